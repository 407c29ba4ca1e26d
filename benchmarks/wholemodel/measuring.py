"""One system at one context: prefill in steps, decode token by token, and what both take."""

from __future__ import annotations

import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hga_compile.cli.decode import Pace
from hga_compile.kernels.states import STATES
from hga_compile.store import StoreError
from wholemodel.replay import Replay
from wholemodel.systems import OPENING, Entry, Hga, Setup, System, Unavailable

__all__ = ["Plan", "TimeLimit", "measure", "percentile"]


_FEWEST = 16


class TimeLimit(RuntimeError):
    """A point that took longer than it was given."""


@dataclass(frozen=True)
class Plan:
    """How a point is measured."""

    step: int
    """Prompt tokens of a forward pass."""
    steps: int
    """Decoded tokens that are timed."""
    warmup: int
    """Decoded tokens before these: they compile, and fill a hot cache."""
    limit: float
    """Seconds for the point."""
    cap: int | None = None
    """Bytes of GPU memory that PyTorch may take."""
    patience: float = math.inf
    """Seconds after which a decode run of at least `_FEWEST` timed tokens is over."""

    @property
    def new(self) -> int:
        """Tokens decoded in all, with and without replayed lists."""
        return 2 * (self.warmup + self.steps)


def measure(
    entry: Entry,
    model: PreTrainedModel,
    ids: Tensor,
    setup: Setup,
    plan: Plan,
    replay: Callable[[Hga], Replay] | None = None,
) -> dict[str, Any]:
    """Measure a system on the prompt `ids` ``[1, context]``.

    Parameters
    ----------
    entry, model, setup
        The system, the model it runs, and what else it is given.
    ids
        The prompt.
    plan
        How.
    replay
        Makes the lists that a second decode run of a routed system reads; None: there is no such run.

    Returns
    -------
    dict
        Plain data: `status` is ``ok``, ``out of memory``, ``out of host memory``, ``time limit``,
        ``unavailable`` or ``failed``, with a `reason`; and what was measured until then.
    """
    found: dict[str, Any] = {"status": "ok", "reason": "", "stage": "start", "reached": 0}
    system: System | None = None
    _settle(plan, entry.capped, anew=not setup.kept)
    started, meter = time.perf_counter(), _Meter()
    try:
        with _limited(plan.limit), torch.no_grad():
            system = entry.make(model, setup)
            _prefill(system, ids, plan, found, meter)
            _decode(system, ids, plan, found, meter)
            if replay is not None and isinstance(system, Hga):
                system.record_anew()  # a recorded step would go on without the lists
                _decode(system, ids, plan, found, meter, replay(system))
    except Unavailable as error:
        found |= {"status": "unavailable", "reason": str(error)}
    except TimeLimit as error:
        found |= {"status": "time limit", "reason": str(error)}
    except StoreError as error:
        found |= {"status": "out of host memory", "reason": _line(error)}
    except Exception as error:  # one system that fails must not cost the others
        short = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        found |= {"status": "out of memory" if short else "failed", "reason": _line(error)}
    found["seconds"] = time.perf_counter() - started
    if system is not None:
        system.close()
    del system
    return found


def _prefill(system: System, ids: Tensor, plan: Plan, found: dict[str, Any], meter: _Meter) -> None:
    found["stage"] = "prefill"
    device, opening = str(ids.device), Pace(str(ids.device))
    with opening.step(OPENING):
        system.prefill(ids[:, :OPENING], 0)
    pace, working = Pace(device), []
    for begin in range(OPENING, ids.shape[1], plan.step):
        piece = ids[:, begin : begin + plan.step]
        meter.reset()
        with pace.step(piece.shape[1]):
            system.prefill(piece, begin)
        working.append(meter.peak() - meter.before - _near(system))
        found["reached"] = begin + piece.shape[1]
    # The first step may have compiled: Inductor tries kernels on buffers of its own.
    alone = working[min(1, len(working) - 1)]
    found["prefill"] = {
        "step": plan.step,
        "tokens": pace.tokens,
        "seconds": pace.seconds,
        "opening_seconds": opening.seconds,
        "tokens_per_second": pace.rate,
        "compiled_steps": sum(compiled for _, _, compiled in pace.steps),
    }
    found["memory"] = {
        "weights": meter.before,
        **asdict(system.held()),
        "activations": alone,
        "staging": max(0, max(working[1:] or working) - alone),
        "prefill_peak": meter.before + _near(system) + max(working),
    }


