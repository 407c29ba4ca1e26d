import importlib.util

import pytest

from hga_compile.evaluation import pictures
from hga_compile.evaluation.pictures import NoMatplotlib, draw_needles, draw_nll, need_matplotlib

VALUE = {"mean": 0.5, "error": 0.1, "low": 0.25, "high": 0.75}
ALONE = {"mean": 0.5, "error": None, "low": None, "high": None}


@pytest.mark.parametrize("value", [VALUE, ALONE])
def test_distances_are_drawn(tmp_path, value):
    buckets = [{"first": first, "end": first + 8, "delta_nll": value, "kl": value} for first in (0, 8)]
    summary = [
        {"row": row, "mode": mode, "length": length, "buckets": buckets}
        for row, mode in (("dense", "-"), ("window only", "all"), ("default", "decode"), ("default", "all"))
        for length in (32, 64)
    ]
    draw_nll(tmp_path / "a.png", summary, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_maps_are_drawn_with_cells_missing(tmp_path):
    summary = [
        {"task": task, "facts": 1, "length": length, "row": "dense", "mode": "-", "depth": depth, 
         "exact": VALUE, "nll": VALUE}
        for task, length, depth in (("single", 32, 0.0), ("single", 64, 1.0), ("variables", 64, None))
    ]  # fmt: skip
    draw_needles(tmp_path / "a.png", summary, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoMatplotlib, match=r"pip install 'hga-compile\[eval\]'.*--no-picture"):
        need_matplotlib()
    monkeypatch.undo()
    if importlib.util.find_spec("matplotlib"):
        need_matplotlib()
