"""Triton: exact attention of tiles of queries to listed groups (reference: `attend.attend_masked`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attend_tiles"]


def attend_tiles(
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    spans: Tensor,
    query: Tensor,
    out: Tensor,
    logits: Tensor | None,
    *,
    first: int,
    tile: int,
    tiles: int,
    size: int,
    group_size: int,
    scale: float,
    softcap: float,
    rows_of_span: int,
    first_row: int = 0,
) -> None:
    """Attend from each query to the tokens of its tile's groups that are not after it.

    Parameters
    ----------
    key, value : Tensor
        ``[rows, tokens, dim]`` and ``[rows, tokens, v_dim]``, channels contiguous, in GPU memory or pinned.
    chosen : Tensor
        ``[tiles * rows, width]`` int32, from `triton_select.select_groups`.
    spans : Tensor
        ``[tiles * lines of a tile, SPAN]`` int32 (see `gpu.Spans`), those of the first tile first.
    query : Tensor
        ``[batch, kv_heads, heads, queries, dim]``, channels contiguous, dtype of the keys.
    out : Tensor
        ``[batch, kv_heads, heads, queries, v_dim]``, channels contiguous; the queries of these tiles are
        written, with 0 for a query without a token.
    logits : Tensor or None
        ``[kv_heads * heads]`` float32: attention sinks (see `scoring.Scoring`).
    first : int
        Position of the first query.
    tile, tiles, size : int
        First tile, counted from position 0, and number of tiles; queries of a tile.
    group_size : int
        Tokens of a group, a power of two.
    scale, softcap : float
        Softmax scale; soft-cap of the scores, 0: none.
    rows_of_span : int
        Rows that a line of `spans` is for.
    first_row : int
        Row that `key` and `value` begin with; they may be of some rows, which are attended from then.
    """
    batch, kv_heads, heads, queries, dim = query.shape
    rows, v_dim = batch * kv_heads, value.shape[2]
    padded, v_padded = max(16, triton.next_power_of_2(dim)), max(16, triton.next_power_of_2(v_dim))
    wide, exact = max(padded, v_padded) > 128, query.dtype == torch.float32
    lines = 64
    # Offsets within a row in 32 bits where they fit: half of the registers that they take.
    far = key.shape[1] * max(key.stride(1), value.stride(1)) >= 2**31
    strides = (*query.stride()[:4], *key.stride()[:2], *value.stride()[:2], *out.stride()[:4])
    _attend[(tiles * triton.cdiv(size * heads, lines), key.shape[0])](
        key, value, chosen, spans, query, out, logits, *strides, chosen.shape[1], first, first + queries,
        tile, tiles, size, scale, softcap, kv_heads, rows, first_row, rows_of_span,
        SPAN=spans.shape[1], HEADS=heads, DIM=dim, V_DIM=v_dim, PADDED=padded, V_PADDED=v_padded,
        GROUP=group_size, LINES=lines, TOKENS=32, SOFTCAP=softcap > 0, SINKS=logits is not None,
        EXACT=exact, FAR=far, STAGES=4 - wide, num_warps=8 if wide else 4,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["width", "first", "end", "tile", "tiles", "size", "rows", "first_row", "rows_of_span"]
)
def _attend(
    keys, values, chosen, spans, queries, out, logits,
    query_batch, query_row, query_head, query_token, key_row, key_token, value_row, value_token,
    out_batch, out_row, out_head, out_token,
    width, first, end, tile, tiles, size, scale, softcap, kv_heads, rows, first_row, rows_of_span,
    SPAN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, GROUP: tl.constexpr, LINES: tl.constexpr, TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, EXACT: tl.constexpr, FAR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    parts = tl.cdiv(size * HEADS, LINES)
    # The last tiles attend to the most: they begin first.
    number = tiles - 1 - tl.program_id(0) // parts
    # K/V are of some rows, all else of every row.
    part = tl.program_id(1).to(tl.int64)
    row = first_row + part
    place = number * rows + row
    span = spans + place // rows_of_span * SPAN
    listed = tl.load(span + 1) - tl.load(span) + tl.load(span + 3) + tl.load(span + 4) - tl.load(span + 2)
    start = tl.load(span + 5)
    line = tl.program_id(0) % parts * LINES + tl.arange(0, LINES)
    position = (tile + number) * size + line // HEADS
    real = (line < size * HEADS) & (position >= first) & (position < end)
    head = line % HEADS
    batch, kv_head = row // kv_heads, row % kv_heads
    channel, v_channel = tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    at = queries + batch * query_batch + kv_head * query_row
    at += head.to(tl.int64) * query_head + (position - first).to(tl.int64) * query_token
    asked = tl.load(at[:, None] + channel[None, :], mask=real[:, None] & (channel[None, :] < DIM), other=0.0)
    peak = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    if SINKS:
        peak = tl.load(logits + kv_head * HEADS + head) * LOG2E
        total += 1.0
    result = tl.zeros([LINES, V_PADDED], tl.float32)
    entry = tl.arange(0, TOKENS)
    mine = chosen + place * width
    of_keys, of_values = keys + part * key_row, values + part * value_row
    for begin in tl.range(0, listed * GROUP, TOKENS, num_stages=STAGES):
        which = (begin + entry) // GROUP
        group = tl.load(mine + which, mask=which < listed, other=0)
        token = group * GROUP + entry % GROUP
        seen = (which < listed) & (token >= start) & (token < end)
        # What is not seen is read all the same, from a place that is: masks would cost more.
        here = tl.minimum(tl.maximum(token, start), end - 1)[:, None]
        if FAR:
            here = here.to(tl.int64)
        key_at, value_at = of_keys + here * key_token, of_values + here * value_token
        if PADDED == DIM:
            key = tl.load(key_at + channel[None, :])
        else:
            key = tl.load(key_at + channel[None, :], mask=channel[None, :] < DIM, other=0.0)
        if V_PADDED == V_DIM:
            value = tl.load(value_at + v_channel[None, :])
        else:
            value = tl.load(value_at + v_channel[None, :], mask=v_channel[None, :] < V_DIM, other=0.0)
        if EXACT:
            score = tl.dot(asked, tl.trans(key), input_precision="tf32x3")
        else:
            score = tl.dot(asked, tl.trans(key))
        if SOFTCAP:
            score = score * scale
            # tanh by exp: exact enough, and defined for every score.
            score = softcap * (1 - 2 / (1 + tl.exp(score * (2 / softcap)))) * LOG2E
        else:
            score = score * (scale * LOG2E)
        token = tl.where(seen, token, 2147483647)
        score = tl.where(token[None, :] <= position[:, None], score, float("-inf"))
        most = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weight, 1)
        result = result * shrink[:, None]
        if EXACT:
            result = tl.dot(weight, value, result, input_precision="tf32x3")
        else:
            result = tl.dot(weight.to(value.dtype), value, result)
        peak = most
    result = result / tl.where(total == 0, 1.0, total)[:, None]
    to = out + batch * out_batch + kv_head * out_row
    to += head.to(tl.int64) * out_head + (position - first).to(tl.int64) * out_token
    # A query that is padding itself sees nothing.
    result = tl.where((position >= start)[:, None], result, 0.0)
    tl.store(
        to[:, None] + v_channel[None, :], result.to(out.dtype.element_ty),
        mask=real[:, None] & (v_channel[None, :] < V_DIM),
    )  # fmt: skip
