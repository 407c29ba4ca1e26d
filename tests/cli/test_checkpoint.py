import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from hga_compile.cli import checkpoint, hub
from hga_compile.cli.checkpoint import Checkpoint, find_checkpoint
from hga_compile.cli.errors import BadInputError

CPU = torch.device("cpu")


def test_a_folder_in_transformers_form(tiny_model: Path) -> None:
    found = find_checkpoint(str(tiny_model))
    assert found == Checkpoint(tiny_model)
    assert checkpoint.load_model(found, CPU, torch.float32).dtype == torch.float32
    assert checkpoint.load_tokenizer(found).eos_token == "</s>"


def test_a_configuration_file_names_its_folder(tiny_model: Path) -> None:
    assert find_checkpoint(str(tiny_model / "config.json"), weights=False) == Checkpoint(tiny_model)


def test_a_gguf_file_and_a_folder_with_one(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert find_checkpoint(str(file)) == find_checkpoint(str(tmp_path)) == Checkpoint(tmp_path, "model.gguf")


def test_two_gguf_files_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(BadInputError, match=r"2 GGUF files, expected one.*a\.gguf"):
        find_checkpoint(str(tmp_path))


def test_gguf_without_its_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInputError, match=r"pip install 'hga-compile\[demo\]'"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["./nothing", "/does/not/exist", "a/b/c", "~/nothing-here", "-x", ""])
def test_what_is_no_path_and_no_hub_id_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match="MODEL"):
        find_checkpoint(name)


def test_an_empty_folder_and_another_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"neither a config\.json nor a \.gguf"):
        find_checkpoint(str(tmp_path))
    other = tmp_path / "model.bin"
    other.touch()
    with pytest.raises(BadInputError, match=r"model\.bin"):
        find_checkpoint(str(other))


def test_other_names_are_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot(repo: str, *, weights: bool, say: object) -> Path:
        asked.append((repo, weights))
        return tmp_path

    monkeypatch.setattr(hub, "snapshot", snapshot)
    assert find_checkpoint("some/model", weights=False) == Checkpoint(tmp_path)
    assert find_checkpoint("gpt2") == Checkpoint(tmp_path)
    assert asked == [("some/model", False), ("gpt2", True)]


def test_damaged_weights_are_one_clear_error(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(BadInputError, match="no causal language model that can be loaded"):
        checkpoint.load_model(Checkpoint(folder), CPU, torch.float32)


def test_a_folder_without_tokenizer_is_one_clear_error(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(BadInputError, match="MODEL"):
        checkpoint.load_tokenizer(Checkpoint(tmp_path))


def test_a_random_model_needs_only_the_configuration(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    model = checkpoint.random_model(Checkpoint(tmp_path), CPU, torch.bfloat16, layers=1)
    assert model.config.num_hidden_layers == len(model.model.layers) == 1
    assert model.dtype == torch.bfloat16
    assert not model.training
    with pytest.raises(BadInputError, match=r"has 2 layers, got 3 \(--layers\)"):
        checkpoint.random_model(Checkpoint(tmp_path), CPU, torch.float32, layers=3)
