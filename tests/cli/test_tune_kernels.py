import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hga_compile.cli import tune_kernels
from hga_compile.cli.app import app
from hga_compile.cli.errors import BadInputError
from hga_compile.kernels import launch
from hga_compile.kernels.launch import Score, Turn, load_table, save_table, shape_of, table_path
from hga_compile.kernels.tuner import Outcome, Workload

runner = CliRunner()
SHAPE = shape_of(65536, 4, 8, 128)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A GPU by name, whose kernels are not run, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made Up 9000")
    found = [
        Outcome("score", SHAPE, Score(256, 528, 4), Score(512, 528, 8), 10.0, 8.0, 7, 1),
        Outcome("turn", SHAPE, Turn(), Turn(), 3.0, 3.0, 8, 0),
    ]
    monkeypatch.setattr(tune_kernels, "_outcomes", lambda load, device, known: found)
    return "Made Up 9000"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_cuda_device_it_says_so_and_exits_with_2() -> None:
    done = runner.invoke(app, ["tune-kernels"])
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr == (
        "hga: error: tune-kernels needs a CUDA device, got none; run it on the machine with the GPU\n"
    )


def test_shapes_are_rows_heads_channels_and_tokens() -> None:
    assert tune_kernels.parse_shapes("4x8x128x65536, 1X1X64X1024") == [
        Workload(4, 8, 128, 65536), Workload(1, 1, 64, 1024),
    ]  # fmt: skip
    assert len(tune_kernels.parse_shapes(tune_kernels._DEFAULT)) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "ROWSxHEADSxDIMxTOKENS, got ''"),
        ("4x8x128", "got '4x8x128'; try 4x8x128x65536"),
        ("4x8x128x-1", "ROWSxHEADSxDIMxTOKENS"),
        ("4x8x128x65536,", "got ''"),
        ("4x8x128x²", "ROWSxHEADSxDIMxTOKENS"),
        ("4x8x320x65536", "dim must be 1 to 256, got 320"),
        ("4x65x128x65536", "heads must be 1 to 64, got 65"),
        ("0x8x128x65536", "rows must be 1 to 4096, got 0"),
        ("4x8x128x16", "tokens must be 1024 to 4194304, got 16"),
    ],
)
def test_other_shapes_are_refused(text: str, said: str) -> None:
    with pytest.raises(BadInputError) as caught:
        tune_kernels.parse_shapes(text)
    assert said in str(caught.value) and "--shapes" in str(caught.value)


def test_what_is_found_is_kept_beside_other_shapes_and_printed(gpu: str) -> None:
    other = {"turn": {"another": Turn(16, 2)}}
    save_table(table_path(gpu), gpu, other)
    done = runner.invoke(app, ["tune-kernels"])
    assert done.exit_code == 0, done.stderr
    assert load_table(table_path(gpu), gpu) == {
        "score": {SHAPE.text(): Score(512, 528, 8)},
        "turn": {SHAPE.text(): Turn(), "another": Turn(16, 2)},
    }
    assert (
        "tokens 512, programs 528, warps 8" in done.stdout
        and "0.80" in done.stdout
        and "the default" in done.stdout
    )
    assert str(table_path(gpu)) in done.stderr
    launch._table_of.cache_clear()


def test_json_has_times_and_ratios_and_a_broken_table_is_replaced(gpu: str) -> None:
    table_path(gpu).parent.mkdir()
    table_path(gpu).write_text("{")
    done = runner.invoke(app, ["tune-kernels", "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device"] == gpu and result["table"] == str(table_path(gpu))
    first = result["kernels"][0]
    assert (first["best"], first["ratio"]) == ({"tokens": 512, "programs": 528, "warps": 8}, 0.8)
    assert load_table(table_path(gpu), gpu)["score"][SHAPE.text()] == Score(512, 528, 8)
