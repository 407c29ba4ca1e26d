import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hga_compile.cli.app import app
from hga_compile.demo.store import cache_root, is_intact

# They share one run of the demo.
pytestmark = pytest.mark.xdist_group("demo")

runner = CliRunner()

# What the tiny model needs for routing to happen in a short context.
SMALL = {
    "HGA_INNER": "eager",
    "HGA_ROUTING__DENSE_BELOW": "64",
    "HGA_ROUTING__CENTRE_TOKENS": "64",
    "HGA_ROUTING__BUDGET__TOKENS": "64",
}


@pytest.fixture(scope="module")
def outcome(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """JSON and picture of one demo with the tiny model."""
    picture = tmp_path_factory.mktemp("demo") / "routes.png"
    arguments = ["demo", "--model", str(tiny_model), "--tokens", "1024", "--device", "cpu", "--json"]
    done = runner.invoke(app, [*arguments, "--out", str(picture)], env=SMALL)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.splitlines() == ["dense: reading the text", "hga: compiling", "hga: reading the text"]
    return json.loads(done.stdout), picture


def test_both_sides_read_the_same_document(outcome: tuple[dict[str, Any], Path]) -> None:
    result, _ = outcome
    assert result["tokens"] == 1024
    assert 1024 // 5 < result["scored_tokens"] < 1024 // 4, "a quarter of the text"
    assert result["dense"]["prefill"]["tokens"] == 1024 - 32
    assert result["hga"]["prefill"]["tokens"] == 1024 - 32 - 2  # two tokens open the cache
    assert result["dense"]["decode"]["tokens"] == result["hga"]["decode"]["tokens"] == 31
    assert result["expected_answer"] in result["fact"]


def test_the_comparison_is_there(outcome: tuple[dict[str, Any], Path]) -> None:
    result, _ = outcome
    assert result["kl"] > 0
    assert result["delta_nll"] == pytest.approx(result["hga"]["nll"] - result["dense"]["nll"])
    assert 0 < result["same_first_choice"] <= 1
    assert result["dense"]["prefill"]["attended"] == 1.0
    for phase in ("prefill", "decode"):
        assert 0 < result["hga"][phase]["attended"] < 0.3
        assert 0 < result["hga"][phase]["kv_bytes_read"] < 0.3
        assert result["hga"][phase]["summary_bytes_read"] > 0
        assert result["hga"][phase]["compiled_steps"] == 0, "the warm-up compiles everything"
        assert result["hga"][phase]["tokens_per_second"] > 0
    assert result["hga"]["bytes_read_per_decoded_token"] < result["dense"]["bytes_read_per_decoded_token"]
    assert result["dense"]["bytes_read_per_decoded_token"] == result["dense"]["kv_bytes"]["host_kv"]
    assert result["hga"]["kv_bytes"]["accelerator_kv"] == 0
    sites = result["hga"]["sites"]
    assert (sites["graphs"], sites["routed"], sites["dense"]) == (2, 4, 0)
    # The demo records routes, which the C++ kernels do not.
    assert all("recorded routes" in reason for reason in sites["fallbacks"])


def test_the_picture_is_drawn(outcome: tuple[dict[str, Any], Path]) -> None:
    result, picture = outcome
    assert result["picture"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_names_every_number(tiny_model: Path) -> None:
    arguments = ["demo", "--model", str(tiny_model), "--tokens", "600", "--device", "cpu"]
    done = runner.invoke(app, arguments, env={"HGA_INNER": "eager", "HGA_BUDGET": "1.0"})
    assert done.exit_code == 0, done.stderr
    for name in (
        "The secret passcode of the library is 7421.",
        "answer is 7421",
        "NLL of the last",
        "(+0.0000)",
        "KL(dense || hga)",
        "attended tokens, prefill",
        "bytes read, decode: token K/V + summaries",
        "K/V and summaries read by a decoded token",
        "prefill",
        "tokens/s",
    ):
        assert name in done.stdout


def test_a_context_that_the_model_does_not_have_exits_with_2(tiny_model: Path) -> None:
    done = runner.invoke(app, ["demo", "--model", str(tiny_model), "--tokens", "5000", "--device", "cpu"])
    assert done.exit_code == 2
    assert (
        done.stderr
        == "hga: error: the context must be at most 4,096 tokens for this model, got 5,000 (--tokens)\n"
    )


def real_model() -> str:
    """Folder of the demo's real model, if this machine has it already."""
    local = Path(os.environ.get("HGA_MODELS", "/nonexistent")) / "smollm2-135m"
    cached = cache_root() / "smollm2-135m-instruct-q4_1"
    if local.is_dir():
        return str(local)
    if is_intact(cached):
        return str(cached)
    pytest.skip("the demo's model is neither in HGA_MODELS nor in the cache folder: run `hga demo` once")


@pytest.mark.slow
@pytest.mark.checkpoint
def test_the_real_model_finds_the_planted_fact_with_routed_attention() -> None:
    arguments = ["demo", "--model", real_model(), "--tokens", "2048", "--device", "cpu", "--json"]
    done = runner.invoke(app, arguments, env={"HGA_INNER": "eager"})
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["dense"]["correct"]
    assert result["hga"]["correct"]
    assert abs(result["delta_nll"]) < 0.06
    assert result["kl"] < 0.06
    assert result["hga"]["decode"]["attended"] < 0.15


@pytest.mark.slow
@pytest.mark.checkpoint
def test_the_same_model_runs_from_a_folder_without_the_cache(tmp_path: Path) -> None:
    folder = shutil.copytree(real_model(), tmp_path / "smollm2-135m")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("What is the capital of France?")
    arguments = ["run", str(folder), "--prompt-file", str(prompt), "--dense", "--device", "cpu"]
    done = runner.invoke(app, [*arguments, "--max-new-tokens", "12"])
    assert done.exit_code == 0, done.stderr
    assert "Paris" in done.stdout
