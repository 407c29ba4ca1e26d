"""Triton: votes of the query heads, and the groups with the most of them (reference: `route`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.triton_score import Masses

__all__ = ["select_groups", "votes_of"]

# Groups whose votes one program holds in registers.
_HELD = 2**15
_PART = 2048


def votes_of(masses: Masses, spans: Tensor, heads: int, most: bool, rows_of_span: int) -> Tensor:
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

    Returns
    -------
    Tensor
        ``[rows, groups]`` float32; infinite for broken groups, -1 for those that are not to choose from.
    """
    rows, groups, padded = masses.mass.shape
    votes = torch.empty(rows, groups, dtype=torch.float32, device=masses.mass.device)
    together = max(1, min(512, 4096 // padded) // masses.block)
    _vote[(triton.cdiv(masses.blocks, together), rows)](
        masses.mass, masses.sums, spans, votes, groups, masses.blocks, rows_of_span,
        SPAN=spans.shape[1], HEADS=heads, PADDED_HEADS=padded, BLOCK=masses.block, TOGETHER=together,
        STEP=max(16, min(2048 // padded, triton.next_power_of_2(masses.blocks))), MOST=most, num_warps=4,
    )  # fmt: skip
    return votes


def select_groups(votes: Tensor, spans: Tensor, width: int, rows_of_span: int) -> Tensor:
    """List the groups of sinks, those with the most votes, and the window, ascending.

    Of groups with equal votes the first ones are taken.

    Parameters
    ----------
    votes : Tensor
        From `votes_of`.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    width : int
        Groups of the longest list.
    rows_of_span : int
        Rows that a line of `spans` is for.

    Returns
    -------
    Tensor
        ``[rows, width]`` int32; entries past a row's own list are not written.
    """
    rows, groups = votes.shape
    chosen = torch.empty(rows, width, dtype=torch.int32, device=votes.device)
    fixed = (spans, chosen, width, rows_of_span)
    if groups <= _HELD:
        _select_held[(rows,)](votes, votes, votes, groups, *fixed, SPAN=spans.shape[1], **_held(groups), LISTED=False)
        return chosen
    # What is less than as many runs have at least is not among the best: few groups are left to look at.
    run = max(8, triton.next_power_of_2(triton.cdiv(groups, 8192)))
    runs, parts = triton.cdiv(groups, run), triton.cdiv(groups, _PART)
    kind = {"dtype": torch.int32, "device": votes.device}
    tops, least = torch.empty(rows, runs, dtype=torch.float32, device=votes.device), torch.empty(rows, **kind)
    _run_tops[(triton.cdiv(runs, 256), rows)](votes, tops, groups, runs, RUN=run, STEP=256, num_warps=8)
    _least_top[(rows,)](tops, spans, least, runs, rows_of_span, SPAN=spans.shape[1], **_held(runs))
    counts = torch.empty(rows, parts, **kind)
    _count[(parts, rows)](votes, least, counts, groups, parts, PART=_PART, num_warps=4)
    left = torch.empty(2, rows, groups, **kind)
    _keep[(parts, rows)](
        votes, least, counts, left[0], left[1], groups, parts, PART=_PART,
        PARTS=triton.next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
    _select_held[(rows,)](
        left[0], left[1], counts, groups, *fixed, SPAN=spans.shape[1], HELD=_HELD, num_warps=16, LISTED=True,
        PARTS=triton.next_power_of_2(parts), COUNTS=parts,
    )  # fmt: skip
    return chosen


def _held(entries: int) -> dict[str, int]:
    held = triton.next_power_of_2(max(entries, 128))
    return {"HELD": held, "num_warps": 4 if held <= 4096 else 8 if held <= 16384 else 16}


@triton.jit(do_not_specialize=["groups", "blocks", "rows_of_span"])
def _vote(
    mass, sums, spans, votes, groups, blocks, rows_of_span,
    SPAN: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    first, end = tl.load(span + 1), tl.load(span + 2)
    head = tl.arange(0, PADDED_HEADS)
    used = head[None, :] < HEADS
    block = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    group = tl.program_id(0) * TOGETHER * BLOCK + tl.arange(0, TOGETHER * BLOCK)
    wanted = used & (group[:, None] < groups)
    given = tl.load(mass + (row * groups + group[:, None]) * PADDED_HEADS + head[None, :], mask=wanted, other=0.0)
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
    tl.store(votes + row * groups + group, vote, mask=group < groups)


@triton.jit
def _least_of(key, count):
    """Return the `count`-th largest key; keys that are negative do not count."""
    least = 0
    # Two bits at a time: the counts above three candidates fit into one number.
    for place in tl.static_range(15):
        step = 1 << (29 - 2 * place)
        one = (key >= least + step).to(tl.int64)
        two = (key >= least + 2 * step).to(tl.int64)
        three = (key >= least + 3 * step).to(tl.int64)
        found = tl.sum(one | (two << 21) | (three << 42), 0)
        enough_one = ((found & 0x1FFFFF) >= count).to(tl.int32)
        enough_two = (((found >> 21) & 0x1FFFFF) >= count).to(tl.int32)
        enough_three = ((found >> 42) >= count).to(tl.int32)
        least += step * (enough_one + enough_two + enough_three)
    return tl.where(tl.sum((key >= least + 1).to(tl.int32), 0) >= count, least + 1, least)


@triton.jit(do_not_specialize=["groups", "width", "rows_of_span"])
def _select_held(
    votes, numbers, counts, groups, spans, chosen, width, rows_of_span,
    SPAN: tl.constexpr, HELD: tl.constexpr, LISTED: tl.constexpr, PARTS: tl.constexpr = 1, COUNTS: tl.constexpr = 1,
):  # fmt: skip
    """Choose among all groups, or among those listed: votes as their bits, and numbers."""
    row = tl.program_id(0).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    sink_start, sink_end, window = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    count, last = tl.load(span + 3), tl.load(span + 4)
    place = tl.arange(0, HELD)
    to = chosen + row * width
    if LISTED:
        part = tl.arange(0, PARTS)
        listed = tl.sum(tl.load(counts + row * COUNTS + part, mask=part < COUNTS, other=0), 0)
        key = tl.load(votes + row * groups + place, mask=place < listed, other=-1)
    else:
        listed = groups
        vote = tl.load(votes + row * groups + place, mask=place < groups, other=-1.0)
        # Votes are not negative, and their bits are ordered as they are; others have the sign bit.
        key = vote.to(tl.int32, bitcast=True)
    if listed <= HELD:
        least = _least_of(key, count)
        above = tl.sum((key > least).to(tl.int32), 0)
        equal = (key == least).to(tl.int64)
        # Both running counts in one scan.
        running = tl.cumsum((key > least).to(tl.int64) | (equal << 32), 0)
        before = (running >> 32).to(tl.int32)
        taken = (count > 0) & ((key > least) | ((equal > 0) & (before <= count - above)))
        at = (running & 0xFFFFFFFF).to(tl.int32) + tl.minimum(before, count - above) - 1
        if LISTED:
            number = tl.load(numbers + row * groups + place, mask=taken, other=0)
        else:
            number = place
        tl.store(to + sink_end - sink_start + at, number, mask=taken)
    else:
        _select_many(votes + row * groups, numbers + row * groups, to + sink_end - sink_start, listed, count, HELD)
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
        tl.store(to + written + tl.cumsum(taken.to(tl.int32), 0) - 1, number, mask=taken & (count > 0))
        written += tl.sum(taken.to(tl.int32), 0)
        equals += tl.sum(equal, 0)
        begin += STEP


@triton.jit(do_not_specialize=["groups", "runs"])
def _run_tops(votes, tops, groups, runs, RUN: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0) * STEP + tl.arange(0, STEP)
    group = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    vote = tl.load(votes + row * groups + group, mask=group < groups, other=-1.0)
    tl.store(tops + row * runs + run, tl.max(vote, 1), mask=run < runs)


@triton.jit(do_not_specialize=["runs", "rows_of_span"])
def _least_top(tops, spans, least, runs, rows_of_span, SPAN: tl.constexpr, HELD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(spans + row // rows_of_span * SPAN + 3)
    place = tl.arange(0, HELD)
    top = tl.load(tops + row * runs + place, mask=place < runs, other=-1.0)
    # With more to choose than runs, nothing can be left out by them.
    tl.store(least + row, _least_of(top.to(tl.int32, bitcast=True), count))


@triton.jit(do_not_specialize=["groups", "parts"])
def _count(votes, least, counts, groups, parts, PART: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * PART + tl.arange(0, PART)
    vote = tl.load(votes + row * groups + group, mask=group < groups, other=-1.0)
    kept = vote.to(tl.int32, bitcast=True) >= tl.load(least + row)
    tl.store(counts + row * parts + tl.program_id(0), tl.sum(kept.to(tl.int32), 0))


@triton.jit(do_not_specialize=["groups", "parts"])
def _keep(votes, least, counts, keys, numbers, groups, parts, PART: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, PARTS)
    before = tl.sum(tl.load(counts + row * parts + part, mask=part < tl.program_id(0), other=0), 0)
    group = tl.program_id(0) * PART + tl.arange(0, PART)
    vote = tl.load(votes + row * groups + group, mask=group < groups, other=-1.0)
    key = vote.to(tl.int32, bitcast=True)
    kept = key >= tl.load(least + row)
    at = row * groups + before + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(keys + at, key, mask=kept)
    tl.store(numbers + at, group, mask=kept)
