import csv
import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hga_compile.cli.app import app
from hga_compile.cli.errors import BadInputError
from hga_compile.cli.eval_layers import split_factors
from hga_compile.configs.loader import load_profile
from hga_compile.evaluation import study

runner = CliRunner()
FAST = ["--set", "routing.dense_below=64", "--set", "routing.centre_tokens=32", "--set", "budget=64"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    letters = [string.ascii_lowercase[number * number % 26] for number in range(700)]
    file = tmp_path / "one.txt"
    file.write_text(
        "".join(letter + (" " if number % 5 == 0 else "") for number, letter in enumerate(letters))
    )
    return file


def layers(model: Path, text: Path, *more: str) -> Any:
    torch.compiler.reset()
    sizes = ["--lengths", "256", "--scored", "30", "--factors", "0.5,1,2"]
    return runner.invoke(app, ["eval", "layers", str(model), "--text", str(text), *sizes, *FAST, *more])


def test_each_layer_is_measured_and_a_profile_is_made(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    done = layers(tiny_model, text, "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((out / "layers.json").read_text())
    found = [(entry["layer"], entry["factor"]) for entry in result["layers"]]
    assert found == [(layer, factor) for layer in (0, 1) for factor in (0.5, 1.0, 2.0)]
    for small, large in zip(result["layers"][::3], result["layers"][2::3], strict=True):
        assert small["kl"]["mean"] > large["kl"]["mean"] > 0
        assert small["attended"]["mean"] == pytest.approx(32 / 240, rel=0.15)
        assert large["attended"]["mean"] == pytest.approx(128 / 240, rel=0.15)
    suggested = result["suggested"]
    assert sum(suggested["factors"].values()) <= 2
    assert suggested["sum_of_kl"] <= suggested["sum_of_kl_now"]
    profile = load_profile(out / "layers.yaml")
    for layer, factor in suggested["factors"].items():
        assert profile.routing.for_layer(int(layer), 2).budget.tokens == 64 * factor
    lines = list(csv.DictReader((out / "layers.csv").open()))
    assert [(int(line["layer"]), float(line["factor"])) for line in lines] == found
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")

    # Everything is there already: no model runs again.
    monkeypatch.setattr(study, "dense_reference", lambda *_: pytest.fail("ran again"))
    again = layers(tiny_model, text, "--out", str(out), "--resume")
    assert again.exit_code == 0, again.output
    assert "sum of the layers' KL" in again.stdout
    assert json.loads((out / "layers.json").read_text())["layers"] == result["layers"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--factors", "2,4"], "1 among them"),
        (["--scored", "256"], "fewer than every length"),
        (["--set", "routing.dense_below=300"], "longer than what is dense anyway"),
        (["--factors", "1,8"], "largest budget 512"),
        (["--set", "routing.dense_layers=[0,1]"], "every layer is dense"),
        (["--profile", "nothing"], "unknown profile"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tiny_model: Path, text: Path, more: list[str], message: str
) -> None:
    done = layers(tiny_model, text, *more)
    assert done.exit_code == 2
    assert message in done.stderr


def test_factors_are_read_sorted_and_once() -> None:
    assert split_factors("2, 1,0.5,1.0") == [0.5, 1.0, 2.0]
    for wrong in ("", "a", "0,1", "0.5", "1,inf", "1,nan"):
        with pytest.raises(BadInputError):
            split_factors(wrong)
