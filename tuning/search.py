"""The search: a study of the cheap stage, and one of the full model for what survives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hga_compile.configs.cards import GpuCard, ModelCard
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import Routing
from hga_compile.tuning.choose import front
from hga_compile.tuning.hardware import prefill_ms, read_share
from hga_compile.tuning.latency import Latency
from hga_compile.tuning.measure import Quality
from hga_compile.tuning.memory import MemoryPlan, plan_memory
from hga_compile.tuning.space import Space, at_length
from hga_compile.tuning.storage import done

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = [
    "Goal",
    "constrain",
    "default_trial",
    "feasible",
    "measure_survivors",
    "metrics",
    "run_screen",
    "survivors",
]

GIB = 2**30
LENIENT = 0.1


@dataclass(frozen=True)
class Goal:
    """What is tuned for."""

    card: ModelCard
    gpu: GpuCard
    context: int
    space: Space
    latency: Latency
    length: int
    """Tokens of the texts that quality is measured on."""
    max_delta_nll: float | None
    """Nats a token; None: what the default setting has, or `LENIENT` if that is more."""
    with_prefill: bool = False
    batch: int = 1
    step: int = 1024
    weight_bytes: int | None = None
    max_read: float | None = None
    """Most bytes that a decode step's attention may read, over dense attention's; None: any number."""

    def memory(self, profile: Profile) -> MemoryPlan:
        """Plan the memory of a profile."""
        return plan_memory(
            self.card, self.gpu, profile, self.context, batch=self.batch, step=self.step,
            weight_bytes=self.weight_bytes,
        )  # fmt: skip

    def costs(self, profile: Profile) -> list[float]:
        """Return the objectives after quality: milliseconds of a token, and of the prompt if asked for."""
        found = [self.latency.milliseconds(profile)]
        if self.with_prefill:
            found.append(prefill_ms(self.card, self.gpu, profile, self.context))
        return found

    def read(self, profile: Profile) -> float:
        """Return the bytes that attention of a decode step reads, summaries too, over dense attention's."""
        return read_share(self.card, profile, self.context, 2 if self.gpu.kind == "cuda" else 4)

    def tried_on(self, profile: Profile) -> Routing:
        """Return the routing as it is measured, on texts that may be shorter than the context."""
        return at_length(profile.routing, self.length) if self.context > self.length else profile.routing


def metrics(goal: Goal, quality: str) -> list[str]:
    """Return the names of the objectives."""
    return [quality, "decode_ms", *(["prefill_ms"] if goal.with_prefill else [])]


def constrain(trial: Trial, goal: Goal, profile: Profile) -> None:
    """Tell a trial what it lacks in each place, in GiB, and reads too much; 0 or less is feasible."""
    plan = goal.memory(profile)
    names = {"gpu": "vram_gib", "host": "ram_gib", "nvme": "nvme_gib"}
    for place, name in names.items():
        # All trials have all constraints: one that is not used has its room to spare.
        lacks = plan.lacks(place) / GIB if place in plan.room else -1.0
        trial.set_constraint(name, lacks)
    trial.set_constraint("read_share", -1.0 if goal.max_read is None else goal.read(profile) - goal.max_read)


def feasible(trial: FrozenTrial) -> bool:
    """Say whether a finished trial keeps all constraints."""
    return all(value <= 0 for value in trial.constraints.values())


def default_trial(trials: Sequence[FrozenTrial], space: Space) -> FrozenTrial | None:
    """Return the finished trial of the default setting; of several tiers the fastest that fits."""
    found = [trial for trial in trials if trial.params in space.defaults()]
    return min(found, key=lambda trial: (not feasible(trial), trial.values[1]), default=None)


def run_screen(
    study: Study, goal: Goal, change: Callable[[Routing], float], *, trials: int, timeout: float | None,
    jobs: int, told: Callable[[Study, FrozenTrial], None],
) -> None:  # fmt: skip
    """Search by the cheap stage until there are so many trials.

    Parameters
    ----------
    study
        Its directions are those of `metrics`.
    goal
        What is tuned for.
    change
        The cheap stage's number of a routing.
    trials
        Finished trials in the end, those of earlier runs included.
    timeout
        Seconds, or None.
    jobs
        Trials at a time.
    told
        Called after each trial.
    """

    def objective(trial: Trial) -> tuple[float, ...]:
        profile = goal.space.profile(goal.space.suggest(trial), f"trial-{trial.number}")
        constrain(trial, goal, profile)
        return (change(goal.tried_on(profile)), *goal.costs(profile))

    if not study.trials:
        for params in goal.space.starts():
            study.enqueue_trial(params)
    left = trials - done(study)
    if left > 0:
        study.optimize(objective, n_trials=left, timeout=timeout, n_jobs=jobs, callbacks=[told])


