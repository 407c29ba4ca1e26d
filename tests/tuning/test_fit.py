"""What fits, and what would make a plan fit."""

import pytest

from hga_compile.configs.catalogue import gpu_card, model_card
from hga_compile.configs.loader import load_profile
from hga_compile.tuning.fit import longest_context, remedies, with_tier
from hga_compile.tuning.memory import plan_memory

DEFAULT = load_profile("default")


@pytest.mark.parametrize("tier", ["gpu", "host"])
def test_the_longest_context_fits_and_a_longer_one_does_not(tier):
    card, gpu, profile = model_card("qwen3-4b"), gpu_card("rtx3090"), with_tier(DEFAULT, tier)
    longest = longest_context(card, gpu, profile)
    assert longest > 0
    assert longest % 1024 == 0
    assert plan_memory(card, gpu, profile, longest).fits
    assert not plan_memory(card, gpu, profile, longest + 1024).fits


def test_nothing_fits_where_the_weights_do_not():
    assert longest_context(model_card("gemma3-27b"), gpu_card("rtx4090"), DEFAULT) == 0


def test_each_remedy_does_make_it_fit():
    card, gpu, profile = model_card("llama3.1-8b"), gpu_card("rtx4090"), with_tier(DEFAULT, "gpu")
    plan = plan_memory(card, gpu, profile, 131072)
    found = {
        remedy.change.split()[0]: remedy.change.split()[-1] for remedy in remedies(card, gpu, profile, plan)
    }
    assert found.keys() == {"--tier", "weights", "--ram-layers", "--context", "--gpu"}
    layers = int(found["--ram-layers"])
    assert plan_memory(card, gpu, profile, 131072, ram_layers=layers).fits
    assert not plan_memory(card, gpu, profile, 131072, ram_layers=layers - 1).fits
    assert plan_memory(card, gpu, with_tier(profile, found["--tier"]), 131072).fits
    assert plan_memory(card, gpu, profile, int(found["--context"])).fits
    assert plan_memory(card, gpu_card(found["--gpu"]), profile, 131072).fits


def test_a_plan_that_fits_needs_none():
    card, gpu = model_card("qwen3-0.6b"), gpu_card("rtx4090")
    assert remedies(card, gpu, DEFAULT, plan_memory(card, gpu, DEFAULT, 8192)) == []
