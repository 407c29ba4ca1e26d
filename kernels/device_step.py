"""A decode step whose position the GPU knows: its kernels are launched once and replayed as a sequence grows.

Nothing in it depends on a number that the CPU holds: each kernel reads the length, and what is sinks, window
and choice at that length, from a table that has a line for every position of a stretch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.call import Call
from hga_compile.kernels.dispatch import covers, preferred
from hga_compile.kernels.gpu import Spans, decode_step, span_lines, store_rows
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.lowbit import LowBitSummary
from hga_compile.kernels.plan import plan_queries

__all__ = ["Book", "DeviceStep", "NotReplayed", "StepCosts"]
__all__ += ["attend_step", "count_steps", "current_step", "stepping", "unfit"]


class NotReplayed(RuntimeError):
    """Why a decode step cannot be replayed; it runs kernel by kernel then."""


@dataclass(frozen=True)
class Book:
    """What one query of a sequence attends to at every position of a stretch."""

    tables: Tensor
    """``[positions, 1, 7]`` int32 on the GPU: `gpu.Spans.table` of each."""
    width: int
    """Groups of the longest list."""
    groups: int
    """Groups before the last window."""
    counts: Tensor
    """``[positions, 3]`` int64 on the CPU: tokens seen, groups scored and tokens attended to in one row."""
    short: bool
    """Whether some of the queries attend to all that they see, or have nothing before their window."""


class StepCosts(NamedTuple):
    """What steps of a layer are counted by."""

    rows: int
    """KV heads times batch."""
    batch: int
    bytes_per_token: float
    """Of summaries, in one row."""
    row_bytes: int
    """Of one token's K and V in one row."""


class DeviceStep:
    """A stretch of positions, and on the GPU the one that a step is at.

    Parameters
    ----------
    first, last : int
        Positions ``first <= position < last`` of the query.
    device : torch.device
        The GPU.
    """

    def __init__(self, first: int, last: int, device: torch.device) -> None:
        self.first, self.last, self.device = first, last, device
        with torch.inference_mode(False):  # written to outside of it too
            self._line = torch.zeros(1, dtype=torch.int64, device=device)
        self._books: dict[Routing, Book] = {}
        self._spans: dict[Routing, Spans] = {}

    def seek(self, position: int) -> None:
        """Have the next run of the kernels be at this position, without a wait.

        Raises
        ------
        IndexError
            It is not of the stretch.
        """
        if not self.first <= position < self.last:
            raise IndexError(f"position {position} is not of the stretch {self.first} to {self.last - 1}")
        self._line.fill_(position - self.first)

    def number(self, ahead: int) -> Tensor:
        """Return the position and `ahead`, ``[]`` int64, added up on the GPU."""
        return (self._line + (self.first + ahead))[0]

    def begin(self) -> None:
        """Forget the lines that layers of an earlier run shared."""
        self._spans.clear()

    def book(self, routing: Routing) -> Book:
        """Return the lines of a routing, planned once for the stretch."""
        if routing not in self._books:
            count = self.last - self.first
            plan = plan_queries(routing, self.first, count, None)
            lines = span_lines(routing, plan, torch.zeros(1, 1, dtype=torch.int64, device="cpu"))
            counts = torch.stack([plan.visible[0], plan.window[0], lines.attended[0]], 1)
            # Found out here, on the CPU: nothing may wait for the GPU while a step is recorded.
            short = bool(plan.dense.any()) or not bool((plan.window > 0).all())
            self._books[routing] = Book(
                lines.tables.to(self.device), int(lines.lists.max()), plan.last_window, counts, short
            )
        return self._books[routing]

    def spans(self, routing: Routing) -> Spans:
        """Return the line of the step's position, read on the GPU once for all layers of a run."""
        if routing not in self._spans:
            book = self.book(routing)
            table = book.tables.index_select(0, self._line)[0]
            self._spans[routing] = Spans(table, book.width, book.groups, 0)
        return self._spans[routing]


_CURRENT: ContextVar[DeviceStep | None] = ContextVar("hga_device_step", default=None)


def current_step() -> DeviceStep | None:
    """Return the step that attention is to run as; None: its own position is known on the CPU."""
    return _CURRENT.get()


@contextmanager
def stepping(step: DeviceStep) -> Iterator[None]:
    """Run attention as this step for as long as the context is open."""
    step.begin()
    token = _CURRENT.set(step)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def unfit(call: Call, step: DeviceStep) -> str | None:
    """Say why a call cannot run as a `DeviceStep`; None if it can.

    Parameters
    ----------
    call : Call
        One query a sequence; its length is the stretch's last.
    step : DeviceStep
        The step.
    """
    routing, need = call.routing, call.need("decode")
    way = preferred(call.kernels, need.device)
    lacking = "kernels of the GPU" if way != "triton" else covers(way, need)
    if lacking is not None:
        return f"a layer that needs {lacking}"
    if not isinstance(call.index.groups, LowBitSummary):
        return f"{routing.summary} summaries"
    if routing.uses_chunks(call.length):
        return "the chunk stage"
    if call.index.tail is not None:
        return "a tail estimate"
    if call.kv.gpu_pages is None:
        return "K/V that kernels cannot read where they lie (offload.tier)"
    if LEDGER.wants(call.layer):
        return "recorded routes"
    if step.book(routing).short:
        return "a sequence that is still short"
    return None


def attend_step(call: Call, key: Tensor, value: Tensor, step: DeviceStep) -> Tensor:
    """Store new rows, bring the index up to date, route and attend, at the position that `step` is at.

    Parameters
    ----------
    call : Call
        As `unfit` takes it, and finds nothing wrong with it.
    key, value : Tensor
        ``[rows, 1, dim]`` and ``[rows, 1, v_dim]``, new rows.
    step : DeviceStep
        The step.

    Returns
    -------
    Tensor
        ``[rows, heads, v_dim]``, dtype of the query.
    """
    pages, summary, spans = call.kv.gpu_pages, call.index.groups, step.spans(call.routing)
    assert pages is not None and isinstance(summary, LowBitSummary)  # fit
    end = spans.table.flatten()[6:]
    store_rows(pages, key, value, end, call.routing.group_size)
    summary.follow(pages, end)
    summary.encode_last(key, end)
    query = call.query.flatten(0, 1)[:, :, 0].to(call.kv.dtype)
    codes, scales = summary.stored
    out, _ = decode_step(
        pages, codes, scales, query, spans, length=call.length, routing=call.routing, scale=call.scale,
        scoring=call.scoring, kv_heads=call.query.shape[1], hot=call.hot,
        centres=None if summary.centres is None else summary.centres.values,
    )  # fmt: skip
    return out.to(call.query.dtype)


def count_steps(book: Book, lines: slice, layer: int, routing: Routing, costs: StepCosts) -> None:
    """Tell the ledger of steps that were replayed.

    Parameters
    ----------
    book : Book
        Lines of the stretch.
    lines : slice
        Those of the steps, with a start and a stop.
    layer : int
        Number of the layer.
    routing : Routing
        Its settings.
    costs : StepCosts
        Of its cache.
    """
    use, steps = LEDGER.use(layer, "decode"), lines.stop - lines.start
    visible, groups, attended = (costs.rows * int(part) for part in book.counts[lines].sum(0))
    use.row_bytes = use.dense_row_bytes = costs.row_bytes
    use.calls += steps
    use.queries += steps * costs.batch
    use.visible += visible
    use.scored += groups * routing.group_size
    use.summary_bytes += groups * routing.group_size * costs.bytes_per_token
    use.add_attended(attended)
