"""Where studies are kept: opening and resuming them, and what must be the same to go on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

__all__ = ["ResumeError", "done", "make_sampler", "open_storage", "open_study", "refuse_old", "saved"]

SAMPLERS = ("tpe", "gp", "nsga2")


class ResumeError(ValueError):
    """A study that cannot be started or gone on with; the message says why."""


def open_storage(place: str) -> BaseStorage:
    """Open a storage.

    Parameters
    ----------
    place : str
        A file ending in ``.db`` or ``.sqlite`` (SQLite), any other file (a journal), or a database's URL.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in place:
        return RDBStorage(place)
    path = Path(place).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".db", ".sqlite", ".sqlite3"):
        return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})
    return JournalStorage(JournalFileBackend(str(path)))


def make_sampler(name: str, seed: int, population: int = 24) -> BaseSampler:
    """Return a sampler by name: `tpe`, `gp` or `nsga2`; all of them take constraints."""
    from optuna.samplers import GPSampler, NSGAIISampler, TPESampler

    if name == "tpe":
        return TPESampler(seed=seed, n_startup_trials=12)
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=12)
    if name == "nsga2":
        return NSGAIISampler(seed=seed, population_size=population)
    raise ResumeError(f"no sampler is called {name!r}; known: {', '.join(SAMPLERS)} (--sampler)")


def refuse_old(storage: BaseStorage, name: str, resume: bool) -> None:
    """Raise if a study is there and not to be gone on with.

    Raises
    ------
    ResumeError
        It is.
    """
    import optuna

    if not resume and name in optuna.get_all_study_names(storage):
        raise ResumeError(
            f"study {name!r} is there already; go on with it (--resume) or name another folder (--out)"
        )


def saved(storage: BaseStorage, name: str) -> dict[str, Any]:
    """Return what a study has noted; nothing if there is none."""
    import optuna

    if name not in optuna.get_all_study_names(storage):
        return {}
    found: dict[str, Any] = optuna.load_study(study_name=name, storage=storage).user_attrs
    return found


def open_study(
    storage: BaseStorage, name: str, sampler: BaseSampler, metrics: list[str], facts: Mapping[str, Any],
    resume: bool,
) -> Study:  # fmt: skip
    """Start a study, or go on with it.

    Trials that a killed run left running are marked as failed, and tried again first.

    Parameters
    ----------
    storage
        From `open_storage`.
    name
        Of the study.
    sampler
        From `make_sampler`.
    metrics
        Names of the objectives, all of them minimised.
    facts
        What must be the same for its trials to count.
    resume
        Whether to go on with a study that is there.

    Raises
    ------
    ResumeError
        A study that is there and not to be gone on with, or was made of other facts.
    """
    import optuna
    from optuna.trial import TrialState

    there = name in optuna.get_all_study_names(storage)
    refuse_old(storage, name, resume)
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        sampler=sampler,
        directions=["minimize"] * len(metrics),
        load_if_exists=True,
    )
    if not there:
        with warnings.catch_warnings():
            # Names for its dashboard; still experimental there.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(metrics)
        for key, value in facts.items():
            study.set_user_attr(key, value)
        return study
    for key, value in facts.items():
        had = study.user_attrs.get(key)
        if had != value:
            raise ResumeError(
                f"study {name!r} was made with {key} {had!r}, got {value!r}: its trials cannot be compared "
                "with new ones; name another folder (--out)"
            )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
    return study


def done(study: Study) -> int:
    """Return the number of finished trials."""
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
