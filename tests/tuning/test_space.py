"""From a trial's parameters to a profile."""

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hga_compile.backend import _check_offload
from hga_compile.configs.budget import Budget
from hga_compile.configs.loader import load_profile
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import LayerOverride, Routing
from hga_compile.tuning.space import Space, at_length

BASE = load_profile("default")
SENSITIVE = {layer: 10.0 ** -(layer % 5) for layer in range(30)}


def test_what_is_tried_first_is_the_default_and_the_papers_setting():
    space = Space(BASE, ("gpu", "host"), sensitivities=SENSITIVE, layers=30)
    starts = space.starts()
    assert [start["tier"] for start in starts[:2]] == ["gpu", "host"]
    assert space.profile(starts[0], "x").routing == BASE.routing
    paper = load_profile("paper").routing
    assert space.profile(starts[2], "x").routing == paper.model_copy(update={"bits": 2})


@pytest.mark.parametrize("sensitivities", [None, SENSITIVE])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_every_draw_is_a_valid_profile_that_this_version_runs(sensitivities, seed):
    space = Space(BASE, ("gpu", "host"), sensitivities=sensitivities, layers=30)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    params = space.suggest(study.ask())
    profile = space.profile(params, "x")
    assert profile.offload.tier == params["tier"]
    assert profile.routing.group_size == params["group_size"]
    _check_offload(profile)
    assert Profile.model_validate_json(profile.model_dump_json()) == profile


def test_means_have_no_centres_to_choose():
    space = Space(BASE, ("host",))
    params = {**space.starts()[0], "centre": "block"}
    assert space.profile(params, "x").routing.centre == "block"
    assert space.profile({**params, "summary": "mean"}, "x").routing.centre == "first"
    assert {"group_size": 1, "centre": "block"}.items() <= space.starts()[-1].items()


def test_sensitive_layers_get_more_and_the_mean_stays():
    space = Space(BASE, ("host",), sensitivities=SENSITIVE, layers=30)
    routing = space.profile({**space.starts()[0], "skew": 0.4}, "x").routing
    shares = [routing.for_layer(layer).budget.fraction for layer in range(30)]
    assert shares[0] > 2 * shares[4]
    assert sum(shares) / 30 == pytest.approx(0.03, rel=0.02)
    assert 1 <= len(routing.overrides) <= 6


def test_no_hot_cache_is_searched_for_as_no_time_of_one_is_known():
    space = Space(BASE, ("gpu", "host"))
    assert not any("hot_cache" in name for name in (*space.starts()[0], *space.describe()))


def test_a_shorter_text_gets_the_same_share():
    routing = Routing(
        budget=Budget(fraction=0.03, tokens=256),
        overrides=(LayerOverride(layers=(0,), budget=Budget(fraction=0.06, tokens=496)),),
    )
    short = at_length(routing, 4096)
    assert short.budget.tokens_for(4096) == 123
    assert short.overrides[0].budget.tokens_for(4096) == 246
    assert at_length(routing, 65536).budget == routing.budget
