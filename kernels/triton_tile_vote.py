"""Triton: votes of a tile of queries for the groups of a KV head (reference: `coarse`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.coarse import Coarse
from hga_compile.kernels.triton_select import Votes

__all__ = ["bases_of", "votes_by_means"]


def bases_of(
    query: Coarse, anchors: Coarse, singles: int, block: int, spans: Tensor, rows_of_span: int
) -> Tensor:
    """Return the log2 of the normaliser of every query of each tile.

    Parameters
    ----------
    query : Coarse
        ``[rows, tiles, lines, padded]``, from `triton_coarse.coarse_queries`.
    anchors : Coarse
        ``[rows, entries, padded]``.
    singles, block : int
        Entries that are single tokens, and tokens of the others.
    spans : Tensor
        ``[tiles * lines of a tile, SPAN]`` int32 (see `gpu.tile_spans`), those of the first tile first.
    rows_of_span : int
        Rows that a line of `spans` is for.

    Returns
    -------
    Tensor
        ``[rows, tiles, lines]`` float32; infinite for a line that has no vote.
    """
    rows, tiles, lines, padded = query.values.shape
    bases = torch.empty(rows, tiles, lines, dtype=torch.float32, device=query.steps.device)
    together = 128 if lines % 128 == 0 and padded <= 128 else 64
    _normalise[(tiles * (lines // together), rows)](
        query.values, query.steps, anchors.values, anchors.steps, spans, bases, anchors.steps.shape[1], tiles,
        lines, rows_of_span, singles, float(block),
        SPAN=spans.shape[1], DIM=padded, LINES=together, GROUPS=64, num_warps=4,
    )  # fmt: skip
    return bases


def votes_by_means(
    query: Coarse, means: Coarse, bases: Tensor, groups: int, spans: Tensor, most: bool, rows_of_span: int
) -> Votes:
    """Let every query and head of each tile vote for the groups before the window by their means.

    Parameters
    ----------
    query, spans, rows_of_span
        As `bases_of` takes them.
    means : Coarse
        ``[rows, >= groups, padded]``.
    bases : Tensor
        From `bases_of`.
    groups : int
        Groups to look at: all up to the last window of these tiles.
    most : bool
        Whether the vote is the greatest mass rather than the sum.

    Returns
    -------
    Votes
        ``[tiles * rows, groups]``, those of the first tile first.
    """
    rows, tiles, lines, padded = query.values.shape
    block = 128
    votes = torch.empty(tiles * rows, groups, dtype=torch.float32, device=query.steps.device)
    _vote[(triton.cdiv(groups, block), tiles, rows)](
        query.values, query.steps, means.values, means.steps, spans, bases, votes,
        means.steps.shape[1], groups, tiles, lines, rows_of_span,
        SPAN=spans.shape[1], DIM=padded, LINES=32, GROUPS=block, MOST=most, num_warps=4,
    )  # fmt: skip
    return Votes(votes)


@triton.jit(do_not_specialize=["held", "tiles", "lines", "rows_of_span", "singles"])
def _normalise(
    queries, query_steps, keys, key_steps, spans, bases, held, tiles, lines, rows_of_span, singles, size,
    SPAN: tl.constexpr, DIM: tl.constexpr, LINES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write the log2 of the sum of a line's masses; infinite for a line that has no vote."""
    parts = lines // LINES
    # The last tiles see the most: they begin first.
    tile = tiles - 1 - tl.program_id(0) // parts
    row = tl.program_id(1).to(tl.int64)
    span = spans + (tile * tl.num_programs(1) + row) // rows_of_span * SPAN
    first, end = tl.load(span + 6), tl.load(span + 7)
    line = (row * tiles + tile) * lines + tl.program_id(0) % parts * LINES + tl.arange(0, LINES)
    channel = tl.arange(0, DIM)
    query = tl.load(queries + line[:, None] * DIM + channel[None, :])
    step = tl.load(query_steps + line)
    lost = step != step
    step = tl.where(lost, 0.0, step)
    peak = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    of_keys = keys + row * held * DIM
    of_steps = key_steps + row * held
    whole, stop = tl.cdiv(first, GROUPS) * GROUPS, end // GROUPS * GROUPS
    # Blocks that lie whole between first and end need no mask; of the others there are two at most.
    for begin in tl.range(whole, stop, GROUPS, num_stages=3):
        peak, total = _absorb(
            of_keys, of_steps, query, step, peak, total, begin, first, end, singles, size, DIM,
            GROUPS, False,
        )  # fmt: skip
    if whole > first:
        peak, total = _absorb(
            of_keys,
            of_steps,
            query,
            step,
            peak,
            total,
            whole - GROUPS,
            first,
            end,
            singles,
            size,
            DIM,
            GROUPS,
            True,
        )
    if (stop < end) & (stop >= whole):
        peak, total = _absorb(
            of_keys, of_steps, query, step, peak, total, stop, first, end, singles, size, DIM,
            GROUPS, True,
        )  # fmt: skip
    lost = lost | (total == 0)
    tl.store(bases + line, tl.where(lost, float("inf"), peak * step + tl.log2(total)))


