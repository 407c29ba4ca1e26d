"""Find the best launch parameters on the present GPU: try a small grid, check each result, time the rest."""

import logging
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels import gpu
from hga_compile.kernels.launch import (
    Attend,
    Encode,
    Launch,
    Score,
    Select,
    Shape,
    Turn,
    Vote,
    shape_of,
    trying,
)
from hga_compile.kernels.plan import plan_queries

__all__ = ["Outcome", "Task", "Workload", "compile_all", "graph_microseconds", "tasks_of", "tune"]

log = logging.getLogger(__name__)

Timer = Callable[[Callable[[], object]], float]
# Less than this is noise.
_WORTH = 0.98


@dataclass(frozen=True)
class Workload:
    """One decode step to tune for: rows (KV heads x batch), query heads of each, channels, tokens."""

    rows: int
    heads: int
    dim: int
    tokens: int


@dataclass(frozen=True)
class Task:
    """One kernel at one shape."""

    kernel: type[Launch]
    shape: Shape
    run: Callable[[], object]
    """What is timed."""
    check: Callable[[], tuple[Tensor, Tensor]]
    """What must come out as it does with the defaults: integers, exactly, and numbers, within their dtype."""


@dataclass(frozen=True)
class Outcome:
    """What was found for one kernel at one shape."""

    kernel: str
    shape: Shape
    default: Launch
    best: Launch
    default_microseconds: float
    best_microseconds: float
    tried: int
    refused: int
    """Candidates that gave another result, or did not run on this GPU."""

    @property
    def ratio(self) -> float:
        """Time of the best over that of the defaults."""
        return self.best_microseconds / self.default_microseconds


def tune(task: Task, timer: Timer, advance: Callable[[int], None] = lambda _: None) -> Outcome:
    """Try all candidates of one kernel at one shape.

    Parameters
    ----------
    task : Task
        From `tasks_of`.
    timer : callable
        Returns the microseconds of a call.
    advance : callable
        Told the number of candidates after each.

    Returns
    -------
    Outcome
        The defaults stay the best unless a candidate is faster by more than noise.
    """
    default = task.kernel.default(task.shape)
    with trying(default):
        want = task.check()
        own = timer(task.run)
    best, least, tried, refused = default, own, 0, 0
    for candidate in task.kernel.candidates():
        if candidate != default:
            tried += 1
            took = _time_of(task, candidate, want, timer)
            refused += took is None
            if took is not None and took < min(least, own * _WORTH):
                best, least = candidate, took
        advance(1)
    return Outcome(task.kernel.name(), task.shape, default, best, own, least, tried, refused)


def compile_all(task: Task, workers: int | None = None) -> None:
    """Run all candidates once, several at a time: compilers are slow, and mostly let other threads run.

    Parameters
    ----------
    task : Task
        From `tasks_of`.
    workers : int or None
        Threads; None: one a core, 16 at most.
    """
    workers = workers or min(16, os.cpu_count() or 1)
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def compiled(candidate: Launch) -> None:
        # What is on trial is a thread's own.
        place = torch.cuda.device(device) if device is not None else nullcontext()
        with place, trying(candidate), suppress(Exception):  # `tune` says what does not run
            task.check()

    candidates = dict.fromkeys([task.kernel.default(task.shape), *task.kernel.candidates()])
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(compiled, candidates))


def _time_of(task: Task, candidate: Launch, want: tuple[Tensor, Tensor], timer: Timer) -> float | None:
    """Return the time of a candidate; None if its result is another, or it needs more than the GPU has."""
    with trying(candidate):
        try:
            if not _same(task.check(), want):
                log.info("%s gives another result: not used", candidate)
                return None
            return timer(task.run)
        except torch.AcceleratorError:
            raise  # the device is in no state to go on
        except Exception as error:  # Triton and its compiler have many, none of them public
            log.info("%s does not run here: %s", candidate, error)
            return None


def _same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    """Compare integers exactly and numbers within a few roundings of their dtype."""
    near = 4 * torch.finfo(want[1].dtype).eps
    close = torch.allclose(got[1].float(), want[1].float(), rtol=near, atol=near * float(want[1].abs().max()))
    return torch.equal(got[0], want[0]) and close


