"""Triton: keys to low-bit codes in one pass (reference: `lowbit.encode_keys`)."""

import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.launch import Encode, launch_parameters, shape_of
from hga_compile.kernels.rotation import rotation

__all__ = ["encode"]


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
    launch = launch_parameters(Encode, keys.device, shape_of(new, rows, 0, dim))
    tokens = launch.tokens
    _encode[(triton.cdiv(new, tokens), rows)](
        keys, keys.stride(0), keys.stride(1), centre, rotation(dim, keys.device), codes, *codes.stride(),
        scales, scales.stride(0), new, begin, step,
        DIM=dim, PADDED=padded, BITS=bits, BYTES=triton.cdiv(dim, 8 // bits), TOKENS=tokens,
        COLUMNS=min(padded, launch.columns), num_warps=launch.warps,
    )  # fmt: skip


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
