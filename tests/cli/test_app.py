import json
import subprocess
import sys

import pytest

from hga_compile.cli import main

RUN = "import sys; from hga_compile.cli import main; sys.exit(main())"


def hga(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=120)


def test_version_goes_to_stdout() -> None:
    done = hga("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("hga ")
    assert done.stderr == ""


def test_version_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"hga_compile"}


def test_help_names_the_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("run", "explain", "profile", "demo", "Exit codes"):
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["run"], "Missing argument 'MODEL'"),
        (["run", "some/model"], "Missing option '--prompt-file'"),
        (["run", "some/model", "--bogus"], "No such option: --bogus"),
        (["run", "some/model", "--prompt-file", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["run", "some/model", "--prompt-file", "/does/not/exist"], "cannot be read"),
        (["run", "some/model", "--prompt-file", "-", "--dense", "--profile", "default"], "--dense"),
        (["explain", "/does/not/exist"], "no such file"),
        (["explain", "some/model", "--layers", "1"], "--random"),
        (["profile"], "Missing command"),
        (["profile", "show", "defult"], "did you mean 'default'"),
        (["demo", "--tokens", "5"], "--tokens"),
        (["demo", "--depth", "2"], "--depth"),
        (["demo", "--device", "tpu"], "--device"),
        (["demo", "--out", "routes.jpg"], ".png"),
        (["--json", "demo"], "--json"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], said: str) -> None:
    done = hga(*arguments, stdin="a prompt")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("hga: error: ")
    assert said in line


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage" in capsys.readouterr().out


def test_nothing_heavy_is_imported_before_a_command_needs_it() -> None:
    heavy = {"torch", "transformers", "pydantic", "matplotlib", "huggingface_hub"}
    code = f"import sys, hga_compile.cli.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -c '{RUN}' profile schema | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
