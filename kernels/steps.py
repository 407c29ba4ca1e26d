"""Queries that C++ kernels route and attend one by one, on a CPU (see `native.routed_steps`)."""

from functools import lru_cache

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.call import Call
from hga_compile.kernels.dispatch import give_up, preferred
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.lowbit import LowBitSummary
from hga_compile.kernels.plan import plan_queries

__all__ = ["NO_CHOICE", "native_pages", "native_steps", "pieces"]


# Queries that are planned together.
PIECE = 256
NO_CHOICE = "a window with nothing to choose from before it"


def native_pages(call: Call) -> Tensor | None:
    """Return the pages if the C++ kernels can attend to them: float32 on a CPU, nothing but a softmax."""
    plain = call.index.tail is None and call.scoring.plain and not LEDGER.wants(call.layer)
    native = preferred(call.kernels, call.query.device) == "native"
    return call.kv.host_pages if native and plain and call.query.dtype == torch.float32 else None


def native_steps(call: Call) -> Tensor | None:
    """Route and attend query by query, in one call on a CPU; None where that is not possible."""
    if call.way != "native":
        return None
    pages, summary = call.kv.host_pages, call.index.groups
    assert pages is not None and isinstance(summary, LowBitSummary)  # covered
    parts = [_spans(call.routing, first, count) for first, count in pieces(call)]
    spans, vote = torch.cat([piece[0] for piece in parts]), call.routing.vote
    if not 0 < int(spans[:, 2].max()) <= summary.groups:
        give_up(call.kernels, call.way, NO_CHOICE)
        return None
    out = summary.steps(pages, call.scaled, call.query.flatten(0, 1), spans, vote, call.scale)
    if out is None:
        give_up(call.kernels, call.way, "a score that is not finite")
        return None
    call.count_scored(sum(piece[1] for piece in parts))
    call.use.add_attended(call.kv.rows * sum(piece[2] for piece in parts))
    return out


def pieces(call: Call) -> list[tuple[int, int]]:
    """Cut the queries into runs (first, number) whose plans are small enough to be kept."""
    starts = range(call.first, call.length, PIECE)
    return [(first, min(PIECE, call.length - first)) for first in starts]


# All layers of a model take the same steps.
@lru_cache(maxsize=64)
def _spans(routing: Routing, first: int, queries: int) -> tuple[Tensor, int, int]:
    """Return the `Span` of each unpadded query, the groups scored, and the tokens attended to, in one row."""
    plan, size = plan_queries(routing, first, queries, None), routing.group_size
    between, chosen = plan.window - plan.sink_end, plan.taken
    parts = (plan.sink_start, plan.sink_end, plan.window, chosen, plan.visible)
    scored = plan.window * ((chosen > 0) & (chosen < between))
    attended = (plan.sink_end - plan.sink_start + chosen - plan.window) * size + plan.visible
    return torch.stack([part[0] for part in parts], 1), int(scored.sum()), int(attended.sum())
