"""What runs in Triton on a GPU for the queries of a prefill, with no wait for it in between.

The modules of the kernels import Triton, which not every machine has: they are imported here, when used.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.coarse import BLOCK, SINGLES, Coarse, TileKeys
from hga_compile.kernels.gpu import sent
from hga_compile.kernels.scoring import PLAIN, Scoring
from hga_compile.kernels.tail import TailSummary
from hga_compile.kernels.tiles import Tiles

__all__ = ["Rows", "coarse_means", "prefill_tiles", "tile_keys", "tile_spans", "whole"]

# Votes of a run of tiles and what their selection needs.
_RUN_BYTES = 2**28


def tile_spans(tiles: Tiles, refined: bool, starts: Tensor | None, device: torch.device) -> Tensor:
    """Put the plan of tiles on the GPU.

    Parameters
    ----------
    tiles : Tiles
        The plan.
    refined : bool
        `coarse.TileKeys.refined` of the keys.
    starts : Tensor or None
        ``[batch, 1]`` int64 on the CPU: padding before each sequence; None: there is none.
    device : torch.device
        The GPU.

    Returns
    -------
    Tensor
        ``[2 or 3, tiles, batch or 1, 8]`` int32. Lines as `Spans.table` has them, and the first entry of the
        anchors that a tile sees, and the one past the last. Then such lines for the choice of candidates:
        without sinks and window. Then, if chunks are chosen, such lines for them: the window is the chunk
        that the groups' begins in, the anchors are parts.
    """
    plan = tiles.plan
    starts = torch.zeros(1, 1, dtype=torch.int64, device="cpu") if starts is None else starts
    own = (plan.sink_start, plan.sink_end, plan.window, plan.taken, tiles.last, starts)
    none = (plan.sink_end, plan.sink_end, plan.window, tiles.candidates, plan.window, starts)
    anchors, level = tiles.anchors(refined), tiles.chunks
    lines = [(*own, *anchors), (*none, *anchors)]
    if level is not None:
        first, chunks, parts = level.first, level.chunks, level.parts
        lines.append((first, first, chunks, level.kept, level.last, starts, first * parts, chunks * parts))
    tables = [
        torch.stack([part.expand(tiles.last.shape) for part in line], -1).transpose(0, 1) for line in lines
    ]
    return sent(torch.stack(tables).to(torch.int32), device)


def tile_keys(
    codes: Tensor,
    scales: Tensor,
    groups: int,
    group_size: int,
    bits: int,
    dim: int,
    starts: Tensor | None,
    centres: Tensor | None = None,
) -> TileKeys:
    """Average low-bit keys over groups and blocks (see `triton_coarse.coarse_codes`)."""
    from hga_compile.kernels import triton_coarse

    return triton_coarse.coarse_codes(codes, scales, groups, group_size, bits, dim, starts, centres)


def coarse_means(means: Tensor, groups: int) -> Coarse:
    """Prepare means of groups (see `triton_coarse.coarse_means`)."""
    from hga_compile.kernels import triton_coarse

    return triton_coarse.coarse_means(means, groups)


class Rows(NamedTuple):
    """K/V of a layer, of some rows at a time on the GPU."""

    read: Callable[[slice], tuple[Tensor, Tensor]]
    """Returns the keys ``[n, tokens, dim]`` and values ``[n, tokens, v_dim]`` of a slice of n rows, channels
    contiguous: all tokens up to the last query."""
    at_once: int
    """Rows that are asked for at a time."""
    v_dim: int


def whole(key: Tensor, value: Tensor) -> Rows:
    """Return the rows of ``[rows, tokens, dim]`` keys and ``[rows, tokens, v_dim]`` values, all at once."""
    return Rows(lambda rows: (key[rows], value[rows]), len(key), value.shape[2])


def prefill_tiles(
    kv: Rows,
    keys: TileKeys,
    query: Tensor,
    spans: Tensor,
    tiles: Tiles,
    *,
    first: int,
    routing: Routing,
    scale: float,
    scoring: Scoring = PLAIN,
    tail: TailSummary | None = None,
    listed: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Route the queries of a prefill, a tile at a time, and attend to what each tile is routed to.

    Parameters
    ----------
    kv : Rows
        Where they are not read all at once, the lists of all tiles are kept meanwhile.
    keys : TileKeys
        Of all groups before the last window, on the GPU.
    query : Tensor
        ``[batch, kv_heads, heads, queries, dim]``, dtype of the keys.
    spans : Tensor
        From `tile_spans`.
    tiles : Tiles
        The plan.
    first : int
        Position of the first query.
    routing : Routing
        Settings of the layer.
    scale : float
        Softmax scale.
    scoring : Scoring
        Soft-cap and sinks.
    tail : TailSummary or None
        Estimates of what is not attended to; they go with neither soft-cap nor sinks.
    listed : callable or None
        Is given each run of tiles: the number of its first one, and the groups attended to,
        ``[tiles, rows, width]`` int32, ascending; entries past a tile's own list are not written.

    Returns
    -------
    Tensor
        ``[batch, kv_heads, heads, queries, v_dim]``, dtype of the query.
    """
    from hga_compile.kernels.triton_tile_attend import attend_tiles
    from hga_compile.kernels.triton_tile_tail import attend_tiles_with_tail

    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, kv_heads, heads, queries, _ = query.shape
    rows = batch * kv_heads
    out = query.new_empty(batch, kv_heads, heads, queries, kv.v_dim)
    logits = None if scoring.sinks is None else scoring.sinks.float()
    shared = rows // spans.shape[2]
    runs: Iterable[_Run] = _route_runs(keys, query, spans, tiles, first, routing, scale)
    if kv.at_once < rows:
        runs = list(runs)
    for begin in range(0, rows, kv.at_once):
        key, value = kv.read(slice(begin, min(rows, begin + kv.at_once)))
        for run in runs:
            asked: dict[str, Any] = {
                "first": first, "tile": tiles.first + run.first, "tiles": run.tiles, "size": tiles.size,
                "group_size": routing.group_size, "scale": scale, "rows_of_span": shared,
                "first_row": begin,
            }  # fmt: skip
            given = key, value, run.chosen, run.table, query, out
            if tail is not None and tail.chunks:
                attend_tiles_with_tail(*given, tail, **asked)
            else:
                attend_tiles(*given, logits, softcap=scoring.softcap, **asked)
            if listed is not None and begin == 0:
                listed(run.first, run.chosen.view(run.tiles, rows, -1))
        del key, value  # before those of other rows are read
    return out


