"""Triton: keys to low-bit codes in one pass (reference: `lowbit.encode_keys`)."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.centres import BLOCK_TOKENS
from hga_compile.kernels.launch import Encode, launch_parameters, shape_of
from hga_compile.kernels.overlap import follow, overlap
from hga_compile.kernels.rotation import rotation, signs

__all__ = ["encode"]

# Keys of a step that are encoded at once, and channels of which a program holds the whole rotation.
_FEW, _HELD = 64, 128
# Keys that a program encodes at a time; programs that a large GPU holds, and how often each encodes at most.
_TOKENS, _PROGRAMS, _TIMES = 64, 528, 8
_WARPS, _STAGES = 4, 2
# Of a thread: four programs of 128 threads fit then.
_REGISTERS = 128
# Channels that one product rotates: a larger power of two is put together of two of them.
_PIECE = 64


def encode(
    keys: Tensor,
    centre: Tensor,
    codes: Tensor,
    scales: Tensor,
    begin: int | Tensor,
    bits: int,
    step: float,
    turned: Tensor | None = None,
    centres: Tensor | None = None,
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
    begin : int or Tensor
        Token that the first key is. A tensor, int32 on the GPU, tells the tokens there are with these, first:
        for a few keys.
    bits : int
        1, 2, 4 or 8.
    step : float
        Step between levels in standard deviations.
    turned : Tensor or None
        The centre rotated, ``[rows, dim]`` float32, contiguous; None: is rotated here, if many keys need it.
    centres : Tensor or None
        ``[rows, blocks, dim]`` bfloat16, contiguous: what rotated keys of each block are centred by then (see
        `centres`), those of all these keys; None: by nothing.
    """
    rows, new, dim = keys.shape
    if keys.stride(2) != 1:
        keys = keys.contiguous()
    padded = max(16, triton.next_power_of_2(dim))
    begin, end = (0, begin) if isinstance(begin, Tensor) else (begin, None)
    if end is None and new > _FEW and keys.element_size() == 2 and padded <= _HELD:
        if turned is None:
            turned = centre.float() @ rotation(dim, keys.device)
        _encode_many(keys, turned, codes, scales, begin, bits, step, centres)
        return
    if new == 1 and padded <= _HELD:
        _encode_one[(rows,)](
            keys, keys.stride(0), centre, rotation(dim, keys.device), codes, *codes.stride(), scales,
            scales.stride(0), begin, end, step, centres, _row_stride(centres),
            MOVED=BLOCK_TOKENS if centres is not None else 0, DIM=dim, PADDED=padded, BITS=bits,
            BYTES=triton.cdiv(dim, 8 // bits), num_warps=8, **overlap(keys.device),
        )  # fmt: skip
        return
    launch = launch_parameters(Encode, keys.device, shape_of(new, rows, 0, dim))
    tokens = launch.tokens
    _encode[(triton.cdiv(new, tokens), rows)](
        keys, keys.stride(0), keys.stride(1), centre, rotation(dim, keys.device), codes, *codes.stride(),
        scales, scales.stride(0), new, begin, end, step, centres, _row_stride(centres),
        MOVED=BLOCK_TOKENS if centres is not None else 0, DIM=dim, PADDED=padded, BITS=bits,
        BYTES=triton.cdiv(dim, 8 // bits), TOKENS=tokens, COLUMNS=min(padded, launch.columns),
        num_warps=launch.warps,
    )  # fmt: skip


def _row_stride(centres: Tensor | None) -> int:
    return 0 if centres is None else centres.stride(0)


def _encode_many(
    keys: Tensor,
    turned: Tensor,
    codes: Tensor,
    scales: Tensor,
    begin: int,
    bits: int,
    step: float,
    centres: Tensor | None,
) -> None:
    """Encode many keys of 16 bits: rotated first, by signs alone, which is exact, and centred then."""
    rows, new, dim = keys.shape
    pieces = 2 if dim == 2 * _PIECE else 1
    inner = dim // 2 if pieces == 2 else max(16, triton.next_power_of_2(dim))
    matrix, factors = _columns(dim // pieces, inner, bits, keys.dtype, keys.device)
    tiles = triton.cdiv(new, _TOKENS)
    # Rounded up to a power of two: few kernels to compile.
    times = min(_TIMES, triton.next_power_of_2(triton.cdiv(tiles * rows, _PROGRAMS)))
    _encode_rows[(triton.cdiv(tiles, times), rows)](
        keys, keys.stride(0), keys.stride(1), turned, matrix, factors, codes, *codes.stride(), scales,
        scales.stride(0), new, begin, step, centres, _row_stride(centres),
        MOVED=BLOCK_TOKENS if centres is not None else 0, ALIKE=begin % _TOKENS == 0, DIM=dim, INNER=inner,
        PIECES=pieces, BITS=bits, BYTES=triton.cdiv(dim, 8 // bits), TOKENS=_TOKENS, TIMES=times,
        STAGES=_STAGES, num_warps=_WARPS, maxnreg=_REGISTERS if pieces == 2 else None,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _columns(
    dim: int, inner: int, bits: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `signs` of `inner` channels, zeros after `dim`, with columns by their place in a byte first."""
    matrix, factors = signs(dim, dtype, device)
    wide, factor = matrix.new_zeros(inner, inner), factors.new_zeros(inner)
    wide[:dim, :dim], factor[:dim] = matrix, factors
    order = torch.arange(inner, device=device).view(-1, 8 // bits).t().flatten()
    return wide[:, order].contiguous(), factor[order].contiguous()


@triton.jit(do_not_specialize=["new", "begin"])
def _encode_rows(
    keys, key_row, key_token, centre, matrix, factors, codes, code_row, code_byte, code_token, scales,
    scale_row, new, begin, step, centres, centre_row,
    MOVED: tl.constexpr, ALIKE: tl.constexpr, DIM: tl.constexpr, INNER: tl.constexpr, PIECES: tl.constexpr,
    BITS: tl.constexpr, BYTES: tl.constexpr, TOKENS: tl.constexpr, TIMES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = INNER // PER_BYTE
    SIZE: tl.constexpr = INNER * PIECES
    LEVELS: tl.constexpr = 2**BITS
    # Added to a number of at most 22 bits, it rounds to whole ones; a half goes up to the upper middle level.
    WHOLE: tl.constexpr = 2.0**23 + LEVELS // 2 % 2
    # Keeps what is summed of huge keys finite: what is not comes of a key that is not.
    SMALL: tl.constexpr = 2.0**-20
    # Of two pieces of a row, the upper half of the rotation's columns is their difference.
    HALF: tl.constexpr = 0.5**0.5 if PIECES == 2 else 1.0
    row = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, INNER)
    byte = tl.arange(0, SIZE // PER_BYTE)
    # A column's channel: first ones of a byte come first, so that a thread has all the levels of its bytes.
    channel = inner % WIDTH * PER_BYTE + inner // WIDTH
    rotate = tl.load(matrix + inner[:, None] * INNER + inner[None, :])
    # [INNER, PIECES], of channels in the order of the columns.
    piece = tl.arange(0, PIECES) * INNER + channel[:, None]
    middle = tl.load(centre + row * DIM + piece, mask=piece < DIM, other=0.0) * SMALL
    middle = tl.reshape(middle, [1, INNER, PIECES])
    if SIZE == DIM:
        factor = tl.load(factors) * (HALF * SMALL)
    else:
        factor = tl.reshape(tl.load(factors + inner) * SMALL, [1, INNER, 1])
    place = tl.exp2((tl.arange(0, PER_BYTE) * BITS).to(tl.float32))
    for time in tl.range(0, TIMES, num_stages=STAGES):
        token = (tl.program_id(0) * TIMES + time) * TOKENS + tl.arange(0, TOKENS)
        # Loads with a mask are slower than those of the last key again and again.
        at = keys + row * key_row + tl.minimum(token, new - 1)[:, None].to(tl.int64) * key_token
        at += inner[None, :]
        if SIZE == DIM:
            turned = tl.dot(tl.load(at), rotate)
        else:
            turned = tl.dot(tl.load(at, mask=inner[None, :] < DIM, other=0.0), rotate)
        if PIECES == 2:
            second = tl.dot(tl.load(at + INNER), rotate)
            turned = tl.join(turned + second, turned - second)
        turned = tl.reshape(turned, [TOKENS, INNER, PIECES]) * factor - middle
        if MOVED and ALIKE:
            # All tokens of a tile are of one block.
            number = tl.minimum(begin + (tl.program_id(0) * TIMES + time) * TOKENS, begin + new - 1) // MOVED
            at_centre = centres + row * centre_row + number.to(tl.int64) * DIM + piece
            moved = tl.load(at_centre, mask=piece < DIM, other=0.0).to(tl.float32) * SMALL
            turned -= tl.reshape(moved, [1, INNER, PIECES])
        elif MOVED:
            number = (begin + tl.minimum(token, new - 1)) // MOVED
            of_piece = tl.reshape(piece, [1, INNER, PIECES])
            at_centre = centres + row * centre_row + tl.reshape(number, [TOKENS, 1, 1]).to(tl.int64) * DIM
            moved = tl.load(at_centre + of_piece, mask=of_piece < DIM, other=0.0).to(tl.float32)
            turned -= moved * SMALL
        square = tl.sum(tl.reshape(turned * turned, [TOKENS, SIZE]), 1)
        start = tl.sqrt(square) * (step * (LEVELS - 1) / DIM**0.5)
        slope = 1 / tl.where(start > 0, start, 1.0)
        share = tl.clamp(turned * tl.reshape(slope, [TOKENS, 1, 1]) + 0.5, 0.0, 1.0)
        level = (share * (LEVELS - 1.0) + WHOLE) - WHOLE
        value = level - (LEVELS - 1.0) / 2
        if SIZE != DIM:
            held = tl.reshape(channel < DIM, [1, INNER, 1])
            level, value = tl.where(held, level, 0.0), tl.where(held, value, 0.0)
        products = tl.sum(tl.reshape(turned * value, [TOKENS, SIZE]), 1)
        scale = products / SMALL / tl.sum(tl.reshape(value * value, [TOKENS, SIZE]), 1)
        scale = tl.where(scale > 65504.0, 65504.0, scale)
        # A key that is not a number gives a scale that is none, whatever its codes; a huge one does not.
        scale = tl.where(tl.abs(products) < float("inf"), scale, float("nan"))
        level = tl.reshape(level, [TOKENS, PER_BYTE, WIDTH, PIECES])
        packed = tl.sum(level * tl.reshape(place, [1, PER_BYTE, 1, 1]), 1)
        packed = (packed + 2.0**23).to(tl.int32, bitcast=True).to(tl.uint8)
        packed = tl.reshape(tl.permute(packed, [0, 2, 1]), [TOKENS, SIZE // PER_BYTE])
        to = codes + row * code_row + (begin + token[:, None]).to(tl.int64) * code_token
        wanted = (token[:, None] < new) & (byte[None, :] < BYTES)
        tl.store(to + byte[None, :].to(tl.int64) * code_byte, packed, mask=wanted)
        tl.store(scales + row * scale_row + begin + token, scale.to(tl.float16), mask=token < new)


@triton.jit(do_not_specialize=["new", "begin"])
def _encode(
    keys, key_row, key_token, centre, matrix, codes, code_row, code_byte, code_token, scales, scale_row, new,
    begin, end, step, centres, centre_row,
    MOVED: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // BITS
    TOP: tl.constexpr = (2**BITS - 1) / 2
    row = tl.program_id(1).to(tl.int64)
    if end is not None:
        begin = tl.load(end) - new
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, PADDED)
    used = (token[:, None] < new) & (channel[None, :] < DIM)
    at = keys + row * key_row + token[:, None].to(tl.int64) * key_token + channel[None, :]
    key = tl.load(at, mask=used, other=0.0).to(tl.float32)
    # A key that is not a number gives a scale that is none, whatever its codes; a huge one does not.
    broken = tl.sum(tl.where(tl.abs(key) < float("inf"), 0, 1), 1) > 0
    middle = tl.load(centre + row * DIM + channel, mask=channel < DIM, other=0.0)
    key = tl.where(used, key - middle[None, :], 0.0)
    if MOVED:
        block = (begin + token) // MOVED
        at_centre = centres + row * centre_row + block[:, None].to(tl.int64) * DIM
        length = tl.zeros([TOKENS], tl.float32)
        for part in tl.static_range(PADDED // COLUMNS):
            column = part * COLUMNS + tl.arange(0, COLUMNS)
            inside = (channel[:, None] < DIM) & (column[None, :] < DIM)
            rotate = tl.load(matrix + channel[:, None] * DIM + column[None, :], mask=inside, other=0.0)
            turned = tl.dot(key, rotate, input_precision="tf32x3")
            wanted = (token[:, None] < new) & (column[None, :] < DIM)
            turned -= tl.load(at_centre + column[None, :], mask=wanted, other=0.0).to(tl.float32)
            length += tl.sum(turned * turned, 1)
    else:
        # The rotation does not change the length.
        length = tl.sum(key * key, 1)
    start = tl.sqrt(length / DIM) * step
    start = tl.where(start > 0, start, 1.0)
    products = tl.zeros([TOKENS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    to = codes + row * code_row + (begin + token[:, None]).to(tl.int64) * code_token
    for part in tl.static_range(PADDED // COLUMNS):
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        inside = (channel[:, None] < DIM) & (column[None, :] < DIM)
        rotate = tl.load(matrix + channel[:, None] * DIM + column[None, :], mask=inside, other=0.0)
        turned = tl.dot(key, rotate, input_precision="tf32x3")
        if MOVED:
            wanted = (token[:, None] < new) & (column[None, :] < DIM)
            turned -= tl.load(at_centre + column[None, :], mask=wanted, other=0.0).to(tl.float32)
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


@triton.jit(do_not_specialize=["begin"])
def _encode_one(
    keys, key_row, centre, matrix, codes, code_row, code_byte, code_token, scales, scale_row, begin, end,
    step, centres, centre_row,
    MOVED: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Encode one key of a row as `_encode` does, with the whole rotation there before the key is."""
    PER_BYTE: tl.constexpr = 8 // BITS
    TOP: tl.constexpr = (2**BITS - 1) / 2
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PADDED)
    inside = (channel[:, None] < DIM) & (channel[None, :] < DIM)
    rotate = tl.load(matrix + channel[:, None] * DIM + channel[None, :], mask=inside, other=0.0)
    follow(EARLY)
    if end is not None:
        begin = tl.load(end) - 1
    used = channel < DIM
    key = tl.load(keys + row * key_row + channel, mask=used, other=0.0).to(tl.float32)
    # A key that is not a number gives a scale that is none, whatever its codes; a huge one does not.
    broken = tl.sum(tl.where(tl.abs(key) < float("inf"), 0, 1), 0) > 0
    key -= tl.load(centre + row * DIM + channel, mask=used, other=0.0)
    turned = tl.sum(key[:, None] * rotate, 0)
    if MOVED:
        at_centre = centres + row * centre_row + (begin // MOVED).to(tl.int64) * DIM + channel
        turned -= tl.load(at_centre, mask=used, other=0.0).to(tl.float32)
        length = tl.sum(turned * turned, 0)
    else:
        # The rotation does not change the length.
        length = tl.sum(key * key, 0)
    start = tl.sqrt(length / DIM) * step
    start = tl.where(start > 0, start, 1.0)
    index = tl.floor(turned / start + 2**BITS / 2)
    index = tl.minimum(tl.maximum(index, 0.0), 2.0**BITS - 1)
    value = tl.where(used, index - TOP, 0.0)
    scale = tl.sum(turned * value, 0) / tl.sum(value * value, 0)
    level = tl.where(used & (index == index), index, 0.0).to(tl.int32) << (channel % PER_BYTE * BITS)
    packed = tl.sum(tl.reshape(level, [PADDED // PER_BYTE, PER_BYTE]), 1)
    byte = tl.arange(0, PADDED // PER_BYTE)
    token = tl.zeros([1], tl.int64) + begin
    to = codes + row * code_row + token * code_token + byte.to(tl.int64) * code_byte
    tl.store(to, packed.to(tl.uint8), mask=byte < BYTES)
    scale = tl.where(scale > 65504.0, 65504.0, scale)
    scale = tl.where(broken, float("nan"), scale)
    tl.store(scales + row * scale_row + token, (tl.zeros([1], tl.float32) + scale).to(tl.float16))
