"""The tuner's loop: what is tried, checked, timed and kept; and real kernels under every candidate."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hga_compile.kernels import launch
from hga_compile.kernels.launch import Encode, Launch, Turn, launch_parameters, shape_of
from hga_compile.kernels.tuner import Task, Workload, compile_all, tasks_of, tune

CPU, SHAPE = torch.device("cpu"), shape_of(1, 4, 8, 128)
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)


def now() -> Launch:
    return launch_parameters(Turn, CPU, SHAPE)


def task(check=None) -> Task:
    right = torch.arange(3), torch.ones(3)
    return Task(Turn, SHAPE, now, check or (lambda: right))


def timer_of(times: dict[Launch, float], other: float = 10.0):
    """A clock that knows how long each set of parameters takes."""
    return lambda run: times.get(run(), other)


def test_the_fastest_candidate_is_the_best():
    advanced = []
    found = tune(task(), timer_of({Turn(16, 2): 5.0, Turn(64, 8): 4.0, Turn(64, 2): 6.0}), advanced.append)
    assert (found.default, found.best) == (Turn(32, 4), Turn(64, 8))
    assert (found.default_microseconds, found.best_microseconds, found.ratio) == (10.0, 4.0, 0.4)
    assert (found.kernel, found.shape, found.tried, found.refused) == ("turn", SHAPE, 8, 0)
    assert sum(advanced) == len(Turn.candidates()) == 9
    assert now() == Turn(), "nothing stays on trial"


def test_all_candidates_are_compiled_at_once_whichever_of_them_fail():
    seen = []

    def check() -> tuple[Tensor, Tensor]:
        seen.append(now())
        raise RuntimeError("no such instruction")

    compile_all(task(check), 4)
    assert sorted(map(str, seen)) == sorted(map(str, Turn.candidates()))


def test_what_is_faster_by_noise_alone_leaves_the_defaults():
    found = tune(task(), timer_of({Turn(16, 2): 9.9}))
    assert found.best == found.default and found.ratio == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        (torch.tensor([0, 1, 3]), torch.ones(3)),
        (torch.arange(3), torch.tensor([1.0, 1.0, 1.001])),
        (torch.arange(3), torch.tensor([1.0, 1.0, torch.nan])),
    ],
)
def test_a_candidate_with_another_result_is_neither_timed_nor_kept(wrong):
    right = torch.arange(3), torch.ones(3)
    timed = []

    def timer(run):
        timed.append(run())
        return 1.0 if run() == Turn(16, 2) else 10.0

    found = tune(task(lambda: wrong if now() == Turn(16, 2) else right), timer)
    assert found.best == Turn(32, 4) and found.refused == 1 and Turn(16, 2) not in timed


def test_numbers_are_compared_within_their_dtype():
    def check() -> tuple[Tensor, Tensor]:
        off = 0.01 if now() == Turn(16, 2) else 0.0
        return torch.arange(3), torch.full((3,), 1.0 + off, dtype=torch.bfloat16)

    assert tune(task(check), timer_of({Turn(16, 2): 1.0})).best == Turn(16, 2)


def test_a_candidate_that_does_not_run_is_refused():
    def check() -> tuple[Tensor, Tensor]:
        if now() == Turn(64, 8):
            raise RuntimeError("out of resource: shared memory")
        return torch.arange(3), torch.ones(3)

    found = tune(task(check), timer_of({Turn(64, 8): 1.0, Turn(64, 4): 2.0}))
    assert found.best == Turn(64, 4) and found.refused == 1


def test_defaults_that_do_not_run_are_an_error():
    def check() -> tuple[Tensor, Tensor]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        tune(task(check), timer_of({}))


@interpreted
def test_real_kernels_give_one_result_under_all_candidates(monkeypatch):
    tried = []
    # Few, since the interpreter is slow: the corners of each grid.
    for kernel in launch.KERNELS.values():
        corners = [kernel.candidates()[0], kernel.candidates()[-1]]
        monkeypatch.setattr(kernel, "candidates", classmethod(lambda cls, corners=corners: corners))
    for work in tasks_of(Workload(2, 3, 32, 1500), CPU, torch.float32):
        found = tune(work, lambda run: float(run() is None))
        tried.append(found.kernel)
        assert found.refused == 0, found
    assert tried == ["turn", "score", "vote", "select", "attend", "encode", "encode"]
    assert Encode(16, 16, 2) in Encode.candidates()


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs the one before")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_real_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "one_result"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=500
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