def _decode(
    system: System,
    ids: Tensor,
    plan: Plan,
    found: dict[str, Any],
    meter: _Meter,
    replay: Replay | None = None,
) -> None:
    name = "decode" if replay is None else "decode_replayed"
    found["stage"] = name
    done = 0 if replay is None else plan.warmup + found["decode"]["steps"]
    # Strides of its own: those of a piece of the prompt would be another graph than those of later tokens.
    token, seconds = ids[:, -1:].clone(memory_format=torch.contiguous_format), []
    if replay is not None:
        replay.prepare([ids.shape[1] + done + number + 1 for number in range(plan.warmup + plan.steps)])
    meter.reset()
    for number in range(plan.warmup + plan.steps):
        if number == plan.warmup and isinstance(system, Hga):
            system.begin_counting()
        if replay is None:
            began = time.perf_counter()
            token = system.decode(token)
        else:
            replay.load(number, ids.shape[1] + done + number + 1)
            _wait()
            began = time.perf_counter()
            with replay.replacing():
                token = system.decode(token)
        # Whoever streams text reads every token.
        int(token)
        if number >= plan.warmup:
            seconds.append(time.perf_counter() - began)
        if replay is not None and not replay.calls:
            raise RuntimeError("no list was replayed: the steps run in no Triton kernel")
        if len(seconds) >= _FEWEST and sum(seconds) > plan.patience:
            break
    found[name] = {
        "steps": len(seconds),
        "median_ms": statistics.median(seconds) * 1e3,
        "p99_ms": percentile(seconds, 0.99) * 1e3,
        "mean_ms": statistics.fmean(seconds) * 1e3,
        **system.traffic(len(seconds)),
    }
    if isinstance(system, Hga):
        found["routed"] = _routed(system)
    memory = {**found["memory"], **asdict(system.held())}
    memory["decode_peak"] = max(memory.get("decode_peak", 0), meter.peak())
    memory["reserved"] = meter.reserved
    memory["spare"] = plan.cap - meter.reserved if plan.cap and meter.on else None
    found["memory"] = memory


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that a share of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _routed(system: Hga) -> dict[str, Any]:
    import hga_compile

    report = hga_compile.report()
    total = report.totals("decode")
    if not total.visible:
        reasons = {site.reason for site in report.sites if not site.routed}
        raise RuntimeError(f"nothing was routed: {', '.join(sorted(reasons)) or 'no site'}")
    fallbacks = system.fallbacks | dict(report.fallbacks)
    return {"attended": total.attended / total.visible, "fallbacks": fallbacks}


def _near(system: System) -> int:
    held = system.held()
    return held.gpu_kv + held.index + held.hot if system.model.device.type == "cuda" else 0


def _settle(plan: Plan, capped: bool, anew: bool) -> None:
    if anew:
        torch.compiler.reset()
    gc.collect()
    STATES.collect()  # a cache that is gone leaves its memory to the next one, which may not be hga's
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        share = min(1.0, plan.cap / total) if capped and plan.cap is not None else 1.0
        torch.cuda.set_per_process_memory_fraction(share)
        torch.cuda.reset_peak_memory_stats()


class _Meter:
    """Peaks of PyTorch's GPU memory since `reset`, and of all that it reserved; zeros without a GPU."""

    def __init__(self) -> None:
        self.on = torch.cuda.is_available()
        self.before = torch.cuda.memory_allocated() if self.on else 0
        """Bytes allocated at the start: the weights."""
        self.reserved = 0

    def reset(self) -> None:
        """Begin anew."""
        if self.on:
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Return the most bytes that were allocated at once."""
        if not self.on:
            return 0
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        return torch.cuda.max_memory_allocated()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `TimeLimit` in the main thread after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeLimit(f"more than {seconds:.0f} s (--limit)")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
