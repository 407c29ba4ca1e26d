"""Whole models: equal to the uncompiled one at full budget, routed at less, never recompiled by growth."""

import pytest
import torch
from tiny import CONFIGS, FULL, ROUTED, make, prompt
from transformers import DynamicCache

import hga_compile
from hga_compile.cache import HGALayer, HGASlidingLayer


def steps(model, ids, mask=None, decode=16):
    """Prefill, a second prefill step, then single tokens; returns all logits."""
    cache, out, start = DynamicCache(config=model.config), [], 0
    cuts = [
        ids.shape[1] - decode - 24,
        ids.shape[1] - decode,
        *range(ids.shape[1] - decode + 1, ids.shape[1] + 1),
    ]
    for end in cuts:
        extra = {} if mask is None else {"attention_mask": mask[:, :end]}
        out.append(model(ids[:, start:end], past_key_values=cache, **extra).logits)
        start = end
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_full_budget_is_the_uncompiled_model(family):
    model, ids = make(family), prompt(120, batch=2)
    compiled = torch.compile(model, backend="hga", options=FULL)
    torch.testing.assert_close(steps(compiled, ids)[0], steps(model, ids)[0], atol=1e-4, rtol=0)
    sites = hga_compile.report().sites
    assert {site.reason.split(":")[0] for site in sites} <= {"routed", "sliding window"}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_full_budget_with_left_padding(family):
    model, ids = make(family), prompt(120, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    compiled = torch.compile(model, backend="hga", options=FULL)
    dense, routed = steps(model, ids, mask)[0], steps(compiled, ids, mask)[0]
    torch.testing.assert_close(routed[0, 37:], dense[0, 37:], atol=1e-4, rtol=0)
    torch.testing.assert_close(routed[1], dense[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_generate_is_identical_at_full_budget(family):
    model, ids = make(family), prompt(60)
    compiled = torch.compile(model, backend="hga", options=FULL)
    settings = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(compiled.generate(ids, **settings), model.generate(ids, **settings))
    phases = {site.phase for site in hga_compile.report().sites}
    assert phases == {"prefill", "decode"}


@torch.no_grad()
def test_without_a_cache_the_stateless_form_is_routed():
    model, ids = make("llama"), prompt(300)
    full = torch.compile(model, backend="hga", options=FULL)
    torch.testing.assert_close(
        full(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-4, rtol=0
    )
    less = torch.compile(model, backend="hga", options=ROUTED)
    torch._dynamo.reset()
    hga_compile.reset_report()
    less(ids, use_cache=False)
    assert 0 < hga_compile.report().totals("prefill").attended_fraction < 0.6


@torch.no_grad()
def test_a_small_budget_attends_to_less_in_both_phases():
    model, ids = make("llama"), prompt(400)
    compiled = torch.compile(model, backend="hga", options=ROUTED)
    steps(compiled, ids)
    report = hga_compile.report()
    assert report.totals("decode").attended_fraction < 0.15
    assert 0 < report.totals("decode").summary_bytes < report.totals("decode").dense_bytes
    assert not report.fallbacks


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@torch.no_grad()
def test_decode_never_recompiles_and_is_one_graph(family, masked):
    model, ids = make(family), prompt(90)
    compiled = torch.compile(model, backend="hga", options=ROUTED, fullgraph=True)
    cache = DynamicCache(config=model.config)
    # The window of the sliding layers (24) is crossed while recompiling is an error.
    mask = torch.ones_like(ids) if masked else None

    def step(start, end):
        extra = {} if mask is None else {"attention_mask": mask[:, :end]}
        return compiled(ids[:, start:end], past_key_values=cache, **extra).logits

    for start, end in ((0, 10), (10, 11), (11, 12), (12, 13)):
        step(start, end)
    with torch.compiler.set_stance("fail_on_recompile"):
        for end in range(14, 80):
            last = step(end - 1, end)
    expected = model(ids[:, :79], use_cache=False).logits[:, -1:]
    if family != "llama":  # these see no more than 64 tokens in the routed layer: dense_below
        torch.testing.assert_close(last, expected, atol=2.0, rtol=0)


@torch.no_grad()
def test_sliding_layers_keep_only_their_window():
    model, ids = make("mistral"), prompt(400)
    compiled = torch.compile(model, backend="hga", options=ROUTED)
    logits, cache = steps(compiled, ids)
    torch.testing.assert_close(logits, steps(model, ids)[0], atol=1e-4, rtol=0)
    row = 2 * (64 // 4) * 2 * 4  # KV heads, channels, K and V, bytes
    for layer in cache.layers:
        assert type(layer) is HGASlidingLayer and layer.get_seq_length() == 400
        assert layer.memory()[0] <= (24 + 16) * row and layer.memory()[2] == 0


@pytest.mark.inductor
@torch.no_grad()
def test_inductor_compiles_the_rest():
    model, ids = make("llama"), prompt(120)
    compiled = torch.compile(model, backend="hga", options={"budget": 1.0})
    logits, cache = steps(compiled, ids, decode=4)
    torch.testing.assert_close(logits, steps(model, ids, decode=4)[0], atol=1e-4, rtol=0)
    assert type(cache.layers[0]) is HGALayer and cache.layers[0].memory()[2] > 0
