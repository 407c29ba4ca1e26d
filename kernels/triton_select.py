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

_MANY_ROWS = 128


@dataclass(frozen=True)
class Votes:
    """Votes of all groups."""

    votes: Tensor
    """``[rows, groups]`` float32; infinite for broken groups, -1 for those that are not to choose from."""
    tops: Tensor
    """``[rows, runs]`` float32: the most votes in each run of groups."""


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
    run = min(max(8, triton.next_power_of_2(triton.cdiv(groups, 8192))), together * masses.block)
    kind: dict[str, Any] = {"dtype": torch.float32, "device": masses.mass.device}
    early = overlap(masses.mass.device)
    votes, tops = torch.empty(rows, groups, **kind), torch.empty(rows, triton.cdiv(groups, run), **kind)
    _vote[(triton.cdiv(masses.blocks, together), rows)](
        masses.mass, masses.sums, spans, votes, tops, groups, tops.shape[1], masses.blocks, rows_of_span,
        SPAN=spans.shape[1], HEADS=heads, PADDED_HEADS=padded, BLOCK=masses.block, TOGETHER=together, RUN=run,
        STEP=max(16, min(2048 // padded, triton.next_power_of_2(masses.blocks))), MOST=most,
        num_warps=launch.warps, **early,
    )  # fmt: skip
    return Votes(votes, tops)


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
    early = overlap(votes.votes.device)
    launch = launch_parameters(Select, votes.votes.device, shape_of(groups, rows))
    part, few, more, warps = launch.part, launch.few, launch.more, launch.warps
    if rows > _MANY_ROWS:
        # With many programs on a multiprocessor few registers matter more than how much one program holds.
        more, warps = 4 * few, 16
    parts = triton.cdiv(groups, part)
    kind: dict[str, Any] = {"dtype": torch.int32, "device": votes.votes.device}
    # As many runs as there are groups to choose have a top: what is less than their least is not chosen.
    least, counts = torch.empty(rows, **kind), torch.empty(rows, parts, **kind)
    held = triton.next_power_of_2(max(runs, 128))
    _least_top[(rows,)](
        votes.tops, spans, least, runs, rows_of_span, SPAN=spans.shape[1], HELD=held,
        num_warps=4 if held <= 4096 else 8, **early,
    )  # fmt: skip
    _count[(parts, rows)](votes.votes, least, counts, groups, parts, PART=part, num_warps=4, **early)
    left, shape = torch.empty(2, rows, groups, **kind), {"PARTS": triton.next_power_of_2(parts)}
    _keep[(parts, rows)](
        votes.votes, least, counts, left[0], left[1], names, groups, parts, PART=part, **shape, num_warps=4,
        **early,
    )  # fmt: skip
    chosen = torch.empty(rows, width, **kind)
    _select[(rows,)](
        left[0], left[1], counts, groups, spans, chosen, width, rows_of_span,
        SPAN=spans.shape[1], COUNTS=parts, **shape, FEW=few, MORE=more, num_warps=warps,
        **early,
    )  # fmt: skip
    return chosen


@triton.jit(do_not_specialize=["groups", "runs", "blocks", "rows_of_span"])
def _vote(
    mass, sums, spans, votes, tops, groups, runs, blocks, rows_of_span,
    SPAN: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    first, end = tl.load(span + 1), tl.load(span + 2)
    head = tl.arange(0, PADDED_HEADS)
    used = head[None, :] < HEADS
    block = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    group = tl.program_id(0) * TOGETHER * BLOCK + tl.arange(0, TOGETHER * BLOCK)
    wanted = used & (group[:, None] < groups)
    of_group = mass + (row * groups + group[:, None]) * PADDED_HEADS
    given = tl.load(of_group + head[None, :], mask=wanted, other=0.0)
    of_row = sums + row * 2 * blocks * PADDED_HEADS
    own = tl.load(
        of_row + block[:, None] * PADDED_HEADS + head[None, :], mask=used & (block[:, None] < blocks),
        other=float("-inf"),
    )  # fmt: skip
    best = tl.full([PADDED_HEADS], float("-inf"), tl.float32)
    whole = tl.zeros([PADDED_HEADS], tl.float32)
    begin = 0
    while begin < blocks:
        number = begin + tl.arange(0, STEP)
        inside = used & (number[:, None] < blocks)
        at = of_row + number[:, None] * PADDED_HEADS + head[None, :]
        peak = tl.load(at, mask=inside, other=float("-inf"))
        total = tl.load(at + blocks * PADDED_HEADS, mask=inside, other=0.0)
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
    """Return the `count`-th largest key, or a bound below it that agrees in its first bits."""
    least = 0
    # Two bits at a time: the three counts that tell them are added up in one sum.
    for pair in tl.static_range(BITS // 2):
        one, two = least | (1 << (29 - 2 * pair)), least | (2 << (29 - 2 * pair))
        three = one | two
        counts = (key >= one).to(tl.int64) + ((key >= two).to(tl.int64) << 20)
        total = tl.sum(counts + ((key >= three).to(tl.int64) << 40), 0)
        least = tl.where((total & 0xFFFFF) >= count, one, least)
        least = tl.where(((total >> 20) & 0xFFFFF) >= count, two, least)
        least = tl.where((total >> 40) >= count, three, least)
    if BITS % 2 == 1:
        candidate = least | (1 << (31 - BITS))
        least = tl.where(tl.sum((key >= candidate).to(tl.int32), 0) >= count, candidate, least)
    return least


@triton.jit(do_not_specialize=["groups", "width", "rows_of_span"])
def _select(
    keys, numbers, counts, groups, spans, chosen, width, rows_of_span,
    SPAN: tl.constexpr, PARTS: tl.constexpr, COUNTS: tl.constexpr, FEW: tl.constexpr, MORE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    sink_start, sink_end, window = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    count, last = tl.load(span + 3), tl.load(span + 4)
    part = tl.arange(0, PARTS)
    listed = tl.sum(tl.load(counts + row * COUNTS + part, mask=part < COUNTS, other=0), 0)
    to = chosen + row * width
    own, own_numbers, chosen_to = keys + row * groups, numbers + row * groups, to + sink_end - sink_start
    if listed <= FEW:
        _select_held(own, own_numbers, chosen_to, listed, count, FEW)
    elif (4 * FEW < MORE) & (listed <= 4 * FEW):
        _select_held(own, own_numbers, chosen_to, listed, count, 4 * FEW)
    elif listed <= MORE:
        _select_held(own, own_numbers, chosen_to, listed, count, MORE)
    else:
        _select_many(own, own_numbers, chosen_to, listed, count, MORE)
    step = tl.arange(0, 256)
    sinks = sink_end - sink_start
    begin = 0
    while begin < sinks:
        tl.store(to + begin + step, sink_start + begin + step, mask=begin + step < sinks)
        begin += 256
    begin = 0
    while begin < last - window:
        tl.store(to + sinks + count + begin + step, window + begin + step, mask=begin + step < last - window)
        begin += 256


@triton.jit
def _select_held(keys, numbers, to, listed, count, HELD: tl.constexpr):
    """Choose among as many entries as registers hold."""
    place = tl.arange(0, HELD)
    key = tl.load(keys + place, mask=place < listed, other=-1)
    number = tl.load(numbers + place, mask=place < listed, other=0)
    least = _least_of(key, count, 31)
    equal = (key == least).to(tl.int32)
    left = count - tl.sum((key > least).to(tl.int32), 0)
    taken = (key > least) | ((equal > 0) & (tl.cumsum(equal, 0) <= left))
    tl.store(to + tl.cumsum(taken.to(tl.int32), 0) - 1, number, mask=taken)


@triton.jit
def _select_many(keys, numbers, to, listed, count, STEP: tl.constexpr):
    """Choose among more entries than registers hold, a bit at a time."""
    place = tl.arange(0, STEP)
    least = 0
    bit = 30
    while bit >= 0:
        candidate = least | (1 << bit)
        enough = 0
        begin = 0
        while begin < listed:
            key = tl.load(keys + begin + place, mask=begin + place < listed, other=-1)
            enough += tl.sum((key >= candidate).to(tl.int32), 0)
            begin += STEP
        least = tl.where(enough >= count, candidate, least)
        bit -= 1
    above = 0
    begin = 0
    while begin < listed:
        key = tl.load(keys + begin + place, mask=begin + place < listed, other=-1)
        above += tl.sum((key > least).to(tl.int32), 0)
        begin += STEP
    written = 0
    equals = 0
    begin = 0
    while begin < listed:
        key = tl.load(keys + begin + place, mask=begin + place < listed, other=-1)
        equal = (key == least).to(tl.int32)
        taken = (key > least) | ((equal > 0) & (equals + tl.cumsum(equal, 0) <= count - above))
        number = tl.load(numbers + begin + place, mask=taken, other=0)
        tl.store(to + written + tl.cumsum(taken.to(tl.int32), 0) - 1, number, mask=taken)
        written += tl.sum(taken.to(tl.int32), 0)
        equals += tl.sum(equal, 0)
        begin += STEP


@triton.jit(do_not_specialize=["runs", "rows_of_span"])
def _least_top(
    tops, spans, least, runs, rows_of_span, SPAN: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr
):
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(spans + row // rows_of_span * SPAN + 3)
    place = tl.arange(0, HELD)
    top = tl.load(tops + row * runs + place, mask=place < runs, other=-1.0)
    # Votes are not negative, and their bits are ordered as they are; others have the sign bit.
    tl.store(least + row, _least_of(top.to(tl.int32, bitcast=True), count, 16))


@triton.jit(do_not_specialize=["groups", "parts"])
def _count(votes, least, counts, groups, parts, PART: tl.constexpr, EARLY: tl.constexpr):
    follow(EARLY)
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * PART + tl.arange(0, PART)
    vote = tl.load(votes + row * groups + group, mask=group < groups, other=-1.0)
    kept = vote.to(tl.int32, bitcast=True) >= tl.load(least + row)
    tl.store(counts + row * parts + tl.program_id(0), tl.sum(kept.to(tl.int32), 0))


@triton.jit(do_not_specialize=["groups", "parts"])
def _keep(
    votes, least, counts, keys, numbers, names, groups, parts, PART: tl.constexpr, PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    row = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, PARTS)
    before = tl.sum(tl.load(counts + row * parts + part, mask=part < tl.program_id(0), other=0), 0)
    group = tl.program_id(0) * PART + tl.arange(0, PART)
    vote = tl.load(votes + row * groups + group, mask=group < groups, other=-1.0)
    key = vote.to(tl.int32, bitcast=True)
    kept = key >= tl.load(least + row)
    at = row * groups + before + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(keys + at, key, mask=kept)
    if names is not None:
        group = tl.load(names + row * groups + group, mask=kept, other=0)
    tl.store(numbers + at, group, mask=kept)