def graph_microseconds(step: Callable[[], object], calls: int = 20, replays: int = 30) -> float:
    """Return the median time of a call, from replays of a CUDA graph of several."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            step()
    took = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / calls)
    median: float = statistics.median(took)
    return median


def tasks_of(
    load: Workload, device: torch.device, dtype: torch.dtype = torch.bfloat16, routing: Routing | None = None
) -> Iterable[Task]:
    """Return the tasks of a decode step and of encoding its keys.

    K/V are random: time does not depend on them.

    Parameters
    ----------
    load : Workload
        Shape of the step.
    device : torch.device
        The GPU, which holds K/V of that shape meanwhile.
    dtype : torch.dtype
        Of the K/V.
    routing : Routing or None
        None: 3% of the tokens, 256 at least, no chunk stage.
    """
    from hga_compile.kernels.triton_attend import attend_listed
    from hga_compile.kernels.triton_encode import encode
    from hga_compile.kernels.triton_score import group_masses
    from hga_compile.kernels.triton_select import select_groups, votes_of
    from hga_compile.kernels.triton_turn import turn

    routing = routing or Routing(budget=Budget(fraction=0.03, tokens=256), chunk_stage="off")
    rows, heads, dim, tokens = load.rows, load.heads, load.dim, load.tokens
    size, bits, scale = routing.group_size, routing.bits, dim**-0.5
    random = torch.Generator(device).manual_seed(0)
    groups = -(-tokens // size)
    pages = torch.empty(groups, rows, size * 2 * dim, dtype=dtype, device=device)
    for part in pages.split(4096):
        part.normal_(generator=random)
    width = -(-dim * bits // 8)
    shape = (rows, groups * size, width)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=random).transpose(1, 2)
    scales = (torch.rand(rows, groups * size, device=device, generator=random) + 0.5).half()
    query = torch.randn(rows, heads, dim, device=device, generator=random).to(dtype)
    spans = gpu.spans_of(routing, plan_queries(routing, tokens - 1, 1, None), None, device)
    table, known = spans.table, spans.groups

    def step() -> tuple[Tensor, Tensor]:
        out, chosen = gpu.decode_step(
            pages, codes, scales, query, spans, length=tokens, routing=routing, scale=scale, kv_heads=rows
        )
        return chosen, out

    def score() -> Any:
        return group_masses(codes, scales, turned, table, groups=known, group_size=size, rows_of_span=rows)

    def attend() -> Tensor:
        return attend_listed(
            pages, chosen, table, query, None, group_size=size, scale=scale, softcap=0.0,
            rows_of_span=rows, kv_heads=rows,
        )  # fmt: skip

    turned = turn(query, scale, routing.bits)
    masses = score()
    # Votes are counted in the masses' bins once: those that are timed below are others.
    votes = votes_of(score(), table, heads, False, rows)
    chosen = select_groups(votes, table, spans.width, rows)
    padded, wide = turned.halves.shape[3], max(32, 1 << (turned.halves.shape[4] - 1).bit_length())
    yield Task(Turn, shape_of(1, rows, padded, dim), lambda: turn(query, scale, routing.bits), step)
    yield Task(Score, shape_of(known * size, rows, padded, wide), score, step)
    vote_shape = shape_of(known, rows, padded)
    yield Task(Vote, vote_shape, lambda: votes_of(masses, table, heads, False, rows), step)
    select_shape = shape_of(known, rows)
    yield Task(Select, select_shape, lambda: select_groups(votes, table, spans.width, rows), step)
    yield Task(Attend, shape_of(spans.width * size, rows, heads, dim), attend, step)

    for new in (size, min(tokens, 4096)):
        keys = torch.randn(rows, new, dim, device=device, generator=random).to(dtype)
        centre = torch.zeros(rows, dim, device=device)
        to = torch.zeros(rows, new, width, dtype=torch.uint8, device=device).transpose(1, 2)
        to_scales = torch.zeros(rows, new, dtype=torch.float16, device=device)

        def write(
            keys: Tensor = keys, centre: Tensor = centre, to: Tensor = to, to_scales: Tensor = to_scales
        ) -> tuple[Tensor, Tensor]:
            encode(keys, centre, to, to_scales, 0, bits, 1.0)
            return to, to_scales

        def written(write: Callable[[], tuple[Tensor, Tensor]] = write) -> tuple[Tensor, Tensor]:
            codes, scales = write()
            return codes.clone(), scales.clone()

        yield Task(Encode, shape_of(new, rows, 0, dim), write, written)
