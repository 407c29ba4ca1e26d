import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hga_compile.cli.app import app
from hga_compile.configs.loader import load_profile
from hga_compile.configs.profile import Profile

runner = CliRunner()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "good.yaml"
    file.write_text("name: mine\nrouting: {budget: {fraction: 0.05}}\n")
    return file


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    file = tmp_path / "bad.yaml"
    file.write_text("name: mine\nrouting:\n  bugdet: {fraction: 0.05}\n")
    return file


def test_validate_accepts_good_files(good: Path) -> None:
    done = runner.invoke(app, ["profile", "validate", str(good)])
    assert done.exit_code == 0
    assert done.stdout == f"{good}: ok (mine)\n"


def test_validate_names_file_line_and_field_of_every_bad_file(good: Path, bad: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, ["profile", "validate", str(bad), str(good), str(tmp_path / "missing.yaml")])
    assert done.exit_code == 2
    first, second = done.stderr.splitlines()
    assert f"{bad}:3" in first
    assert "did you mean 'budget'" in first
    assert "missing.yaml" in second
    assert "good.yaml: ok" in done.stdout


def test_validate_as_json(good: Path, bad: Path) -> None:
    done = runner.invoke(app, ["profile", "validate", "--json", str(good), str(bad)])
    assert done.exit_code == 2
    first, second = json.loads(done.stdout)
    assert first == {"file": str(good), "ok": True, "name": "mine", "error": None}
    assert not second["ok"]
    assert "bugdet" in second["error"]


@pytest.mark.parametrize("name", ["default", "paper"])
def test_show_prints_yaml_that_is_the_same_profile(name: str, tmp_path: Path) -> None:
    done = runner.invoke(app, ["profile", "show", name])
    assert done.exit_code == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(done.stdout)
    assert load_profile(copy) == load_profile(name)
    assert yaml.safe_load(done.stdout)["name"] == name


def test_show_as_json() -> None:
    done = runner.invoke(app, ["profile", "show", "paper", "--json"])
    assert Profile.model_validate_json(done.stdout) == load_profile("paper")


def test_schema_is_json_with_and_without_the_option() -> None:
    plain, asked = (runner.invoke(app, ["profile", "schema", *more]) for more in ([], ["--json"]))
    assert plain.stdout == asked.stdout
    assert json.loads(plain.stdout)["title"] == "hga-compile profile"
