"""One run of the tuner: from what is asked for to a profile that says how it was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from hga_compile.configs.cards import GpuCard
from hga_compile.configs.profile import Profile
from hga_compile.evaluation.corpora import Document
from hga_compile.evaluation.provenance import environment
from hga_compile.tuning.choose import Preference, choose, front
from hga_compile.tuning.defaults import with_hot_cache
from hga_compile.tuning.latency import Latency
from hga_compile.tuning.outcome import facts_of, plain, why_none
from hga_compile.tuning.quality import Calibration, Checkpoint
from hga_compile.tuning.search import (
    Goal,
    default_trial,
    feasible,
    measure_survivors,
    metrics,
    run_screen,
    survivors,
)
from hga_compile.tuning.space import Space
from hga_compile.tuning.storage import make_sampler, open_storage, open_study, refuse_old, saved
from hga_compile.tuning.target import Target
from hga_compile.tuning.timing import present_is
from hga_compile.tuning.writing import made_for, write_profile

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

__all__ = ["Found", "NoneFeasible", "Request", "tune"]

_SENSITIVITIES = "sensitivities"
Told = Callable[[str, int, int, str], None]
"""Stage, trials done, trials in all, the best so far."""


class NoneFeasible(RuntimeError):  # an outcome rather than a mistake
    """No trial keeps all constraints; the message names the one that binds."""


@dataclass(frozen=True)
class Request:
    """What `hga-tune` was asked for."""

    target: Target
    gpu: GpuCard
    context: int
    base: Profile
    tiers: tuple[str, ...]
    checkpoint: Checkpoint
    documents: Sequence[Document]
    lengths: Sequence[int]
    storage: str
    trials: int = 60
    measured: int = 8
    seed: int = 0
    sampler: str = "tpe"
    jobs: int = 1
    timeout: float | None = None
    prefer: Preference = "balanced"
    max_delta_nll: float | None = None
    max_read: float | Literal["default"] | None = None
    """Most bytes that attention may read, over dense attention's; "default": as the default setting."""
    with_prefill: bool = False
    scored: int = 128
    screen_layers: int = 6
    screen_queries: int = 48
    resume: bool = False
    verify: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def name(self) -> str:
        """Name of the study."""
        return f"{self.target.card.name}.{self.gpu.name}.{self.context}"


@dataclass(frozen=True)
class Found:
    """What came out."""

    profile: Profile
    facts: dict[str, Any]
    """Comment lines of the profile."""
    result: dict[str, Any]
    """All of it as plain data."""
    studies: tuple[Any, Any]
    """Of the cheap stage and of the full model."""
    interrupted: bool


def tune(request: Request, say: Callable[[str], None], told: Told, command: str) -> Found:
    """Search, measure and choose.

    Parameters
    ----------
    request
        What is asked for.
    say
        Told what takes time.
    told
        Told after each trial.
    command
        How to do it again, for the profile.

    Raises
    ------
    NoneFeasible
        Nothing keeps the constraints.
    ResumeError
        A study that is there, or was made of something else.
    """
    began = time.monotonic()
    storage = open_storage(request.storage)
    refuse_old(storage, f"{request.name}.screen", request.resume)
    calibration = Calibration(
        request.checkpoint, request.documents, request.lengths, scored=request.scored,
        screen_layers=request.screen_layers, screen_queries=request.screen_queries,
        device=request.device, say=say,
    )  # fmt: skip
    known = saved(storage, f"{request.name}.screen").get(_SENSITIVITIES)
    goal = _goal(request, calibration, known, say)
    facts = _same_facts(request, calibration, goal)

    def study(stage: str, quality: str) -> Study:
        sampler = make_sampler(request.sampler, request.seed)
        name = f"{request.name}.{stage}"
        return open_study(storage, name, sampler, metrics(goal, quality), facts, request.resume)

    screen, full = study("screen", "change"), study("full", "kl")
    if goal.space.sensitivities is not None and known is None:
        found = {str(layer): value for layer, value in goal.space.sensitivities.items()}
        screen.set_user_attr(_SENSITIVITIES, found)
    interrupted = False

    def left() -> float | None:
        return None if request.timeout is None else max(1.0, request.timeout - (time.monotonic() - began))

    def after(stage: str, total: int) -> Callable[[Study, FrozenTrial], None]:
        return lambda study, trial: told(stage, len(_complete(study)), total, _best(study))

    try:
        # Half of the time at most: what is cheap must not leave nothing for what counts.
        time_left = left()
        run_screen(
            screen, goal, calibration.change, trials=request.trials, jobs=request.jobs,
            timeout=None if time_left is None else time_left / 2, told=after("screen", request.trials),
        )  # fmt: skip
        chosen = survivors(screen, goal.space, request.measured)
        measure_survivors(
            full, goal, chosen, calibration.quality, timeout=left(), told=after("full model", len(chosen))
        )
    except KeyboardInterrupt:
        interrupted = True
        _fail_running(screen)
        _fail_running(full)
    return _found(request, calibration, goal, (screen, full), interrupted, command, began, say)


