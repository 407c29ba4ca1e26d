"""The memory model: byte for byte what the store allocates, and the recorded peaks on a GPU."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hga_compile.configs.catalogue import gpu_card, model_card
from hga_compile.configs.loader import load_profile, resolve_profile
from hga_compile.configs.profile import Offload
from hga_compile.configs.routing import Routing
from hga_compile.kernels.hot import HotCache
from hga_compile.kernels.site import SiteConfig
from hga_compile.store import LayerStore
from hga_compile.store.nvme import NvmePages
from hga_compile.store.pages import Pages
from hga_compile.tuning.memory import layer_bytes, plan_memory
from hga_compile.tuning.sizes import arrivals, file_sizes, hot_bytes, index_bytes, page_bytes

ROWS, HEADS, DIM = 2, 2, 32
CPU = torch.device("cpu")
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
        Routing(centre="block"),
        Routing(centre="block", group_size=1, prefill="dense"),
    ],
    ids=["default", "wide", "late-centre", "paper", "chunks", "tail", "dense-prefill", "blocks", "tokens"],
)
@pytest.mark.parametrize("reserved", [0, 500, 5000])
def test_a_layers_index_and_pages_are_as_large_as_computed(routing, context, step, reserved):
    place, counts = Offload(reserve_tokens=reserved or None), arrivals(context, step, decoded=5)
    store = LayerStore("host", place)
    torch.manual_seed(0)
    before = 0
    for count in counts:
        new = count - before
        key, value = torch.randn(2, 1, ROWS, new, DIM)
        query, before = torch.randn(1, ROWS * HEADS, new, DIM), count
        site = SiteConfig(0, "host", routing, "reference", place)
        store.attend(query, key, value, count, None, DIM**-0.5, site)
    held = store.nbytes()
    assert held.summaries == index_bytes(routing, counts, ROWS, HEADS, DIM, reserved)
    assert held.host == page_bytes(counts, ROWS, 2 * DIM * 4, routing.group_size, reserved)


@pytest.mark.parametrize("reserved", [300, 5000])
def test_pages_that_are_reserved_count(reserved):
    place, counts = Offload(reserve_tokens=reserved), arrivals(900, 200, decoded=5)
    pages = Pages(ROWS, DIM, DIM, 4, torch.float32, CPU, CPU, place=place)
    before = 0
    for count in counts:
        pages.write(*torch.zeros(2, ROWS, count - before, DIM), before)
        before = count
    assert pages.held().host == page_bytes(counts, ROWS, 2 * DIM * 4, 4, reserved)


@pytest.mark.parametrize("share", [0.03, 0.2, 1.0])
@pytest.mark.parametrize(
    ("routing", "context", "step"),
    [(Routing(), 3001, 300), (Routing(group_size=16), 20000, 4096), (Routing(), 800, 300)],
    ids=["short", "long", "never-routed"],
)
def test_a_layers_hot_cache_is_as_large_as_computed(share, routing, context, step, monkeypatch):
    # Looking groups up needs a GPU; room for them is made without.
    found = SimpleNamespace(place_groups=lambda *given: given[0])
    monkeypatch.setitem(sys.modules, "hga_compile.kernels.triton_hot", found)
    counts, size = arrivals(context, step, decoded=200), routing.group_size
    hot, before = None, 0
    for count in counts:
        routed = count > routing.dense_below and routing.budget.tokens_for(count) < count
        if count - before == 1 and routed:
            hot = hot or HotCache(ROWS, size * 2 * DIM, share, torch.float16, CPU)
            hot.place(torch.zeros(ROWS, 1, dtype=torch.int32), torch.zeros(1, 1), count, size, ROWS)
        before = count
    computed = hot_bytes(share, routing, counts, ROWS, 2 * DIM * 2)
    assert computed == (0 if hot is None else hot.nbytes())
    assert (computed > 0) is (context > 1024)


@pytest.mark.parametrize("reserved", [None, 3000])
@pytest.mark.parametrize(("group_size", "page"), [(4, 2**15), (16, 2**15), (128, 2**16)])
def test_a_layers_file_and_last_block_are_as_large_as_computed(group_size, page, reserved, tmp_path):
    place = Offload(
        tier="nvme", nvme_folder=str(tmp_path), nvme_page=page, nvme_cache=2 * page, reserve_tokens=reserved
    )
    counts, before = arrivals(2500, 600, decoded=70), 0
    pages = NvmePages(ROWS, DIM, DIM, group_size, torch.float32, CPU, place=place)
    for count in counts:
        pages.write(*torch.zeros(2, ROWS, count - before, DIM), before)
        before = count
    filed, held = file_sizes(counts, ROWS, 2 * DIM * 4, group_size, place), pages.held()
    pages.close()
    assert held.nvme == filed.file > 0
    # What is left is in the cache of pages.
    assert 0 <= held.host - filed.tail <= 2 * filed.page


@pytest.mark.parametrize("ram_layers", [1, 3, 6])
def test_accelerate_places_the_weights_as_planned(ram_layers):
    from accelerate import infer_auto_device_map
    from transformers import AutoModelForCausalLM, LlamaConfig

    from hga_compile.tuning.target import card_of_config

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, vocab_size=1000,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    card = card_of_config(config.to_dict(), "m", "a config")
    plan = plan_memory(card, gpu_card("rtx4090"), load_profile("default"), 4096, ram_layers=ram_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    places = infer_auto_device_map(model, plan.max_memory, model._no_split_modules)
    layers = [place for name, place in places.items() if ".layers." in name]
    assert set(places.values()) == {0, "cpu"}
    # The output layer comes last: it goes where the last layers go.
    assert ram_layers - 2 <= layers.count("cpu") <= ram_layers


def test_weights_in_ram_take_ram_and_leave_the_gpu():
    card, gpu, profile = model_card("qwen3-30b"), gpu_card("rtx4090"), load_profile("default")
    plain, split = (plan_memory(card, gpu, profile, 65536, ram_layers=layers) for layers in (0, 13))
    layer = layer_bytes(card)
    assert plain.max_memory is None
    assert plain.used("gpu") - split.used("gpu") == 12 * layer
    assert split.used("host") - plain.used("host") == 13 * layer
    whole = card.geometry.layers * layer
    assert abs(card.weight_bytes() - whole - card.geometry.embedding_parameters * 2) < card.geometry.layers
    assert layer_bytes(card, 2 * card.weight_bytes()) == pytest.approx(2 * layer, abs=1)


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


def test_the_cache_of_pages_takes_what_it_may_and_never_what_is_not_left():
    def cache(**options):
        found = plan(tier="nvme", **options)
        return next(part.bytes for part in found.parts if part.name == "cache of pages"), found

    assert cache()[0] == 2**30
    assert cache(**{"offload.nvme_cache": "2GiB"})[0] == 2**31
    small, found = cache(**{"offload.host_budget": "512MiB"})
    assert 0 < small < 2**29
    assert found.lacks("host") == 0
    # No more of it than there are pages on the files.
    assert cache(**{"offload.nvme_cache": "40GiB"})[0] == plan(tier="nvme").used("nvme")


def test_a_hot_cache_costs_its_share_of_the_groups_and_its_tables():
    more = plan(**{"offload.hot_cache": 0.1}).used("gpu") - plan().used("gpu")
    # It grew once more while tokens were decoded: a quarter of slack.
    assert 1.25 < more / (0.1 * 65536 * 98304) < 1.28


def test_only_the_host_tier_has_a_hot_cache():
    assert "hot cache" in {part.name for part in plan(**{"offload.hot_cache": 0.1}).parts}
    for tier in ("gpu", "nvme"):
        assert "hot cache" not in {part.name for part in plan(tier=tier, **{"offload.hot_cache": 0.1}).parts}


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
