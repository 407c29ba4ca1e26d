import csv
import json
import os
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hga_compile.cli import eval_common
from hga_compile.cli.app import app
from hga_compile.cli.errors import BadInputError
from hga_compile.cli.eval_needle import split_depths
from hga_compile.cli.eval_options import settings, split_modes, split_numbers
from hga_compile.evaluation import candidates

runner = CliRunner()
FAST = ["--set", "routing.dense_below=64", "--set", "routing.centre_tokens=32", "--set", "budget=48",
        "--set", "routing.prefill_budget.tokens=48"]  # fmt: skip


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Two text files, each of about 900 tokens of the tiny model."""
    files = []
    for name, step in (("one", 7), ("two", 11)):
        letters = [string.ascii_lowercase[number * step % 26] for number in range(800)]
        text = "".join(letter + (" " if number % 5 == 0 else "") for number, letter in enumerate(letters))
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text("\n\n".join(text[start : start + 60] for start in range(0, len(text), 60)))
    return [str(file) for file in files]


@pytest.fixture
def dense_instead(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the dense model into the compiled one's place; returns the modes that candidates were made for."""
    made: list[str] = []

    class Fake(candidates.DenseCandidate):
        def __init__(self, model: Any, options: Any, advance: Any, dynamic: bool) -> None:
            super().__init__(model)
            made.append("decode" if "routing.prefill_tile" in options else "all")

    monkeypatch.setattr(candidates, "RoutedCandidate", Fake)
    return made


def invoke(*arguments: str) -> Any:
    torch.compiler.reset()
    return runner.invoke(app, ["eval", *arguments])


def nll(model: Path, texts: list[str], out: Path, *more: str) -> Any:
    # As a shell leaves `--text *.txt`: one value, the others behind the model.
    files = ["--text", *texts]
    sizes = ["--lengths", "256,384", "--scored", "40", "--buckets", "2", "--out", str(out)]
    return invoke("nll", str(model), *files, *sizes, *more)


