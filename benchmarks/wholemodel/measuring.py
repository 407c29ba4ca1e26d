"""One system at one context: prefill in steps, decode token by token, and what both take."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hga_compile.cli.decode import Pace
from wholemodel.attempts import Meter, attempt, wait
from wholemodel.replay import Replay
from wholemodel.systems import OPENING, Entry, Hga, Setup, System

__all__ = ["FEWEST", "Plan", "measure", "percentile", "prefill_facts", "read", "routed", "times"]


FEWEST = 16
"""Timed tokens of a decode run that is cut short."""


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
    """Seconds after which a decode run of at least `FEWEST` timed tokens is over."""

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

    def run(system: System, found: dict[str, Any], meter: Meter) -> None:
        _prefill(system, ids, plan, found, meter)
        _decode(system, ids, plan, found, meter)
        if replay is not None and isinstance(system, Hga):
            system.record_anew()  # a recorded step would go on without the lists
            _decode(system, ids, plan, found, meter, replay(system))

    return attempt(
        lambda: entry.make(model, setup), run, limit=plan.limit, cap=plan.cap if entry.capped else None,
        anew=not setup.kept,
    )  # fmt: skip


def read(system: System, ids: Tensor, step: int, opening: Pace, pace: Pace) -> Iterator[int]:
    """Read a prompt ``[1, n]`` in steps.

    Yields
    ------
    int
        Tokens that are read: those of the opening, which is timed apart, then those with each step.
    """
    with opening.step(OPENING):
        system.prefill(ids[:, :OPENING], 0)
    yield OPENING
    for begin in range(OPENING, ids.shape[1], step):
        piece = ids[:, begin : begin + step]
        with pace.step(piece.shape[1]):
            system.prefill(piece, begin)
        yield begin + piece.shape[1]


def prefill_facts(step: int, opening: Pace, pace: Pace) -> dict[str, Any]:
    """Return what is told of a prefill in steps."""
    return {
        "step": step,
        "tokens": pace.tokens,
        "seconds": pace.seconds,
        "opening_seconds": opening.seconds,
        "tokens_per_second": pace.rate,
        "compiled_steps": sum(compiled for _, _, compiled in pace.steps),
    }


def _prefill(system: System, ids: Tensor, plan: Plan, found: dict[str, Any], meter: Meter) -> None:
    found["stage"] = "prefill"
    device, working = str(ids.device), []
    opening, pace = Pace(device), Pace(device)
    for end in read(system, ids, plan.step, opening, pace):
        if end > OPENING:
            working.append(meter.peak() - meter.before - _near(system))
            found["reached"] = end
        meter.reset()
    # The first step may have compiled: Inductor tries kernels on buffers of its own.
    alone = working[min(1, len(working) - 1)]
    found["prefill"] = prefill_facts(plan.step, opening, pace)
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
    meter: Meter,
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
            wait()
            began = time.perf_counter()
            with replay.replacing():
                token = system.decode(token)
        # Whoever streams text reads every token.
        int(token)
        if number >= plan.warmup:
            seconds.append(time.perf_counter() - began)
        if replay is not None and not replay.calls:
            raise RuntimeError("no list was replayed: the steps run in no Triton kernel")
        if len(seconds) >= FEWEST and sum(seconds) > plan.patience:
            break
    found[name] = times(seconds) | system.traffic(len(seconds))
    if isinstance(system, Hga):
        found["routed"] = routed(system)
    memory = {**found["memory"], **asdict(system.held())}
    memory["decode_peak"] = max(memory.get("decode_peak", 0), meter.peak())
    memory["reserved"] = meter.reserved
    memory["spare"] = plan.cap - meter.reserved if plan.cap and meter.on else None
    found["memory"] = memory


def times(seconds: list[float]) -> dict[str, float]:
    """Return what is told of the times of decode steps."""
    return {
        "steps": len(seconds),
        "median_ms": statistics.median(seconds) * 1e3,
        "p99_ms": percentile(seconds, 0.99) * 1e3,
        "mean_ms": statistics.fmean(seconds) * 1e3,
    }


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that a share of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def routed(system: Hga) -> dict[str, Any]:
    """Return the share of tokens attended to since counting began, and all fallbacks with their counts.

    Raises
    ------
    RuntimeError
        Nothing was routed.
    """
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
