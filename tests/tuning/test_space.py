"""From a trial's parameters to a profile."""

from functools import partial

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hga_compile.backend import _check_offload
from hga_compile.configs.budget import Budget
from hga_compile.configs.catalogue import gpu_card, model_card
from hga_compile.configs.loader import load_profile
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import LayerOverride, Routing
from hga_compile.tuning.defaults import HOT_SHARES, with_hot_cache
from hga_compile.tuning.fit import with_tier
from hga_compile.tuning.memory import plan_memory
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


def test_with_kv_in_host_ram_the_hot_cache_is_the_largest_that_fits():
    card, gpu = model_card("qwen3-30b"), gpu_card("rtx5090")
    space = Space(BASE, ("gpu", "host"), finish=partial(with_hot_cache, card, gpu, context=65536))
    near, far = (space.profile(start, "x") for start in space.starts()[:2])
    assert near.offload.tier == "gpu" and near.offload.hot_cache is None
    assert far.offload.tier == "host" and far.offload.hot_cache == HOT_SHARES[0]
    assert plan_memory(card, gpu, far, 65536).fits
    # A longer context has room for a smaller one, or none; a share that somebody chose stays.
    shares = [
        with_hot_cache(card, gpu, with_tier(BASE, "host"), context).offload.hot_cache or 0
        for context in (65536, 131072, 196608, 262144)
    ]
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0
    own = far.model_copy(update={"offload": far.offload.model_copy(update={"hot_cache": 0.07})})
    assert with_hot_cache(card, gpu, own, 65536) == own
    kept = Space(own, ("gpu", "host"))
    shares = [kept.profile(start, "x").offload.hot_cache for start in kept.starts()[:2]]
    assert shares == [None, 0.07]
    assert (
        "offload.hot_cache" in space.describe()
        and "offload.hot_cache" not in Space(BASE, ("gpu",)).describe()
    )


def test_a_shorter_text_gets_the_same_share():
    routing = Routing(
        budget=Budget(fraction=0.03, tokens=256),
        overrides=(LayerOverride(layers=(0,), budget=Budget(fraction=0.06, tokens=496)),),
    )
    short = at_length(routing, 4096)
    assert short.budget.tokens_for(4096) == 123
    assert short.overrides[0].budget.tokens_for(4096) == 246
    assert at_length(routing, 65536).budget == routing.budget
