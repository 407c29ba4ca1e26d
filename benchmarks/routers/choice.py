"""From scores to the tokens that are attended to: one budget, sinks and window for all routers."""

from __future__ import annotations

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.plan import tokens_for
from hga_compile.kernels.route import merge_votes
from routers.router import Index, Router


def attended(
    router: Router, index: Index, routing: Routing, query: Tensor, first: int, tokens: int, bonus: float = 0.0
) -> Tensor:
    """Mark the tokens that queries attend to.

    The budget holds sinks, window, pinned units and as many of the best units as fit whole. The unit that a
    query stands in has no summary yet: it is attended to and counts. Units whose tokens are in the window
    anyway cost what is left of them.

    Parameters
    ----------
    router, index
        Scores units.
    routing : Routing
        Budget, sinks, window and `dense_below`.
    query : Tensor
        ``[rows, heads, queries, dim]``, softmax scale applied.
    first : int
        Position of the first query.
    tokens : int
        Tokens that the layer holds, all queries' own included.
    bonus : float
        Share of the visible tokens that the budget is larger by.

    Returns
    -------
    Tensor
        ``[rows, queries, tokens]`` bool.
    """
    rows, queries = query.shape[0], query.shape[2]
    position = torch.arange(first, first + queries)[:, None]
    visible = position + 1
    token = torch.arange(tokens)
    budget = tokens_for(routing.budget, visible) + (bonus * visible).long()
    dense = (visible <= routing.dense_below) | (budget >= visible)
    causal = token <= position
    window = tokens_for(routing.window, budget)
    start = torch.minimum(visible - window, visible // router.unit * router.unit)
    fixed = causal & ((token < routing.sinks) | (token >= start))

    scores = index.score(query)
    units = scores.shape[-1]
    number = torch.arange(units)
    inside = fixed[:, : units * router.unit].unflatten(-1, (units, router.unit))
    cost = router.unit - inside.sum(-1)
    seen = ((number + 1) * router.unit <= visible) & (number * router.unit < start)
    votes = merge_votes(scores.clone()[..., None], seen[None], router.vote)
    open_ = seen & (cost > 0)
    votes = votes.masked_fill(~open_, -1.0)
    if index.pinned is not None:
        votes = votes.masked_fill(index.pinned[:, None] & open_, torch.inf)
    left = budget - fixed.sum(-1, keepdim=True)
    # Only a unit at the sinks and one at the window can cost less than a whole one.
    most = min(units, max(0, int(left.max())) // router.unit + 2)
    best = votes.topk(most, dim=-1)
    spent = cost.expand(rows, -1, -1).gather(-1, best.indices).cumsum(-1)
    kept = (spent <= left) & (best.values >= 0)
    chosen = torch.zeros_like(votes, dtype=torch.bool).scatter_(-1, best.indices, kept)
    chosen = chosen.repeat_interleave(router.unit, -1)
    mask = fixed.expand(rows, -1, -1).clone()
    mask[..., : chosen.shape[-1]] |= chosen & causal[:, : chosen.shape[-1]]
    return torch.where(dense, causal, mask)
