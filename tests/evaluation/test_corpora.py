import json
import shutil

import pytest

from hga_compile.evaluation import corpora
from hga_compile.evaluation.corpora import CorpusError, named, sources
from hga_compile.evaluation.corpora.sources import Source


@pytest.fixture
def counted(monkeypatch):
    """A source that counts how often it is built."""
    built = []

    def build(folder):
        assert folder.is_dir()
        built.append(folder)
        return {"one": ("One", "first\ntext"), "two": ("Two", "zwei — 二")}, "Test 1.0"

    monkeypatch.setattr(named, "SOURCES", (Source(("one", "two", "absent"), "CC0-1.0", build),))
    return built


def test_a_source_is_built_once_and_only_when_asked(counted, tmp_path):
    assert corpora.names() == ("one", "two", "absent")
    assert not counted
    document = corpora.load("two", tmp_path)
    assert (document.text, document.title, document.licence) == ("zwei — 二", "Two", "CC0-1.0")
    assert document.source == "Test 1.0"
    assert corpora.load("one", tmp_path).text == "first\ntext"
    assert len(counted) == 1
    assert not counted[0].exists()


def test_a_document_is_a_text_and_an_entry(counted, tmp_path):
    document = corpora.load("one", tmp_path)
    assert (tmp_path / "one.txt").read_text() == document.text
    assert json.loads((tmp_path / "one.json").read_text()) == document.entry()
    assert "text" not in document.entry()


@pytest.mark.parametrize("damage", ["text", "entry", "missing"])
def test_a_damaged_text_is_built_again(counted, tmp_path, damage):
    corpora.load("one", tmp_path)
    if damage == "missing":
        (tmp_path / "one.txt").unlink()
    else:
        (tmp_path / ("one.txt" if damage == "text" else "one.json")).write_text("first")
    assert corpora.load("one", tmp_path).text == "first\ntext"
    assert len(counted) == 2


def test_unknown_and_undelivered_names_are_errors(counted, tmp_path):
    with pytest.raises(CorpusError, match=r"no text named 'emmma'; there are one, two"):
        corpora.load("emmma", tmp_path)
    with pytest.raises(CorpusError, match="did not give the text 'absent'"):
        corpora.load("absent", tmp_path)


@pytest.mark.parametrize("name", sources.STDLIB)
def test_python_sources_are_always_there(tmp_path, name):
    document = corpora.load(name, tmp_path)
    assert document.licence == "PSF-2.0"
    assert document.text.startswith(f"# {name}/__init__.py\n")
    assert document.characters > 100_000  # over 10K tokens
    assert not list(tmp_path.glob(".*"))


def test_texts_of_another_python_are_built_again(tmp_path):
    entry = tmp_path / "asyncio.json"
    corpora.load("asyncio", tmp_path)
    stale = json.loads(entry.read_text())
    entry.write_text(json.dumps(stale | {"source": "CPython 2.7.18"}))
    assert corpora.load("asyncio", tmp_path).source == stale["source"]


@pytest.mark.parametrize("name", ["emma", "kjv-law", "kernel-rcu"])
def test_without_a_package_manager_the_error_says_what_to_do(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match=r"`apt-\w+` is not installed; this text needs a Debian"):
        corpora.load(name, tmp_path)


def test_a_failing_command_gives_its_last_line(tmp_path):
    with pytest.raises(CorpusError, match=r"failed: .*; try again"):
        sources._run(["ls", "--no-such-option"], tmp_path, "try again")


def test_every_name_belongs_to_one_source():
    assert len(set(corpora.names())) == len(corpora.names()) >= 15


def test_the_shelf_lists_without_building(counted, tmp_path):
    entries = corpora.shelf(tmp_path)
    assert [(entry["name"], entry["licence"], entry["built"]) for entry in entries] == [
        (name, "CC0-1.0", False) for name in ("one", "two", "absent")
    ]
    assert not counted
    corpora.load("one", tmp_path)
    assert [entry.get("characters") for entry in corpora.shelf(tmp_path)] == [10, 8, None]


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
def test_emma_comes_from_the_debian_package(tmp_path):
    try:
        document = corpora.load("emma", tmp_path)
    except CorpusError as error:
        pytest.skip(f"packages out of reach: {error}")
    assert document.text.startswith("EMMA\n\nBy Jane Austen\n")
    assert "handsome, clever, and rich" in document.text
    assert document.characters > 800_000
    assert document.source.startswith("Debian r-cran-janeaustenr ")
