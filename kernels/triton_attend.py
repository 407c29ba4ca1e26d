"""Triton: exact attention of one query to the groups on a list (reference: `attend.attend_gathered`)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.fp8 import EXTRA
from hga_compile.kernels.launch import Attend, launch_parameters, shape_of
from hga_compile.kernels.overlap import COMPILED, follow, overlap
from hga_compile.kernels.triton_fp8 import decoded
from hga_compile.kernels.triton_tail import TailShares

__all__ = ["attend_listed"]


def attend_listed(
    pages: Tensor,
    chosen: Tensor,
    spans: Tensor,
    query: Tensor,
    logits: Tensor | None,
    *,
    group_size: int,
    scale: float,
    softcap: float,
    rows_of_span: int,
    kv_heads: int,
    slots: Tensor | None = None,
    tail: TailShares | None = None,
    hot: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend to the tokens of listed groups, read where they lie: in GPU memory or in pinned host memory.

    Parameters
    ----------
    pages : Tensor
        ``[groups, rows, group_size * (dim + v_dim)]`` (see `store.pages.Pages`); with `slots`, a pool
        ``[slots, group_size * (dim + v_dim)]`` of such pages. Of uint8: coded (see `fp8`), values `EXTRA`
        bytes longer.
    chosen : Tensor
        ``[rows, width]`` int32, from `triton_select.select_groups`.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    query : Tensor
        ``[rows, heads, dim]``, contiguous, dtype of the pages, or of what coded ones stand for.
    logits : Tensor or None
        ``[kv_heads * heads]`` float32: attention sinks (see `scoring.Scoring`).
    group_size : int
        Tokens of a group, a power of two.
    scale, softcap : float
        Softmax scale; soft-cap of the scores, 0: none.
    rows_of_span, kv_heads : int
        Rows that a line of `spans` is for; rows of one sequence.
    slots : Tensor or None
        ``[rows, groups]`` int32, groups innermost in memory: the page of the pool that holds a row's group;
        read for listed groups only. None: pages lie as groups do.
    tail : TailShares or None
        Estimate of all chunks, from which the listed tokens are taken out (see `tail`); it goes with neither
        soft-cap nor sinks.

    hot : tuple of Tensor or None
        A pool ``[rows, slots, page]`` and ``[rows, width]`` int32: where in it listed groups are, or are put
        as they are read from `pages` (see `triton_hot.place_groups`).

    Returns
    -------
    Tensor
        ``[rows, heads, v_dim]``, dtype of the query; 0 for a row without a token.
    """
    rows, heads, dim = query.shape
    coded = pages.dtype == torch.uint8
    v_dim = pages.shape[-1] // group_size - dim - (EXTRA if coded else 0)
    shape = shape_of(chosen.shape[1] * group_size, rows, heads, dim)
    launch = launch_parameters(Attend, query.device, shape)
    tokens = max(launch.tokens, group_size)
    tiles = triton.cdiv(chosen.shape[1] * group_size, tokens)
    # As many programs as keep all of a large GPU's memory channels busy, each with at least one tile.
    splits = min(tiles, max(1, launch.programs // rows))
    shares = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, shares)
    padded = max(16, triton.next_power_of_2(heads))
    kind: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    partial = torch.empty(2 if tail else 1, rows, heads, splits, v_dim, **kind)
    stats = torch.empty(3 if tail else 2, rows, heads, splits, **kind)
    mean = shifts = rest = rest_totals = values = peaks = totals = None
    chunks = chunk_size = tail_splits = 0
    if tail is not None:
        mean, shifts, rest, rest_totals = tail.mean, tail.shifts, partial[1], stats[2]
        chunks, chunk_size = tail.chunks, tail.chunk_size
        values, peaks, totals, tail_splits = tail.values, tail.stats[0], tail.stats[1], tail.values.shape[2]
    pool, entries = (None, None) if hot is None else hot
    exact, early = query.dtype == torch.float32, overlap(query.device)
    _attend[(splits, rows)](
        pages, chosen, spans, query, partial[0], stats[0], stats[1], chosen.shape[1], scale, softcap, rows,
        splits, shares, rows_of_span, slots, 0 if slots is None else slots.stride(0),
        mean, shifts, rest, rest_totals, chunks, pool, 0 if pool is None else pool.stride(0), entries,
        SPAN=spans.shape[1], HEADS=heads, PADDED_HEADS=padded, DIM=dim, V_DIM=v_dim,
        PADDED=max(16, triton.next_power_of_2(dim)), V_PADDED=max(16, triton.next_power_of_2(v_dim)),
        GROUP=group_size, TOKENS=tokens, SOFTCAP=softcap > 0, EXACT=exact, TAIL=chunk_size,
        EXTRA=EXTRA if coded else 0, PIPED=COMPILED and shares > 1 and tail is None and not exact, STAGES=3,
        num_warps=launch.warps, **early,
    )  # fmt: skip
    out = torch.empty(rows, heads, v_dim, dtype=query.dtype, device=query.device)
    v_padded = triton.next_power_of_2(v_dim)
    columns = min(32, v_padded)
    _merge[(rows * heads, triton.cdiv(v_dim, columns))](
        partial[0], stats[0], stats[1], logits, out, splits, kv_heads * heads, rest, rest_totals, values,
        peaks, totals, tail_splits,
        V_DIM=v_dim, COLUMNS=columns, STEP=min(128, max(16, triton.next_power_of_2(splits))),
        SINKS=logits is not None, TAIL=tail is not None, num_warps=4, **early,
    )  # fmt: skip
    return out


@triton.jit
def _tile(
    tile, peak, total, result, left_total, left, pages, chosen, asked, middle, row, width, listed, length,
    start, scale, softcap, rows, slots, slot_row, shifts, chunks, pool, pool_row, entries,
    HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr, TAIL: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """Attend to the tokens of a tile of the list, and add them to what came before."""
    V_ROW: tl.constexpr = V_DIM + EXTRA
    PAGE: tl.constexpr = GROUP * (DIM + V_ROW)
    head = tl.arange(0, peak.shape[0])
    channel = tl.arange(0, PADDED)
    v_channel = tl.arange(0, V_PADDED)
    entry = tile * TOKENS + tl.arange(0, TOKENS)
    place, inside = entry // GROUP, entry % GROUP
    group = tl.load(chosen + row * width + place, mask=place < listed, other=0)
    token = group * GROUP + inside
    real = (place < listed) & (token < length) & (token >= start)
    if pool is not None:
        page = pages + (group.to(tl.int64) * rows + row) * PAGE
        slot = tl.load(entries + row * width + place, mask=place < listed, other=-1)
        put = slot < -1
        near = pool + row * pool_row + tl.where(put, -2 - slot, slot).to(tl.int64) * PAGE
        page = tl.where(slot >= 0, near, page)
    elif slots is None:
        page = pages + (group.to(tl.int64) * rows + row) * PAGE
    else:
        slot = tl.load(slots + row * slot_row + group, mask=real, other=0)
        page = pages + slot.to(tl.int64) * PAGE
    keys = page[:, None] + inside[:, None] * DIM + channel[None, :]
    key = tl.load(keys, mask=real[:, None] & (channel[None, :] < DIM), other=0)
    values = page[:, None] + GROUP * DIM + inside[:, None] * V_ROW + v_channel[None, :]
    value = tl.load(values, mask=real[:, None] & (v_channel[None, :] < V_DIM), other=0)
    if pool is not None:
        # A group is on one list once: nobody else reads its slot now.
        to = near[:, None] + inside[:, None] * DIM + channel[None, :]
        tl.store(to, key, mask=put[:, None] & (channel[None, :] < DIM))
        to = near[:, None] + GROUP * DIM + inside[:, None] * V_ROW + v_channel[None, :]
        tl.store(to, value, mask=put[:, None] & (v_channel[None, :] < V_DIM))
    if EXTRA:
        ends = GROUP * DIM + inside * V_ROW + V_DIM
        key_exponent = tl.load(page + ends, mask=real, other=0)
        value_exponent = tl.load(page + ends + 1, mask=real, other=0)
        if pool is not None:
            tl.store(near + ends, key_exponent, mask=put)
            tl.store(near + ends + 1, value_exponent, mask=put)
        key = decoded(key, key_exponent).to(asked.dtype)
        value = decoded(value, value_exponent).to(asked.dtype)
    score = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
    if SOFTCAP:
        # tanh by exp: exact enough, and defined for every score.
        score = softcap * (1 - 2 / (1 + tl.exp(score * (2 / softcap))))
    score = tl.where(real[None, :], score, float("-inf"))
    most = tl.maximum(peak, tl.max(score, 1))
    if TAIL:
        # What the estimate of its chunk holds of each token.
        chunk = token // TAIL
        counted = real & (chunk < chunks) & (chunk * TAIL >= start)
        own = shifts + (row * HEADS + head[:, None]) * chunks + chunk[None, :]
        again = tl.load(own, mask=(head[:, None] < HEADS) & counted[None, :], other=0.0)
        again = tl.dot(middle, tl.trans(key.to(tl.float32)), again, input_precision="tf32x3")
        again = tl.where(counted[None, :], again, float("-inf"))
        most = tl.maximum(most, tl.max(again, 1))
    base = tl.where(most == float("-inf"), 0.0, most)
    weight = tl.exp(score - base[:, None])
    shrink = tl.exp(peak - base)
    total = total * shrink + tl.sum(weight, 1)
    result = result * shrink[:, None]
    if TAIL:
        again = tl.exp(again - base[:, None])
        left_total = left_total * shrink - tl.sum(again, 1)
        left = left * shrink[:, None]
        left = tl.dot(-again, value.to(tl.float32), left, input_precision="tf32x3")
    if EXACT:
        result = tl.dot(weight, value.to(tl.float32), result, input_precision="ieee")
    else:
        result = tl.dot(weight.to(value.dtype), value, result)
    return most, total, result, left_total, left


@triton.jit(do_not_specialize=["width", "rows", "splits", "shares", "rows_of_span", "slot_row", "chunks"])
def _attend(
    pages, chosen, spans, query, partial, peaks, totals, width, scale, softcap, rows, splits, shares,
    rows_of_span, slots, slot_row, mean, shifts, rest, rest_totals, chunks, pool, pool_row, entries,
    SPAN: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, DIM: tl.constexpr,
    V_DIM: tl.constexpr, PADDED: tl.constexpr, V_PADDED: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, TAIL: tl.constexpr,
    EXTRA: tl.constexpr, PIPED: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    sinks = tl.load(span + 1) - tl.load(span)
    listed = sinks + tl.load(span + 3) + tl.load(span + 4) - tl.load(span + 2)
    start, length = tl.load(span + 5), tl.load(span + 6)
    head = tl.arange(0, PADDED_HEADS)
    channel = tl.arange(0, PADDED)
    v_channel = tl.arange(0, V_PADDED)
    used = head[:, None] < HEADS
    at = query + (row * HEADS + head[:, None]) * DIM + channel[None, :]
    asked = tl.load(at, mask=used & (channel[None, :] < DIM), other=0.0)
    peak = tl.full([PADDED_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_HEADS], tl.float32)
    result = tl.zeros([PADDED_HEADS, V_PADDED], tl.float32)
    left_total, left = total, result
    # What was there before the kernel that lists the groups needed no wait.
    follow(EARLY)
    middle = asked
    if TAIL:
        at = mean + (row * HEADS + head[:, None]) * DIM + channel[None, :]
        middle = tl.load(at, mask=used & (channel[None, :] < DIM), other=0.0)
    if PIPED:
        # K/V of the tile that follows are on their way meanwhile.
        for share in tl.range(shares, num_stages=STAGES):
            peak, total, result, left_total, left = _tile(
                split * shares + share, peak, total, result, left_total, left, pages, chosen, asked, middle,
                row, width, listed, length, start, scale, softcap, rows, slots, slot_row, shifts, chunks,
                pool, pool_row, entries,
                HEADS, DIM, V_DIM, PADDED, V_PADDED, GROUP, TOKENS, SOFTCAP, EXACT, TAIL, EXTRA,
            )  # fmt: skip
    else:
        share = 0
        while share < shares:
            peak, total, result, left_total, left = _tile(
                split * shares + share, peak, total, result, left_total, left, pages, chosen, asked, middle,
                row, width, listed, length, start, scale, softcap, rows, slots, slot_row, shifts, chunks,
                pool, pool_row, entries,
                HEADS, DIM, V_DIM, PADDED, V_PADDED, GROUP, TOKENS, SOFTCAP, EXACT, TAIL, EXTRA,
            )  # fmt: skip
            share += 1
    to = (row * HEADS + head) * splits + split
    tl.store(peaks + to, peak, mask=head < HEADS)
    tl.store(totals + to, total, mask=head < HEADS)
    wanted = used & (v_channel[None, :] < V_DIM)
    tl.store(partial + to[:, None] * V_DIM + v_channel[None, :], result, mask=wanted)
    if TAIL:
        tl.store(rest_totals + to, left_total, mask=head < HEADS)
        tl.store(rest + to[:, None] * V_DIM + v_channel[None, :], left, mask=wanted)


@triton.jit(do_not_specialize=["splits", "query_heads", "tail_splits"])
def _merge(
    partial, peaks, totals, logits, out, splits, query_heads, rest, rest_totals, tail_values, tail_peaks,
    tail_totals, tail_splits,
    V_DIM: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, SINKS: tl.constexpr, TAIL: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    number = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, STEP)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if SINKS:
        peak = tl.load(logits + number % query_heads)
        total += 1.0
    result = tl.zeros([COLUMNS], tl.float32)
    left_total = tl.zeros([], tl.float32)
    left = tl.zeros([COLUMNS], tl.float32)
    begin = 0
    while begin < splits:
        split = begin + step
        at = number * splits + split
        own = tl.load(peaks + at, mask=split < splits, other=float("-inf"))
        most = tl.maximum(peak, tl.max(own, 0))
        base = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp(own - base)
        shrink = tl.exp(peak - base)
        total = total * shrink + tl.sum(weight * tl.load(totals + at, mask=split < splits, other=0.0), 0)
        wanted = (split[:, None] < splits) & (channel[None, :] < V_DIM)
        part = tl.load(partial + at[:, None] * V_DIM + channel[None, :], mask=wanted, other=0.0)
        result = result * shrink + tl.sum(weight[:, None] * part, 0)
        if TAIL:
            own = tl.load(rest_totals + at, mask=split < splits, other=0.0)
            left_total = left_total * shrink + tl.sum(weight * own, 0)
            part = tl.load(rest + at[:, None] * V_DIM + channel[None, :], mask=wanted, other=0.0)
            left = left * shrink + tl.sum(weight[:, None] * part, 0)
        peak = most
        begin += STEP
    if TAIL:
        begin = 0
        while begin < tail_splits:
            split = begin + step
            at = number * tail_splits + split
            own = tl.load(tail_peaks + at, mask=split < tail_splits, other=float("-inf"))
            most = tl.maximum(peak, tl.max(own, 0))
            base = tl.where(most == float("-inf"), 0.0, most)
            weight = tl.exp(own - base)
            shrink = tl.exp(peak - base)
            own = tl.load(tail_totals + at, mask=split < tail_splits, other=0.0)
            left_total = left_total * shrink + tl.sum(weight * own, 0)
            wanted = (split[:, None] < tail_splits) & (channel[None, :] < V_DIM)
            part = tl.load(tail_values + at[:, None] * V_DIM + channel[None, :], mask=wanted, other=0.0)
            left = left * shrink + tl.sum(weight[:, None] * part, 0)
            total = total * shrink
            result = result * shrink
            peak = most
            begin += STEP
        # What is left of the chunks without their listed tokens: rounding must not make it negative.
        left_total = tl.where(left_total < 0, 0.0, left_total)
        total += left_total
        result += tl.where(left_total == 0, 0.0, left)
    result = result / tl.where(total == 0, 1.0, total)
    tl.store(out + number * V_DIM + channel, result.to(out.dtype.element_ty), mask=channel < V_DIM)
