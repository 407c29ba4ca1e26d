"""Triton: votes of the query heads, and the groups with the most of them (reference: `route`)."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.launch import Select, Vote, launch_parameters, shape_of
from hga_compile.kernels.overlap import follow, overlap
from hga_compile.kernels.triton_score import Masses

__all__ = ["Votes", "select_groups", "votes_of"]

# About so many programs in all look through the groups.
_PROGRAMS = 264
_MOST_PART = 2**12
# Entries that a program holds in registers at most; more are looked through again for every bit.
_MOST_HELD = 2**14


@dataclass(frozen=True)
class Votes:
    """Votes of all groups."""

    votes: Tensor
    """``[rows, groups]`` float32; infinite for broken groups, -1 for those that are not to choose from."""
    tops: Tensor
    """``[rows, runs]`` float32: the most votes in each run of groups."""
    entered: Tensor | None = None
    """``[rows]`` int32, 0: where the selection counts; used up by it. None: it makes its own."""


def votes_of(masses: Masses, spans: Tensor, heads: int, most: bool, rows_of_span: int) -> Votes:
    """Merge the softmax masses of a KV head's query heads into one vote a group (see `route.merge_votes`).

    Parameters
    ----------
    masses : Masses
        From `triton_score.group_masses`.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    heads : int
        Query heads of a KV head: the first of those in `masses`.
    most : bool
        Whether the vote is the greatest mass rather than the sum.
    rows_of_span : int
        Rows that a line of `spans` is for.
    """
    rows, groups, padded = masses.mass.shape
    launch = launch_parameters(Vote, masses.mass.device, shape_of(groups, rows, padded))
    together = max(1, launch.groups // masses.block)
    run = min(max(8, triton.next_power_of_2(triton.cdiv(groups, _MOST_HELD))), together * masses.block)
    kind: dict[str, Any] = {"dtype": torch.float32, "device": masses.mass.device}
    early = overlap(masses.mass.device)
    votes, tops = torch.empty(rows, groups, **kind), torch.empty(rows, triton.cdiv(groups, run), **kind)
    entered = torch.empty(rows, dtype=torch.int32, device=masses.mass.device)
    parts = masses.sums.shape[2]
    _vote[(triton.cdiv(masses.blocks, together), rows)](
        masses.mass, masses.sums, masses.peaks, masses.peaks.stride(0), spans, votes, tops, entered, groups,
        tops.shape[1], masses.blocks, parts, rows_of_span,
        SPAN=spans.shape[1], HEADS=heads, PADDED_HEADS=padded, BLOCK=masses.block, TOGETHER=together, RUN=run,
        STEP=max(16, min(2048 // padded, triton.next_power_of_2(parts))), MOST=most,
        num_warps=launch.warps, **early,
    )  # fmt: skip
    return Votes(votes, tops, entered)


def select_groups(
    votes: Votes, spans: Tensor, width: int, rows_of_span: int, names: Tensor | None = None
) -> Tensor:
    """List the groups of sinks, those with the most votes, and the window, ascending.

    Of groups with equal votes the first ones are taken.

    Parameters
    ----------
    votes : Votes
        From `votes_of`.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    width : int
        Groups of the longest list.
    rows_of_span : int
        Rows that a line of `spans` is for.
    names : Tensor or None
        ``[rows, groups]`` int32, ascending: the groups that are voted for; None: all, in their order.

    Returns
    -------
    Tensor
        ``[rows, width]`` int32; entries past a row's own list are not written.
    """
    (rows, groups), runs = votes.votes.shape, votes.tops.shape[1]
    device = votes.votes.device
    launch, early = launch_parameters(Select, device, shape_of(groups, rows)), overlap(device)
    # With many rows a program of each does all parts: its own search for the bounds is done once.
    most = max(1, _PROGRAMS // rows)
    part = max(launch.part, min(_MOST_PART, triton.next_power_of_2(triton.cdiv(groups, most))))
    parts = triton.cdiv(groups, part)
    shares = triton.cdiv(parts, min(parts, most))
    splits = triton.cdiv(parts, shares)
    kind: dict[str, Any] = {"dtype": torch.int32, "device": device}
    entries, bounds = torch.empty(2, rows, groups, **kind), torch.empty(rows, **kind)
    entered = votes.entered
    if entered is None:
        entered = torch.zeros(rows, **kind) if splits > 1 else torch.empty(rows, **kind)
    _keep[(splits, rows)](
        votes.votes, votes.tops, spans, bounds, entered, entries[0], entries[1], groups, runs, shares,
        rows_of_span, SPAN=spans.shape[1], HELD=triton.next_power_of_2(max(runs, 128)), PART=part,
        ALONE=splits == 1, num_warps=launch.warps, **early,
    )  # fmt: skip
    chosen = torch.empty(rows, width, **kind)
    _list[(splits, rows)](
        votes.votes, bounds, entered, entries[0], entries[1], names, spans, chosen, groups, width, shares,
        rows_of_span, SPAN=spans.shape[1], PART=part,
        HELD=min(_MOST_HELD, max(launch.held, triton.next_power_of_2(2 * width))),
        num_warps=launch.warps, **early,
    )  # fmt: skip
    return chosen


@triton.jit(do_not_specialize=["groups", "runs", "blocks", "parts", "rows_of_span", "peak_row"])
def _vote(
    mass, sums, peaks, peak_row, spans, votes, tops, entered, groups, runs, blocks, parts, rows_of_span,
    SPAN: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    if tl.program_id(0) == 0:
        tl.store(entered + row, 0)
    first, end = tl.load(span + 1), tl.load(span + 2)
    head = tl.arange(0, PADDED_HEADS)
    used = head[None, :] < HEADS
    block = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    group = tl.program_id(0) * TOGETHER * BLOCK + tl.arange(0, TOGETHER * BLOCK)
    wanted = used & (group[:, None] < groups)
    of_group = mass + (row * groups + group[:, None]) * PADDED_HEADS
    given = tl.load(of_group + head[None, :], mask=wanted, other=0.0)
    of_row = sums + row * 2 * parts * PADDED_HEADS
    at = peaks + row * peak_row + block[:, None] * PADDED_HEADS + head[None, :]
    own = tl.load(at, mask=used & (block[:, None] < blocks), other=float("-inf"))
    best = tl.full([PADDED_HEADS], float("-inf"), tl.float32)
    whole = tl.zeros([PADDED_HEADS], tl.float32)
    begin = 0
    while begin < parts:
        number = begin + tl.arange(0, STEP)
        inside = used & (number[:, None] < parts)
        of_part = of_row + number[:, None] * PADDED_HEADS + head[None, :]
        peak = tl.load(of_part, mask=inside, other=float("-inf"))
        total = tl.load(of_part + parts * PADDED_HEADS, mask=inside, other=0.0)
        most = tl.maximum(best, tl.max(peak, 0))
        base = tl.where(most == float("-inf"), 0.0, most)
        whole = whole * tl.exp(best - base) + tl.sum(total * tl.exp(peak - base[None, :]), 0)
        best = most
        begin += STEP
    base = tl.where(best == float("-inf"), 0.0, best)
    share = tl.exp(own - base[None, :]) / tl.where(whole > 0, whole, 1.0)[None, :]
    share = tl.reshape(
        tl.broadcast_to(share[:, None, :], [TOGETHER, BLOCK, PADDED_HEADS]), [TOGETHER * BLOCK, PADDED_HEADS]
    )
    broken = tl.max((given == float("inf")).to(tl.int32), 1) > 0
    part = tl.where(given == float("inf"), 0.0, given) * share
    vote = tl.max(part, 1) if MOST else tl.sum(part, 1)
    vote = tl.where(broken, float("inf"), vote)
    vote = tl.where((group >= first) & (group < end), vote, -1.0)
    vote = tl.where(group < groups, vote, -1.0)
    tl.store(votes + row * groups + group, vote, mask=group < groups)
    RUNS: tl.constexpr = TOGETHER * BLOCK // RUN
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    tl.store(tops + row * runs + run, tl.max(tl.reshape(vote, [RUNS, RUN]), 1), mask=run < runs)


@triton.jit
def _least_of(key, count, BITS: tl.constexpr):
    """Return a bound that `count` keys reach: the largest there is, as far as its first bits tell.

    Ends early where exactly so many reach it: they are what is above it and what is equal to it.
    """
    least = 0
    bit = 30
    enough = -1
    while (bit > 30 - BITS) & (enough != count):
        candidate = least | (1 << bit)
        enough = tl.sum((key >= candidate).to(tl.int32), 0)
        least = tl.where(enough >= count, candidate, least)
        bit -= 1
    return least


@triton.jit(do_not_specialize=["groups", "runs", "shares", "rows_of_span"])
def _keep(
    votes, tops, spans, bounds, entered, keys, numbers, groups, runs, shares, rows_of_span,
    SPAN: tl.constexpr, HELD: tl.constexpr, PART: tl.constexpr, ALONE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Enter the groups that may be chosen, in any order of the programs."""
    follow(EARLY)
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(spans + row // rows_of_span * SPAN + 3)
    place = tl.arange(0, HELD)
    top = tl.load(tops + row * runs + place, mask=place < runs, other=-1.0)
    # As many runs as there are groups to choose have a top: what is less than their least is not chosen.
    # Votes are not negative, and their bits are ordered as they are; others have the sign bit.
    bound = _least_of(top.to(tl.int32, bitcast=True), count, 16)
    if tl.program_id(0) == 0:
        tl.store(bounds + row, bound)
    before = 0
    share = 0
    while share < shares:
        group = (tl.program_id(0) * shares + share) * PART + tl.arange(0, PART)
        vote = tl.load(votes + row * groups + group, mask=group < groups, other=-1.0)
        key = vote.to(tl.int32, bitcast=True)
        kept = key >= bound
        number = tl.sum(kept.to(tl.int32), 0)
        if not ALONE:
            before = tl.atomic_add(entered + row, number, sem="relaxed")
        at = row * groups + before + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(keys + at, key, mask=kept)
        tl.store(numbers + at, group, mask=kept)
        before += number
        share += 1
    if ALONE:
        tl.store(entered + row, before)


@triton.jit(do_not_specialize=["groups", "width", "shares", "rows_of_span"])
def _list(
    votes, bounds, entered, keys, numbers, names, spans, chosen, groups, width, shares, rows_of_span,
    SPAN: tl.constexpr, PART: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """List the chosen groups of a program's parts: where, follows from what is entered of those before."""
    follow(EARLY)
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    sink_start, sink_end, window = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    count, last = tl.load(span + 3), tl.load(span + 4)
    listed, bound = tl.load(entered + row), tl.load(bounds + row)
    own, own_numbers, to = keys + row * groups, numbers + row * groups, chosen + row * width
    sinks = sink_end - sink_start
    begin = tl.program_id(0) * shares * PART
    place = tl.arange(0, HELD)
    if listed <= HELD:
        key = tl.load(own + place, mask=place < listed, other=-1)
        number = tl.load(own_numbers + place, mask=place < listed, other=0)
        least = tl.maximum(_least_of(key, count, 31), bound)
        all_above = tl.sum((key > least).to(tl.int32), 0)
        above = tl.sum(((key > least) & (number < begin)).to(tl.int32), 0)
        equal = tl.sum(((key == least) & (number < begin)).to(tl.int32), 0)
    else:
        least, all_above, above, equal = _search(own, own_numbers, listed, count, bound, begin, HELD)
    # Of those that are equal to the least one, the first.
    left = count - all_above
    share = 0
    while share < shares:
        group = begin + share * PART + tl.arange(0, PART)
        vote = tl.load(votes + row * groups + group, mask=group < groups, other=-1.0)
        key = vote.to(tl.int32, bitcast=True)
        # Both counts in one sum: a part has fewer than 2^15 groups.
        both = (key > least).to(tl.int32) + ((key == least).to(tl.int32) << 16)
        until = tl.cumsum(both, 0)
        equals = equal + (until >> 16)
        at = sinks + above + (until & 0xFFFF) + tl.minimum(equals, left) - 1
        taken = (key > least) | ((key == least) & (equals <= left))
        if names is not None:
            group = tl.load(names + row * groups + group, mask=taken, other=0)
        tl.store(to + at, group, mask=taken)
        both = tl.sum(both, 0)
        above += both & 0xFFFF
        equal += both >> 16
        share += 1
    if tl.program_id(0) == 0:
        step = tl.arange(0, 256)
        at = 0
        while at < sinks:
            tl.store(to + at + step, sink_start + at + step, mask=at + step < sinks)
            at += 256
        at = 0
        while at < last - window:
            tl.store(to + sinks + count + at + step, window + at + step, mask=at + step < last - window)
            at += 256


@triton.jit
def _search(keys, numbers, listed, count, bound, begin, STEP: tl.constexpr):
    """Do for more entries than registers hold what `_list` does for few."""
    place = tl.arange(0, STEP)
    least = 0
    bit = 30
    enough = -1
    while (bit >= 0) & (enough != count):
        candidate = least | (1 << bit)
        enough = 0
        at = 0
        while at < listed:
            key = tl.load(keys + at + place, mask=at + place < listed, other=-1)
            enough += tl.sum((key >= candidate).to(tl.int32), 0)
            at += STEP
        least = tl.where(enough >= count, candidate, least)
        bit -= 1
    least = tl.maximum(least, bound)
    all_above = 0
    above = 0
    equal = 0
    at = 0
    while at < listed:
        key = tl.load(keys + at + place, mask=at + place < listed, other=-1)
        number = tl.load(numbers + at + place, mask=at + place < listed, other=0)
        all_above += tl.sum((key > least).to(tl.int32), 0)
        above += tl.sum(((key > least) & (number < begin)).to(tl.int32), 0)
        equal += tl.sum(((key == least) & (number < begin)).to(tl.int32), 0)
        at += STEP
    return least, all_above, above, equal
