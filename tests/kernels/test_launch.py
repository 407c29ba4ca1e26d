"""Launch parameters: defaults, the table of a GPU, and what a file that is none does."""

import json
import logging
import os
import stat

import pytest
import torch

from hga_compile.kernels import launch
from hga_compile.kernels.launch import (
    KERNELS,
    Attend,
    Encode,
    Score,
    Select,
    Turn,
    Vote,
    launch_parameters,
    load_table,
    save_table,
    shape_of,
    table_path,
    trying,
)

GPU = "NVIDIA H200"
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SHAPE = shape_of(65536, 4, 8, 128)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A cache folder of its own, and a machine that says it has a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    forget()
    yield
    forget()


def forget() -> None:
    launch._table_of.cache_clear()
    launch._looked_up.cache_clear()


def test_the_file_lies_in_the_cache_folder_and_is_named_after_the_gpu(tmp_path):
    assert table_path(GPU) == tmp_path / "hga-compile" / "launch-nvidia-h200.json"
    assert table_path("../../A/B").name == "launch-a-b.json"


@pytest.mark.parametrize(("size", "log"), [(1, 0), (2, 1), (3, 2), (4, 2), (65536, 16), (65537, 17)])
def test_a_class_holds_sizes_up_to_a_power_of_two(size, log):
    assert shape_of(size, 4, 8, 128) == (log, 4, 8, 128)


def test_without_a_table_the_defaults_hold():
    assert launch_parameters(Score, CUDA, SHAPE) == Score()
    assert launch_parameters(Score, CUDA, shape_of(2**18, 4, 8, 32)) == Score(128, 2112, 1)
    assert launch_parameters(Score, CUDA, shape_of(2**16, 32, 8, 32)) == Score(128, 2112, 1)
    assert launch_parameters(Vote, CUDA, shape_of(9, 4, 8)) == Vote(256, 528, 4)
    assert launch_parameters(Vote, CUDA, shape_of(9, 4, 64)) == Vote(64, 528, 4)
    assert launch_parameters(Select, CUDA, shape_of(9, 4)) == Select(2**10, 512, 2**11, 4)
    assert launch_parameters(Select, CUDA, shape_of(2**18, 4)) == Select(2**10, 2**11, 2**13, 8)
    assert launch_parameters(Select, CUDA, shape_of(2**14, 4096)) == Select(2**14, 512, 2**11, 16)
    assert launch_parameters(Attend, CUDA, shape_of(2048, 4, 8, 128)) == Attend(32, 528, 4)
    assert launch_parameters(Attend, CUDA, shape_of(2048, 64, 8, 128)) == Attend(64, 528, 4)
    assert launch_parameters(Turn, CUDA, SHAPE) == Turn(32, 4)
    for new, dim, tokens in ((16, 128, 16), (17, 128, 64), (4096, 256, 32), (4096, 20, 64)):
        assert launch_parameters(Encode, CUDA, shape_of(new, 4, 0, dim)).tokens == tokens


def test_a_table_comes_back_and_is_used_for_its_shapes_alone():
    table = {"score": {SHAPE.text(): Score(256, 528, 2)}, "turn": {SHAPE.text(): Turn(16, 2)}}
    save_table(table_path(GPU), GPU, table)
    assert load_table(table_path(GPU), GPU) == table
    assert launch_parameters(Score, CUDA, SHAPE) == Score(256, 528, 2)
    assert launch_parameters(Score, CUDA, shape_of(65537, 4, 8, 128)) == Score(64, 2112)
    assert launch_parameters(Attend, CUDA, SHAPE) == Attend(64)
    assert launch_parameters(Score, CPU, SHAPE) == Score(), "the interpreter goes by the defaults"


def test_a_new_table_is_used_at_once():
    assert launch_parameters(Turn, CUDA, SHAPE) == Turn()
    save_table(table_path(GPU), GPU, {"turn": {SHAPE.text(): Turn(16, 2)}})
    assert launch_parameters(Turn, CUDA, SHAPE) == Turn(16, 2)


def test_a_table_is_read_once_a_process(monkeypatch):
    save_table(table_path(GPU), GPU, {"turn": {SHAPE.text(): Turn(16, 2)}})
    launch_parameters(Turn, CUDA, SHAPE)
    monkeypatch.setattr(launch, "load_table", lambda *given: pytest.fail("read again"))
    for size in (1, 9, 1000):
        launch_parameters(Turn, CUDA, shape_of(size, 4, 8, 128))


