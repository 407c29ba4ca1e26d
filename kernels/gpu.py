"""What runs in Triton on a GPU, with no wait for it in between: a decode step, and encoding keys.

The modules of the kernels import Triton, which not every machine has: they are imported here, when used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.coarse import BLOCK, Coarse, TileKeys
from hga_compile.kernels.plan import QueryPlan, plan_queries
from hga_compile.kernels.scoring import PLAIN, Scoring
from hga_compile.kernels.tiles import Tiles

__all__ = [
    "Spans",
    "coarse_means",
    "decode_step",
    "encode",
    "load_rows",
    "prefill_tiles",
    "spans_of",
    "store_rows",
    "tile_keys",
    "tile_spans",
    "usable",
]

_MOST_CHANNELS, _MOST_HEADS = 256, 64
# Votes of a run of tiles and what their selection needs.
_RUN_BYTES = 2**28


@dataclass(frozen=True)
class Spans:
    """Which groups one query of each sequence attends to beside those chosen, on the GPU."""

    table: Tensor
    """``[batch or 1, 6]`` int32: first sink group, group past the sinks, first group of the window, groups to
    choose between them, groups in all, first token that is not padding."""
    width: int
    """Groups of the longest list."""
    groups: int
    """Groups before the last window."""
    attended: int
    """Tokens attended to in one row of each line, summed over the lines."""

    def listed(self, rows: int) -> Tensor:
        """Return how long the list of each row is, ``[rows, 1]``."""
        start, end, window, chosen, last, _ = self.table.unbind(1)
        return (end - start + chosen + last - window).repeat_interleave(rows // len(self.table))[:, None]

    def starts(self, rows: int) -> Tensor:
        """Return the first token of each row that is not padding, ``[rows, 1]``."""
        return self.table[:, 5].repeat_interleave(rows // len(self.table))[:, None]


def usable(device: torch.device, dtype: torch.dtype, dim: int, heads: int = 1, group_size: int = 1) -> bool:
    """Say whether the kernels cover a layer: CUDA with Triton, common dtypes, groups of a power of two."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and dim <= _MOST_CHANNELS
        and heads <= _MOST_HEADS
        and group_size & (group_size - 1) == 0
        and _has_triton()
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def spans_of(routing: Routing, plan: QueryPlan, starts: Tensor | None, device: torch.device) -> Spans:
    """Put the plan of one query a sequence on the GPU.

    Parameters
    ----------
    routing : Routing
        Settings of the layer.
    plan : QueryPlan
        Of one query.
    starts : Tensor or None
        ``[batch, 1]`` int64 on the CPU: padding before each sequence; None: there is none.
    device : torch.device
        The GPU.
    """
    if starts is None:
        return _plain_spans(routing, plan.first, device)
    return _spans(routing, plan, starts, device)


# All layers of a model take the same step.
@lru_cache(maxsize=64)
def _plain_spans(routing: Routing, first: int, device: torch.device) -> Spans:
    none = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    return _spans(routing, plan_queries(routing, first, 1, None), none, device)


