"""``hga-tune``: its help, dry run, errors and exit codes, and a whole run on a tiny random model."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hga_compile.configs.loader import load_profile
from hga_compile.tuning import quality, search, tune
from hga_compile.tuning.main import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a random Llama with two layers whose tokens are bytes: its quality says nothing."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, number %d. " * 60, encoding="utf-8")
    return [
        "--model", str(tiny), "--gpu", "cpu", "--context", "2048", "--lengths", "1536", "--scored", "8",
        "--text", str(text), "--trials", "5", "--measured", "1", "--max-delta-nll", "10", "--no-verify",
        "--device", "cpu", "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def test_a_whole_run_writes_a_profile_that_loads_a_report_and_a_result(arguments, tmp_path, capsys):
    pytest.importorskip("plotly")
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["trials"]["screen"]) == 5
    assert result["chosen"]["feasible"]
    assert result["default"]["params"]["budget"] == 0.03
    assert result["checkpoint"]["transferred"] is False
    out = tmp_path / "out"
    (file,) = out.glob("*.yaml")
    profile = load_profile(file)
    assert profile.model.layers == 2
    assert profile.model_dump(mode="json") == result["profile"]
    assert "# Made by: hga-tune --model tiny-llama" in file.read_text()
    assert str(tmp_path) not in file.read_text()
    report = (out / "report.html").read_text()
    assert "Measured on the full model" in report and "Quality by text and length" in report
    # Without --resume it is not begun again; with it, nothing that was tried is tried again.
    assert main([*arguments, "--no-report"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*arguments, "--no-report", "--resume", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["trials"] == result["trials"]


def test_what_was_found_before_ctrl_c_is_written(arguments, tmp_path, monkeypatch, capsys):
    stock, calls = search.measure_survivors, []

    def measure_survivors(study, goal, chosen, measured, **more):
        def once(profile):
            if calls:
                raise KeyboardInterrupt
            calls.append(profile)
            return measured(profile)

        return stock(study, goal, chosen, once, **more)

    monkeypatch.setattr(tune, "measure_survivors", measure_survivors)
    assert main([*arguments, "--no-report", "--json"]) == 130
    result = json.loads(capsys.readouterr().out)
    assert result["interrupted"]
    assert len(result["trials"]["full"]) == 1
    assert len(list((tmp_path / "out").glob("*.yaml"))) == 1


def test_ctrl_c_while_the_choice_is_verified_costs_the_verification_only(arguments, monkeypatch, capsys):
    stock = quality.Calibration.quality

    def interrupted(self, profile, compiled=False):
        if compiled:
            raise KeyboardInterrupt
        return stock(self, profile)

    monkeypatch.setattr(quality.Calibration, "quality", interrupted)
    arguments.remove("--no-verify")
    assert main([*arguments, "--no-report", "--json"]) == 130
    result = json.loads(capsys.readouterr().out)
    assert result["verified"] is None
    assert result["chosen"]["feasible"]


@pytest.mark.parametrize("wrong", ["0", "1.5", "half"])
def test_a_share_that_is_none_is_refused_with_the_option_to_change(arguments, capsys, wrong):
    assert main([*arguments, "--max-read", wrong]) == 2
    assert "(--max-read)" in capsys.readouterr().err


def test_nothing_within_the_constraint_is_exit_3_with_its_name(arguments, capsys):
    arguments[arguments.index("--max-delta-nll") + 1] = "-10"
    assert main([*arguments, "--no-report"]) == 3
    assert "delta_nll binds in" in capsys.readouterr().err


def test_what_cannot_fit_is_exit_3_before_anything_is_loaded(capsys):
    assert main(["--model", "qwen3-30b", "--gpu", "rtx3090"]) == 3
    error = capsys.readouterr().err
    assert "GPU memory of rtx3090 binds" in error
    assert "the largest part is weights" in error


def test_the_dry_run_shows_space_feasibility_and_time(capsys):
    assert main(["--model", "qwen3-30b", "--gpu", "rtx5090", "--context", "65536", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "routing.budget.fraction" in out
    assert "host │  65,536 │ yes" in out
    assert "gpu  │  65,536 │ no" in out
    assert "Time on this machine, about:" in out


def test_the_dry_run_as_json(capsys):
    assert main(["--model", "qwen3-8b", "--gpu", "rtx4090", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {cell["tier"] for cell in found["feasibility"]} == {"gpu", "host", "nvme"}
    assert set(found["seconds"]) == {"dense runs", "cheap stage", "full model", "compiled model"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "qwen3-30bb", "--gpu", "h200"], "did you mean 'qwen3-30b'"),
        (["--model", "qwen3-30b", "--gpu", "h2000"], "did you mean 'h200'"),
        (
            ["--model", "qwen3-30b", "--gpu", "h200", "--tiers", "hots"],
            "tiers are gpu and host, got hots",
        ),
        (
            ["--model", "qwen3-30b", "--gpu", "h200", "--tiers", "host,nvme"],
            "the time of a step in nvme is neither measured nor modelled (--tiers)",
        ),
        (["--gpu", "h200"], "Missing option '--model'"),
        (["--model", "qwen3-30b", "--gpu", "h200", "--prefer", "cheap"], "cheap"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_profile_with_a_hot_cache_is_a_base_like_others(tmp_path, capsys):
    base = tmp_path / "hot.yaml"
    base.write_text("schema_version: 1\nname: hot\noffload: {tier: host, hot_cache: 0.1}\n")
    given = ["--model", "qwen3-30b", "--gpu", "h200", "--profile", str(base), "--dry-run", "--json"]
    assert main(given) == 0
    host = next(cell for cell in json.loads(capsys.readouterr().out)["feasibility"] if cell["tier"] == "host")
    assert main([*given[:4], *given[6:]]) == 0
    bare = next(cell for cell in json.loads(capsys.readouterr().out)["feasibility"] if cell["tier"] == "host")
    assert host["gpu_bytes"] > bare["gpu_bytes"]


def test_without_any_weights_it_says_what_to_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HGA_MODELS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(quality, "local_weights", lambda card: None)
    assert main(["--model", "qwen3-30b", "--gpu", "h200", "--no-report"]) == 2
    assert "--quality-model" in capsys.readouterr().err


def test_help_has_examples(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "hga-tune --model qwen3-30b --gpu rtx5090" in out
    assert "3 nothing is feasible" in " ".join(out.split())
    rule = "balanced the least KL of those at most 10% slower than the default setting"
    assert rule in " ".join(out.split())


@pytest.mark.slow
@pytest.mark.checkpoint
@pytest.mark.timeout(170)
def test_a_short_real_study(tmp_path, capsys):
    """On real weights: settings rank as known, the choice keeps its rule, the compiled model agrees."""
    from hga_compile.tuning.target import find_model

    if find_model("smollm2-135m").folder is None:
        pytest.skip("no weights of smollm2-135m (HGA_MODELS)")
    arguments = ["--model", "smollm2-135m", "--gpu", "rtx4090", "--context", "8192", "--lengths", "1536"]
    arguments += ["--corpus", "persuasion", "--trials", "12", "--measured", "4", "--scored", "24"]
    arguments += ["--tiers", "host", "--no-report", "--out", str(tmp_path)]
    assert main([*arguments, "--max-delta-nll", "0.5", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    default, verified, chosen = result["default"], result["verified"], result["chosen"]
    # The paper's mean keys are far behind low-bit keys on this checkpoint.
    paper = next(
        t
        for t in result["trials"]["full"]
        if t["params"]["summary"] == "mean" and t["params"]["budget"] == 0.03
    )
    assert paper["values"][0] > 1.5 * default["values"][0]
    assert len(result["trials"]["full"]) > 4  # something that the cheap stage proposed
    assert verified["kl"] == pytest.approx(chosen["values"][0], rel=0.05)
    # `balanced` is better than the default and at most a tenth slower.
    assert chosen["values"][0] < default["values"][0]
    assert chosen["values"][1] <= 1.1 * default["values"][1]
    profile = load_profile(Path(tmp_path) / "smollm2-135m.rtx4090.yaml")
    assert profile.gpu == "NVIDIA GeForce RTX 4090"
