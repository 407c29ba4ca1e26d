"""Triton: exact attention of one query to the groups on a list (reference: `attend.attend_gathered`)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.launch import Attend, launch_parameters, shape_of

__all__ = ["attend_listed"]


def attend_listed(
    pages: Tensor,
    chosen: Tensor,
    spans: Tensor,
    query: Tensor,
    logits: Tensor | None,
    *,
    length: int,
    group_size: int,
    scale: float,
    softcap: float,
    rows_of_span: int,
    kv_heads: int,
) -> Tensor:
    """Attend to the tokens of listed groups, read where they lie: in GPU memory or in pinned host memory.

    Parameters
    ----------
    pages : Tensor
        ``[groups, rows, group_size * (dim + v_dim)]`` (see `store.pages.Pages`).
    chosen : Tensor
        ``[rows, width]`` int32, from `triton_select.select_groups`.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    query : Tensor
        ``[rows, heads, dim]``, contiguous, dtype of the pages.
    logits : Tensor or None
        ``[kv_heads * heads]`` float32: attention sinks (see `scoring.Scoring`).
    length : int
        Tokens of the sequence.
    group_size : int
        Tokens of a group, a power of two.
    scale, softcap : float
        Softmax scale; soft-cap of the scores, 0: none.
    rows_of_span, kv_heads : int
        Rows that a line of `spans` is for; rows of one sequence.

    Returns
    -------
    Tensor
        ``[rows, heads, v_dim]``, dtype of the query; 0 for a row without a token.
    """
    rows, heads, dim = query.shape
    v_dim = pages.shape[2] // group_size - dim
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
    partial = torch.empty(rows, heads, splits, v_dim, **kind)
    stats = torch.empty(2, rows, heads, splits, **kind)
    exact = query.dtype == torch.float32
    _attend[(splits, rows)](
        pages, chosen, spans, query, partial, stats[0], stats[1], chosen.shape[1], length, scale, softcap,
        rows, splits, shares, rows_of_span,
        SPAN=spans.shape[1], HEADS=heads, PADDED_HEADS=padded, DIM=dim, V_DIM=v_dim,
        PADDED=max(16, triton.next_power_of_2(dim)), V_PADDED=max(16, triton.next_power_of_2(v_dim)),
        GROUP=group_size, TOKENS=tokens, SOFTCAP=softcap > 0, EXACT=exact, num_warps=launch.warps,
    )  # fmt: skip
    out = torch.empty(rows, heads, v_dim, dtype=query.dtype, device=query.device)
    _merge[(rows * heads,)](
        partial, stats[0], stats[1], logits, out, splits, kv_heads * heads,
        V_DIM=v_dim, V_PADDED=triton.next_power_of_2(v_dim), STEP=32, SINKS=logits is not None, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["width", "length", "rows", "splits", "shares", "rows_of_span"])
def _attend(
    pages, chosen, spans, query, partial, peaks, totals, width, length, scale, softcap, rows, splits, shares,
    rows_of_span,
    SPAN: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, DIM: tl.constexpr,
    V_DIM: tl.constexpr, PADDED: tl.constexpr, V_PADDED: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    PAGE: tl.constexpr = GROUP * (DIM + V_DIM)
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    sinks = tl.load(span + 1) - tl.load(span)
    listed = sinks + tl.load(span + 3) + tl.load(span + 4) - tl.load(span + 2)
    start = tl.load(span + 5)
    head = tl.arange(0, PADDED_HEADS)
    channel = tl.arange(0, PADDED)
    v_channel = tl.arange(0, V_PADDED)
    used = head[:, None] < HEADS
    at = query + (row * HEADS + head[:, None]) * DIM + channel[None, :]
    asked = tl.load(at, mask=used & (channel[None, :] < DIM), other=0.0)
    peak = tl.full([PADDED_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_HEADS], tl.float32)
    result = tl.zeros([PADDED_HEADS, V_PADDED], tl.float32)
    share = 0
    while share < shares:
        entry = (split * shares + share) * TOKENS + tl.arange(0, TOKENS)
        place, inside = entry // GROUP, entry % GROUP
        group = tl.load(chosen + row * width + place, mask=place < listed, other=0)
        token = group * GROUP + inside
        real = (place < listed) & (token < length) & (token >= start)
        page = pages + (group.to(tl.int64) * rows + row) * PAGE
        keys = page[:, None] + inside[:, None] * DIM + channel[None, :]
        key = tl.load(keys, mask=real[:, None] & (channel[None, :] < DIM), other=0.0)
        values = page[:, None] + GROUP * DIM + inside[:, None] * V_DIM + v_channel[None, :]
        value = tl.load(values, mask=real[:, None] & (v_channel[None, :] < V_DIM), other=0.0)
        score = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP:
            # tanh by exp: exact enough, and defined for every score.
            score = softcap * (1 - 2 / (1 + tl.exp(score * (2 / softcap))))
        score = tl.where(real[None, :], score, float("-inf"))
        most = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp(score - base[:, None])
        shrink = tl.exp(peak - base)
        total = total * shrink + tl.sum(weight, 1)
        result = result * shrink[:, None]
        if EXACT:
            result = tl.dot(weight, value.to(tl.float32), result, input_precision="ieee")
        else:
            result = tl.dot(weight.to(value.dtype), value, result)
        peak = most
        share += 1
    to = (row * HEADS + head) * splits + split
    tl.store(peaks + to, peak, mask=head < HEADS)
    tl.store(totals + to, total, mask=head < HEADS)
    wanted = used & (v_channel[None, :] < V_DIM)
    tl.store(partial + to[:, None] * V_DIM + v_channel[None, :], result, mask=wanted)


@triton.jit(do_not_specialize=["splits", "query_heads"])
def _merge(
    partial, peaks, totals, logits, out, splits, query_heads,
    V_DIM: tl.constexpr, V_PADDED: tl.constexpr, STEP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, V_PADDED)
    step = tl.arange(0, STEP)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if SINKS:
        peak = tl.load(logits + number % query_heads)
        total += 1.0
    result = tl.zeros([V_PADDED], tl.float32)
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
        peak = most
        begin += STEP
    result = result / tl.where(total == 0, 1.0, total)
    tl.store(out + number * V_DIM + channel, result.to(out.dtype.element_ty), mask=channel < V_DIM)
