"""Triton: votes of the query heads, and the groups with the most of them (reference: `route`)."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.launch import Select, Vote, launch_parameters, shape_of
from hga_compile.kernels.overlap import follow, overlap
from hga_compile.kernels.triton_bins import (
    BINS,
    SHIFT,
    bin_of,
    count_votes,
    first_guess,
    line_of,
    threshold_bin,
)
from hga_compile.kernels.triton_score import Masses

__all__ = ["Votes", "select_groups", "votes_of"]

# About so many programs in all look through the groups.
_PROGRAMS = 264
_MOST_PART = 2**12


@dataclass(frozen=True)
class Votes:
    """Votes of all groups."""

    votes: Tensor
    """``[rows, groups]`` float32; infinite for broken groups, -1 for those that are not to choose from."""
    bins: Tensor | None = None
    """``[rows, LINE]`` int32: votes by size (see `triton_bins`); None: the selection counts if it has to."""
    largest: float = 1024.0
    """About what the finite votes of a row add up to at most: the nearer, the less a selection may take."""


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
    kind: dict[str, Any] = {"device": masses.mass.device}
    votes = torch.empty(rows, groups, dtype=torch.float32, **kind)
    bins = masses.bins
    parts = masses.sums.shape[2]
    tiles = triton.cdiv(masses.blocks, together)
    # Each program reads the sums of all parts: of many tiles it takes several.
    shares = triton.cdiv(tiles * rows, launch.programs)
    _vote[(triton.cdiv(tiles, shares), rows)](
        masses.mass, masses.sums, masses.peaks, masses.peaks.stride(0), spans, votes, bins, groups,
        masses.blocks, parts, rows_of_span, float(heads), shares,
        SPAN=spans.shape[1], HEADS=heads, PADDED_HEADS=padded, BLOCK=masses.block, TOGETHER=together,
        STEP=max(16, min(2048 // padded, triton.next_power_of_2(parts))), MOST=most,
        GATHERED=together * masses.block >= 32 * launch.warps, BINS=BINS, SHIFT=SHIFT,
        num_warps=launch.warps, **overlap(masses.mass.device),
    )  # fmt: skip
    return Votes(votes, bins, float(heads))


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
    (rows, groups), device = votes.votes.shape, votes.votes.device
    launch, early = launch_parameters(Select, device, shape_of(groups, rows)), overlap(device)
    kind: dict[str, Any] = {"dtype": torch.int32, "device": device}
    fixed: dict[str, Any] = {"SPAN": spans.shape[1], "BINS": BINS, "SHIFT": SHIFT, "num_warps": launch.warps}
    chosen = torch.empty(rows, width, **kind)
    if groups <= launch.whole:
        _whole[(rows,)](
            votes.votes, votes.bins, names, spans, chosen, groups, width, rows_of_span,
            votes.largest, HELD=triton.next_power_of_2(max(groups, 128)), **fixed, **early,
        )  # fmt: skip
        return chosen
    bins = votes.bins
    if bins is None:
        bins = count_votes(votes.votes, spans, rows_of_span, votes.largest)
    # With many rows a program of each does all parts.
    most = max(1, _PROGRAMS // rows)
    part = max(launch.part, min(_MOST_PART, triton.next_power_of_2(triton.cdiv(groups, most))))
    parts = triton.cdiv(groups, part)
    shares = triton.cdiv(parts, min(parts, most))
    splits = triton.cdiv(parts, shares)
    padded = triton.next_power_of_2(splits)
    found, rivals = torch.empty(rows, 3, splits, **kind), torch.empty(rows, 2, launch.held, **kind)
    _keep[(splits, rows)](
        votes.votes, bins, spans, found, rivals, groups, shares, rows_of_span, votes.largest,
        PART=part, HELD=launch.held, **fixed, **early,
    )  # fmt: skip
    _list[(splits, rows)](
        votes.votes, bins, found, rivals, names, spans, chosen, groups, width, shares, rows_of_span,
        votes.largest, PART=part, HELD=launch.held, SPLITS=padded, **fixed, **early,
    )  # fmt: skip
    return chosen


@triton.jit(do_not_specialize=["groups", "blocks", "parts", "rows_of_span", "peak_row", "shares"])
def _vote(
    mass, sums, peaks, peak_row, spans, votes, bins, groups, blocks, parts, rows_of_span, largest, shares,
    SPAN: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr, GATHERED: tl.constexpr,
    BINS: tl.constexpr, SHIFT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    # What was there before the kernel that scores needs no wait.
    first, end, count = tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    follow(EARLY)
    head = tl.arange(0, PADDED_HEADS)
    used = head[None, :] < HEADS
    of_row = sums + row * 2 * parts * PADDED_HEADS
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
    scale = 1 / tl.where(whole > 0, whole, 1.0)
    bins = line_of(bins, row, BINS)
    share = 0
    while share < shares:
        tile = tl.program_id(0) * shares + share
        block = tile * TOGETHER + tl.arange(0, TOGETHER)
        group = tile * TOGETHER * BLOCK + tl.arange(0, TOGETHER * BLOCK)
        at = mass + (row * groups + group[:, None]) * PADDED_HEADS + head[None, :]
        given = tl.load(at, mask=used & (group[:, None] < groups), other=0.0)
        at = peaks + row * peak_row + block[:, None] * PADDED_HEADS + head[None, :]
        own = tl.load(at, mask=used & (block[:, None] < blocks), other=float("-inf"))
        of_block = tl.exp(own - base[None, :]) * scale[None, :]
        of_block = tl.broadcast_to(of_block[:, None, :], [TOGETHER, BLOCK, PADDED_HEADS])
        broken = tl.max((given == float("inf")).to(tl.int32), 1) > 0
        part = tl.where(given == float("inf"), 0.0, given)
        part *= tl.reshape(of_block, [TOGETHER * BLOCK, PADDED_HEADS])
        vote = tl.max(part, 1) if MOST else tl.sum(part, 1)
        vote = tl.where(broken, float("inf"), vote)
        vote = tl.where((group >= first) & (group < end) & (group < groups), vote, -1.0)
        tl.store(votes + row * groups + group, vote, mask=group < groups)
        bin = bin_of(vote.to(tl.int32, bitcast=True), count, largest, BINS, SHIFT)
        bin = tl.where(vote >= 0, bin, BINS)
        if GATHERED:
            # A histogram counts each thread's copy: after a gather no two threads have the same votes.
            bin = tl.gather(bin, tl.arange(0, TOGETHER * BLOCK), 0)
            number = tl.histogram(bin, BINS, mask=bin < BINS)
            tl.atomic_add(bins + tl.arange(0, BINS), number, mask=number > 0, sem="relaxed")
        else:
            tl.atomic_add(bins + bin, 1, mask=bin < BINS, sem="relaxed")
        share += 1


@triton.jit
def _least_of(key, count, least, bit):
    """Return a bound that `count` keys reach: the largest there is, from its first bits and the next on.

    Ends early where exactly so many reach it: they are what is above it and what is equal to it.
    """
    enough = -1
    while (bit >= 0) & (enough != count):
        candidate = least | (1 << bit)
        enough = tl.sum((key >= candidate).to(tl.int32), 0)
        least = tl.where(enough >= count, candidate, least)
        bit -= 1
    return least


@triton.jit
def _enter(to, key, group, names, least, left, above, equal):
    """List those of some groups that are chosen: so many are above the least one before, or equal to it.

    Of those that are equal to the least one, the first.
    """
    # Both counts in one sum: these are fewer than 2^15 groups.
    both = (key > least).to(tl.int32) + ((key == least).to(tl.int32) << 16)
    until = tl.cumsum(both, 0)
    equals = equal + (until >> 16)
    at = above + (until & 0xFFFF) + tl.minimum(equals, left) - 1
    taken = (key > least) | ((key == least) & (equals <= left))
    if names is not None:
        group = tl.load(names + group, mask=taken, other=0)
    tl.store(to + at, group, mask=taken)
    return both


@triton.jit
def _enter_fixed(span, to):
    """List the groups of sinks and window, which are before and behind those that are chosen."""
    sink_start, sink_end, window = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    count, last = tl.load(span + 3), tl.load(span + 4)
    sinks = sink_end - sink_start
    step = tl.arange(0, 256)
    at = 0
    while at < sinks:
        tl.store(to + at + step, sink_start + at + step, mask=at + step < sinks)
        at += 256
    at = 0
    while at < last - window:
        tl.store(to + sinks + count + at + step, window + at + step, mask=at + step < last - window)
        at += 256


@triton.jit(do_not_specialize=["groups", "width", "rows_of_span"])
def _whole(
    votes, bins, names, spans, chosen, groups, width, rows_of_span, largest,
    SPAN: tl.constexpr, HELD: tl.constexpr, BINS: tl.constexpr, SHIFT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Do the whole selection of a row in registers."""
    row = tl.program_id(0).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    sinks, count = tl.load(span + 1) - tl.load(span), tl.load(span + 3)
    follow(EARLY)
    group = tl.arange(0, HELD)
    vote = tl.load(votes + row * groups + group, mask=group < groups, other=-1.0)
    # Votes are not negative, and their bits are ordered as they are; others have the sign bit.
    key = vote.to(tl.int32, bitcast=True)
    if bins is None:
        least = 0
        bit = 30
    else:
        edge = threshold_bin(line_of(bins, row, BINS), count, BINS)
        least, bit = first_guess(edge, count, largest, BINS, SHIFT)
    least = _least_of(key, count, least, bit)
    left = count - tl.sum((key > least).to(tl.int32), 0)
    if names is not None:
        names += row * groups
    to = chosen + row * width
    _enter(to + sinks, key, group, names, least, left, 0, 0)
    _enter_fixed(span, to)


