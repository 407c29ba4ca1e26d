"""Triton: what tiles are routed by, in 8-bit floats or as exact as it was (reference: `coarse`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.centres import BLOCK_TOKENS
from hga_compile.kernels.coarse import BLOCK, LARGEST, SINGLES, Coarse, TileKeys
from hga_compile.kernels.rotation import half_rotation

__all__ = ["coarse_codes", "coarse_means", "coarse_queries"]

_LINES = 64
# Lines that a program rounds at a time, and how often: the rotation is read once for all of them.
_ROWS, _TIMES = 64, 8


def _carrier(device: torch.device) -> torch.dtype:
    """Return the dtype that the values are kept in: their own where the GPU multiplies it, else float16."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return torch.float8_e4m3fn
    return torch.float16


def coarse_codes(
    codes: Tensor,
    scales: Tensor,
    groups: int,
    group_size: int,
    bits: int,
    dim: int,
    starts: Tensor | None,
    centres: Tensor | None = None,
) -> TileKeys:
    """Average low-bit keys over groups and over blocks (see `coarse.TileKeys`).

    Parameters
    ----------
    codes, scales : Tensor
        ``[rows, bytes, tokens]`` uint8, bytes innermost in memory, and ``[rows, tokens]`` float16 (see
        `lowbit.encode_keys`).
    groups, group_size, bits, dim : int
        Groups wanted; tokens of a group; bits and channels of a key.
    starts : Tensor or None
        ``[rows]`` int64 on the GPU: first token that blocks are counted from; None: 0.
    centres : Tensor or None
        ``[rows, >= blocks, dim]`` bfloat16, contiguous: what the keys of each block are coded about (see
        `centres`); None: all are coded about one centre.
    """
    rows, tokens = len(codes), groups * group_size
    means = _empty((rows, groups), dim, codes.device)
    anchors = _empty((rows, SINGLES + max(0, tokens - SINGLES) // BLOCK), dim, codes.device)
    for made, size, singles in ((means, group_size, 0), (anchors, BLOCK, SINGLES)):
        count = made.steps.shape[1]
        block = max(1, 64 // size)
        _average_codes[(triton.cdiv(count, block), rows)](
            codes, codes.stride(0), codes.stride(2), scales, scales.stride(0), starts if singles else None,
            made.values, made.steps, count, tokens, centres, 0 if centres is None else centres.stride(0),
            MOVED=BLOCK_TOKENS if centres is not None else 0,
            DIM=dim, PADDED=made.values.shape[-1], BITS=bits, SIZE=size, SINGLES=singles, BLOCK=block,
            LARGEST=LARGEST, num_warps=4,
        )  # fmt: skip
    moved = None
    if centres is not None:
        wanted = triton.cdiv(tokens, BLOCK_TOKENS)
        assert wanted <= centres.shape[1]  # made before codes are
        moved = coarse_means(centres, wanted)
    return TileKeys(means, anchors, codes, scales, bits, dim, centres=moved)


def coarse_means(means: Tensor, groups: int) -> Coarse:
    """Scale means of groups by powers of two, so that half precision holds them as they are.

    Parameters
    ----------
    means : Tensor
        ``[rows, >= groups, dim]``, channels contiguous.
    groups : int
        Groups wanted.

    Returns
    -------
    Coarse
        ``[rows, groups, padded]``.
    """
    rows, _, dim = means.shape
    made = _empty((rows, groups), dim, means.device, torch.float16)
    strides = (means.stride(0), 0, 0, means.stride(1))
    _round_rows[(triton.cdiv(groups, _ROWS), 1, rows)](
        means, *strides, means, made.values, made.steps, 0, 0, groups, groups, 1.0, 1, groups,
        HEADS=1, DIM=dim, PADDED=made.values.shape[-1], COLUMNS=_columns(made), ROWS=_ROWS,
        TIMES=1, TURN=False, LARGEST=LARGEST, num_warps=4, num_stages=1,
    )  # fmt: skip
    return made


def coarse_queries(
    query: Tensor, first: int, tile: int, tiles: int, size: int, scale: float, turn: bool
) -> Coarse:
    """Prepare the queries of a run of tiles, for low-bit keys or for means.

    For low-bit keys they are rotated and rounded to 8-bit floats; for means they are scaled by powers of two,
    which half precision holds but for the last bits of float32.

    Parameters
    ----------
    query : Tensor
        ``[batch, kv_heads, heads, queries, dim]``, channels contiguous.
    first : int
        Position of the first query.
    tile, tiles, size : int
        First tile, counted from position 0, and number of tiles; queries of a tile.
    scale : float
        Softmax scale.
    turn : bool
        Whether the keys are low-bit ones, which are rotated.

    Returns
    -------
    Coarse
        ``[rows, tiles, padded lines, padded]``, a line for each query and head, head innermost; steps for
        powers of two, and not a number for lines without a query.
    """
    batch, kv_heads, heads, queries, dim = query.shape
    rows, lines = batch * kv_heads, triton.cdiv(size * heads, _LINES) * _LINES
    times = min(_TIMES, triton.cdiv(lines, _ROWS))
    made = _empty((rows, tiles, lines), dim, query.device, None if turn else torch.float16)
    _round_rows[(triton.cdiv(lines, _ROWS * times), tiles, rows)](
        query, query.stride(0), query.stride(1), query.stride(2), query.stride(3),
        half_rotation(dim, query.device), made.values, made.steps, first, tile, first + queries, size,
        scale * 1.4426950408889634, kv_heads, lines,
        HEADS=heads, DIM=dim, PADDED=made.values.shape[-1], COLUMNS=_columns(made),
        ROWS=_ROWS, TIMES=times, TURN=turn, LARGEST=LARGEST, num_warps=4, num_stages=1,
    )  # fmt: skip
    return made


def _empty(
    shape: tuple[int, ...], dim: int, device: torch.device, dtype: torch.dtype | None = None
) -> Coarse:
    padded = max(32, triton.next_power_of_2(dim))
    values = torch.empty(*shape, padded, dtype=dtype or _carrier(device), device=device)
    return Coarse(values, torch.empty(shape, dtype=torch.float32, device=device))


def _columns(made: Coarse) -> int:
    """Columns of the rotation that a program holds at a time: 32 KB of them."""
    padded = made.values.shape[-1]
    return min(padded, 2**14 // padded)


@triton.jit
def _eight_bits(x):
    """Round to the nearest float of 4 exponent and 3 mantissa bits, ties to even; none is too large."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2**-6 they are the multiples of 2**-9.
    small = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, small, normal)


@triton.jit(do_not_specialize=["count", "tokens"])
def _average_codes(
    codes, code_row, code_token, scales, scale_row, starts, values, steps, count, tokens, centres, centre_row,
    MOVED: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr,
    SINGLES: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Average runs of SIZE keys, after the first SINGLES ones, which stay as they are."""
    PER_BYTE: tl.constexpr = 8 // BITS
    TOP: tl.constexpr = (2**BITS - 1) / 2
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, PADDED)
    begin = entry * SIZE
    many = tl.full([BLOCK], SIZE, tl.int32)
    if SINGLES > 0:
        begin = tl.where(entry < SINGLES, entry, SINGLES + (entry - SINGLES) * SIZE)
        many = tl.where(entry < SINGLES, 1, SIZE)
    if starts is not None:
        begin += tl.load(starts + row).to(tl.int32)
    mean = tl.zeros([BLOCK, PADDED], tl.float32)
    for member in tl.static_range(SIZE):
        token = tl.minimum(begin + member, tokens - 1).to(tl.int64)
        wanted = (entry < count) & (member < many)
        used = wanted[:, None] & (channel[None, :] < DIM)
        at = codes + row * code_row + token[:, None] * code_token + (channel // PER_BYTE)[None, :]
        packed = tl.load(at, mask=used, other=0).to(tl.int32)
        level = (packed >> (channel % PER_BYTE * BITS)[None, :]) & (2**BITS - 1)
        scale = tl.load(scales + row * scale_row + token, mask=wanted, other=0.0).to(tl.float32)
        mean += tl.where(used, (level.to(tl.float32) - TOP) * scale[:, None], 0.0)
        if MOVED:
            at = centres + row * centre_row + (token // MOVED)[:, None] * DIM + channel[None, :]
            mean += tl.load(at, mask=used, other=0.0).to(tl.float32)
    mean = mean / many.to(tl.float32)[:, None]
    broken = tl.sum(tl.where(tl.abs(mean) < float("inf"), 0, 1), 1) > 0
    peak = tl.max(tl.where(broken[:, None], 0.0, tl.abs(mean)), 1)
    step = tl.where(peak > 0, peak, 1.0) / LARGEST
    value = _eight_bits(tl.where(broken[:, None], 0.0, mean) / step[:, None])
    to = (row * count + entry)[:, None] * PADDED + channel[None, :]
    tl.store(values + to, value.to(values.dtype.element_ty), mask=entry[:, None] < count)
    tl.store(steps + row * count + entry, tl.where(broken, float("nan"), step), mask=entry < count)


@triton.jit
def _turned(vector, matrix, begin, DIM: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr):
    channel = tl.arange(0, PADDED)
    column = begin + tl.arange(0, COLUMNS)
    inside = (channel[:, None] < DIM) & (column[None, :] < DIM)
    rotate = tl.load(matrix + channel[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    return tl.dot(vector.to(tl.float16), rotate)


@triton.jit(do_not_specialize=["first", "tile", "end", "size", "kv_heads", "lines"])
def _round_rows(
    given, stride_batch, stride_row, stride_head, stride_query, matrix, values, steps, first, tile, end, size,
    scale, kv_heads, lines,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    TIMES: tl.constexpr, TURN: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    HELD: tl.constexpr = TURN and COLUMNS == PADDED
    row = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, PADDED)
    if HELD:
        inside = (channel[:, None] < DIM) & (channel[None, :] < DIM)
        rotate = tl.load(matrix + channel[:, None] * DIM + channel[None, :], mask=inside, other=0.0)
    for time in range(TIMES):
        line = (tl.program_id(0) * TIMES + time) * ROWS + tl.arange(0, ROWS)
        wanted = line < lines
        position = (tile + tl.program_id(1)) * size + line // HEADS
        real = (position >= first) & (position < end) & (line < size * HEADS)
        at = given + row // kv_heads * stride_batch + row % kv_heads * stride_row
        at += (line % HEADS).to(tl.int64) * stride_head + (position - first).to(tl.int64) * stride_query
        used = real[:, None] & (channel[None, :] < DIM)
        vector = tl.load(at[:, None] + channel[None, :], mask=used, other=0.0).to(tl.float32)
        peak = tl.max(tl.abs(vector), 1)
        broken = tl.sum(tl.where(tl.abs(vector) < float("inf"), 0, 1), 1) > 0
        base = tl.where((peak > 0) & (broken == 0), peak, 1.0)
        if not TURN:
            # Of the largest magnitude its exponent alone: nothing is rounded.
            base = (base.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            base = tl.maximum(base, 1.1754943508222875e-38)
        # Scaled first: half precision is more than enough for what is rounded to 8 bits.
        vector = tl.where(broken[:, None], 0.0, vector) / base[:, None]
        to = (row * tl.num_programs(1) + tl.program_id(1)) * lines + line
        value_at = values + to[:, None] * PADDED
        if TURN and not HELD:
            # Once for the largest, once for the values.
            largest = tl.zeros([ROWS], tl.float32)
            for part in tl.static_range(PADDED // COLUMNS):
                turned = _turned(vector, matrix, part * COLUMNS, DIM, PADDED, COLUMNS)
                largest = tl.maximum(largest, tl.max(tl.abs(turned), 1))
            step = tl.where(largest > 0, largest, 1.0) / LARGEST
            for part in tl.static_range(PADDED // COLUMNS):
                turned = _turned(vector, matrix, part * COLUMNS, DIM, PADDED, COLUMNS)
                value = _eight_bits(turned / step[:, None]).to(values.dtype.element_ty)
                column = part * COLUMNS + tl.arange(0, COLUMNS)
                tl.store(value_at + column[None, :], value, mask=wanted[:, None])
        else:
            if TURN:
                vector = tl.dot(vector.to(tl.float16), rotate)
                largest = tl.max(tl.abs(vector), 1)
                step = tl.where(largest > 0, largest, 1.0) / LARGEST
                vector = _eight_bits(vector / step[:, None])
            else:
                step = tl.full([ROWS], 1.0, tl.float32)
            value = vector.to(values.dtype.element_ty)
            tl.store(value_at + channel[None, :], value, mask=wanted[:, None])
        step = tl.where(broken | (real == 0), float("nan"), base * step * scale)
        tl.store(steps + to, step, mask=wanted)
