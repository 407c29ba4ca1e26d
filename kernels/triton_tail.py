"""Triton: what the chunks of a tail estimate add to a query (reference: `tail.attend_gathered_with_tail`)."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.tail import TailSummary

__all__ = ["TailShares", "tail_shares"]

_CHUNKS = 16


@dataclass(frozen=True)
class TailShares:
    """The part of all counted chunks, routed tokens not taken out yet, in splits that are merged later."""

    mean: Tensor
    """``[rows, heads, dim]`` float32, contiguous (see `tail.TailSummary`)."""
    chunk_size: int
    chunks: int
    """Complete chunks."""
    shifts: Tensor
    """``[rows, heads, chunks]`` float32 (see `tail.TailSummary.shifts`)."""
    values: Tensor
    """``[rows, heads, splits, v_dim]`` float32: sums over a split's chunks."""
    stats: Tensor
    """``[2, rows, heads, splits]`` float32: greatest log mass (-inf: none), sum of the masses against it."""


def tail_shares(
    query: Tensor, summary: TailSummary, spans: Tensor, *, length: int, scale: float, rows_of_span: int
) -> TailShares:
    """Sum the masses and values of the chunks that are complete and free of padding.

    Parameters
    ----------
    query : Tensor
        ``[rows, heads, dim]``, contiguous.
    summary : TailSummary
        Expansions of the chunks.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    length : int
        Tokens of the sequence.
    scale : float
        Softmax scale.
    rows_of_span : int
        Rows that a line of `spans` is for.
    """
    rows, heads, dim = query.shape
    mean, size, v_dim = summary.mean_query.contiguous(), summary.chunk_size, summary.value.shape[3]
    chunks = min(summary.chunks, length // size)
    tiles = max(1, triton.cdiv(chunks, _CHUNKS))
    # As many programs as keep a large GPU busy, each with at least one tile.
    shares = triton.cdiv(tiles, min(tiles, max(1, 528 // (rows * heads))))
    splits = triton.cdiv(tiles, shares)
    kind: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    shifts, values = torch.empty(rows, heads, chunks, **kind), torch.empty(rows, heads, splits, v_dim, **kind)
    stats = torch.empty(2, rows, heads, splits, **kind)
    _share[(splits, rows * heads)](
        query, mean, summary.log_mass, summary.log_mass.stride(1), summary.key,
        summary.key.stride(1), summary.value, summary.value.stride(1), spans, shifts, values, stats[0],
        stats[1], chunks, splits, shares, rows_of_span, scale,
        SPAN=spans.shape[1], HEADS=heads, DIM=dim, V_DIM=v_dim, PADDED=triton.next_power_of_2(dim),
        V_PADDED=triton.next_power_of_2(v_dim), SIZE=size, CHUNKS=_CHUNKS, num_warps=4,
    )  # fmt: skip
    return TailShares(mean, size, chunks, shifts, values, stats)


@triton.jit(do_not_specialize=["chunks", "splits", "shares", "rows_of_span", "mass_head"])
def _share(
    query, mean, log_mass, mass_head, key, key_head, value, value_head, spans, shifts, values, peaks, totals,
    chunks, splits, shares, rows_of_span, scale,
    SPAN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, SIZE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    number = tl.program_id(1).to(tl.int64)
    start = tl.load(spans + number // HEADS // rows_of_span * SPAN + 5)
    channel = tl.arange(0, PADDED)
    v_channel = tl.arange(0, V_PADDED)
    asked = tl.load(query + number * DIM + channel, mask=channel < DIM, other=0.0).to(tl.float32) * scale
    asked -= tl.load(mean + number * DIM + channel, mask=channel < DIM, other=0.0)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    result = tl.zeros([V_PADDED], tl.float32)
    share = 0
    while share < shares:
        chunk = (split * shares + share) * CHUNKS + tl.arange(0, CHUNKS)
        counted = (chunk < chunks) & (chunk * SIZE >= start)
        at = key + number * key_head + chunk[:, None].to(tl.int64) * DIM + channel[None, :]
        expanded = tl.load(at, mask=counted[:, None] & (channel[None, :] < DIM), other=0.0)
        shift = tl.sum(expanded * asked[None, :], 1)
        tl.store(shifts + number * chunks + chunk, shift, mask=chunk < chunks)
        mass = tl.load(log_mass + number * mass_head + chunk, mask=counted, other=0.0) + shift
        mass = tl.where(counted, mass, float("-inf"))
        most = tl.maximum(peak, tl.max(mass, 0))
        base = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp(mass - base)
        shrink = tl.exp(peak - base)
        total = total * shrink + tl.sum(weight, 0)
        at = value + number * value_head + chunk[:, None].to(tl.int64) * V_DIM + v_channel[None, :]
        own = tl.load(at, mask=counted[:, None] & (v_channel[None, :] < V_DIM), other=0.0)
        result = result * shrink + tl.sum(weight[:, None] * own, 0)
        peak = most
        share += 1
    to = number * splits + split
    tl.store(peaks + to, peak)
    tl.store(totals + to, total)
    tl.store(values + to * V_DIM + v_channel, result, mask=v_channel < V_DIM)
