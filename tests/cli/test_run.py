import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from hga_compile.cli import run
from hga_compile.cli.app import app
from hga_compile.cli.engine import Dense
from hga_compile.cli.prompt import encode, read_prompt

runner = CliRunner()


class FakeRouted(Dense):
    """The dense model with made-up counts, so that the command is tested without the compiler."""

    name = "hga"

    def __init__(self, model: Any, profile: Any) -> None:
        super().__init__(model)
        self.profile = profile

    def reads(self, phase: str) -> dict[str, Any]:
        return {"attended": 0.03, "kv_bytes_read": 0.031, "summary_bytes_read": 0.066}

    def sites(self) -> Any:
        return {"graphs": 2, "routed": 4, "dense": 0, "fallbacks": {"a reason": 3}}


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon a time, " * 5)
    return file


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Routed", FakeRouted)


def expected_text(model: Path, ids: torch.Tensor, tokens: int) -> str:
    from hga_compile.cli.checkpoint import Checkpoint, load_model, load_tokenizer

    loaded = load_model(Checkpoint(model), torch.device("cpu"), torch.float32)
    found = loaded.generate(ids, max_new_tokens=tokens, do_sample=False, past_key_values=DynamicCache())
    text: str = load_tokenizer(Checkpoint(model)).decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_text_goes_to_stdout_and_the_summary_to_stderr(tiny_model: Path, prompt: Path, fake: None) -> None:
    arguments = [
        "run",
        str(tiny_model),
        "--prompt-file",
        str(prompt),
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
    ]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    from hga_compile.cli.checkpoint import Checkpoint, load_tokenizer

    ids = encode(load_tokenizer(Checkpoint(tiny_model)), prompt.read_text(), chat=True)
    assert done.stdout == expected_text(tiny_model, ids, 8) + "\n"
    lines = done.stderr.splitlines()
    assert lines[0].startswith("prefill")
    assert "attended 3%; read token K/V 3.1% + summaries 6.6% of dense" in lines[0]
    assert lines[1].startswith("decode   7 tokens")
    assert lines[2].startswith("K/V      accelerator 0 B")
    assert "4 routed, 0 dense in 2 graphs" in lines[3]
    assert lines[4] == "fallback 3 x a reason"


def test_json_is_one_document_on_stdout(tiny_model: Path, prompt: Path, fake: None) -> None:
    arguments = ["run", str(tiny_model), "--prompt-file", str(prompt), "--max-new-tokens", "4", "--json"]
    done = runner.invoke(app, [*arguments, "--no-chat", "--prefill-step", "16", "--device", "cpu"])
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["attention"] == "hga"
    assert result["profile"] == "default"
    assert result["prompt_tokens"] == len(prompt.read_text())
    assert result["new_tokens"] == 4
    assert result["stopped"] == "length"
    assert result["prefill"]["tokens"] == result["prompt_tokens"]
    assert result["decode"]["tokens"] == 3
    assert result["memory"]["host_kv"] > 0
    assert result["text"]


def test_dense_runs_without_compiler_and_profile(
    tiny_model: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the dense run must not compile")

    monkeypatch.setattr(torch, "compile", refuse)
    arguments = ["run", str(tiny_model), "--prompt-file", str(prompt), "--max-new-tokens", "3", "--dense"]
    done = runner.invoke(app, [*arguments, "--json", "--device", "cpu"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["attention"] == "dense"
    assert result["profile"] is None
    assert result["sites"] is None
    assert result["prefill"]["attended"] == 1.0


def test_a_prompt_from_stdin(tiny_model: Path, fake: None) -> None:
    arguments = [
        "run",
        str(tiny_model),
        "--prompt-file",
        "-",
        "--max-new-tokens",
        "1",
        "--json",
        "--device",
        "cpu",
    ]
    done = runner.invoke(app, arguments, input="hello")
    assert json.loads(done.stdout)["prompt_tokens"] == len("hello") + 3  # the template's marks


def test_a_text_past_the_models_length_is_noted(tiny_model: Path, prompt: Path, fake: None) -> None:
    arguments = [
        "run",
        str(tiny_model),
        "--prompt-file",
        str(prompt),
        "--max-new-tokens",
        "1",
        "--device",
        "cpu",
    ]
    prompt.write_text("x" * 4100)
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0
    assert "the model was made for 4,096" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [(b" \n", "is empty"), (b"\xff\xfe", "must be UTF-8 text, got byte 0xff at offset 0")],
)
def test_unusable_prompts_exit_with_2(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    done = runner.invoke(app, ["run", "some/model", "--prompt-file", str(file)])
    assert done.exit_code == 2
    assert said in done.stderr
    assert "--prompt-file" in done.stderr


def test_a_folder_as_prompt_file_exits_with_2(tmp_path: Path) -> None:
    done = runner.invoke(app, ["run", "some/model", "--prompt-file", str(tmp_path)])
    assert done.exit_code == 2


def test_a_bad_profile_is_found_before_the_model_loads(prompt: Path) -> None:
    done = runner.invoke(app, ["run", "some/model", "--prompt-file", str(prompt), "--profile", "defualt"])
    assert done.exit_code == 2
    assert "did you mean 'default'" in done.stderr


def test_a_chat_without_template_is_refused(tiny_model: Path) -> None:
    from hga_compile.cli.checkpoint import Checkpoint, load_tokenizer
    from hga_compile.cli.errors import BadInputError

    tokenizer = load_tokenizer(Checkpoint(tiny_model))
    tokenizer.chat_template = None
    with pytest.raises(BadInputError, match="--no-chat"):
        encode(tokenizer, "hello", chat=True)
    assert encode(tokenizer, "hello", chat=None).shape == (1, 5)


def test_read_prompt_takes_stdin_as_utf8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "stdin"
    file.write_text("grün", encoding="utf-8")
    with file.open(encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert read_prompt("-") == "grün"


def test_the_real_compiler_writes_what_dense_writes_at_full_budget(
    tiny_model: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HGA_INNER", "eager")
    monkeypatch.setenv("HGA_BUDGET", "1.0")
    arguments = ["run", str(tiny_model), "--prompt-file", str(prompt), "--max-new-tokens", "6", "--json"]
    routed, dense = (
        json.loads(runner.invoke(app, [*arguments, "--device", "cpu", "--prefill-step", "40", *more]).stdout)
        for more in ([], ["--dense"])
    )
    assert routed["text"] == dense["text"]
    assert routed["sites"] == {"graphs": 2, "routed": 4, "dense": 0, "fallbacks": {}}
    assert routed["decode"]["attended"] == 1.0