@triton.jit
def _absorb(
    keys, steps, query, step, peak, total, begin, first, end, singles, size,
    DIM: tl.constexpr, GROUPS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add the masses of a block of entries, each as often as it has tokens, to a running sum."""
    group = begin + tl.arange(0, GROUPS)
    channel = tl.arange(0, DIM)
    if EDGE:
        inside = (group >= first) & (group < end)
        key = tl.load(keys + group[:, None] * DIM + channel[None, :], mask=inside[:, None], other=0.0)
        unit = tl.load(steps + group, mask=inside, other=float("nan"))
    else:
        key = tl.load(keys + group[:, None] * DIM + channel[None, :])
        unit = tl.load(steps + group)
    lost = tl.where(unit == unit, 0.0, float("-inf"))
    unit = tl.where(unit == unit, unit, 0.0)
    score = tl.dot(query, tl.trans(key)) * unit[None, :] + lost[None, :]
    most = tl.maximum(peak, tl.max(score, 1))
    base = tl.where(most == float("-inf"), 0.0, most) * step
    mass = tl.exp2(score * step[:, None] - base[:, None]) * tl.where(group < singles, 1.0, size)[None, :]
    return most, total * tl.exp2(peak * step - base) + tl.sum(mass, 1)


@triton.jit(do_not_specialize=["held", "groups", "tiles", "lines", "rows_of_span"])
def _vote(
    queries, query_steps, keys, key_steps, spans, bases, votes, held, groups, tiles, lines,
    rows_of_span,
    SPAN: tl.constexpr, DIM: tl.constexpr, LINES: tl.constexpr, GROUPS: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    tile = tiles - 1 - tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    place = tile * tl.num_programs(2) + row
    span = spans + place // rows_of_span * SPAN
    sink_end, end = tl.load(span + 1), tl.load(span + 2)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    vote = tl.full([GROUPS], -1.0, tl.float32)
    if tl.program_id(0) * GROUPS < end:
        inside = (group >= sink_end) & (group < end)
        channel = tl.arange(0, DIM)
        of_group = (row * held + group)[:, None] * DIM + channel[None, :]
        key = tl.load(keys + of_group, mask=inside[:, None], other=0.0)
        unit = tl.load(key_steps + row * held + group, mask=inside, other=0.0)
        masses = tl.zeros([GROUPS, LINES], tl.float32)
        number = tl.arange(0, LINES)
        for begin in tl.range(0, lines, LINES, num_stages=3):
            line = (row * tiles + tile) * lines + begin + number
            query = tl.load(queries + line[:, None] * DIM + channel[None, :])
            base = tl.load(bases + line)
            # A line without a vote has an infinite base, and a step that may be no number.
            step = tl.where(base == float("inf"), 0.0, tl.load(query_steps + line))
            score = tl.dot(key, tl.trans(query)) * unit[:, None]
            mass = tl.exp2(score * step[None, :] - base[None, :])
            masses = tl.maximum(masses, mass) if MOST else masses + mass
        vote = tl.max(masses, 1) if MOST else tl.sum(masses, 1)
        vote = tl.where(unit == unit, vote, float("inf"))
        vote = tl.where(inside, vote, -1.0)
    tl.store(votes + place * groups + group, vote, mask=group < groups)
