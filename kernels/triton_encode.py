"""Triton: keys to low-bit codes in one pass (reference: `lowbit.encode_keys`)."""

import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.launch import Encode, launch_parameters, shape_of
from hga_compile.kernels.rotation import rotation, signs

__all__ = ["encode"]

# Keys of a step that are encoded at once, and channels of which a program holds the whole rotation.
_FEW, _HELD = 64, 128
# Keys that a program encodes at a time, and how often: the rotation is read once for all of them.
_TOKENS, _TIMES = 64, 4


def encode(
    keys: Tensor, centre: Tensor, codes: Tensor, scales: Tensor, begin: int, bits: int, step: float
) -> None:
    """Centre, rotate and round keys, and write their codes and scales.

    Parameters
    ----------
    keys : Tensor
        ``[rows, n, dim]``, channels contiguous.
    centre : Tensor
        ``[rows, dim]`` float32.
    codes : Tensor
        ``[rows, bytes, tokens]`` uint8, written from token `begin` on (see `lowbit.encode_keys`).
    scales : Tensor
        ``[rows, tokens]`` float16, likewise.
    begin : int
        Token that the first key is.
    bits : int
        1, 2, 4 or 8.
    step : float
        Step between levels in standard deviations.
    """
    rows, new, dim = keys.shape
    if keys.stride(2) != 1:
        keys = keys.contiguous()
    padded = max(16, triton.next_power_of_2(dim))
    if new > _FEW and keys.element_size() == 2 and padded <= _HELD:
        _encode_many(keys, centre, codes, scales, begin, bits, step, padded)
        return
    launch = launch_parameters(Encode, keys.device, shape_of(new, rows, 0, dim))
    tokens = launch.tokens
    _encode[(triton.cdiv(new, tokens), rows)](
        keys, keys.stride(0), keys.stride(1), centre, rotation(dim, keys.device), codes, *codes.stride(),
        scales, scales.stride(0), new, begin, step,
        DIM=dim, PADDED=padded, BITS=bits, BYTES=triton.cdiv(dim, 8 // bits), TOKENS=tokens,
        COLUMNS=min(padded, launch.columns), num_warps=launch.warps,
    )  # fmt: skip


def _encode_many(
    keys: Tensor,
    centre: Tensor,
    codes: Tensor,
    scales: Tensor,
    begin: int,
    bits: int,
    step: float,
    padded: int,
) -> None:
    """Encode many keys of 16 bits: rotated first, by signs alone, which is exact, and centred then."""
    rows, new, dim = keys.shape
    matrix, factors = signs(dim, keys.dtype, keys.device)
    middle = centre @ rotation(dim, keys.device)
    _encode_rows[(triton.cdiv(new, _TOKENS * _TIMES), rows)](
        keys, keys.stride(0), keys.stride(1), middle, matrix, factors, codes, *codes.stride(), scales,
        scales.stride(0), new, begin, step,
        DIM=dim, PADDED=padded, BITS=bits, BYTES=triton.cdiv(dim, 8 // bits), TOKENS=_TOKENS, TIMES=_TIMES,
        num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["new", "begin"])
def _encode_rows(
    keys, key_row, key_token, centre, matrix, factors, codes, code_row, code_byte, code_token, scales,
    scale_row, new, begin, step,
    DIM: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, TOKENS: tl.constexpr,
    TIMES: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // BITS
    TOP: tl.constexpr = (2**BITS - 1) / 2
    row = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, PADDED)
    byte = tl.arange(0, PADDED // PER_BYTE)
    inside = (channel[:, None] < DIM) & (channel[None, :] < DIM)
    rotate = tl.load(matrix + channel[:, None] * DIM + channel[None, :], mask=inside, other=0.0)
    factor = tl.load(factors + channel, mask=channel < DIM, other=0.0)
    middle = tl.load(centre + row * DIM + channel, mask=channel < DIM, other=0.0)
    for time in range(TIMES):
        token = (tl.program_id(0) * TIMES + time) * TOKENS + tl.arange(0, TOKENS)
        used = (token[:, None] < new) & (channel[None, :] < DIM)
        at = keys + row * key_row + token[:, None].to(tl.int64) * key_token + channel[None, :]
        key = tl.load(at, mask=used, other=0.0)
        # A key that is not a number gives a scale that is none, whatever its codes; a huge one does not.
        broken = tl.sum(tl.where(tl.abs(key.to(tl.float32)) < float("inf"), 0, 1), 1) > 0
        turned = tl.dot(key, rotate) * factor[None, :] - middle[None, :]
        start = tl.sqrt(tl.sum(turned * turned, 1) / DIM) * step
        start = tl.where(start > 0, start, 1.0)
        index = tl.floor(turned / start[:, None] + 2**BITS / 2)
        index = tl.minimum(tl.maximum(index, 0.0), 2.0**BITS - 1)
        value = tl.where(channel[None, :] < DIM, index - TOP, 0.0)
        scale = tl.sum(turned * value, 1) / tl.sum(value * value, 1)
        scale = tl.where(scale > 65504.0, 65504.0, scale)
        scale = tl.where(broken, float("nan"), scale)
        level = tl.where((channel[None, :] < DIM) & (index == index), index, 0.0).to(tl.int32)
        level = level << (channel % PER_BYTE * BITS)[None, :]
        packed = tl.sum(tl.reshape(level, [TOKENS, PADDED // PER_BYTE, PER_BYTE]), 2)
        to = codes + row * code_row + (begin + token[:, None]).to(tl.int64) * code_token
        wanted = (token[:, None] < new) & (byte[None, :] < BYTES)
        tl.store(to + byte[None, :].to(tl.int64) * code_byte, packed.to(tl.uint8), mask=wanted)
        tl.store(scales + row * scale_row + begin + token, scale.to(tl.float16), mask=token < new)


@triton.jit(do_not_specialize=["new", "begin"])
def _encode(
    keys, key_row, key_token, centre, matrix, codes, code_row, code_byte, code_token, scales, scale_row, new,
    begin, step,
    DIM: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // BITS
    TOP: tl.constexpr = (2**BITS - 1) / 2
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, PADDED)
    used = (token[:, None] < new) & (channel[None, :] < DIM)
    at = keys + row * key_row + token[:, None].to(tl.int64) * key_token + channel[None, :]
    key = tl.load(at, mask=used, other=0.0).to(tl.float32)
    # A key that is not a number gives a scale that is none, whatever its codes; a huge one does not.
    broken = tl.sum(tl.where(tl.abs(key) < float("inf"), 0, 1), 1) > 0
    middle = tl.load(centre + row * DIM + channel, mask=channel < DIM, other=0.0)
    key = tl.where(used, key - middle[None, :], 0.0)
    # The rotation does not change the length.
    start = tl.sqrt(tl.sum(key * key, 1) / DIM) * step
    start = tl.where(start > 0, start, 1.0)
    products = tl.zeros([TOKENS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    to = codes + row * code_row + (begin + token[:, None]).to(tl.int64) * code_token
    for part in tl.static_range(PADDED // COLUMNS):
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        inside = (channel[:, None] < DIM) & (column[None, :] < DIM)
        rotate = tl.load(matrix + channel[:, None] * DIM + column[None, :], mask=inside, other=0.0)
        turned = tl.dot(key, rotate, input_precision="tf32x3")
        index = tl.floor(turned / start[:, None] + 2**BITS / 2)
        index = tl.minimum(tl.maximum(index, 0.0), 2.0**BITS - 1)
        value = tl.where(column[None, :] < DIM, index - TOP, 0.0)
        products += tl.sum(turned * value, 1)
        squares += tl.sum(value * value, 1)
        level = tl.where((column[None, :] < DIM) & (index == index), index, 0.0).to(tl.int32)
        level = level << (column % PER_BYTE * BITS)[None, :]
        packed = tl.sum(tl.reshape(level, [TOKENS, COLUMNS // PER_BYTE, PER_BYTE]), 2)
        byte = part * (COLUMNS // PER_BYTE) + tl.arange(0, COLUMNS // PER_BYTE)
        wanted = (token[:, None] < new) & (byte[None, :] < BYTES)
        tl.store(to + byte[None, :].to(tl.int64) * code_byte, packed.to(tl.uint8), mask=wanted)
    scale = products / squares
    scale = tl.where(scale > 65504.0, 65504.0, scale)
    scale = tl.where(broken, float("nan"), scale)
    tl.store(scales + row * scale_row + begin + token, scale.to(tl.float16), mask=token < new)
