"""Tiles of a prefill: runs of queries that share one routed set, and how many tokens each set has.

A tile begins at a multiple of its size, so that what is routed to does not depend on how a prompt was cut at
such places. Its budget, sinks and window are those of its first query; later queries see the tokens between
too. Attention is causal for every query; which groups are attended to is decided by the whole tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.coarse import (
    BLOCK,
    CANDIDATES,
    SINGLES,
    TileKeys,
    bases_of,
    exact,
    levels_of,
    to_eight_bits,
    votes_by_means,
    votes_by_tokens,
)
from hga_compile.kernels.levels import decode_levels
from hga_compile.kernels.plan import QueryPlan, per_row, plan_queries
from hga_compile.kernels.tile_chunks import TileChunks, best_of, kept_groups, plan_chunks

__all__ = ["Tiles", "plan_tiles", "shared_groups"]


@dataclass(frozen=True)
class Tiles:
    """The tiles that a run of queries lies in. Tensors are ``[batch or 1, tiles]`` on the CPU."""

    size: int
    """Queries of a tile."""
    group_size: int
    """Tokens of a group."""
    first: int
    """Number of the first tile, counted from position 0."""
    plan: QueryPlan
    """Of the first query of each tile, with the budget of a shared set."""
    last: Tensor
    """int64: groups in all, up to that of the tile's last query."""
    chunks: TileChunks | None = None
    """Which chunks are kept first; None: all of them."""

    @property
    def number(self) -> int:
        """How many tiles there are."""
        return self.last.shape[1]

    @property
    def listed(self) -> Tensor:
        """Groups that a tile's queries attend to, sinks and window included; int64."""
        plan = self.plan
        return plan.sink_end - plan.sink_start + plan.taken + self.last - plan.window

    @property
    def between(self) -> Tensor:
        """Groups between sinks and window, int64."""
        return self.plan.window - self.plan.sink_end

    @property
    def candidates(self) -> Tensor:
        """Groups that are voted for a second time, int64."""
        available = self.between if self.chunks is None else self.chunks.available
        return torch.minimum(self.plan.taken * CANDIDATES, available)

    def anchors(self, refined: bool) -> tuple[Tensor, Tensor]:
        """Return the first entry of `coarse.TileKeys.anchors` that a tile sees, and the one past the last."""
        plan = self.plan
        if not refined:
            return plan.sink_start, plan.window
        tokens = (plan.window - plan.sink_start) * self.group_size
        blocks = (tokens - SINGLES).clamp(min=0) // BLOCK
        return torch.zeros_like(tokens), tokens.clamp(max=SINGLES) + blocks

    def attended(self, first: int, queries: int, starts: Tensor | None) -> int:
        """Count the tokens that queries attend to in one row of each line, summed over the lines.

        Parameters
        ----------
        first, queries : int
            Position of the first query and number of queries.
        starts : Tensor or None
            ``[batch, 1]`` int64 on the CPU: padding before each sequence; None: there is none.
        """
        plan, size = self.plan, self.group_size
        starts = torch.zeros(1, 1, dtype=torch.int64, device="cpu") if starts is None else starts
        position = torch.arange(first, first + queries, device="cpu")
        before = (plan.sink_end - plan.sink_start + plan.taken - plan.window) * size
        # Of the first group only some tokens may be there.
        before = before - (starts - plan.sink_start * size).clamp(min=0)
        counts = before[:, position // self.size - self.first] + position + 1
        return int(counts.masked_fill(position < starts, 0).sum())


def plan_tiles(routing: Routing, first: int, queries: int, key_mask: Tensor | None, size: int) -> Tiles:
    """Plan the tiles of queries at positions ``first, first + 1, ...``.

    Parameters
    ----------
    routing : Routing
        Budgets, sinks, window, `dense_below`, chunk stage.
    first, queries : int
        Position of the first query and their number.
    key_mask : Tensor or None
        ``[batch, first + queries]`` bool on the CPU, True for real tokens; None: all are real.
    size : int
        Queries of a tile.
    """
    begin, length = first // size, first + queries
    number = -(-length // size) - begin
    plan = plan_queries(routing.shared(), begin * size, number, key_mask, size)
    ends = (torch.arange(begin + 1, begin + number + 1, device="cpu") * size).clamp(max=length)
    last = ((ends - 1) // routing.group_size + 1).expand(len(plan.window), -1)
    chunks = plan_chunks(routing, plan) if routing.uses_chunks(length) else None
    return Tiles(size, routing.group_size, begin, plan, last, chunks)


def shared_groups(
    query: Tensor,
    keys: TileKeys | None,
    tiles: Tiles,
    tile: int,
    vote: str,
    real: Tensor | None,
    straight: Tensor | None = None,
) -> Tensor:
    """Mark the groups that the queries of one tile attend to, in plain torch.

    Parameters
    ----------
    query : Tensor
        ``[rows, heads, queries, dim]`` float32: those of the tile, softmax scale applied, rotated where the
        keys are.
    keys : TileKeys or None
        Those of at least all groups before the window; None: every query is dense.
    tiles : Tiles
        The plan.
    tile : int
        Which of the tiles, from 0.
    vote : str
        `routing.vote`.
    real : Tensor or None
        ``[rows, groups]`` bool: groups with a token that is not padding; None: all.
    straight : Tensor or None
        The query as it was before it was rotated, for the chunks; None: it is not rotated.

    Returns
    -------
    Tensor
        ``[rows or 1, groups]`` bool, up to the tile's last query's.
    """
    rows, device, plan = len(query), query.device, tiles.plan

    def own(part: Tensor) -> Tensor:
        return per_row(part[:, tile : tile + 1], rows, device)[:, 0]

    window, start, end = own(plan.window), own(plan.sink_start), own(plan.sink_end)
    number = torch.arange(int(tiles.last[0, tile]), device=device)
    marks = (number >= window) | ((number >= start) & (number < end)) | own(plan.dense)
    groups = int(plan.window[:, tile].max())
    if keys is None or groups == 0 or bool(plan.dense[:, tile].all()):
        return marks
    first, last = (own(part) for part in tiles.anchors(keys.refined))
    entry = torch.arange(keys.anchors.steps.shape[1], device=device)
    weights = torch.ones(len(entry), device=device)
    if keys.refined:
        weights[SINGLES:] = BLOCK
    asked = to_eight_bits(query) if keys.refined else exact(query)
    bases = bases_of(asked, keys.anchors, (entry >= first) & (entry < last), weights)
    candidate = (number[:groups] >= end) & (number[:groups] < window)
    if real is not None:
        candidate = candidate & real[:, :groups]
    if tiles.chunks is not None and keys.chunks is not None:
        level = tiles.chunks
        candidate = candidate & kept_groups(
            query if straight is None else straight, keys.chunks, own(level.first), own(level.chunks),
            own(level.kept), vote, level, groups, real,
        )  # fmt: skip
    votes = votes_by_means(asked, keys.means.first(groups), bases, vote)
    if keys.codes is not None and keys.scales is not None:
        candidate = best_of(votes, candidate, own(tiles.candidates))
        tokens, dim = groups * tiles.group_size, query.shape[3]
        levels = levels_of(decode_levels(keys.codes[:, :, :tokens], keys.bits, dim), keys.bits)
        levels = levels.transpose(1, 2).unflatten(1, (groups, -1))
        scales = keys.scales[:, :tokens].float().unflatten(1, (groups, -1))
        votes = votes_by_tokens(asked, levels, scales, bases, vote, keys.centres)
    marks = marks.expand(rows, -1).clone()
    marks[:, :groups] |= best_of(votes, candidate, own(plan.chosen))
    return marks
