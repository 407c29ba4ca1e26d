"""The search: what is tried first, constraints, seeds, survivors, and going on after kill -9."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from studies import FACTS, change, goal, quality, screen

from hga_compile.tuning.search import default_trial, feasible, measure_survivors, metrics, survivors
from hga_compile.tuning.storage import ResumeError, done, make_sampler, open_storage, open_study


def test_the_default_and_the_papers_setting_come_first(tmp_path):
    wanted = goal()
    study = screen(tmp_path / "s.db", wanted)
    assert [trial.params for trial in study.trials[:6]] == wanted.space.starts()
    assert done(study) == 20


def test_trials_that_do_not_fit_are_marked_and_keep_their_values(tmp_path):
    study = screen(tmp_path / "s.journal", goal(tiers=("gpu", "host")), trials=24)
    here = [trial for trial in study.trials if trial.params["tier"] == "gpu"]
    there = [trial for trial in study.trials if trial.params["tier"] == "host"]
    assert here and there
    assert not any(feasible(trial) for trial in here)
    # A mean for each token is as large as the keys.
    large = [trial.params["summary"] == "mean" and trial.params["group_size"] == 1 for trial in there]
    assert [feasible(trial) for trial in there] == [not one for one in large]
    assert all(trial.constraints["vram_gib"] > 1 for trial in here)
    assert max(trial.values[1] for trial in here) < 100
    assert {trial.params["tier"] for trial in study.best_trials} == {"host"}
    # The sampler sees the constraints: later trials leave the tier that does not fit.
    assert sum(trial.params["tier"] == "gpu" for trial in study.trials[18:]) <= 3


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_the_same_seed_gives_the_same_trials(tmp_path, sampler):
    runs = [
        [
            (trial.params, trial.values)
            for trial in screen(tmp_path / f"{n}.journal", seed=seed, sampler=sampler).trials
        ]
        for n, seed in enumerate((3, 3, 4))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.slow
def test_a_gaussian_process_searches_too(tmp_path):
    study = screen(tmp_path / "s.journal", sampler="gp", trials=15)
    assert done(study) == 15


def test_searching_finds_better_than_what_it_began_with(tmp_path):
    study = screen(tmp_path / "s.journal", trials=40)
    starts, rest = study.trials[:6], study.trials[6:]
    default = starts[0].values
    assert any(trial.values[0] < default[0] and trial.values[1] <= default[1] for trial in rest)


def test_a_bound_on_the_bytes_read_is_kept_by_what_is_feasible(tmp_path):
    free = goal()
    bound = free.read(free.space.profile(free.space.starts()[0], "default"))
    study = screen(tmp_path / "s.journal", replace(free, max_read=bound), trials=24)
    over = [trial for trial in study.trials if trial.constraints["read_share"] > 0]
    for trial in study.trials:
        read = free.read(free.space.profile(trial.params, "x"))
        assert trial.constraints["read_share"] == pytest.approx(read - bound)
        assert feasible(trial) is (read <= bound)
    assert over and feasible(study.trials[0])


def test_survivors_are_the_first_ones_and_the_front(tmp_path):
    study = screen(tmp_path / "s.journal", trials=24)
    chosen = survivors(study, goal().space, 5)
    assert [trial.number for trial in chosen[:6]] == [0, 1, 2, 3, 4, 5]
    assert 6 <= len(chosen) <= 11
    on_front = {trial.number for trial in study.best_trials}
    assert len([trial for trial in chosen[6:] if trial.number in on_front]) >= min(3, len(chosen) - 6)


def test_of_several_tiers_the_default_is_the_one_that_fits(tmp_path):
    wanted = goal(tiers=("gpu", "host"))
    study = screen(tmp_path / "s.journal", wanted, trials=8)
    assert [trial.params["tier"] for trial in study.trials[:2]] == ["gpu", "host"]
    assert default_trial(study.trials, wanted.space).number == 1
    assert default_trial(study.trials[2:], wanted.space) is None


def full_study(place, wanted, resume=False):
    return open_study(
        open_storage(str(place)), "f", make_sampler("tpe", 0), metrics(wanted, "kl"), FACTS, resume
    )


def measured(place, wanted, chosen, resume=False, told=lambda *_: None):
    study = full_study(place, wanted, resume)
    measure_survivors(study, wanted, chosen, quality, timeout=None, told=told)
    return study


def test_the_full_model_is_asked_about_each_survivor_once(tmp_path):
    wanted = goal(max_delta_nll=0.12)
    study = screen(tmp_path / "s.journal", wanted)
    chosen = survivors(study, wanted.space, 4)
    full = measured(tmp_path / "s.journal", wanted, chosen)
    assert [trial.params for trial in full.trials] == [trial.params for trial in chosen]
    for trial in full.trials:
        assert trial.constraints["delta_nll"] == pytest.approx(trial.user_attrs["delta_nll"] - 0.12)
    assert {feasible(trial) for trial in full.trials} == {True, False}
    again = measured(tmp_path / "s.journal", wanted, chosen, resume=True)
    assert len(again.trials) == len(chosen)


def test_without_a_limit_the_default_setting_is_never_refused(tmp_path):
    wanted = goal(max_delta_nll=None)
    study = screen(tmp_path / "s.journal", wanted)
    full = measured(tmp_path / "s.journal", wanted, survivors(study, wanted.space, 4))
    default = full.trials[0]
    limit = max(0.1, default.user_attrs["delta_nll"])
    assert default.user_attrs["delta_nll"] > 0.1
    for trial in full.trials:
        assert trial.constraints["delta_nll"] == pytest.approx(trial.user_attrs["delta_nll"] - limit)
    assert feasible(default)


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path):
    wanted = goal()
    study = screen(tmp_path / "s.journal", wanted)
    chosen = survivors(study, wanted.space, 4)

    def stop(study, trial):
        if trial.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "s.journal", wanted, chosen, told=stop)
    full = measured(tmp_path / "s.journal", wanted, chosen, resume=True)
    finished = [trial.params for trial in full.trials if trial.state is TrialState.COMPLETE]
    assert len(finished) == len(chosen)
    assert all(trial.params in finished for trial in chosen)


def test_a_study_that_is_there_is_not_started_again(tmp_path):
    screen(tmp_path / "s.journal", trials=5)
    with pytest.raises(ResumeError, match="there already; go on with it"):
        screen(tmp_path / "s.journal", trials=5)
    assert done(screen(tmp_path / "s.journal", trials=9, resume=True)) == 9


def test_trials_of_something_else_are_not_gone_on_with(tmp_path):
    screen(tmp_path / "s.journal", trials=5)
    other = {**FACTS, "gpu": "h200"}
    with pytest.raises(ResumeError, match=r"made with gpu 'rtx5090', got 'h200'"):
        open_study(
            open_storage(str(tmp_path / "s.journal")),
            "s",
            make_sampler("tpe", 0),
            ["change", "decode_ms"],
            other,
            True,
        )


@pytest.mark.parametrize("name", ["study.db", pytest.param("study.journal", marks=pytest.mark.slow)])
def test_it_goes_on_after_kill_9(tmp_path, name):
    place = tmp_path / name
    script = Path(__file__).with_name("studies.py")
    run = subprocess.Popen(
        [sys.executable, str(script), str(place), "0.2"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    for _ in range(7):  # in the middle of the seventh trial
        assert run.stdout.readline() == "trial\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = optuna.load_study(study_name="s", storage=open_storage(str(place)))
    trials_before = before.trials
    running = [trial for trial in trials_before if trial.state is TrialState.RUNNING]
    assert len(running) == 1
    assert 5 <= done(before) <= 6
    kept = [(trial.params, trial.values) for trial in trials_before if trial.state is TrialState.COMPLETE]
    study = screen(place, trials=12, resume=True)
    assert done(study) == 12
    assert study.trials[running[0].number].state is TrialState.FAIL
    # What it was about when it was killed is tried again first.
    again = study.trials[len(trials_before)]
    assert again.params == running[0].params
    assert again.values[0] == pytest.approx(change(goal().space.profile(again.params, "x").routing))
    assert [(trial.params, trial.values) for trial in study.trials[: len(kept)]] == kept
