"""The memory model: byte for byte what the store allocates, and the recorded peaks on a GPU."""

import json
from pathlib import Path

import pytest
import torch

from hga_compile.configs.catalogue import gpu_card, model_card
from hga_compile.configs.loader import load_profile, resolve_profile
from hga_compile.configs.routing import Routing
from hga_compile.kernels.site import SiteConfig
from hga_compile.store import LayerStore
from hga_compile.tuning.memory import arrivals, index_bytes, page_bytes, plan_memory

ROWS, HEADS, DIM = 2, 2, 32
RECORDED = Path(__file__).parents[2] / "benchmarks/results/gpu_memory.json"


@pytest.mark.parametrize(("context", "step"), [(2000, 512), (3001, 300), (255, 100), (1100, 64)])
@pytest.mark.parametrize(
    "routing",
    [
        Routing(),
        Routing(bits=4, group_size=8),
        Routing(bits=1, centre_tokens=700),
        Routing(summary="mean", group_size=16, chunk_stage="on", chunk_parts=1),
        Routing(chunk_stage="on"),
        Routing(tail="estimate"),
        Routing(prefill="dense"),
    ],
    ids=["default", "wide", "late-centre", "paper", "chunks", "tail", "dense-prefill"],
)
def test_a_layers_index_and_pages_are_as_large_as_computed(routing, context, step):
    store, counts = LayerStore("host"), arrivals(context, step, decoded=5)
    torch.manual_seed(0)
    before = 0
    for count in counts:
        new = count - before
        key, value = torch.randn(2, 1, ROWS, new, DIM)
        query, before = torch.randn(1, ROWS * HEADS, new, DIM), count
        store.attend(query, key, value, count, None, DIM**-0.5, SiteConfig(0, "host", routing, "reference"))
    _, index, pages = store.nbytes()
    assert index == index_bytes(routing, counts, ROWS, HEADS, DIM)
    assert pages == page_bytes(counts, ROWS, 2 * DIM * 4, routing.group_size)


def test_passes_are_the_prompts_steps_and_then_single_tokens():
    assert arrivals(1000, 400, decoded=3) == (400, 800, 997, 998, 999, 1000)
    assert arrivals(2, 400) == (1, 2)


@pytest.mark.parametrize("point", [0, 1, 2])
def test_the_peak_on_a_gpu_is_what_was_recorded_or_a_little_more(point):
    result = json.loads(RECORDED.read_text())
    measured = [point for point in result["points"] if point["side"] == "hga"][point]
    card = model_card("llama3.1-8b")
    recorded = {"layers": result["model"]["num_hidden_layers"], "vocabulary": result["model"]["vocab_size"]}
    card = card.model_copy(update={"geometry": card.geometry.model_copy(update=recorded)})
    step = result["settings"]["piece"]
    plan = plan_memory(card, gpu_card("h200"), load_profile("default"), measured["context"], step=step)
    weights = next(part.bytes for part in plan.parts if part.name == "weights")
    assert 1.0 <= (plan.used("gpu") - weights) / measured["peak_bytes"] <= 1.07
    assert measured["host_kv_bytes"] <= plan.used("host") <= 1.26 * measured["host_kv_bytes"]


def plan(model="qwen3-30b", gpu="rtx5090", context=65536, **options):
    return plan_memory(model_card(model), gpu_card(gpu), resolve_profile(options, {}), context)


def test_qwen_at_64k_fits_a_card_of_32_gib_with_its_history_in_ram():
    found = plan()
    assert found.fits
    assert -found.lacks("gpu") >= 2**30
    assert found.used("host") == pytest.approx(65536 * 98304, rel=0.26)


def test_the_history_in_gpu_memory_does_not_fit_there():
    found = plan(tier="gpu")
    assert not found.fits
    assert found.binding == "gpu"
    assert found.room.keys() == {"gpu"}


def test_the_host_binds_when_its_budget_is_small():
    found = plan(**{"offload.host_budget": "1GiB"})
    assert not found.fits
    assert found.binding == "host"


def test_files_take_the_history_from_ram():
    found = plan(tier="nvme")
    assert found.used("nvme") > 6 * 2**30 > found.used("host")


def test_a_hot_cache_costs_its_share():
    more = plan(**{"offload.hot_cache": 0.1}).used("gpu") - plan().used("gpu")
    assert more == pytest.approx(0.1 * 65536 * 98304, rel=1e-6)


def test_dense_layers_keep_their_history_on_the_gpu():
    found = {part.name: part.bytes for part in plan(**{"routing.dense_layers": [0, -1]}).parts}
    assert found["K/V of dense layers"] == 2 * 65536 * 2048
    assert found["token K/V"] == pytest.approx(46 / 48 * plan().used("host"), rel=1e-6)


def test_overrides_of_layers_count():
    wider = {"routing.overrides": [{"layers": [0, 1], "bits": 4}]}
    sizes = [next(p.bytes for p in plan(**options).parts if p.name == "index") for options in ({}, wider)]
    assert sizes[1] / sizes[0] == pytest.approx(1 + 2 * 32 / (48 * 34), rel=0.01)


def test_a_sliding_layer_keeps_its_window():
    found = {part.name: part.bytes for part in plan("gemma3-27b", "h200", 131072).parts}
    assert found["sliding windows"] == 52 * (1023 + 1024) * 16 * 2 * 128 * 2
    assert found["token K/V"] < 1.26 * 131072 * 10 * 16 * 2 * 128 * 2


def test_a_cpu_has_one_memory_and_32_bit_keys():
    found = plan("smollm2-135m", "cpu", 8192)
    assert found.room.keys() == {"gpu"}
    kept = next(part.bytes for part in found.parts if part.name == "token K/V")
    assert kept == pytest.approx(8192 * 30 * 3 * 2 * 64 * 4, rel=0.26)
