"""Hostile and surprising YAML: the right value, or one line with file, line and field, within a second."""

import os
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hga_compile.configs import yaml_source
from hga_compile.configs.errors import ProfileError
from hga_compile.configs.yaml_source import MAX_BYTES, parse_yaml, read_yaml

BOMB = b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (n, n, n - 1, n - 1) for n in range(98, 123))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb:\n  c: 1\n  c: 2\n", "f.yaml:4: b.c: duplicate key, first on line 3"),
        (b'a: 1\n"a": 2\n', "f.yaml:2: a: duplicate key, first on line 1"),
        (BOMB, "f.yaml:1: a: anchors and aliases"),
        (b"a: 1\nb: *nowhere\n", "f.yaml:2: b: anchors and aliases"),
        (b"&k a: 1\n", "f.yaml:1: anchors and aliases"),
        (
            b"a:\n  b: !!python/object/apply:os.system [x]\n",
            "f.yaml:2: a.b: tag !!python/object/apply:os.system is",
        ),
        (b"a: !!python/name:os.system\n", "f.yaml:1: a: tag !!python/name:os.system is not allowed"),
        (b"a: !!timestamp 2020-01-01\n", "f.yaml:1: a: tag !!timestamp is not allowed"),
        (b"a: !!binary aGk=\n", "f.yaml:1: a: tag !!binary is not allowed"),
        (b"a: !!set {x}\n", "f.yaml:1: a: tag !!set is not allowed"),
        (b"a: !local x\n", "f.yaml:1: a: tag !local is not allowed"),
        (b"%TAG !! tag:other,2000:\n--- !!map {}\n", "tag tag:other,2000:map is not allowed"),
        (b"a: !!int x\n", 'f.yaml:1: a: expected a value of tag !!int, got "x"'),
        (b"a:\n  " + b"[" * 40 + b"]" * 40, "f.yaml:2: a[0][0]"),
        (b"[" * 1_000_000, "must not nest deeper than 32 levels"),
        (b"- " * 500_000, "must not nest deeper than 32 levels"),
        (b"{a: " * 200_000, "must not nest deeper than 32 levels"),
        (b"? " * 500_000, "expected a field name"),
        (b"[a, b]: 1\n", "f.yaml:1: expected a field name, got a list or mapping as a key"),
        (b"a: 1\n5: 1\n", "f.yaml:2: expected a field name, got 5"),
        (b"true: 1\n", "f.yaml:1: expected a field name, got true"),
        (b"a: 1\n" + b"# padding\n" * 200_000, "must not exceed 1048576 bytes (1 MiB)"),
        (b"[" + b"1, " * 300_000 + b"]", "must not hold more than 10000 values"),
        (b"".join(b"k%d: 1\n" % n for n in range(80_000)), "f.yaml:5000: k4999: the document must not hold"),
        (b"a: " + b"9" * 1_000_000, "f.yaml:1: a: expected a number of at most 100 characters, got 1000000"),
        (b"a: 0x" + b"f" * 1_000_000, "f.yaml:1: a: expected a number of at most 100 characters"),
        (b"a: 1\n---\nb: 1\n", "f.yaml:2: expected one document, got a second"),
        (b"", "f.yaml:1: the document is empty"),
        (b"# only a comment\n", "f.yaml:1: the document is empty"),
        (b"a: 1\nb: \xff\n", "f.yaml:2: expected UTF-8 text, got byte 0xff"),
        (b"a: 1\nb: \0\n", "f.yaml:2: invalid YAML"),
        (b"a: \x1b[31m\n", "f.yaml:1: invalid YAML"),
        (b"a: [1\nb: 2\n", "f.yaml:2: invalid YAML"),
        (b"a:\n\t- b\n", "f.yaml:2: invalid YAML"),
        (b'a: "\\ud800"\n', "f.yaml:1:"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else "",
)
@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
def test_bad_documents_get_one_clear_line_within_a_second(monkeypatch, content, message, loader):
    if not hasattr(yaml, loader):
        pytest.skip("PyYAML was built without libyaml")
    monkeypatch.setattr(yaml_source, "_LOADER", getattr(yaml, loader))
    start = time.perf_counter()
    with pytest.raises(ProfileError) as caught:
        parse_yaml(content, "f.yaml")
    # The pure-Python parser serves only where libyaml is missing; its slowest case is a number of 1 MB.
    assert time.perf_counter() - start < (1.0 if loader == "CSafeLoader" else 5.0)
    text = str(caught.value)
    assert message in text
    assert text.startswith("f.yaml:") and "\n" not in text and len(text) < 400 and text.isprintable()


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("no", "no"),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e+2", -150.0),
        ("12:30", "12:30"),
        ("12:30:00", "12:30:00"),
        ("2020-01-01", "2020-01-01"),
        ("017", "017"),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b1", "0b1"),
        ("1_000", "1_000"),
        ("+7", 7),
        ("-0", 0),
        ("", None),
        ("~", None),
        ("null", None),
        ("NULL", None),
        ("nUll", "nUll"),
        ('"5"', "5"),
        ("'true'", "true"),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("!!float 5", 5),
        ("!!null ''", None),
        ("!!seq []", []),
        ("!!map {}", {}),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(scalar, value):
    read = parse_yaml(f"a: {scalar}\n".encode(), "f.yaml").data["a"]
    assert read == value and type(read) is type(value)


def test_merge_keys_and_words_of_yaml_1_1_are_plain_keys():
    assert parse_yaml(b"<<: {a: 1}\non: 2\n", "f.yaml").data == {"<<": {"a": 1}, "on": 2}


def test_thirty_two_levels_are_read():
    assert parse_yaml(b"[" * 32 + b"]" * 32, "f.yaml").data


def test_lines_of_fields_survive_comments_and_lists():
    document = parse_yaml(b"# one\na:\n  # two\n  b:\n    - 1\n\n    - {c: 2,\n       d: 3}\n", "f.yaml")
    assert document.line_of(("a", "b")) == 4
    assert document.line_of(("a", "b", 1)) == 7
    assert document.line_of(("a", "b", 1, "d")) == 8
    assert document.line_of(("a", "missing", "x")) == 2


def test_byte_order_mark_and_windows_lines_are_read():
    assert parse_yaml("\ufeffa: 1\r\nb: é\r\n".encode(), "f.yaml").data == {"a": 1, "b": "é"}


@given(
    st.binary(max_size=200) | st.text(alphabet="[]{}:,-?&*!#|>'\"%@` \n\ta1.", max_size=80).map(str.encode)
)
def test_any_bytes_give_plain_data_or_a_profile_error(content):
    try:
        parse_yaml(content, "f.yaml")
    except ProfileError as failure:
        assert str(failure).startswith("f.yaml:") and "\n" not in str(failure)


def test_a_file_that_is_not_regular_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    start = time.perf_counter()
    for path in (tmp_path, tmp_path / "pipe.yaml", tmp_path / "none.yaml", "/dev/zero", "a\0b"):
        with pytest.raises(ProfileError, match=r"cannot read|regular file"):
            read_yaml(path)
    assert time.perf_counter() - start < 1.0


def test_an_endless_file_is_read_no_further_than_the_limit(tmp_path):
    path = tmp_path / "big.yaml"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    start = time.perf_counter()
    with pytest.raises(ProfileError, match=f"must not exceed {MAX_BYTES} bytes"):
        read_yaml(path)
    assert time.perf_counter() - start < 1.0