def _spans(routing: Routing, plan: QueryPlan, starts: Tensor, device: torch.device) -> Spans:
    size, last = routing.group_size, plan.first // routing.group_size + 1
    chosen = plan.taken
    lists = plan.sink_end - plan.sink_start + chosen + last - plan.window
    parts = (plan.sink_start, plan.sink_end, plan.window, chosen, torch.full_like(starts, last), starts)
    table = torch.cat([part.expand(len(plan.window), 1) for part in parts], 1).to(torch.int32)
    # Of the first sink group and the last one not all tokens are there.
    tokens = lists * size - (starts - plan.sink_start * size).clamp(min=0) - -(plan.first + 1) % size
    return Spans(_sent(table, device), int(lists.max()), plan.last_window, int(tokens.sum()))


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
        ``[2, tiles, batch or 1, 8]`` int32. Lines as `Spans.table` has them, and the first entry of the
        anchors that a tile sees, and the one past the last. Then such lines for the choice of candidates:
        without sinks and window.
    """
    plan = tiles.plan
    starts = torch.zeros(1, 1, dtype=torch.int64, device="cpu") if starts is None else starts
    own = (plan.sink_start, plan.sink_end, plan.window, plan.taken, tiles.last, starts)
    none = (plan.sink_end, plan.sink_end, plan.window, tiles.candidates, plan.window, starts)
    anchors = tiles.anchors(refined)
    tables = [
        torch.stack([part.expand(tiles.last.shape) for part in (*parts, *anchors)], -1).transpose(0, 1)
        for parts in (own, none)
    ]
    return _sent(torch.stack(tables).to(torch.int32), device)


def _sent(table: Tensor, device: torch.device) -> Tensor:
    # Without a wait: the table is small, and its source is kept until the copy is done.
    source = table.pin_memory() if device.type == "cuda" else table
    return source.to(device, non_blocking=True)


def encode(
    keys: Tensor, centre: Tensor, codes: Tensor, scales: Tensor, begin: int, bits: int, step: float
) -> None:
    """Encode keys (see `triton_encode.encode`)."""
    from hga_compile.kernels import triton_encode

    triton_encode.encode(keys, centre, codes, scales, begin, bits, step)


def store_rows(pages: Tensor, key: Tensor, value: Tensor, begin: int, group_size: int) -> None:
    """Write a few K/V rows (see `triton_store.store_rows`)."""
    from hga_compile.kernels import triton_store

    triton_store.store_rows(pages, key, value, begin, group_size)


def load_rows(
    pages: Tensor, begin: int, end: int, dim: int, group_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Read a few K/V rows (see `triton_store.load_rows`)."""
    from hga_compile.kernels import triton_store

    return triton_store.load_rows(pages, begin, end, dim, group_size, device)


