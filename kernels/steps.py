"""Queries that C++ kernels route and attend one by one, on a CPU (see `native.routed_steps`)."""

from functools import lru_cache

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.call import Call
from hga_compile.kernels.dispatch import give_up, preferred
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.lowbit import LowBitSummary
from hga_compile.kernels.native import attend_pages
from hga_compile.kernels.plan import plan_queries

__all__ = ["NO_CHOICE", "attend_native", "native_steps", "pieces"]


# Queries that are planned together.
PIECE = 256
NO_CHOICE = "a window with nothing to choose from before it"


def attend_native(call: Call, groups: Tensor, tokens: int) -> Tensor | None:
    """Attend from one query a row to listed groups; None where C++ cannot: float32 on a CPU, a plain softmax.

    Parameters
    ----------
    call : Call
        Of one query a row.
    groups : Tensor
        ``[rows, n]`` int64.
    tokens : int
        Tokens of these groups that exist.
    """
    kv, plain = call.kv, call.index.tail is None and call.scoring.plain and not LEDGER.wants(call.layer)
    single = kv.dtype == call.query.dtype == torch.float32
    if preferred(call.kernels, call.query.device) != "native" or not (plain and single and kv.paged):
        return None
    return _attend(call, groups, tokens)


def native_steps(call: Call) -> Tensor | None:
    """Route and attend query by query, in one call on a CPU; None where that is not possible."""
    if call.way != "native":
        return None
    pages, summary = call.kv.host_pages, call.index.groups
    assert isinstance(summary, LowBitSummary)  # covered
    parts = [_spans(call.routing, first, count) for first, count in pieces(call)]
    spans, vote = torch.cat([piece[0] for piece in parts]), call.routing.vote
    if not 0 < int(spans[:, 2].max()) <= summary.groups:
        give_up(call.kernels, call.way, NO_CHOICE)
        return None
    out = None
    if pages is None and len(spans) == 1:
        groups = summary.routes(call.scaled, spans, vote)
        if groups is not None:
            # Only the last group can be incomplete, and it comes last.
            missing = -call.length % call.routing.group_size
            out = _attend(call, groups, groups.shape[1] * call.routing.group_size - missing)
            out = None if out is None else out[:, :, None]
    else:
        if pages is None:
            every = torch.arange(-(-call.length // call.routing.group_size), device="cpu")
            pages = call.kv.fetch(every.expand(call.kv.rows, -1))
        out = summary.steps(pages, call.scaled, call.query.flatten(0, 1), spans, vote, call.scale)
    if out is None:
        give_up(call.kernels, call.way, "a score that is not finite")
        return None
    call.count_scored(sum(piece[1] for piece in parts))
    call.use.add_attended(call.kv.rows * sum(piece[2] for piece in parts))
    return out


def _attend(call: Call, groups: Tensor, tokens: int) -> Tensor | None:
    """Attend to listed groups, read where they lie or fetched: ``[rows, heads, v_dim]``."""
    pages, query = call.kv.host_pages, call.query.flatten(0, 1)[:, :, 0]
    if pages is None:
        pages = call.kv.fetch(groups)
        groups = torch.arange(groups.shape[1], device="cpu").expand(len(groups), -1)
    return attend_pages(pages, groups, query, tokens, call.routing.group_size, call.scale)


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
