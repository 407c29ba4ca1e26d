"""The hardware model against everything recorded on the H200, and its behaviour where nothing is recorded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hga_compile.configs.budget import Budget
from hga_compile.configs.catalogue import gpu_card, model_card
from hga_compile.configs.loader import load_profile, resolve_profile
from hga_compile.configs.routing import Routing
from hga_compile.tuning.calibrate import calibrate, fit, left_out, read_settings
from hga_compile.tuning.hardware import (
    Step,
    calibration,
    decode_ms,
    hit_rate,
    predict,
    prefill_ms,
    read_share,
    step_terms,
    step_us,
)
from hga_compile.tuning.timing import measured_us

pytest.importorskip("scipy")
RESULTS = Path(__file__).parents[2] / "benchmarks/results"
H200 = gpu_card("h200")


def test_the_error_on_the_recorded_settings_is_at_most_20_percent():
    settings, gpu = read_settings(RESULTS)
    assert gpu.name == "h200"
    assert len(settings) >= 20
    errors = {}
    for kernel in ("step", "gather", "dense", "hot"):
        own = [setting for setting in settings if setting.kernel == kernel]
        errors[kernel] = [abs(error) for error in left_out(own)]
        assert sum(errors[kernel]) / len(errors[kernel]) <= 0.2, (kernel, errors[kernel])
    every = [error for group in errors.values() for error in group]
    print(f"{len(every)} settings, {sum(every) / len(every):.1%} on average, {max(every):.1%} at worst")
    assert sum(every) / len(every) <= 0.2


def test_the_shipped_calibration_is_that_of_the_recorded_settings():
    assert calibration() == calibrate(RESULTS)


def test_factors_are_found_again():
    settings, _ = read_settings(RESULTS)
    own = [setting for setting in settings if setting.kernel == "gather"]
    truth = {"launch": 5.0, "host": 1.5}
    made = [type(s)(s.kernel, s.name, s.terms, predict(s.terms, truth), s.source) for s in own]
    assert fit(made) == pytest.approx(truth, rel=1e-6)
    assert max(map(abs, left_out(made))) < 1e-6


def step(tokens=65536, tier="gpu", **routing):
    return Step(tokens, 4, 8, 128, Routing(**routing), tier)


@pytest.mark.parametrize("tier", ["gpu", "host"])
def test_time_grows_with_length_and_budget(tier):
    times = [step_us(step(tokens, tier), H200) for tokens in (16384, 65536, 262144)]
    assert times == sorted(times)
    wide = step(tier=tier, budget=Budget(fraction=0.3))
    assert step_us(wide, H200) > step_us(step(tier=tier), H200)


def test_a_slower_bus_costs_the_host_tier_only():
    slow = gpu_card("h200").model_copy(
        update={"host_bandwidth": H200.host_bandwidth.model_copy(update={"value": 31.5e9})}
    )
    assert step_us(step(), slow) == step_us(step(), H200)
    assert step_us(step(tier="host"), slow) > 1.5 * step_us(step(tier="host"), H200)


def test_no_step_beats_its_bytes():
    for name in ("rtx3090", "rtx4090", "h200"):
        gpu = gpu_card(name)
        for tokens in (16384, 262144, 1048576):
            for bits in (1, 2, 8):
                one = step(tokens, bits=bits)
                floor = (one.index_bytes + one.routed_bytes) / gpu.bandwidth.value * 1e6
                assert step_us(one, gpu) > floor


def test_groups_scored_by_means_read_less_than_low_bit_keys():
    mean, lowbit = (step_terms(step(**kind), H200) for kind in ({"summary": "mean", "group_size": 16}, {}))
    assert mean["unpack"] == lowbit["unpack"] / 16
    assert mean["memory"] < lowbit["memory"]


def test_a_token_takes_at_least_its_weights():
    card, gpu, profile = model_card("llama3.1-8b"), gpu_card("rtx4090"), load_profile("default")
    floor = card.active_bytes() / gpu.bandwidth.value * 1e3
    near, far = (decode_ms(card, gpu, profile, context) for context in (8192, 131072))
    assert floor < near < far


def test_dense_layers_and_the_tier_change_a_tokens_time():
    card, gpu = model_card("qwen3-30b"), gpu_card("rtx5090")

    def took(**options):
        return decode_ms(card, gpu, resolve_profile(options, {}), 131072)

    plain = took()
    assert took(**{"routing.dense_layers": [0, 1]}) != plain
    assert took(tier="gpu") < plain


def test_a_prefill_grows_faster_than_its_tokens_and_dense_ones_more():
    card = model_card("qwen3-30b")
    routed, dense = resolve_profile({}, {}), resolve_profile({"prefill": "dense"}, {})
    times = [prefill_ms(card, H200, routed, tokens) for tokens in (65536, 131072)]
    assert times[1] > 2 * times[0]
    assert prefill_ms(card, H200, dense, 131072) > times[1]


def test_what_was_never_recorded_is_not_predicted():
    with pytest.raises(ValueError, match="does not have the tier nvme"):
        decode_ms(model_card("qwen3-30b"), H200, resolve_profile({"tier": "nvme"}, {}), 65536)


@pytest.mark.parametrize("tokens", [16384, 65536, 262144])
def test_the_larger_the_hot_cache_the_nearer_a_step_is_to_one_in_gpu_memory(tokens):
    near, far = step_us(step(tokens), H200), step_us(step(tokens, "host"), H200)
    times = [step_us(replace(step(tokens, "host"), hot=share), H200) for share in (0.2, 0.1, 0.05, 0.03)]
    assert near < times[0] and times == sorted(times) and times[-1] < far
    # A cache for a third of what a step is routed to holds little of it.
    assert step_us(replace(step(tokens, "host"), hot=0.01), H200) > 0.8 * far


def test_hit_rates_are_the_recorded_ones_and_between_them():
    sizes, rates = zip(*calibration()["hits"], strict=True)
    assert list(rates) == sorted(rates) and rates[0] > 0 and rates[-1] < 1
    assert [hit_rate(size) for size in sizes] == pytest.approx(rates)
    assert hit_rate(0) == 0 and hit_rate(100) == rates[-1]
    assert rates[0] < hit_rate((sizes[0] * sizes[1]) ** 0.5) < rates[1]


def test_a_cpus_step_is_timed():
    routing = Routing(dense_below=64, centre_tokens=16)
    cpu = torch.device("cpu")
    few, many = (
        measured_us(Step(65536, 2, 2, 32, routing.model_copy(update={"budget": budget}), "gpu", 4), cpu)
        for budget in (Budget(tokens=64), Budget(fraction=1.0))
    )
    assert 0 < few < many


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tier", ["gpu", "host"])
def test_a_gpus_step_is_timed(tier):
    assert 1 < measured_us(step(16384, tier), torch.device("cuda", 0)) < 10_000


def test_the_bytes_read_are_those_of_routed_tokens_and_summaries():
    card, default = model_card("smollm2-135m"), load_profile("default")
    # 64 channels of K and of V; 2 bits a channel and a scale of 16 bits.
    assert read_share(card, default, 8192, item=4) == pytest.approx(256 / 8192 + (16 + 2) / (2 * 64 * 4))
    moving = resolve_profile({"profile": "default", "routing.centre": "block"})
    # A centre of 64 channels in 16 bits for 128 tokens.
    expected = 256 / 8192 + (16 + 2 + 1) / (2 * 64 * 4)
    assert read_share(card, moving, 8192, item=4) == pytest.approx(expected)
    half = resolve_profile({"profile": "default", "routing.dense_layers": list(range(15))})
    assert read_share(card, half, 8192) == pytest.approx((1 + read_share(card, default, 8192)) / 2)