class _Run(NamedTuple):
    """Tiles that are routed together."""

    first: int
    """Number of the first one."""
    tiles: int
    table: Tensor
    """``[tiles * lines, SPAN]`` int32, of `tile_spans`."""
    chosen: Tensor
    """``[tiles * rows, width]`` int32."""


def _route_runs(
    keys: TileKeys, query: Tensor, spans: Tensor, tiles: Tiles, first: int, routing: Routing, scale: float
) -> Iterator[_Run]:
    """Route tiles, as many at a time as `_RUN_BYTES` are enough for."""
    from hga_compile.kernels.triton_coarse import coarse_queries

    batch, kv_heads, heads, _, _ = query.shape
    rows = batch * kv_heads
    # The largest of what a run needs: votes, and queries in 16 bits.
    own = tiles.size * heads * keys.means.values.shape[2] * (2 if keys.chunks or not keys.refined else 0)
    step = max(1, _RUN_BYTES // (rows * (12 * keys.means.steps.shape[1] + own)))
    for begin in range(0, tiles.number, step):
        number = min(step, tiles.number - begin)
        tables = spans[:, begin : begin + number].flatten(1, 2)
        ask = partial(coarse_queries, query, first, tiles.first + begin, number, tiles.size, scale)
        asked = straight = ask(turn=keys.refined)
        if keys.refined and keys.chunks is not None:
            straight = ask(turn=False)
        run = slice(begin, begin + number)
        shared = rows // spans.shape[2]
        chosen = _choose_for_tiles(asked, straight, keys, tiles, run, tables, routing, shared)
        yield _Run(begin, number, tables[0], chosen)


def _choose_for_tiles(
    query: Coarse,
    straight: Coarse,
    keys: TileKeys,
    tiles: Tiles,
    run: slice,
    tables: Tensor,
    routing: Routing,
    shared: int,
) -> Tensor:
    """List the groups of a run of tiles, ``[tiles * rows, width]`` int32."""
    from hga_compile.kernels.triton_select import select_groups
    from hga_compile.kernels.triton_tile_refine import votes_by_tokens
    from hga_compile.kernels.triton_tile_vote import KeptChunks, bases_of, votes_by_means

    def longest(part: Tensor) -> int:
        return max(1, int(part[:, run].max()))

    table, candidates = tables[0], tables[1]
    most, width, groups = routing.vote == "mass_max", longest(tiles.listed), longest(tiles.plan.window)
    kept, level = None, tiles.chunks
    if level is not None and keys.chunks is not None:
        bases = bases_of(straight, keys.chunks, 0, 1, tables[2], shared)
        votes, _ = votes_by_means(
            straight, keys.chunks, bases, longest(level.chunks), tables[2], most, shared, parts=level.parts
        )
        chunks = select_groups(votes, tables[2], longest(level.listed), shared)
        kept = KeptChunks(chunks, tables[2], level.groups)
    singles, block = (SINGLES, BLOCK) if keys.refined else (0, 1)
    bases = bases_of(query, keys.anchors, singles, block, table, shared)
    votes, names = votes_by_means(query, keys.means, bases, groups, table, most, shared, kept=kept)
    if keys.codes is None or keys.scales is None:
        return select_groups(votes, table, width, shared, names)
    names = select_groups(votes, candidates, longest(tiles.candidates), shared, names)
    votes = votes_by_tokens(
        query, keys.codes, keys.scales, names, bases, candidates, group_size=routing.group_size,
        bits=routing.bits, dim=keys.dim, most=most, rows_of_span=shared, centres=keys.centres,
    )  # fmt: skip
    return select_groups(votes, table, width, shared, names)
