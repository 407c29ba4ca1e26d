"""What runs in Triton on a GPU, with no wait for it in between: a decode step, and encoding keys.

The modules of the kernels import Triton, which not every machine has: they are imported here, when used.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.plan import QueryPlan, plan_queries
from hga_compile.kernels.scoring import PLAIN, Scoring

__all__ = ["Spans", "decode_step", "encode", "load_rows", "spans_of", "store_rows"]


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
    # Without a wait: the table is small, and its source is kept until the copy is done.
    source = table.pin_memory() if device.type == "cuda" else table
    return Spans(source.to(device, non_blocking=True), int(lists.max()), plan.last_window, int(tokens.sum()))


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