def _goal(
    request: Request, calibration: Calibration, known: dict[str, float] | None, say: Callable[[str], None]
) -> Goal:
    card, own = request.target.card, request.checkpoint.own
    here = None
    if request.gpu.kind == "cpu":
        here = torch.device("cpu")
    elif torch.cuda.is_available() and present_is(torch.device("cuda", 0), request.gpu.device_names):
        here = torch.device("cuda", 0)
    sensitivities = None
    if own and known is not None:
        sensitivities = {int(layer): value for layer, value in known.items()}
    elif own:
        say("sensitivity of each layer")
        sensitivities = calibration.sensitivities(request.base.routing)
    finish = partial(with_hot_cache, card, request.gpu, context=request.context)
    space = Space(request.base, request.tiers, sensitivities, card.geometry.layers, finish)
    latency = Latency(card, request.gpu, request.context, here)
    goal = Goal(
        card, request.gpu, request.context, space, latency, calibration.length, request.max_delta_nll,
        request.with_prefill,
    )  # fmt: skip
    if request.max_read is None:
        return goal
    default = goal.read(space.profile(space.defaults()[0], "default"))
    return replace(goal, max_read=default if request.max_read == "default" else request.max_read)


def _same_facts(request: Request, calibration: Calibration, goal: Goal) -> dict[str, Any]:
    """Return what trials depend on: they are never mixed with those of something else."""
    return {
        "model": request.target.card.name,
        "gpu": request.gpu.name,
        "context": request.context,
        "tiers": ", ".join(request.tiers),
        "prefill": request.with_prefill,
        "latency": goal.latency.how,
        "checkpoint": calibration.facts["sha256"],
        "texts": ", ".join(f"{d.name}:{d.sha256[:12]}" for d in request.documents),
        "lengths": ", ".join(map(str, sorted(request.lengths))),
        "scored": request.scored,
        "screen": f"{request.screen_layers} layers, {request.screen_queries} queries",
        "max_delta_nll": "default's" if request.max_delta_nll is None else request.max_delta_nll,
        "max_read": goal.max_read,
        "code": environment("cpu")["code"],
    }


def _found(
    request: Request, calibration: Calibration, goal: Goal, studies: tuple[Study, Study], interrupted: bool,
    command: str, began: float, say: Callable[[str], None],
) -> Found:  # fmt: skip
    full = studies[1]
    finished = _complete(full)
    fit = [trial for trial in finished if feasible(trial)]
    if not fit:
        raise NoneFeasible(why_none(finished, interrupted))
    start = default_trial(finished, goal.space)
    points = [tuple(trial.values) for trial in fit]
    baseline = None if start is None else tuple(start.values)
    taken = fit[choose(points, request.prefer, baseline)]
    name = f"{request.target.card.name}.{request.gpu.name}"
    profile = goal.space.profile(taken.params, name)
    verified = None
    if request.verify and not interrupted:
        say("the chosen profile through the compiled model")
        tried = profile.model_copy(update={"routing": goal.tried_on(profile)})
        try:
            verified = calibration.quality(tried, compiled=True)
        except KeyboardInterrupt:  # what was found counts without it
            interrupted = True
    sha = str(calibration.facts["sha256"]) if request.checkpoint.own else None
    where_for = f"{request.target.card.name} on {request.gpu.name} at {request.context:,} tokens"
    description = f"Tuned by hga-tune for {where_for}, preferring {request.prefer}."
    profile = made_for(profile, request.target.card, request.gpu, name, description, sha)
    where = environment(str(request.device))
    facts = facts_of(request, calibration, goal, taken, start, verified, where, command)
    result = {
        "tuned": {"model": request.target.card.name, "gpu": request.gpu.name, "context": request.context},
        "prefer": request.prefer,
        "interrupted": interrupted,
        "seconds": time.monotonic() - began,
        "environment": where,
        "checkpoint": {**calibration.facts, "transferred": not request.checkpoint.own},
        "latency": goal.latency.how,
        "chosen": plain(taken),
        "default": None if start is None else plain(start),
        "verified": None if verified is None else verified.numbers(),
        "front": [fit[number].number for number in front(points)],
        "trials": {
            "screen": [plain(t) for t in _complete(studies[0])],
            "full": [plain(t) for t in finished],
        },
        "profile": profile.model_dump(mode="json"),
    }
    return Found(profile, facts, result, studies, interrupted)


def _complete(study: Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    finished: list[FrozenTrial] = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return finished


def _fail_running(study: Study) -> None:
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)


def _best(study: Study) -> str:
    fit = [trial for trial in _complete(study) if feasible(trial)]
    if not fit:
        return "nothing feasible yet"
    best = fit[choose([tuple(trial.values) for trial in fit], "quality")]
    names = study.metric_names or ["quality", "decode_ms"]
    shown = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, best.values, strict=True))
    return f"best so far: trial {best.number}, {shown}"


def save(found: Found, path: Path) -> None:
    """Write the profile with its facts."""
    write_profile(found.profile, path, found.facts)
