import json
import multiprocessing
import time
from pathlib import Path

import pytest

from hga_compile.cli.errors import CommandError
from hga_compile.demo import store
from hga_compile.demo.store import MANIFEST, build_once, is_intact


def build(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def never(folder: Path) -> None:
    raise AssertionError("an intact folder must not be built again")


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    assert build_once(target, build) == build_once(target, never) == target
    assert is_intact(target)
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors", MANIFEST}
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["tiny"]


def test_an_interrupted_build_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    target = tmp_path / "tiny"

    def interrupted(folder: Path) -> None:
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(target, interrupted)
    assert not target.exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    build_once(target, build)
    assert is_intact(target)


def test_the_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    leftover = tmp_path / ".tiny.partial-abc"
    leftover.mkdir()
    build(leftover)
    build_once(tmp_path / "tiny", build)
    assert not leftover.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"weighty"),  # as long as before
        lambda folder: (folder / "model.safetensors").write_bytes(b"w"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text('{"files": {}}'),
        lambda folder: (folder / MANIFEST).write_text("[1, 2"),
    ],
)
def test_a_damaged_folder_is_never_used_but_built_again(tmp_path: Path, damage: object) -> None:
    target, said = tmp_path / "tiny", []
    build_once(target, build)
    damage(target)  # type: ignore[operator]
    assert not is_intact(target)
    build_once(target, build, say=said.append)
    assert is_intact(target)
    assert said == ["the cached tiny is damaged; building it again"]


def test_a_folder_of_another_origin_is_not_trusted(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    target.mkdir()
    build(target)
    build_once(target, build)
    assert json.loads((target / MANIFEST).read_text())["files"]["config.json"]["bytes"] == 2


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="XDG_CACHE_HOME"):
        build_once(tmp_path / "file" / "tiny", build)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_sync", full)
    with pytest.raises(CommandError, match="No space left"):
        build_once(tmp_path / "tiny", build)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def _slow_build(target: Path, started: str, built: str) -> None:
    def slow(folder: Path) -> None:
        Path(started).touch()
        time.sleep(0.5)
        build(folder)
        Path(built).touch()

    build_once(target, slow)


def test_a_second_process_waits_and_uses_what_the_first_built(tmp_path: Path) -> None:
    target, started, built = tmp_path / "tiny", tmp_path / "started", tmp_path / "built"
    context = multiprocessing.get_context("fork")
    other = context.Process(target=_slow_build, args=(target, str(started), str(built)))
    other.start()
    while not started.exists():
        time.sleep(0.01)
    said: list[str] = []
    assert build_once(target, never, say=said.append) == target
    other.join()
    assert built.exists()
    assert said == ["another process is preparing tiny; waiting for it"]
