"""The README's table of what fits."""

from pathlib import Path

import pytest


def test_the_table_has_a_row_a_model_and_says_what_does_not_fit(monkeypatch):
    import fits

    monkeypatch.setattr(fits, "MODELS", ("qwen3-30b",))
    monkeypatch.setattr(fits, "GPUS", ("rtx4090", "rtx5090"))
    lines = fits.render().splitlines()
    assert lines[0] == "| model | weights | made for | rtx4090: 24 + 48 GiB | rtx5090: 32 + 48 GiB |"
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:4] == ["qwen3-30b", "29.0 GiB", "256K", "- / **-**"]
    small, large = cells[4].replace("*", "").replace("K", "").split(" / ")
    assert 0 < int(small) < 64 <= int(large)


def test_a_document_without_marks_is_refused():
    import fits

    with pytest.raises(ValueError, match="<!-- fits -->"):
        fits.update("# no table\n")


def test_update_replaces_what_is_between_the_marks(monkeypatch):
    import fits

    monkeypatch.setattr(fits, "render", lambda: "TABLE\n")
    old = "a\n<!-- fits -->\nold\n<!-- /fits -->\nb\n"
    assert fits.update(old) == "a\n<!-- fits -->\nTABLE\n<!-- /fits -->\nb\n"


@pytest.mark.slow
def test_the_readmes_table_is_up_to_date():
    import fits

    assert fits.main(["--check", str(Path(__file__).parents[2] / "README.md")]) == 0
