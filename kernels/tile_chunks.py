"""Level 1 of a tile: which chunks the queries of a tile keep, in plain torch, and how many that are.

A chunk is voted for as a group is, by the best of the means of its parts; the groups of other chunks are then
no candidates. A query's masses are shares of those of all parts that it is scored against.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.coarse import Coarse, bases_of, exact, votes_by_means
from hga_compile.kernels.plan import QueryPlan, kept_chunks

__all__ = ["TileChunks", "best_of", "kept_groups", "plan_chunks"]


@dataclass(frozen=True)
class TileChunks:
    """How many chunks the tiles of a prefill keep. Tensors are ``[batch or 1, tiles]`` int64 on the CPU."""

    groups: int
    """Groups of a chunk."""
    parts: int
    """Means that stand for a chunk."""
    first: Tensor
    """First chunk with a token."""
    chunks: Tensor
    """Chunks that end before the window, from 0 on."""
    kept: Tensor
    """Chunks to keep among them."""
    last: Tensor
    """The same as `chunks`, with the one that the window begins in if there are groups before it."""
    available: Tensor
    """Groups between sinks and window that lie in kept chunks, at least."""

    @property
    def listed(self) -> Tensor:
        """Chunks whose groups are voted for, int64."""
        return self.kept + self.last - self.chunks


def plan_chunks(routing: Routing, plan: QueryPlan) -> TileChunks | None:
    """Plan level 1; None where all tiles keep all chunks.

    So many chunks are kept that the groups to choose lie in them, whichever they are: only then is the length
    of a tile's list known without looking at votes.

    Parameters
    ----------
    routing : Routing
        Settings of the layer.
    plan : QueryPlan
        Of the first query of each tile, with the budget of a shared set.
    """
    groups = routing.chunk_size // routing.group_size
    first, chunks, kept = kept_chunks(routing, plan)
    rest, between = plan.window % groups, plan.window - plan.sink_end
    # The sinks' groups may be in kept chunks, where none of them is chosen.
    lost = (plan.sink_end - first * groups).clamp(min=0)
    needed = -(-(plan.taken + lost - rest).clamp(min=0) // groups)
    kept = torch.minimum(torch.maximum(kept, needed), chunks - first)
    if not bool(((kept < chunks - first) & (plan.taken > 0)).any()):
        return None
    available = torch.minimum(kept * groups + rest - lost, between).clamp(min=0)
    available = torch.where(kept == chunks - first, between, available)
    return TileChunks(groups, routing.chunk_parts, first, chunks, kept, chunks + (rest > 0), available)


def kept_groups(
    query: Tensor,
    parts: Coarse,
    first: Tensor,
    chunks: Tensor,
    kept: Tensor,
    vote: str,
    sizes: TileChunks,
    groups: int,
    real: Tensor | None,
) -> Tensor:
    """Mark the groups of the chunks that one tile keeps, and those of the chunk that its window begins in.

    Parameters
    ----------
    query : Tensor
        ``[rows, heads, queries, dim]`` float32, softmax scale applied, not rotated.
    parts : Coarse
        ``[rows, >= chunks * parts, dim]`` (see `coarse.TileKeys`).
    first, chunks, kept : Tensor
        ``[rows or 1, 1]`` int64: the tile's (see `TileChunks`).
    vote : str
        `routing.vote`.
    sizes : TileChunks
        Sizes of a chunk.
    groups : int
        Groups to mark: up to the last window.
    real : Tensor or None
        ``[rows, >= groups]`` bool: groups with a token that is not padding; None: all.

    Returns
    -------
    Tensor
        ``[rows, groups]`` bool.
    """
    count = int(chunks.max())
    number = torch.arange(max(count, -(-groups // sizes.groups)), device=query.device)
    seen = ((number[:count] >= first) & (number[:count] < chunks)).expand(len(query), -1)
    if real is not None:
        seen = seen & real[:, : count * sizes.groups].unflatten(-1, (count, -1)).any(-1)
    marks = (number >= chunks).expand(len(query), -1).clone()
    if count:
        asked, scored = exact(query), parts.first(count * sizes.parts)
        every = seen.repeat_interleave(sizes.parts, -1)
        bases = bases_of(asked, scored, every, torch.ones(every.shape[1], device=query.device))
        votes = votes_by_means(asked, scored, bases, vote, sizes.parts)
        marks[:, :count] |= best_of(votes, seen, kept)
    return marks.repeat_interleave(sizes.groups, -1)[:, :groups]


def best_of(votes: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
    """Mark the `count` candidates with the most votes, the first ones of equal ones: ``[rows, groups]``."""
    best = votes.masked_fill(~candidate, -1.0).sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(votes.shape[1], device=votes.device)
    wanted = (best.values >= 0) & (rank < count)
    return torch.zeros_like(wanted).scatter_(-1, best.indices, wanted)
