"""The grid of settings that the hardware model is fitted to."""

import json

from hga_compile.configs.catalogue import gpu_card
from hga_compile.configs.routing import Routing
from hga_compile.tuning.calibrate import _grid


def test_the_grid_has_at_least_24_settings_with_names_of_their_own():
    import tuner_grid

    cases = tuner_grid.grid()
    assert len(cases) >= 24
    assert len({case["name"] for case in cases}) == len(cases)
    routings = [Routing.model_validate_json(json.dumps(case["routing"])) for case in cases]
    for values in (
        {case["tier"] for case in cases},
        {case["tokens"] for case in cases},
        {routing.group_size for routing in routings},
        {routing.bits for routing in routings},
        {routing.budget.fraction for routing in routings},
    ):
        assert len(values) >= 2


def test_what_it_records_is_what_the_calibration_reads():
    import tuner_grid

    cases = [{**case, "microseconds": 1.0} for case in tuner_grid.grid()]
    settings = _grid({"cases": cases}, gpu_card("h200"))
    assert [setting.name for setting in settings] == [case["name"] for case in cases]
    assert {setting.kernel for setting in settings} == {"step"}


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    import torch
    import tuner_grid

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuner_grid.main([]) == 1
    assert "CUDA device wanted" in capsys.readouterr().err
