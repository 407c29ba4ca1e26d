"""How many tokens each query may attend to, and where its sinks and its window lie."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.routing import Routing

__all__ = ["QueryPlan", "kept_chunks", "per_row", "plan_left_padded", "plan_queries", "tokens_for"]

# The same guard against rounding up 0.07 * 100 as configs.budget has.
_ROUNDING = 1.0 - 1e-12


@dataclass(frozen=True)
class QueryPlan:
    """Budgets and fixed parts of the routed set for a run of queries.

    Every field is an int64 or bool tensor ``[batch or 1, queries]`` but `first`. Groups are counted from
    token 0 of the sequence; the chosen groups lie in ``sink_end <= group < window``.
    """

    first: int
    """Position of the first query."""
    visible: Tensor
    """Tokens that the query sees causally, padding left out."""
    dense: Tensor
    """Whether the query attends to all of them."""
    sink_start: Tensor
    """First group with sink tokens."""
    sink_end: Tensor
    """First group past the sinks."""
    window: Tensor
    """First group of the window."""
    chosen: Tensor
    """Groups to choose, at most."""
    chunks: Tensor
    """Chunks to keep at level 1, at most."""
    most_chosen: int
    """Bound on `chosen`, known without reading a tensor."""
    most_chunks: int
    """Bound on `chunks`, likewise."""
    certain: int
    """Groups from 0 on that lie before every query's window; 0 with padding."""
    last_window: int
    """Greatest `window`."""

    @property
    def taken(self) -> Tensor:
        """Groups that are chosen between sinks and window where none is padding: all of a dense query's."""
        between = self.window - self.sink_end
        return torch.where(self.dense, between, torch.minimum(self.chosen, between))


def tokens_for(share: Budget | Window, whole: Tensor) -> Tensor:
    """Return `share.tokens_for` of every entry of the int64 tensor `whole`."""
    least = torch.full_like(whole, share.tokens or 0)
    if share.fraction is None:
        return least
    part = torch.ceil(whole.double() * (share.fraction * _ROUNDING)).long()
    return torch.maximum(part, least)


def plan_queries(
    routing: Routing, first: int, queries: int, key_mask: Tensor | None, every: int = 1
) -> QueryPlan:
    """Plan `queries` queries at positions ``first, first + every, ...``.

    Parameters
    ----------
    routing : Routing
        Budgets, sinks, window, `dense_below`.
    first, queries : int
        Position of the first query and their number.
    key_mask : Tensor or None
        ``[batch, tokens]`` bool on the CPU, True for real tokens up to the last query; None: all are real.
    every : int
        Distance from one query to the next.

    Returns
    -------
    QueryPlan
        On the CPU. Shared between callers: not to be written to.
    """
    if key_mask is None:
        return plan_left_padded(routing, first, queries, (0,), every)
    visible = key_mask.cumsum(1)[:, first : first + queries * every : every]
    start = key_mask.to(torch.int8).argmax(1, keepdim=True)
    return _plan(routing, first, every, visible, start, unpadded=False)


# All layers of a model plan the same queries: one tile or step is worked out once.
@lru_cache(maxsize=512)
def plan_left_padded(
    routing: Routing, first: int, queries: int, starts: tuple[int, ...], every: int = 1
) -> QueryPlan:
    """Plan queries of sequences with padding on the left, as `plan_queries` does by a mask.

    Parameters
    ----------
    routing : Routing
        Budgets, sinks, window, `dense_below`.
    first, queries : int
        Position of the first query and their number.
    starts : tuple of int
        First real token of each sequence; all 0: there is no padding.
    every : int
        Distance from one query to the next.
    """
    start = torch.tensor(starts, device="cpu")[:, None]
    end = first + queries * every
    visible = (torch.arange(first + 1, end + 1, every, device="cpu") - start).clamp(min=0)
    # A sequence that has not begun is planned as one without padding that sees nothing.
    start = start.masked_fill(start >= end, 0)
    return _plan(routing, first, every, visible, start, unpadded=not any(starts))


def _plan(
    routing: Routing, first: int, every: int, visible: Tensor, start: Tensor, *, unpadded: bool
) -> QueryPlan:
    """Build the plan from the visible tokens and the first real token (``[batch or 1, 1]``) of each row."""
    group = routing.group_size
    queries = visible.shape[1]
    end = torch.arange(first + 1, first + queries * every + 1, every, device="cpu")[None]
    budget = torch.minimum(tokens_for(routing.budget, visible), visible)
    window = (end - tokens_for(routing.window, budget)).clamp(min=0) // group
    # Past the first sink the window may already begin: nothing is counted twice.
    sink_start = torch.minimum(start // group, window)
    sink_end = torch.minimum((start + routing.sinks + group - 1) // group, window)
    sink_end = torch.maximum(sink_end, sink_start) if routing.sinks else sink_start
    taken = end - window * group + (sink_end - sink_start) * group
    early = visible <= routing.centre_tokens  # the codes' centre is made of these keys
    dense = early | (budget >= visible) | (visible <= routing.dense_below)
    kept = torch.maximum(tokens_for(routing.chunk_budget, visible), budget)
    last = first + (queries - 1) * every + 1
    return QueryPlan(
        first=first,
        visible=visible,
        dense=dense,
        sink_start=sink_start,
        sink_end=sink_end,
        window=window,
        chosen=((budget - taken) // group).clamp(min=0),
        chunks=-(-kept // routing.chunk_size),
        most_chosen=min(routing.budget.tokens_for(last), last) // group,
        most_chunks=-(-routing.chunk_tokens_for(last) // routing.chunk_size),
        certain=int(window.min()) if unpadded else 0,
        last_window=int(window.max()),
    )


def kept_chunks(routing: Routing, plan: QueryPlan) -> tuple[Tensor, Tensor, Tensor]:
    """First chunk with a token, chunks before the window, and how many are kept.

    Parameters
    ----------
    routing : Routing
        Settings of the layer.
    plan : QueryPlan
        The queries.

    Returns
    -------
    tuple of Tensor
        ``[batch or 1, queries]`` int64 each.
    """
    per_chunk = routing.chunk_size // routing.group_size
    chunks = plan.window // per_chunk
    # By the plan, which has a row of nothing but padding begin where it has groups to choose.
    first = torch.minimum(plan.sink_start // per_chunk, chunks)
    whole = plan.dense
    if routing.chunk_stage == "auto":
        whole = whole | (plan.visible <= routing.auto_chunk_tokens)
    return first, chunks, torch.where(whole, chunks - first, torch.minimum(plan.chunks, chunks - first))


def per_row(part: Tensor, rows: int, device: torch.device) -> Tensor:
    """Spread a field of a plan over rows: ``[batch or 1, queries]`` to ``[rows or 1, queries, 1]``."""
    part = part.to(device)
    if len(part) > 1:
        part = part.repeat_interleave(rows // len(part), 0)
    return part[..., None]