@pytest.mark.parametrize("kernel", KERNELS.values())
def test_candidates_and_defaults_may_all_stand_in_a_table(kernel):
    candidates = kernel.candidates()
    assert 1 < len(candidates) <= 30 and len(set(candidates)) == len(candidates)
    defaults = [kernel.default(shape_of(size, 4, heads, 128)) for size in (1, 2**30) for heads in (8, 64)]
    table = {kernel.name(): {str(place): entry for place, entry in enumerate([*candidates, *defaults])}}
    save_table(table_path(GPU), GPU, table)
    assert load_table(table_path(GPU), GPU) == table


def document() -> dict:
    save_table(table_path(GPU), GPU, {"score": {SHAPE.text(): Score(256, 528, 2)}})
    return json.loads(table_path(GPU).read_text())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "NVIDIA A100"}, "made for device 'NVIDIA A100', expected 'NVIDIA H200'"),
        ({"triton": "0.1"}, "made for triton '0.1'"),
        ({"schema": 99}, "made for schema 99"),
        ({"more": 1}, "expected schema, device, triton and kernels"),
        ({"kernels": []}, "kernels must be a mapping"),
        ({"kernels": {"shiny": {}}}, "expected kernels score"),
        (
            {"kernels": {"score": {"x": {"tokens": 300, "programs": 528, "warps": 4}}}},
            "score.tokens must be one of",
        ),
        (
            {"kernels": {"score": {"x": {"tokens": True, "programs": 528, "warps": 4}}}},
            "score.tokens must be one of",
        ),
        (
            {"kernels": {"score": {"x": {"tokens": 2**70, "programs": 528, "warps": 4}}}},
            "score.tokens must be one of",
        ),
        (
            {"kernels": {"score": {"x": {"tokens": [256], "programs": 528, "warps": 4}}}},
            "score.tokens must be one of",
        ),
        ({"kernels": {"score": {"x": {"tokens": 256}}}}, "score must have tokens, programs, warps"),
        ({"kernels": {"score": {"x": 3}}}, "score must have tokens, programs, warps"),
    ],
)
def test_a_foreign_table_is_ignored_with_one_warning(change, said, caplog):
    table_path(GPU).write_text(json.dumps(document() | change))
    forget()
    with caplog.at_level(logging.WARNING):
        for size in (1, 65536, 100000):
            launch_parameters(Turn, CUDA, shape_of(size, 4, 8, 128))
        assert launch_parameters(Score, CUDA, SHAPE) == Score()
    (record,) = caplog.records
    assert said in record.getMessage() and "hga tune-kernels" in record.getMessage()


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b" " * (2**20 + 1)])
def test_a_corrupt_file_is_ignored_with_one_warning(text, caplog):
    document()
    table_path(GPU).write_bytes(text)
    forget()
    assert launch_parameters(Score, CUDA, SHAPE) == launch_parameters(Score, CUDA, SHAPE) == Score()
    assert len(caplog.records) == 1


def test_a_folder_in_its_place_is_ignored(caplog):
    table_path(GPU).mkdir(parents=True)
    assert launch_parameters(Turn, CUDA, SHAPE) == Turn() and len(caplog.records) == 1


def test_a_table_is_its_owners_alone_and_leaves_no_draft():
    document()
    folder = table_path(GPU).parent
    assert stat.S_IMODE(table_path(GPU).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [file.name for file in folder.iterdir()] == ["launch-nvidia-h200.json"]


def test_a_write_that_fails_leaves_the_old_table(monkeypatch):
    before = document()

    def fail(*given):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_table(table_path(GPU), GPU, {})
    assert json.loads(table_path(GPU).read_text()) == before
    assert len(list(table_path(GPU).parent.iterdir())) == 1


def test_parameters_on_trial_hold_for_their_kernel_until_the_end():
    with trying(Turn(16, 2)):
        assert launch_parameters(Turn, CUDA, SHAPE) == Turn(16, 2)
        assert launch_parameters(Score, CUDA, SHAPE) == Score()
    assert launch_parameters(Turn, CUDA, SHAPE) == Turn()
