"""The page about profiles names every field."""

from pathlib import Path

import pytest

from hga_compile.configs.errors import field_path
from hga_compile.configs.options import SHORTHANDS, fields
from hga_compile.configs.profile import LayerOverride

PAGE = (Path(__file__).parents[2] / "docs" / "profiles.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(field_path(path) for path in fields()))
def test_the_page_names_every_field(path):
    assert f"`{path}`" in PAGE


def test_the_page_names_every_override_and_variable():
    for name in LayerOverride.model_fields:
        assert f"`{name}`" in PAGE or f"`routing.{name}`" in PAGE
    for name in ("profile", *SHORTHANDS):
        assert f"`HGA_{name.upper()}`" in PAGE
