import pytest

from hga_compile.evaluation.corpora import TextError, read_files
from hga_compile.evaluation.corpora.document import OWN


def write(folder, **texts):
    files = []
    for name, text in texts.items():
        files.append(folder / f"{name}.txt")
        files[-1].write_text(text)
    return files


def test_files_and_folders_become_documents_in_order(tmp_path):
    inner = tmp_path / "more"
    inner.mkdir()
    write(inner, b="bravo", a="alpha")
    (inner / "left.out").write_text("no text")
    documents = read_files([*write(tmp_path, z="zulu"), inner])
    assert [(d.name, d.text, d.licence) for d in documents] == [
        ("z", "zulu", OWN), ("a", "alpha", OWN), ("b", "bravo", OWN)
    ]  # fmt: skip
    assert str(tmp_path) not in str(documents[0].entry())


def test_one_text_counts_once_and_equal_names_get_a_number(tmp_path):
    inner = tmp_path / "more"
    inner.mkdir()
    files = [*write(tmp_path, a="alpha", copy="alpha"), *write(inner, a="other")]
    assert [(d.name, d.text) for d in read_files(files)] == [("a", "alpha"), ("a-2", "other")]


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    for name, said in (
        ("bytes.txt", "must be UTF-8, got a byte that is not at offset 2"),
        ("empty.txt", "is empty"),
        ("missing.txt", "cannot be read: No such file"),
        ("folder", "has no .txt"),
    ):
        with pytest.raises(TextError, match=said):
            read_files([tmp_path / name])
