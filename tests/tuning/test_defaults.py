"""What is picked where nothing is said: tier, hot cache, prefill step, layers in host RAM."""

import pytest

from hga_compile.configs.catalogue import gpu_card, model_card
from hga_compile.configs.loader import load_profile, resolve_profile
from hga_compile.tuning.defaults import HOT_SHARES, STEPS, pick_defaults
from hga_compile.tuning.memory import plan_memory

DEFAULT = load_profile("default")
QWEN = model_card("qwen3-30b")


@pytest.mark.parametrize("context", [4096, 32768, 65536, 131072])
@pytest.mark.parametrize("gpu", ["rtx5090", "l40s", "h200"])
def test_what_is_picked_fits_and_the_next_better_does_not(gpu, context):
    card = gpu_card(gpu)
    found = pick_defaults(QWEN, card, DEFAULT, context)
    assert found.plan.fits and found.ram_layers == 0
    assert found.plan == plan_memory(QWEN, card, found.profile, context, step=found.step)
    offload = found.profile.offload

    def spare(tier, hot, step):
        place = offload.model_copy(update={"tier": tier, "hot_cache": hot})
        profile = DEFAULT.model_copy(update={"offload": place})
        plan = plan_memory(QWEN, card, profile, context, step=step)
        return -plan.lacks("gpu") - 0.02 * card.usable

    if offload.tier == "host":
        assert all(spare("gpu", None, step) < 1 for step in STEPS)
        better = [share for share in HOT_SHARES if share > (offload.hot_cache or 0)]
        assert all(spare("host", share, step) < 1 for share in better for step in STEPS[:3])
    larger = [step for step in STEPS if step > found.step]
    assert all(spare(offload.tier, offload.hot_cache, step) < 1 for step in larger)


def test_more_memory_holds_more_on_the_gpu():
    picked = [
        pick_defaults(QWEN, gpu_card(name), DEFAULT, 65536).profile.offload for name in ("rtx5090", "h200")
    ]
    assert [offload.tier for offload in picked] == ["host", "gpu"]
    assert [offload.hot_cache for offload in picked] == [0.1, None]


def test_what_the_profile_and_the_caller_say_stays():
    own = resolve_profile({"profile": "default", "offload.tier": "host", "offload.hot_cache": 0.02})
    found = pick_defaults(QWEN, gpu_card("h200"), own, 16384, step=512)
    assert found.profile.offload == own.offload and found.step == 512
    filed = resolve_profile({"profile": "default", "offload.tier": "nvme"})
    assert pick_defaults(QWEN, gpu_card("h200"), filed, 16384).profile.offload.tier == "nvme"
    warm = resolve_profile({"profile": "default", "offload.hot_cache": 0.05})
    assert pick_defaults(QWEN, gpu_card("h200"), warm, 16384).profile.offload.home == "host"


def test_where_weights_do_not_fit_as_few_layers_as_possible_are_in_ram():
    card = gpu_card("rtx4090")
    found = pick_defaults(QWEN, card, DEFAULT, 65536)
    assert found.plan.fits and found.ram_layers > 0 and found.plan.max_memory
    less = plan_memory(QWEN, card, found.profile, 65536, step=found.step, ram_layers=found.ram_layers - 1)
    assert less.lacks("gpu") > -0.02 * card.usable


def test_files_are_for_where_ram_is_short():
    small = gpu_card("rtx5090")
    ram = small.host_memory.model_copy(update={"value": 4 * 2**30})
    found = pick_defaults(QWEN, small.model_copy(update={"host_memory": ram}), DEFAULT, 65536)
    assert found.profile.offload.tier == "nvme" and found.plan.fits


def test_what_fits_nowhere_says_so_by_its_plan():
    small = gpu_card("rtx4090")
    ram = small.host_memory.model_copy(update={"value": 2**30})
    found = pick_defaults(
        model_card("gemma3-27b"), small.model_copy(update={"host_memory": ram}), DEFAULT, 131072
    )
    assert not found.plan.fits


def test_a_cpu_keeps_its_one_memory_and_small_steps():
    found = pick_defaults(model_card("smollm2-135m"), gpu_card("cpu"), DEFAULT, 8192)
    assert found.profile.offload == DEFAULT.offload and found.step == 1024


def test_where_memory_is_all_but_full_the_step_is_still_the_largest_that_fits():
    """The smallest one would be many times as slow."""
    card, host = gpu_card("rtx5090"), DEFAULT.offload.model_copy(update={"tier": "host"})
    bare = DEFAULT.model_copy(update={"offload": host})
    needed = plan_memory(QWEN, card, bare, 131072, step=1024)
    full = needed.used("gpu") + card.reserved.value + 0.01 * card.memory.value
    card = card.model_copy(update={"memory": card.memory.model_copy(update={"value": full})})
    found = pick_defaults(QWEN, card, bare, 131072)
    assert found.plan.fits and found.ram_layers == 0 and found.profile.offload.hot_cache is None
    assert found.step >= 1024
