"""One system with some requests at once: prompts are read one by one, joined, decoded together, split."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hga_compile.cli.decode import Pace
from wholemodel.attempts import Meter, attempt, wait
from wholemodel.batches import Batch, BatchSetup, HgaBatch
from wholemodel.measuring import FEWEST, Plan, prefill_facts, read, routed, times
from wholemodel.systems import Entry

__all__ = ["measure_batch"]


def measure_batch(
    entry: Entry, model: PreTrainedModel, prompts: list[Tensor], setup: BatchSetup, plan: Plan
) -> dict[str, Any]:
    """Measure a system on prompts ``[1, n]``, as `measuring.measure` does on one.

    Parameters
    ----------
    entry, model, setup
        The system, the model it runs, and what else it is given.
    prompts
        One for each of `setup.lengths`.
    plan
        How.

    Returns
    -------
    dict
        Plain data, as of `attempts.attempt`; `reached` counts the tokens of all prompts that were read.
    """

    def run(system: Batch, found: dict[str, Any], meter: Meter) -> None:
        _prefill(system, prompts, plan, found)
        peaks = {"weights": meter.before, "prefill_peak": meter.peak()}
        found["stage"] = "join"
        seconds = _timed(system.join)
        if isinstance(system, HgaBatch):
            found["join_seconds"] = seconds
        meter.reset()
        _decode(system, prompts, plan, found)
        held = asdict(system.held())
        if isinstance(system, HgaBatch):
            found["stage"] = "split"
            found["split_seconds"] = _timed(lambda: _split(system, setup, plan, found))
        peaks["decode_peak"] = meter.peak()
        spare = plan.cap - meter.reserved if plan.cap and meter.on else None
        found["memory"] = {**peaks, **held, "reserved": meter.reserved, "spare": spare}

    return attempt(lambda: entry.make(model, setup), run, limit=plan.limit, cap=plan.cap, anew=not setup.kept)


def _prefill(system: Batch, prompts: list[Tensor], plan: Plan, found: dict[str, Any]) -> None:
    found["stage"] = "prefill"
    opening, pace = (Pace(str(prompts[0].device)) for _ in range(2))
    for number, ids in enumerate(prompts):
        found["request"], before = number + 1, found["reached"]
        system.begin(number)
        for end in read(system, ids[:, :-1], plan.step, opening, pace):
            found["reached"] = before + end
    found["prefill"] = prefill_facts(plan.step, opening, pace)


def _decode(system: Batch, prompts: list[Tensor], plan: Plan, found: dict[str, Any]) -> None:
    found["stage"] = "decode"
    token, pace, seconds = torch.cat([ids[:, -1:] for ids in prompts]), Pace(str(prompts[0].device)), []
    for number in range(plan.warmup + plan.steps):
        if number == plan.warmup and isinstance(system, HgaBatch):
            system.begin_counting()
        if number == 0:
            # What a joined cache makes anew, it makes now: its index.
            with pace.step(len(token)):
                token = system.decode(token)
            continue
        began = time.perf_counter()
        token = system.decode(token)
        # Whoever streams texts reads every token.
        token.tolist()
        if number >= plan.warmup:
            seconds.append(time.perf_counter() - began)
        if len(seconds) >= FEWEST and sum(seconds) > plan.patience:
            break
    run: dict[str, Any] = times(seconds) | system.traffic(len(seconds))
    run["tokens_per_second"] = len(prompts) * 1e3 / run["median_ms"]
    run["first_seconds"], run["first_compiled"] = pace.steps[0][1:]
    found["decode"] = run
    if isinstance(system, HgaBatch):
        found["routed"] = routed(system)


def _split(system: HgaBatch, setup: BatchSetup, plan: Plan, found: dict[str, Any]) -> None:
    """Split the batch, and see that each request has the tokens that it read."""
    decoded = plan.warmup + found["decode"]["steps"]
    got, want = system.split(), [length - 1 + decoded for length in setup.lengths]
    if got != want:
        raise RuntimeError(f"requests of {want} tokens were split into {got}")


def _timed(run: Any) -> float:
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began