def survivors(study: Study, space: Space, count: int) -> list[FrozenTrial]:
    """Return the trials that the full model is asked about: the first ones, and the front, spread out.

    Parameters
    ----------
    study
        Of the cheap stage.
    space
        Whose settings tried first are always among them.
    count
        How many of the fronts; some of these may be among those tried first.
    """
    from optuna.trial import TrialState

    finished = [trial for trial in study.trials if trial.state is TrialState.COMPLETE]
    starts = space.starts()
    first = [trial for trial in finished if trial.number < len(starts)]
    fit = [trial for trial in finished if feasible(trial)]
    known = [trial.params for trial in first]
    # Half of them where they count most: better than the default in everything, as far as it can be told.
    start = default_trial(first, space)
    default = [] if start is None else start.values
    better = [
        trial
        for trial in fit
        if trial.params not in known and all(a <= b for a, b in zip(trial.values, default, strict=False))
    ]
    best = _layers_of_fronts(better, count // 2)
    others = [trial for trial in fit if trial not in best]
    best = sorted(best + _layers_of_fronts(others, count - len(best)), key=lambda trial: trial.values[1])
    return first + [trial for trial in best if trial.params not in known]


def _layers_of_fronts(trials: Sequence[FrozenTrial], count: int) -> list[FrozenTrial]:
    """Return the Pareto front, then the front of the rest, until there are enough; evenly from the last."""
    left, found = list(trials), list[Any]()
    while left and len(found) < count:
        chosen = [left[number] for number in front([tuple(trial.values) for trial in left])]
        chosen.sort(key=lambda trial: trial.values[1])
        room = count - len(found)
        if len(chosen) > room:
            at = [round(part * (len(chosen) - 1) / max(1, room - 1)) for part in range(room)]
            chosen = [chosen[number] for number in sorted(set(at))]
            return found + chosen
        found += chosen
        numbers = {trial.number for trial in chosen}
        left = [trial for trial in left if trial.number not in numbers]
    return found


def measure_survivors(
    study: Study, goal: Goal, chosen: Sequence[FrozenTrial], measured: Callable[[Profile], Quality], *,
    timeout: float | None, told: Callable[[Study, FrozenTrial], None],
) -> None:  # fmt: skip
    """Ask the full model about each of the chosen settings that it was not asked about before.

    Parameters
    ----------
    study
        Of the full model.
    goal
        What is tuned for.
    chosen
        Trials of the cheap stage.
    measured
        The full model's numbers of a profile.
    timeout
        Seconds, or None.
    told
        Called after each trial.
    """
    from optuna.trial import TrialState

    def objective(trial: Trial) -> tuple[float, ...]:
        profile = goal.space.profile(goal.space.suggest(trial), f"trial-{trial.number}")
        constrain(trial, goal, profile)
        routing = goal.tried_on(profile)
        quality = measured(profile.model_copy(update={"routing": routing}))
        trial.set_constraint("delta_nll", quality.delta_nll - _limit(study, goal, quality))
        for name, value in quality.numbers().items():
            trial.set_user_attr(name, value)
        trial.set_user_attr("by_text", {name: dict(numbers) for name, numbers in quality.by_text.items()})
        return (quality.kl, *goal.costs(profile))

    states = (TrialState.COMPLETE, TrialState.WAITING)
    had = [_wanted(trial) for trial in study.get_trials(deepcopy=False, states=states)]
    for trial in chosen:
        if trial.params not in had:
            study.enqueue_trial(trial.params, user_attrs={"screened_as": trial.number})
    waiting = len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
    if waiting:
        study.optimize(objective, n_trials=waiting, timeout=timeout, callbacks=[told])


def _limit(study: Study, goal: Goal, own: Quality) -> float:
    """Return the most that NLL may rise; the default setting, which is measured first, is never refused."""
    if goal.max_delta_nll is not None:
        return goal.max_delta_nll
    first = goal.space.starts()[0]
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.values and trial.params == first]
    return max(LENIENT, finished[0].user_attrs["delta_nll"] if finished else own.delta_nll)


def _wanted(trial: FrozenTrial) -> dict[str, Any]:
    fixed: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
    return trial.params or fixed