def decode_step(
    pages: Tensor,
    codes: Tensor,
    scales: Tensor,
    query: Tensor,
    spans: Spans,
    *,
    length: int,
    routing: Routing,
    scale: float,
    scoring: Scoring = PLAIN,
    kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """Route one query a head by low-bit keys and attend to what it is routed to.

    Parameters
    ----------
    pages : Tensor
        ``[groups, rows, group_size * (dim + v_dim)]``, in GPU memory or pinned (see `store.pages.Pages`).
    codes, scales : Tensor
        ``[rows, bytes, tokens]`` uint8, bytes innermost in memory, and ``[rows, tokens]`` float16 (see
        `lowbit.encode_keys`).
    query : Tensor
        ``[rows, heads, dim]``, dtype of the pages.
    spans : Spans
        From `spans_of`.
    length : int
        Tokens of the sequence.
    routing : Routing
        Settings of the layer.
    scale : float
        Softmax scale.
    scoring : Scoring
        Soft-cap and sinks.
    kv_heads : int
        Rows of one sequence.

    Returns
    -------
    out : Tensor
        ``[rows, heads, v_dim]``, dtype of the query.
    groups : Tensor
        ``[rows, width]`` int32: the groups attended to, ascending; fewer in rows whose list is shorter.
    """
    from hga_compile.kernels.triton_attend import attend_listed
    from hga_compile.kernels.triton_score import group_masses
    from hga_compile.kernels.triton_select import select_groups, votes_of
    from hga_compile.kernels.triton_turn import turn

    query = query.contiguous()
    rows, heads, _ = query.shape
    table = spans.table
    shared = rows if len(table) == 1 else kv_heads
    turned = turn(query, scale)
    masses = group_masses(
        codes, scales, turned, table, groups=spans.groups, group_size=routing.group_size, bits=routing.bits,
        rows_of_span=shared,
    )  # fmt: skip
    votes = votes_of(masses, table, heads, routing.vote == "mass_max", shared)
    chosen = select_groups(votes, table, spans.width, shared)
    logits = None if scoring.sinks is None else scoring.sinks.float()
    out = attend_listed(
        pages, chosen, table, query, logits, length=length, group_size=routing.group_size, scale=scale,
        softcap=scoring.softcap, rows_of_span=shared, kv_heads=kv_heads,
    )  # fmt: skip
    return out, chosen


def tile_keys(
    codes: Tensor, scales: Tensor, groups: int, group_size: int, bits: int, dim: int, starts: Tensor | None
) -> TileKeys:
    """Average low-bit keys over groups and blocks (see `triton_coarse.coarse_codes`)."""
    from hga_compile.kernels import triton_coarse

    return triton_coarse.coarse_codes(codes, scales, groups, group_size, bits, dim, starts)


def coarse_means(means: Tensor, groups: int) -> Coarse:
    """Round means of groups (see `triton_coarse.coarse_means`)."""
    from hga_compile.kernels import triton_coarse

    return triton_coarse.coarse_means(means, groups)


def prefill_tiles(
    key: Tensor,
    value: Tensor,
    keys: TileKeys,
    query: Tensor,
    spans: Tensor,
    tiles: Tiles,
    *,
    first: int,
    routing: Routing,
    scale: float,
    scoring: Scoring = PLAIN,
    listed: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Route the queries of a prefill, a tile at a time, and attend to what each tile is routed to.

    Parameters
    ----------
    key, value : Tensor
        ``[rows, tokens, dim]`` and ``[rows, tokens, v_dim]``, channels contiguous: all tokens up to the last
        query.
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
    listed : callable or None
        Is given each run of tiles: the number of its first one, and the groups attended to,
        ``[tiles, rows, width]`` int32, ascending; entries past a tile's own list are not written.

    Returns
    -------
    Tensor
        ``[batch, kv_heads, heads, queries, v_dim]``, dtype of the query.
    """
    from hga_compile.kernels.triton_coarse import coarse_queries
    from hga_compile.kernels.triton_tile_attend import attend_tiles

    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, kv_heads, heads, queries, _ = query.shape
    rows = batch * kv_heads
    out = query.new_empty(batch, kv_heads, heads, queries, value.shape[2])
    logits = None if scoring.sinks is None else scoring.sinks.float()
    shared = rows // spans.shape[2]
    # Votes are the largest of what a run needs.
    step = max(1, _RUN_BYTES // (12 * rows * keys.means.steps.shape[1]))
    for begin in range(0, tiles.number, step):
        number = min(step, tiles.number - begin)
        table, candidates = spans[:, begin : begin + number].flatten(1, 2)
        asked = coarse_queries(
            query, first, tiles.first + begin, number, tiles.size, scale, turn=keys.refined
        )
        chosen = _choose_for_tiles(asked, keys, tiles, begin, number, table, candidates, routing, shared)
        attend_tiles(
            key, value, chosen, table, query, out, logits, first=first, tile=tiles.first + begin,
            tiles=number, size=tiles.size, group_size=routing.group_size, scale=scale,
            softcap=scoring.softcap, rows_of_span=shared,
        )  # fmt: skip
        if listed is not None:
            listed(begin, chosen.view(number, rows, -1))
    return out


def _choose_for_tiles(
    query: Coarse,
    keys: TileKeys,
    tiles: Tiles,
    begin: int,
    number: int,
    table: Tensor,
    candidates: Tensor,
    routing: Routing,
    shared: int,
) -> Tensor:
    """List the groups of a run of tiles, ``[tiles * rows, width]`` int32."""
    from hga_compile.kernels.triton_select import select_groups
    from hga_compile.kernels.triton_tile_refine import votes_by_tokens
    from hga_compile.kernels.triton_tile_vote import bases_of, votes_by_means

    def longest(part: Tensor) -> int:
        return max(1, int(part[:, begin : begin + number].max()))

    most, width = routing.vote == "mass_max", longest(tiles.listed)
    singles, block = (BLOCK, BLOCK) if keys.refined else (0, 1)
    bases = bases_of(query, keys.anchors, singles, block, table, shared)
    votes = votes_by_means(query, keys.means, bases, longest(tiles.plan.window), table, most, shared)
    if keys.codes is None or keys.scales is None:
        return select_groups(votes, table, width, shared)
    names = select_groups(votes, candidates, longest(tiles.candidates), shared)
    votes = votes_by_tokens(
        query, keys.codes, keys.scales, names, bases, candidates, group_size=routing.group_size,
        bits=routing.bits, dim=keys.dim, most=most, rows_of_span=shared,
    )  # fmt: skip
    return select_groups(votes, table, width, shared, names)