def test_nll_has_dense_window_and_profile_in_both_modes(
    tiny_model: Path, texts: list[str], tmp_path: Path
) -> None:
    done = nll(tiny_model, texts, tmp_path / "out", *FAST, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "out" / "nll.json").read_text())
    rows = [(e["length"], e["row"], e["mode"], e["documents"]) for e in result["summary"]]
    per_length = [
        ("dense", "-", 2),
        *((r, m, 2) for m in ("decode", "all") for r in ("window only", "default")),
    ]
    assert rows == [(length, *row) for length in (256, 384) for row in per_length]
    for entry in result["summary"]:
        assert [(b["first"], b["end"]) for b in entry["buckets"]] == [
            (entry["length"] - 40, entry["length"] - 20), (entry["length"] - 20, entry["length"])
        ]  # fmt: skip
        if entry["row"] != "dense":
            assert 0.05 < entry["attended"]["mean"] < 0.6
            assert entry["kl"]["low"] > 0
            # A GPU scores also where nothing is left to choose.
            scored = entry["row"] == "default" or torch.cuda.is_available()
            assert (entry["summary_bytes"]["mean"] > 0) == scored
    assert [d["name"] for d in result["documents"]] == ["one", "two"]
    assert result["model"]["sha256"]
    assert {row: r["window"]["fraction"] for row, r in result["routing"].items()} == {
        "window only": 1.0, "default": 0.1
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(result["documents"])
    lines = list(csv.DictReader((tmp_path / "out" / "nll.csv").open()))
    assert len(lines) == len(rows) * 3
    assert (tmp_path / "out" / "nll.png").read_bytes().startswith(b"\x89PNG")


def test_resume_takes_what_is_there_and_tables_show_it(
    tiny_model: Path, texts: list[str], tmp_path: Path, dense_instead: list[str]
) -> None:
    out = tmp_path / "out"
    assert nll(tiny_model, texts[:1], out, "--no-picture").exit_code == 0
    assert dense_instead == ["decode", "decode", "all", "all"]
    assert not (out / "nll.png").exists()
    dense_instead.clear()
    done = nll(tiny_model, texts[:1], out, "--no-picture", "--resume")
    assert dense_instead == []
    for word in ("window only", "default", "delta NLL", "95%", "344-363", "same top-1", "summaries read"):
        assert word in done.stdout
    again = nll(
        tiny_model, texts[:1], out, "--no-picture", "--resume", "--set", "budget=0.5", "--mode", "decode"
    )
    assert again.exit_code == 0
    assert dense_instead == ["decode", "decode"]
    dense_instead.clear()
    finer = nll(tiny_model, texts[:1], out, "--no-picture", "--resume", "--buckets", "4", "--mode", "decode")
    assert finer.exit_code == 0
    assert dense_instead == ["decode", "decode"]


def test_an_interrupted_run_keeps_what_was_measured(
    tiny_model: Path,
    texts: list[str],
    tmp_path: Path,
    dense_instead: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(run: Any) -> None:
        if run["row"] == "default":
            raise KeyboardInterrupt

    monkeypatch.setattr(eval_common, "say_run", stop)
    done = nll(tiny_model, texts, tmp_path / "out", "--no-picture")
    assert done.exit_code == 130
    saved = json.loads((tmp_path / "out" / "nll.json").read_text())
    assert [run["row"] for run in saved["runs"]] == ["dense", "window only", "default"]


@pytest.mark.parametrize("command", ["needle", "ruler"])
def test_facts_are_mapped_by_depth_and_length(
    tiny_model: Path, tmp_path: Path, dense_instead: list[str], command: str
) -> None:
    out, more = (
        tmp_path / "out",
        ["--keys", "1,3"] if command == "needle" else ["--tasks", "multi-value,variables"],
    )
    sizes = ["--lengths", "1800,2000", "--depths", "0,1", "--trials", "2", "--out", str(out)]
    done = invoke(command, str(tiny_model), *sizes, *more, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    cells = {(e["task"], e["facts"], e["length"], e["depth"]) for e in result["summary"]}
    tasks = (
        [("single", 1), ("multi-key", 3)] if command == "needle" else [("multi-value", 4), ("variables", 4)]
    )
    assert cells == {
        (*task, length, depth) for task in tasks for length in (1800, 2000) for depth in (0, 1, None)
    }
    assert {(e["row"], e["mode"]) for e in result["summary"]} == {
        ("dense", "-"), ("window only", "decode"), ("default", "decode")
    }  # fmt: skip
    for entry in result["summary"]:
        assert abs(entry["delta_nll"]["mean"]) < 1e-4
    assert (out / f"{command}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(csv.DictReader((out / f"{command}.csv").open()))) == len(result["summary"])
    table = invoke(command, str(tiny_model), *sizes, *more, "--resume")
    assert all(word in table.stdout for word in ("answer NLL", "parts found", "100%", tasks[1][0]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nll", "m", "--lengths", "1024"], "fewer than every length, got 1024"),
        (["nll", "m", "--lengths", "4k"], "--lengths"),
        (["nll", "m", "--mode", "prefill"], "must be decode or all"),
        (["nll", "m", "--resume"], "name it with --out"),
        (["nll", "m", "--corpus", "emmma"], "hga eval texts"),
        (["nll", "m", "--text", "/does/not/exist"], "cannot be read"),
        (["nll", "m", "--text", __file__, "--corpus", "emma"], "leave one out"),
        (["nll", "/does/not/exist", "--text", __file__], "no such file"),
        (["needle", "m", "--depths", "2"], "from 0 to 1"),
        (["needle", "m", "--keys", "0"], "--keys"),
        (["ruler", "m", "--tasks", "needle"], "must be one of multi-key"),
        (["ruler", "m", "--count", "1"], "--count"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from hga_compile.cli import main

    assert main(["eval", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "budget"], "FIELD=VALUE"),
        (["--set", "routing.bugdet=1"], "unknown option"),
        (["--set", "budget=7.0"], "above 0.0"),
        (["--profile", "defult"], "did you mean 'default'"),
        (["--profile", "default", "--profile", "default"], "differ in their names"),
        (["--lengths", "5000"], "shorter than 5,000 tokens"),
    ],
)
def test_wrong_settings_and_short_texts_are_refused(
    tiny_model: Path, texts: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from hga_compile.cli import main

    assert (
        main(["eval", "nll", str(tiny_model), "--text", texts[0], "--lengths", "256", "--scored", "8", *more])
        == 2
    )
    assert said in capsys.readouterr().err


def test_settings_are_yaml_and_one_name_a_field() -> None:
    found = settings(["inner=inductor", "budget=0.02", "routing.prefill_tile=64", "prefill=dense"])
    assert found == {
        "compile.inner": "inductor", "budget": 0.02, "routing.prefill_tile": 64, "routing.prefill": "dense"
    }  # fmt: skip
    assert settings([]) == {"compile.inner": "eager"}


def test_lists_are_read_once_each() -> None:
    assert split_numbers("8,4,8", "--lengths", 2) == [8, 4]
    assert split_modes("all,decode,all") == ["all", "decode"]
    assert split_depths("1,0,0.5,1") == [0.0, 0.5, 1.0]
    for wrong in ("", "1,", "-1", "1.5"):
        with pytest.raises(BadInputError, match="--lengths"):
            split_numbers(wrong, "--lengths", 2)


def test_texts_are_listed_with_their_licences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    listed = json.loads(invoke("texts", "--json").stdout)
    assert all(entry["licence"] for entry in listed)
    assert {"emma", "asyncio", "hamlet"} <= {entry["name"] for entry in listed}
    fetched = invoke("texts", "asyncio")
    assert fetched.exit_code == 0
    assert "PSF-2.0" in fetched.stdout
    assert "not fetched" not in fetched.stdout
    failed = invoke("texts", "asyncio", "nothing")
    assert failed.exit_code == 1


@pytest.mark.checkpoint
@pytest.mark.slow
def test_a_real_model_is_near_dense_and_the_window_alone_is_not(tmp_path: Path) -> None:
    model = Path(os.environ.get("HGA_MODELS", "")) / "smollm2-135m"
    if not os.environ.get("HGA_MODELS") or not model.is_dir():
        pytest.skip("no SmolLM2-135M: set HGA_MODELS to a folder with smollm2-135m")
    sizes = ["--lengths", "1400", "--depths", "0.5", "--keys", "1", "--trials", "1", "--out", str(tmp_path)]
    done = invoke("needle", str(model), *sizes, "--json")
    assert done.exit_code == 0, done.output
    found = {e["row"]: e for e in json.loads(done.stdout)["summary"] if e["depth"] is None}
    assert found["dense"]["exact"]["mean"] == found["default"]["exact"]["mean"] == 1.0
    assert found["window only"]["exact"]["mean"] == 0.0
    assert found["default"]["kl"]["mean"] < 0.05 < 1.0 < found["window only"]["kl"]["mean"]