@triton.jit(do_not_specialize=["groups", "shares", "rows_of_span"])
def _keep(
    votes, bins, spans, found, rivals, groups, shares, rows_of_span, largest,
    SPAN: tl.constexpr, PART: tl.constexpr, HELD: tl.constexpr, BINS: tl.constexpr, SHIFT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Count the groups of a program's parts above the threshold's bin, and keep those in it with their votes.

    All programs of a row share the room, so that it does not matter where in the row these groups are.
    """
    row = tl.program_id(1).to(tl.int64)
    split, splits = tl.program_id(0), tl.num_programs(0)
    count = tl.load(spans + row // rows_of_span * SPAN + 3)
    follow(EARLY)
    bins = line_of(bins, row, BINS)
    edge = threshold_bin(bins, count, BINS)
    to = rivals + row * 2 * HELD
    above = 0
    inside = 0
    share = 0
    while share < shares:
        group = (split * shares + share) * PART + tl.arange(0, PART)
        vote = tl.load(votes + row * groups + group, mask=group < groups, other=-1.0)
        key = vote.to(tl.int32, bitcast=True)
        bin = bin_of(key, count, largest, BINS, SHIFT)
        rival = (vote >= 0) & (bin == edge)
        both = ((vote >= 0) & (bin < edge)).to(tl.int32) + (rival.to(tl.int32) << 16)
        own = tl.sum(both, 0)
        # In any order, which the numbers of the groups tell.
        at = tl.atomic_add(bins + BINS, own >> 16, sem="relaxed") + (tl.cumsum(both, 0) >> 16) - 1
        tl.store(to + at, key, mask=rival & (at < HELD))
        tl.store(to + HELD + at, group, mask=rival & (at < HELD))
        above += own & 0xFFFF
        inside += own >> 16
        share += 1
    found += row * 3 * splits + split
    tl.store(found, above)
    tl.store(found + splits, inside)
    tl.store(found + 2 * splits, edge)


@triton.jit(do_not_specialize=["groups", "width", "shares", "rows_of_span"])
def _list(
    votes, bins, found, rivals, names, spans, chosen, groups, width, shares, rows_of_span, largest,
    SPAN: tl.constexpr, PART: tl.constexpr, HELD: tl.constexpr, SPLITS: tl.constexpr, BINS: tl.constexpr,
    SHIFT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """List the chosen groups of a program's parts: where, follows from what was found in those before."""
    row = tl.program_id(1).to(tl.int64)
    split, splits = tl.program_id(0), tl.num_programs(0)
    span = spans + row // rows_of_span * SPAN
    sinks, count = tl.load(span + 1) - tl.load(span), tl.load(span + 3)
    follow(EARLY)
    votes += row * groups
    found += row * 3 * splits
    begin = split * shares * PART
    part = tl.arange(0, SPLITS)
    above_of = tl.load(found + part, mask=part < splits, other=0)
    inside_of = tl.load(found + splits + part, mask=part < splits, other=0)
    edge = tl.load(found + 2 * splits + split)
    least, bit = first_guess(edge, count, largest, BINS, SHIFT)
    inside = tl.sum(inside_of, 0)
    if inside <= HELD:
        place = tl.arange(0, HELD)
        rivals += row * 2 * HELD
        rival = tl.load(rivals + place, mask=place < inside, other=-1)
        of_rival = tl.load(rivals + HELD + place, mask=place < inside, other=0)
        all_above = tl.sum(above_of, 0)
        above = tl.sum(tl.where(part < split, above_of, 0), 0)
        least = _least_of(rival, count - all_above, least, bit)
        before = of_rival < begin
        all_above += tl.sum((rival > least).to(tl.int32), 0)
        both = (rival > least).to(tl.int32) + ((rival == least).to(tl.int32) << 16)
        both = tl.sum(tl.where(before, both, 0), 0)
        above += both & 0xFFFF
        equal = both >> 16
    else:
        # Flat votes: thousands are in one bin. Of an outer one no bit is known, so that all votes count.
        left = tl.where(bit == 30, count, count - tl.sum(above_of, 0))
        least, all_above, above, equal = _search(votes, groups, least, bit + 1, left, begin, 4096)
    left = count - all_above
    if names is not None:
        names += row * groups
    to = chosen + row * width
    share = 0
    while share < shares:
        group = begin + share * PART + tl.arange(0, PART)
        vote = tl.load(votes + group, mask=group < groups, other=-1.0)
        key = vote.to(tl.int32, bitcast=True)
        both = tl.sum(_enter(to + sinks, key, group, names, least, left, above, equal), 0)
        above += both & 0xFFFF
        equal += both >> 16
        share += 1
    if split == 0:
        _enter_fixed(span, to)
        # Whoever selects by the same bins once more counts from 0 again.
        tl.store(line_of(bins, row, BINS) + BINS, 0)


@triton.jit
def _search(votes, groups, least, known, left, begin, STEP: tl.constexpr):
    """Do by all votes what `_list` does by the rivals' where there is room for them: 8 bits at a time.

    The bits from number `known` on are those of `least`; `left` votes that have them are to be found.
    """
    place = tl.arange(0, STEP)
    digit = tl.arange(0, 256)
    while known > 0:
        shift = tl.maximum(known - 8, 0)
        number = tl.zeros([256], tl.int32)
        at = 0
        while at < groups:
            vote = tl.load(votes + at + place, mask=at + place < groups, other=-1.0)
            key = vote.to(tl.int32, bitcast=True)
            same = (vote >= 0) & (((key ^ least) >> known) == 0)
            own = tl.where(same, (key >> shift) & ((1 << (known - shift)) - 1), 256)
            # A histogram counts each thread's copy: after a gather no two threads have the same votes.
            own = tl.gather(own, place, 0)
            number += tl.histogram(own, 256, mask=own < 256)
            at += STEP
        # Votes with this digit or a greater one, greatest first.
        reached = tl.sum(number, 0) - tl.cumsum(number, 0) + number
        found = tl.max(tl.where(reached >= left, digit, 0), 0)
        left -= tl.sum(tl.where(digit > found, number, 0), 0)
        least |= found << shift
        known = shift
    all_above = 0
    above = 0
    equal = 0
    at = 0
    while at < groups:
        vote = tl.load(votes + at + place, mask=at + place < groups, other=-1.0)
        key = vote.to(tl.int32, bitcast=True)
        all_above += tl.sum((key > least).to(tl.int32), 0)
        above += tl.sum(((key > least) & (at + place < begin)).to(tl.int32), 0)
        equal += tl.sum(((key == least) & (at + place < begin)).to(tl.int32), 0)
        at += STEP
    return least, all_above, above, equal
