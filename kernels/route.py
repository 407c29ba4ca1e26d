"""Two-level routing in plain torch: which groups each query attends to, beside its sinks and its window."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.chunks import ChunkSummary
from hga_compile.kernels.plan import QueryPlan, per_row
from hga_compile.kernels.summaries import Scorer

__all__ = ["Chosen", "choose_groups", "merge_votes"]


@dataclass(frozen=True)
class Chosen:
    """Chosen groups of a run of queries.

    `groups` is ``[rows, queries, most]`` int64; entries where `kept` (bool, same shape) is False count for
    nothing. A row is one KV head of one sequence.
    """

    groups: Tensor
    kept: Tensor


def merge_votes(scores: Tensor, seen: Tensor | None, vote: str, certain: int = 0) -> Tensor:
    """Merge the query heads' scores of a KV head into one vote per group.

    Every head votes with its softmax mass over the groups it sees, so that a head that attends elsewhere has
    little to say.

    Parameters
    ----------
    scores : Tensor
        ``[rows, heads, queries, groups, members]`` float32 (see `summaries.Scorer`). Overwritten.
    seen : Tensor or None
        bool, broadcastable to ``[rows, queries, groups]``: groups that take part; None: all.
    vote : str
        `mass_sum` or `mass_max` (`routing.vote`).
    certain : int
        First groups that every query sees, whatever `seen` says: no time is spent on their mask.

    Returns
    -------
    Tensor
        ``[rows, queries, groups]``; 0 where not seen, infinite for a group whose score is not a number, so
        that broken keys are attended to, never lost.
    """
    if seen is not None and certain < scores.shape[3]:
        hidden = ~seen[..., certain:]
        scores[..., certain:, :].masked_fill_(hidden[:, None, :, :, None], -torch.inf)
    peak = scores.flatten(3).amax(-1) if scores.shape[3] else scores.new_zeros(scores.shape[:3])
    broken = None
    if not bool(torch.isfinite(peak).all()):
        # A score that is not a number, an infinite one, or a query that sees nothing.
        broken = torch.isnan(scores).any(-1) | (scores == torch.inf).any(-1)
        scores.masked_fill_(broken[..., None], -torch.inf)
        peak = scores.flatten(3).amax(-1)
        peak = torch.where(torch.isinf(peak), torch.zeros_like(peak), peak)
    mass = _sum_members(scores.sub_(peak[..., None, None]).exp_())
    total = mass.sum(-1, keepdim=True)
    mass /= torch.where(total > 0, total, torch.ones_like(total))
    votes = mass.amax(1) if vote == "mass_max" else mass.sum(1)
    return votes if broken is None else votes.masked_fill_(broken.any(1), torch.inf)


def _sum_members(mass: Tensor) -> Tensor:
    """Sum over the last dimension, pairwise: torch's reduction of so few takes three times as long."""
    while mass.shape[-1] > 1 and mass.shape[-1] % 2 == 0:
        mass = mass[..., ::2] + mass[..., 1::2]
    return mass.sum(-1) if mass.shape[-1] > 1 else mass[..., 0]


def choose_groups(
    routing: Routing,
    plan: QueryPlan,
    query: Tensor,
    score: Scorer,
    groups: int,
    chunks: ChunkSummary | None,
    real: Tensor | None = None,
) -> Chosen:
    """Choose the groups of every query of a run, causally.

    Parameters
    ----------
    routing : Routing
        Settings of the layer.
    plan : QueryPlan
        Budgets of these queries.
    query : Tensor
        ``[rows, heads, queries, dim]`` float32 with the softmax scale applied; `heads` are the query heads of
        one KV head.
    score : Scorer
        Scores the first `groups` groups.
    groups : int
        Groups to look at: summarised, and all up to the last window of the run.
    chunks : ChunkSummary or None
        Summaries of level 1; None leaves it out.
    real : Tensor or None
        ``[rows, groups]`` bool: groups with at least one token that is not padding; None: all.

    Returns
    -------
    Chosen
        Groups between sinks and window, best first, no more than the plan allows.
    """
    rows = query.shape[0]
    kept = None
    if chunks is not None and min(chunks.chunks, groups * routing.group_size // routing.chunk_size):
        kept = _keep_chunks(routing, plan, query, chunks, groups, real)
    if kept is None and real is None and query.shape[2] == 1 and groups == plan.certain:
        # One query without padding sees all of these groups: nothing to mask, and all counts are known.
        votes = merge_votes(score(query, groups), None, routing.vote)
        first = int(plan.sink_end)
        best = votes[..., first:].topk(min(int(plan.chosen), groups - first), -1, sorted=False)
        return Chosen(best.indices + first, torch.ones_like(best.indices, dtype=torch.bool))
    scores = score(query, groups)
    number = torch.arange(groups, device=query.device)
    window, sink_end, sink_start, most = (
        per_row(part, rows, query.device)
        for part in (plan.window, plan.sink_end, plan.sink_start, plan.chosen)
    )
    seen = (number < window) & (number >= sink_start)
    certain = plan.certain
    for part in (kept, None if real is None else real[:, None]):
        if part is not None:
            seen, certain = seen & part, 0
    votes = merge_votes(scores, seen, routing.vote, certain)
    votes = votes.masked_fill_(~(seen & (number >= sink_end)), -1.0)
    width = min(plan.most_chosen, groups)
    best = votes.topk(width, -1)
    rank = torch.arange(width, device=query.device)
    return Chosen(best.indices, (best.values >= 0) & (rank < most))


def _keep_chunks(
    routing: Routing,
    plan: QueryPlan,
    query: Tensor,
    chunks: ChunkSummary,
    groups: int,
    real: Tensor | None,
) -> Tensor:
    """Level 1: mark the groups whose chunk is kept, ``[rows, queries, groups]`` bool."""
    rows = query.shape[0]
    per_chunk = routing.chunk_size // routing.group_size
    window = per_row(plan.window, rows, query.device)
    most = per_row(plan.chunks, rows, query.device)
    count = min(chunks.chunks, groups // per_chunk)
    scores = chunks.scores(query, count)
    number = torch.arange(count, device=query.device)
    # A chunk counts for a query once it ends before the window: until then it may hold later tokens.
    complete = (number + 1) * per_chunk <= window
    seen = complete
    if real is not None:
        seen = complete & real[:, None, : count * per_chunk].unflatten(-1, (count, per_chunk)).any(-1)
    votes = merge_votes(scores, seen, routing.vote)
    votes = votes.masked_fill_(~seen, -1.0)
    width = min(plan.most_chunks, count)
    best = votes.topk(width, -1)
    rank = torch.arange(width, device=query.device)
    keep = torch.zeros_like(votes, dtype=torch.bool)
    keep.scatter_(-1, best.indices, (best.values >= 0) & (rank < most))
    # Groups of chunks without a usable summary go on to level 2, as do those of queries below the threshold.
    short = per_row(plan.visible, rows, query.device) <= routing.auto_chunk_tokens
    if routing.chunk_stage == "on":
        short = torch.zeros_like(short)
    keep = (keep | ~complete | short).repeat_interleave(per_chunk, -1)[..., :groups]
    tail = torch.ones(*keep.shape[:-1], groups - keep.shape[-1], dtype=torch.bool, device=keep.device)
    return torch.cat([keep, tail], -1)
