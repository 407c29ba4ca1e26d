import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig
from typer.testing import CliRunner

from hga_compile.cli.app import app

runner = CliRunner()


def test_every_site_is_listed_with_decision_and_reason(tiny_model: Path) -> None:
    done = runner.invoke(app, ["explain", str(tiny_model), "--json", "--device", "cpu"])
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["model"] == "LlamaForCausalLM"
    assert (result["profile"], result["kernels"]) == ("default", "auto")
    assert (result["routed"], result["dense"]) == (4, 0)
    assert {(site["phase"], site["layer"]) for site in result["sites"]} == {
        ("prefill", 0), ("prefill", 1), ("decode", 0), ("decode", 1),
    }  # fmt: skip
    assert all(site["decision"] == "routed" and site["reason"] for site in result["sites"])


def test_a_layer_that_stays_dense_says_why(tiny_model: Path, tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("name: mine\nrouting: {dense_layers: [0]}\n")
    arguments = ["explain", str(tiny_model), "--profile", str(profile), "--device", "cpu"]
    result = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    dense = [site for site in result["sites"] if site["decision"] == "dense"]
    assert {site["layer"] for site in dense} == {0}
    table = runner.invoke(app, arguments)
    assert table.exit_code == 0, table.stderr
    assert dense[0]["reason"] in table.stdout
    assert "2 routed, 2 dense" in table.stdout


def test_random_needs_no_weights(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    arguments = ["explain", str(tmp_path), "--random", "--layers", "1", "--json", "--device", "cpu"]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["routed"] == 2


def test_strict_refuses_a_dense_site_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Bloom adds a bias to its scores, which routing cannot take into account.
    BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=100).save_pretrained(tmp_path)
    monkeypatch.setenv("HGA_STRICT", "true")
    done = runner.invoke(app, ["explain", str(tmp_path), "--random", "--device", "cpu"])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert "stays dense" in line
    assert "compile.strict" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_kernels_that_cannot_run_here_are_bad_input(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HGA_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = runner.invoke(app, ["explain", str(tiny_model), "--device", "cpu"])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert "a CUDA device is needed" in line and "compile.kernels" in line


def test_a_setting_that_nothing_serves_is_bad_input(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HGA_OFFLOAD__HOT_CACHE", "0.1")
    monkeypatch.setenv("HGA_TIER", "gpu")
    done = runner.invoke(app, ["explain", str(tiny_model), "--device", "cpu"])
    assert done.exit_code == 2
    assert "offload.hot_cache" in done.stderr
