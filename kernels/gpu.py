"""What runs in Triton on a GPU, with no wait for it in between: a decode step, and summarising keys.

The modules of the kernels import Triton, which not every machine has: they are imported here, when used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.hot import HotCache
from hga_compile.kernels.plan import QueryPlan, kept_chunks, plan_queries
from hga_compile.kernels.scoring import PLAIN, Scoring
from hga_compile.kernels.tail import TailSummary

__all__ = [
    "ChunkSpans",
    "SpanLines",
    "Spans",
    "chunks_suffice",
    "decode_step",
    "encode",
    "fetched",
    "follow_centre",
    "load_rows",
    "sent",
    "span_lines",
    "spans_of",
    "store_means",
    "store_rows",
]


@dataclass(frozen=True)
class ChunkSpans:
    """Which chunks one query of each sequence keeps, on the GPU."""

    table: Tensor
    """``[batch or 1, 7]`` int32: `Spans.table` of chunks; its window is the chunk that the groups' is in."""
    width: int
    """Chunks of the longest list: those kept, and that one if it has groups before the window."""
    chunks: int
    """Chunks before the last window."""
    groups: int
    """Most groups of a list, those of the window left out."""
    chosen: int
    """Most groups to choose among these."""


@dataclass(frozen=True)
class Spans:
    """Which groups one query of each sequence attends to beside those chosen, on the GPU."""

    table: Tensor
    """``[batch or 1, 7]`` int32: first sink group, group past the sinks, first group of the window, groups to
    choose between them, groups in all, first token that is not padding, tokens in all."""
    width: int
    """Groups of the longest list."""
    groups: int
    """Groups before the last window."""
    attended: int
    """Tokens attended to in one row of each line, summed over the lines."""
    chunks: ChunkSpans | None = None
    """Which chunks are kept first; None: all of them."""

    def listed(self, rows: int) -> Tensor:
        """Return how long the list of each row is, ``[rows, 1]``."""
        start, end, window, chosen, last, _, _ = self.table.unbind(1)
        return (end - start + chosen + last - window).repeat_interleave(rows // len(self.table))[:, None]

    def starts(self, rows: int) -> Tensor:
        """Return the first token of each row that is not padding, ``[rows, 1]``."""
        return self.table[:, 5].repeat_interleave(rows // len(self.table))[:, None]


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
    return _padded_spans(routing, plan, starts, device)


# All layers of a model take the same step.
@lru_cache(maxsize=64)
def _plain_spans(routing: Routing, first: int, device: torch.device) -> Spans:
    none = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    return _spans(routing, plan_queries(routing, first, 1, None), none, device)


# Likewise; plan and padding, which are found by what they are and not by what they hold, are made once too.
@lru_cache(maxsize=64)
def _padded_spans(routing: Routing, plan: QueryPlan, starts: Tensor, device: torch.device) -> Spans:
    return _spans(routing, plan, starts, device)


def _spans(routing: Routing, plan: QueryPlan, starts: Tensor, device: torch.device) -> Spans:
    lines = span_lines(routing, plan, starts)
    chunks = _chunk_spans(routing, plan, device) if routing.uses_chunks(plan.first + 1) else None
    width, attended = int(lines.lists.max()), int(lines.attended.sum())
    return Spans(sent(lines.tables[0], device), width, plan.last_window, attended, chunks)


class SpanLines(NamedTuple):
    """`Spans` of a run of queries, on the CPU; a query is one a sequence."""

    tables: Tensor
    """``[queries, batch or 1, 7]`` int32: their `Spans.table`."""
    lists: Tensor
    """``[batch or 1, queries]`` int64: groups of a list."""
    attended: Tensor
    """``[batch or 1, queries]`` int64: tokens attended to in one row of a line."""


def span_lines(routing: Routing, plan: QueryPlan, starts: Tensor) -> SpanLines:
    """Turn a plan into what kernels read of it.

    Parameters
    ----------
    routing : Routing
        Settings of the layer.
    plan : QueryPlan
        Of queries next to each other.
    starts : Tensor
        ``[batch or 1, 1]`` int64 on the CPU: padding before each sequence.
    """
    size, window = routing.group_size, plan.window
    ends = torch.arange(plan.first + 1, plan.first + 1 + window.shape[1], device="cpu").expand_as(window)
    last, chosen = -(-ends // size), plan.taken
    lists = plan.sink_end - plan.sink_start + chosen + last - window
    parts = (plan.sink_start, plan.sink_end, window, chosen, last, starts, ends)
    tables = torch.stack([part.expand_as(window) for part in parts], 2).transpose(0, 1)
    # Of the first sink group and the last one not all tokens are there.
    attended = lists * size - (starts - plan.sink_start * size).clamp(min=0) - -ends % size
    return SpanLines(tables.to(torch.int32).contiguous(), lists, attended)


def chunks_suffice(routing: Routing, plan: QueryPlan) -> bool:
    """Say whether the chunks that a query keeps hold the groups it may choose, whichever they are.

    Only then is their number known without a wait. The first chunk may hold padding: without any they do.

    Parameters
    ----------
    routing : Routing
        Settings of the layer.
    plan : QueryPlan
        Of one query.
    """
    first, chunks, kept = kept_chunks(routing, plan)
    per_chunk = routing.chunk_size // routing.group_size
    least = kept * per_chunk - (plan.sink_end - first * per_chunk)
    return bool(((kept == chunks - first) | (least >= plan.taken)).all())


def _chunk_spans(routing: Routing, plan: QueryPlan, device: torch.device) -> ChunkSpans | None:
    """Plan level 1 of one query a sequence; None where it keeps all chunks, or nothing is chosen."""
    per_chunk = routing.chunk_size // routing.group_size
    first, chunks, kept = kept_chunks(routing, plan)
    chosen, rest = plan.taken, plan.window % per_chunk
    if not bool(((kept < chunks - first) & (chosen > 0)).any()):
        return None
    last = chunks + (rest > 0)
    nothing = torch.zeros_like(kept)
    table = torch.cat([first, first, chunks, kept, last, nothing, nothing], 1).to(torch.int32)
    width, groups = kept + last - chunks, kept * per_chunk + rest
    most = (int(part.max()) for part in (width, chunks, groups, chosen))
    return ChunkSpans(sent(table, device), *most)


def sent(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small table to the GPU without a wait."""
    # Without a wait: the table is small, and its source is kept until the copy is done.
    source = table.pin_memory() if device.type == "cuda" else table
    return source.to(device, non_blocking=True)


def encode(
    keys: Tensor,
    centre: Tensor,
    codes: Tensor,
    scales: Tensor,
    begin: int | Tensor,
    bits: int,
    step: float,
    turned: Tensor | None = None,
    centres: Tensor | None = None,
) -> None:
    """Encode keys (see `triton_encode.encode`)."""
    from hga_compile.kernels import triton_encode

    triton_encode.encode(keys, centre, codes, scales, begin, bits, step, turned, centres)


def follow_centre(pages: Tensor, centres: Tensor, middle: Tensor, end: Tensor, group_size: int) -> None:
    """Make the centre of a block that begins (see `triton_centres.follow_centre`)."""
    from hga_compile.kernels import triton_centres

    triton_centres.follow_centre(pages, centres, middle, end, group_size)


def store_means(keys: Tensor, means: Tensor, begin: int, group_size: int) -> None:
    """Write the means of groups of keys (see `triton_mean.store_means`)."""
    from hga_compile.kernels import triton_mean

    triton_mean.store_means(keys, means, begin, group_size)


def store_rows(pages: Tensor, key: Tensor, value: Tensor, begin: int | Tensor, group_size: int) -> None:
    """Write a few K/V rows (see `triton_store.store_rows`)."""
    from hga_compile.kernels import triton_store

    triton_store.store_rows(pages, key, value, begin, group_size)


def load_rows(
    pages: Tensor, key: Tensor, value: Tensor, begin: int, group_size: int, first_row: int = 0
) -> None:
    """Read K/V rows into `key` and `value` (see `triton_store.load_rows`)."""
    from hga_compile.kernels import triton_store

    triton_store.load_rows(pages, key, value, begin, group_size, first_row)


def decode_step(
    pages: Tensor | None,
    codes: Tensor,
    scales: Tensor | None,
    query: Tensor,
    spans: Spans,
    *,
    length: int,
    routing: Routing,
    scale: float,
    scoring: Scoring = PLAIN,
    kv_heads: int,
    parts: Tensor | None = None,
    tail: TailSummary | None = None,
    fetch: Callable[[Tensor], Tensor] | None = None,
    hot: HotCache | None = None,
    centres: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Route one query a head by summaries and attend to what it is routed to.

    Parameters
    ----------
    pages : Tensor or None
        ``[groups, rows, group_size * (dim + v_dim)]``, in GPU memory or pinned (see `store.pages.Pages`);
        None: they are fetched.
    codes, scales : Tensor
        ``[rows, bytes, tokens]`` uint8, bytes innermost in memory, and ``[rows, tokens]`` float16 (see
        `lowbit.encode_keys`); or ``[rows, groups, dim]`` means, and None (see `mean.MeanSummary`).
    query : Tensor
        ``[rows, heads, dim]``, dtype of the pages.
    spans : Spans
        From `spans_of`.
    length : int
        Tokens of the sequence, or a bound: room is made for so many.
    routing : Routing
        Settings of the layer.
    scale : float
        Softmax scale.
    scoring : Scoring
        Soft-cap and sinks.
    kv_heads : int
        Rows of one sequence.
    parts : Tensor or None
        ``[rows, chunks * chunk_parts, dim]`` means of parts of chunks (see `chunks.ChunkSummary`), by which
        `spans.chunks` are kept; None: all are.
    tail : TailSummary or None
        Estimates of what is not attended to; they go with neither soft-cap nor sinks.
    fetch : callable or None
        Returns copies ``[n, rows, page]`` of ``[rows, n]`` groups on the GPU, where there are no `pages`;
        this waits for the GPU.
    hot : HotCache or None
        Slots for pages that lie in pinned memory.
    centres : Tensor or None
        ``[rows, >= blocks, dim]`` bfloat16: what the keys of each block are coded about (see `centres`);
        None: all are coded about one centre.

    Returns
    -------
    out : Tensor
        ``[rows, heads, v_dim]``, dtype of the query.
    groups : Tensor
        ``[rows, width]`` int32: the groups attended to, ascending; fewer in rows whose list is shorter.
    """
    from hga_compile.kernels.triton_attend import attend_listed
    from hga_compile.kernels.triton_route import route
    from hga_compile.kernels.triton_tail import tail_shares

    query, table = query.contiguous(), spans.table
    shared = len(query) if len(table) == 1 else kv_heads
    chosen = route(
        codes, scales, query, spans, routing=routing, scale=scale, rows_of_span=shared, parts=parts,
        centres=centres,
    )  # fmt: skip
    estimate = None
    if tail is not None:
        estimate = tail_shares(query, tail, table, length=length, scale=scale, rows_of_span=shared)
    logits = None if scoring.sinks is None else scoring.sinks.float()
    slots = None
    if pages is None:
        assert fetch is not None  # one of the two is given
        pages, slots = fetched(chosen, spans, -(-length // routing.group_size), fetch)
    near = None
    if hot is not None:
        entries = hot.place(chosen, table, length, routing.group_size, shared)
        near = hot.pool, entries
    out = attend_listed(
        pages, chosen, table, query, logits, group_size=routing.group_size, scale=scale,
        softcap=scoring.softcap, rows_of_span=shared, kv_heads=kv_heads, slots=slots, tail=estimate, hot=near,
    )  # fmt: skip
    return out, chosen


def fetched(
    chosen: Tensor, spans: Spans, groups: int, fetch: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Fetch listed groups, `groups` in all: a pool of their pages, and the table of where each lies in it.

    Both are as `triton_attend.attend_listed` takes them.
    """
    rows, width = chosen.shape
    place = torch.arange(width, device=chosen.device)
    # What stands behind a row's own list is anything; its first group is there in any case.
    listed = torch.where(place < spans.listed(rows), chosen, 0).long()
    slots = torch.zeros(rows, groups, dtype=torch.int32, device=chosen.device)
    number = place * rows + torch.arange(rows, device=chosen.device)[:, None]
    slots.scatter_(1, listed, number.to(torch.int32))
    return fetch(listed).flatten(0, 1), slots
