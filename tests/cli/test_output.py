import json

import pytest

from hga_compile.cli import output


def test_json_has_null_for_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": ("ä", None, True)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": ["ä", None, True]}


def test_progress_is_silent_when_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("prefill", 10) as advance, output.status("loading"):
        advance(10)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_progress_shows_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with output.progress("prefill", 10) as advance:
        advance(4)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/10" in captured.err


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (99.6 * 2**20, "99.6 MiB"),
        (300 * 2**30, "300 GiB"),
        (None, "-"),
    ],
)
def test_sizes_are_in_binary_units(count: float | None, text: str) -> None:
    assert output.size(count) == text


def test_percent_and_rate_have_three_digits() -> None:
    assert output.percent(0.031234) == "3.12%"
    assert output.percent(None) == output.percent(float("nan")) == "-"
    assert output.rate(123.456) == "123 tokens/s"
    assert output.rate(None) == "-"


def test_a_table_is_not_cut_to_80_columns_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    output.console().print("x" * 150)
    assert capsys.readouterr().out == "x" * 150 + "\n"
