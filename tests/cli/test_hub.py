import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from hga_compile.cli import hub
from hga_compile.cli.errors import CommandError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    return tmp_path


class FakeHub:
    """Stands for the hub: a folder in the local cache or not, reachable or not."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, cached: bool, reachable: bool
    ) -> None:
        self.folder, self.cached, self.reachable = folder, cached, reachable
        self.calls: list[str] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)

    def snapshot_download(
        self, repo: str, *, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        self.calls.append("cache" if local_files_only else "download")
        if local_files_only and not self.cached:
            raise LocalEntryNotFoundError("not cached")
        return str(self.folder)

    def model_info(self, repo: str, timeout: float) -> Any:
        self.calls.append("info")
        assert timeout <= 10
        if not self.reachable:
            raise ConnectionError("Name or service not known")
        return None


def test_a_cached_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    fake = FakeHub(monkeypatch, folder, cached=True, reachable=False)
    assert hub.snapshot("some/model") == folder
    assert fake.calls == ["cache"]


def test_an_unreachable_hub_fails_at_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    fake = FakeHub(monkeypatch, folder, cached=False, reachable=False)
    with pytest.raises(CommandError, match=r"cannot be reached \(Name or service not known\)"):
        hub.snapshot("some/model")
    assert fake.calls == ["cache", "info"]


def test_a_reachable_model_is_downloaded(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    fake = FakeHub(monkeypatch, folder, cached=False, reachable=True)
    said: list[str] = []
    assert hub.snapshot("some/model", say=said.append) == folder
    assert fake.calls == ["cache", "info", "download"]
    assert said == ["downloading some/model from the Hugging Face hub"]


def test_a_partly_cached_model_does_not_count(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    FakeHub(monkeypatch, folder, cached=True, reachable=False)
    assert hub.cached_snapshot("some/model") is None
    assert hub.cached_snapshot("some/model", weights=False) == folder


def test_every_shard_must_be_there(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").touch()
    assert not hub.is_model_folder(folder)
    (folder / "model-2.safetensors").touch()
    assert hub.is_model_folder(folder)
    (folder / "model.safetensors.index.json").write_text("half a fi")
    assert not hub.is_model_folder(folder)
