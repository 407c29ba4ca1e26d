"""Triton: what `triton_tile_attend` does, with a tail estimate (reference: `tail.attend_masked_with_tail`).

The chunks' expansions differ from one query head to the next, so that a program has queries of one head. It
adds up the chunks first; then each listed token is added with its score, and taken out with its chunk's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.tail import TailSummary

__all__ = ["attend_tiles_with_tail"]

# Queries and tokens that a program takes at a time, and its warps: of 64 channels, of 128 and of 256.
_SHAPES = {
    False: ((64, 32, 4), (32, 32, 8), (16, 16, 4)),
    True: ((32, 16, 4), (16, 16, 8), (16, 16, 8)),
}


def attend_tiles_with_tail(
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    spans: Tensor,
    query: Tensor,
    out: Tensor,
    tail: TailSummary,
    *,
    first: int,
    tile: int,
    tiles: int,
    size: int,
    group_size: int,
    scale: float,
    rows_of_span: int,
    first_row: int = 0,
) -> None:
    """Attend to listed groups exactly and to the rest of the complete chunks before the window by estimates.

    Parameters
    ----------
    key, value, chosen, spans, query, out, first, tile, tiles, size, group_size, scale, rows_of_span
        As `triton_tile_attend.attend_tiles` takes them.
    tail : TailSummary
        Expansions of at least one chunk.
    first_row
        As there too.
    """
    batch, kv_heads, heads, queries, dim = query.shape
    rows, v_dim = batch * kv_heads, value.shape[2]
    padded, v_padded = max(16, triton.next_power_of_2(dim)), max(16, triton.next_power_of_2(v_dim))
    exact = query.dtype == torch.float32
    # As many lines as the registers hold.
    lines, block, warps = _SHAPES[exact][min(2, max(padded, v_padded) // 128)]
    far = key.shape[1] * max(key.stride(1), value.stride(1)) >= 2**31
    strides = (*query.stride()[:4], *key.stride()[:2], *value.stride()[:2], *out.stride()[:4])
    _attend[(tiles * triton.cdiv(size, lines) * heads, key.shape[0])](
        key, value, chosen, spans, query, out, tail.mean_query.contiguous(), tail.log_mass, tail.key,
        tail.value, tail.log_mass.stride(1), tail.key.stride(1), tail.value.stride(1), *strides,
        chosen.shape[1], first, first + queries, tile, tiles, size, scale, kv_heads, rows,
        first_row, rows_of_span, min(tail.chunks, key.shape[1] // tail.chunk_size),
        SPAN=spans.shape[1], HEADS=heads, DIM=dim, V_DIM=v_dim, PADDED=padded, V_PADDED=v_padded,
        GROUP=group_size, CHUNK=tail.chunk_size, LINES=lines, BLOCK=block,
        PRECISION="tf32x3" if exact else "tf32", FAR=far, num_warps=warps, num_stages=1,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "width", "first", "end", "tile", "tiles", "size", "rows", "first_row", "rows_of_span", "chunks",
        "mass_head",
    ]
)  # fmt: skip
def _attend(
    keys, values, chosen, spans, queries, out, mean, log_mass, tail_keys, tail_values,
    mass_head, tail_key_head, tail_value_head,
    query_batch, query_row, query_head, query_token, key_row, key_token, value_row, value_token,
    out_batch, out_row, out_head, out_token,
    width, first, end, tile, tiles, size, scale, kv_heads, rows, first_row, rows_of_span, chunks,
    SPAN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, LINES: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    parts = tl.cdiv(size, LINES)
    # The last tiles attend to the most: they begin first.
    number = tiles - 1 - tl.program_id(0) // (parts * HEADS)
    # K/V are of some rows, all else of every row.
    part = tl.program_id(1).to(tl.int64)
    row = first_row + part
    place = number * rows + row
    span = spans + place // rows_of_span * SPAN
    sink_start, window, last = tl.load(span), tl.load(span + 2), tl.load(span + 4)
    listed = tl.load(span + 1) - sink_start + tl.load(span + 3) + last - window
    start = tl.load(span + 5)
    head = tl.program_id(0) % HEADS
    own = row * HEADS + head
    line = tl.program_id(0) // HEADS % parts * LINES + tl.arange(0, LINES)
    position = (tile + number) * size + line
    real = (line < size) & (position >= first) & (position < end)
    batch, kv_head = row // kv_heads, row % kv_heads
    channel, v_channel = tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    from_query = queries + batch * query_batch + kv_head * query_row + head.to(tl.int64) * query_head
    from_query += (position - first).to(tl.int64) * query_token
    asked = tl.load(
        from_query[:, None] + channel[None, :], mask=real[:, None] & (channel[None, :] < DIM), other=0.0
    )
    middle = tl.load(mean + own * DIM + channel, mask=channel < DIM, other=0.0)
    about = asked.to(tl.float32) * scale - middle[None, :]
    peak = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    rest = tl.zeros([LINES], tl.float32)
    result = tl.zeros([LINES, V_PADDED], tl.float32)
    entry = tl.arange(0, BLOCK)
    of_log_mass = log_mass + own * mass_head
    of_tail_keys, of_tail_values = tail_keys + own * tail_key_head, tail_values + own * tail_value_head
    low, high = tl.cdiv(start, CHUNK), tl.minimum(chunks, tl.cdiv(window * GROUP, CHUNK))
    # Where everything is listed nothing is estimated.
    high = tl.where(listed == last - sink_start, 0, high)
    for begin in tl.range(low, high, BLOCK):
        chunk = begin + entry
        there = chunk < high
        from_tail = of_tail_keys + chunk[:, None].to(tl.int64) * DIM + channel[None, :]
        expanded = tl.load(from_tail, mask=there[:, None] & (channel[None, :] < DIM), other=0.0)
        from_value = of_tail_values + chunk[:, None].to(tl.int64) * V_DIM + v_channel[None, :]
        value = tl.load(from_value, mask=there[:, None] & (v_channel[None, :] < V_DIM), other=0.0)
        score = tl.dot(about, tl.trans(expanded), input_precision=PRECISION)
        score = (score + tl.load(of_log_mass + chunk, mask=there, other=0.0)[None, :]) * LOG2E
        counted = there[None, :] & ((chunk[None, :] + 1) * CHUNK <= position[:, None] + 1)
        score = tl.where(counted, score, float("-inf"))
        most = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(peak - base)
        rest = rest * shrink + tl.sum(weight, 1)
        result = tl.dot(weight, value, result * shrink[:, None], input_precision=PRECISION)
        peak = most
    mine = chosen + place * width
    of_keys, of_values = keys + part * key_row, values + part * value_row
    for begin in tl.range(0, listed * GROUP, BLOCK):
        which = (begin + entry) // GROUP
        group = tl.load(mine + which, mask=which < listed, other=0)
        token = group * GROUP + entry % GROUP
        seen = (which < listed) & (token >= start) & (token < end)
        # What is not seen is read all the same, from a place that is.
        here = tl.minimum(tl.maximum(token, start), end - 1)
        chunk = tl.minimum(here // CHUNK, chunks - 1).to(tl.int64)
        there = seen & (token // CHUNK >= low) & (token // CHUNK < high)
        if FAR:
            here = here.to(tl.int64)
        from_key = of_keys + here[:, None] * key_token + channel[None, :]
        key = tl.load(from_key, mask=channel[None, :] < DIM, other=0.0)
        from_value = of_values + here[:, None] * value_token + v_channel[None, :]
        value = tl.load(from_value, mask=v_channel[None, :] < V_DIM, other=0.0)
        from_tail = of_tail_keys + chunk[:, None] * DIM + channel[None, :]
        expanded = tl.load(from_tail, mask=there[:, None] & (channel[None, :] < DIM), other=0.0)
        score = tl.dot(asked, tl.trans(key), input_precision=PRECISION)
        score = score * (scale * LOG2E)
        late = tl.where(seen, token, 2147483647)
        score = tl.where(late[None, :] <= position[:, None], score, float("-inf"))
        again = tl.dot(about, tl.trans(expanded), input_precision=PRECISION)
        again = (again + tl.sum(key.to(tl.float32) * middle[None, :], 1)[None, :]) * LOG2E
        counted = there[None, :] & ((token[None, :] // CHUNK + 1) * CHUNK <= position[:, None] + 1)
        again = tl.where(counted, again, float("-inf"))
        most = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(most == float("-inf"), 0.0, most)
        weight, again = tl.exp2(score - base[:, None]), tl.exp2(again - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weight, 1)
        rest = rest * shrink - tl.sum(again, 1)
        # What is taken out may all but cancel what was added: both in float32, or tf32.
        value = value.to(tl.float32)
        result = tl.dot(weight - again, value, result * shrink[:, None], input_precision=PRECISION)
        peak = most
    # Rounding must not make what is left of the chunks negative.
    total += tl.maximum(rest, 0.0)
    result = result / tl.where(total == 0, 1.0, total)[:, None]
    to = out + batch * out_batch + kv_head * out_row + head.to(tl.int64) * out_head
    to += (position - first).to(tl.int64) * out_token
    # A query that is padding itself sees nothing.
    result = tl.where((position >= start)[:, None], result, 0.0)
    tl.store(
        to[:, None] + v_channel[None, :], result.to(out.dtype.element_ty),
        mask=real[:, None] & (v_channel[None, :] < V_DIM),
    )  # fmt: skip
