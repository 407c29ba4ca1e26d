"""Triton: votes counted by size, in bins of an eighth of a power of two: where the selection begins."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.overlap import follow, overlap

__all__ = ["BINS", "SHIFT", "bin_of", "clear_bins", "count_votes", "empty_bins", "first_guess"]
__all__ += ["line_of", "threshold_bin"]

BINS = 256
"""Bins of a row: number 0 has the greatest votes; the first and the last one have no other end."""
LINE = BINS + 32
"""Numbers of a row: its bins, and behind them one that the selection counts with."""
SHIFT = 20
"""Low bits of a vote (float32) that its bin does not tell."""


def empty_bins(rows: int, device: torch.device) -> Tensor:
    """Make room for the bins of some rows, ``[rows, LINE]`` int32, that a kernel has yet to make 0.

    Parameters
    ----------
    rows : int
        Rows of votes.
    device : torch.device
        Where they live.
    """
    return torch.empty(rows, LINE, dtype=torch.int32, device=device)


def count_votes(votes: Tensor, spans: Tensor, rows_of_span: int, largest: float) -> Tensor:
    """Count votes of which the kernel that made them has not done so.

    Parameters
    ----------
    votes, spans, rows_of_span, largest
        As `triton_select.Votes` and `triton_select.select_groups` have them.

    Returns
    -------
    Tensor
        ``[rows, LINE]`` int32.
    """
    (rows, groups), part = votes.shape, 1024
    kind: dict[str, Any] = {"dtype": torch.int32, "device": votes.device}
    bins = torch.zeros(rows, LINE, **kind)
    _count[(triton.cdiv(groups, part), rows)](
        votes, spans, bins, groups, rows_of_span, largest, SPAN=spans.shape[1], PART=part, BINS=BINS,
        SHIFT=SHIFT, num_warps=4, **overlap(votes.device),
    )  # fmt: skip
    return bins


@triton.jit
def line_of(bins, row, BINS: tl.constexpr):
    """Return where the bins of a row are, and the count behind them."""
    return bins + row * (BINS + 32)  # LINE, a global that kernels cannot read


@triton.jit
def clear_bins(bins, row, BINS: tl.constexpr):
    """Make the bins of a row 0, and the count behind them."""
    line = line_of(bins, row, BINS)
    tl.store(line + tl.arange(0, BINS), 0)
    tl.store(line + BINS, 0)


@triton.jit
def _first_bin(count, largest, SHIFT: tl.constexpr):
    """Return the number of bin 0, counted from the least float: of so many votes, the least is not above."""
    bound = largest / tl.maximum(count, 1).to(tl.float32)
    return bound.to(tl.int32, bitcast=True) >> SHIFT


@triton.jit
def bin_of(key, count, largest, BINS: tl.constexpr, SHIFT: tl.constexpr):
    """Return the bins of votes by their bits; no vote is negative."""
    number = _first_bin(count, largest, SHIFT) - (key >> SHIFT)
    return tl.minimum(tl.maximum(number, 0), BINS - 1)


@triton.jit
def threshold_bin(bins, count, BINS: tl.constexpr):
    """Return the bin that the least of `count` votes is in, or the first vote; BINS where there are less."""
    reached = tl.cumsum(tl.load(bins + tl.arange(0, BINS)), 0)
    return tl.sum((reached < tl.maximum(count, 1)).to(tl.int32), 0)


@triton.jit
def first_guess(bin, count, largest, BINS: tl.constexpr, SHIFT: tl.constexpr):
    """Return the bits that all votes in a bin have in common, and the first bit that they may not have.

    The outer bins have votes of any size.
    """
    outer = (bin == 0) | (bin == BINS - 1)
    least = tl.where(outer, 0, (_first_bin(count, largest, SHIFT) - bin) << SHIFT)
    bit = tl.where(outer, 30, SHIFT - 1)
    least = tl.where(bin == BINS, -1, least)
    bit = tl.where(bin == BINS, -1, bit)
    return least, bit


@triton.jit(do_not_specialize=["groups", "rows_of_span"])
def _count(
    votes, spans, bins, groups, rows_of_span, largest,
    SPAN: tl.constexpr, PART: tl.constexpr, BINS: tl.constexpr, SHIFT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(spans + row // rows_of_span * SPAN + 3)
    group = tl.program_id(0) * PART + tl.arange(0, PART)
    vote = tl.load(votes + row * groups + group, mask=group < groups, other=-1.0)
    bin = bin_of(vote.to(tl.int32, bitcast=True), count, largest, BINS, SHIFT)
    number = tl.histogram(bin, BINS, mask=vote >= 0)
    tl.atomic_add(line_of(bins, row, BINS) + tl.arange(0, BINS), number, mask=number > 0, sem="relaxed")
