"""Cache operations of transformers on layers whose K/V live in a store."""

import copy
import gc
import pickle

import pytest
import torch
from tiny import FULL, ROUTED, make, prompt
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import DynamicLayer

import hga_compile
from hga_compile.cache import HGACache, HGALayer
from hga_compile.hooks import install_hooks, remove_hooks
from hga_compile.kernels.states import STATES


@pytest.fixture
def pair():
    model = make("llama")
    return model, torch.compile(model, backend="hga", options=FULL)


def filled(compiled, ids):
    cache = DynamicCache(config=compiled.config)
    with torch.no_grad():
        compiled(ids, past_key_values=cache)
    return cache


@torch.no_grad()
def next_logits(model, cache, token):
    return model(token, past_key_values=cache).logits[:, -1]


def test_crop_then_go_on_equals_a_shorter_prompt(pair):
    model, compiled = pair
    ids = prompt(100)
    cache = filled(compiled, ids)
    cache.crop(-30)
    assert cache.get_seq_length() == 70 and cache.get_mask_sizes(5, 0) == (75, 0)
    expected = next_logits(model, filled_plain(model, ids[:, :70]), ids[:, 70:71])
    torch.testing.assert_close(next_logits(compiled, cache, ids[:, 70:71]), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def filled_plain(model, ids):
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    return cache


def test_reorder_repeat_and_select_act_on_sequences(pair):
    model, compiled = pair
    ids = prompt(80, batch=2)
    token = prompt(1, batch=4, seed=9)
    for change, order in (
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    ):
        cache = filled(compiled, ids)
        change(cache)
        want = next_logits(model, filled_plain(model, ids[order]), token[: len(order)])
        got = next_logits(compiled, cache, token[: len(order)])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_beam_search_equals_the_stock_model(pair):
    model, compiled = pair
    ids, settings = prompt(40), {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    assert torch.equal(compiled.generate(ids, **settings), model.generate(ids, **settings))


def test_prompt_lookup_crops_and_equals_the_stock_model(pair):
    model, compiled = pair
    ids = prompt(20).repeat(1, 3)
    settings = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 3, "do_sample": False}
    assert torch.equal(compiled.generate(ids, **settings), model.generate(ids, **settings))


def test_reset_forgets_everything(pair):
    model, compiled = pair
    cache = filled(compiled, prompt(60))
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = prompt(50, seed=5)
    with torch.no_grad():
        got = compiled(ids, past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids).logits, atol=1e-4, rtol=0)


def test_a_copy_shares_nothing_and_a_pickle_carries_the_rows(pair):
    model, compiled = pair
    ids = prompt(60)
    cache = filled(compiled, ids)
    other, thawed = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    next_logits(compiled, cache, prompt(1, seed=7))
    assert (cache.get_seq_length(), other.get_seq_length(), thawed.get_seq_length()) == (61, 60, 60)
    token = prompt(1, seed=8)
    want = next_logits(model, filled_plain(model, ids), token)
    for each in (other, thawed):
        torch.testing.assert_close(next_logits(compiled, each, token), want, atol=1e-4, rtol=0)


def test_a_dead_cache_gives_its_store_back(pair):
    _, compiled = pair
    gc.collect()
    before = STATES.count()
    cache = filled(compiled, prompt(60))
    assert STATES.count() == before + 2
    del cache
    torch._dynamo.reset()
    gc.collect()
    assert STATES.count() == before


def test_uncompiled_then_compiled_then_uncompiled(pair):
    model, compiled = pair
    ids = prompt(90)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(ids[:, :50], past_key_values=cache).logits
        assert cache.layers[0].handle is None
        second = compiled(ids[:, 50:70], past_key_values=cache).logits
        assert cache.layers[0].handle is not None
        third = model(ids[:, 70:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat([first, second, third], 1), model(ids).logits, atol=1e-4, rtol=0)


def test_an_hga_cache_is_dense_and_right_without_compiling():
    model, ids = make("gemma3"), prompt(90)
    cache = HGACache(model.config)
    with torch.no_grad():
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 60), (60, 61), (61, 90))]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-4, rtol=0)
    memory = hga_compile.cache_memory(cache)
    assert memory.host_kv > 0


def test_other_backends_see_the_stock_layer():
    model, ids = make("llama"), prompt(40)
    before = STATES.count()
    for backend in ("eager", "aot_eager"):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            torch.compile(model, backend=backend)(ids, past_key_values=cache)
        assert type(cache.layers[0]) is HGALayer and cache.layers[0].handle is None
        assert isinstance(cache.layers[0].keys, torch.Tensor)
    assert STATES.count() == before
    settings = {"max_new_tokens": 4, "do_sample": False}
    other = torch.compile(model, backend="eager")
    assert torch.equal(other.generate(ids, **settings), model.generate(ids, **settings))


def test_hooks_are_removable():
    model = make("llama")
    remove_hooks()
    try:
        assert type(DynamicCache(config=model.config).layers[0]) is DynamicLayer
    finally:
        install_hooks()
    install_hooks()
    assert type(DynamicCache(config=model.config).layers[0]) is HGALayer


def test_an_encoder_decoder_generates_the_same_tokens():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=96, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    compiled = torch.compile(model, backend="hga", options=ROUTED)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(compiled.generate(prompt(30), **settings), model.generate(prompt(30), **settings))


def test_gradients_are_right_and_the_reason_is_counted():
    model, ids = make("llama"), prompt(40)
    compiled = torch.compile(model, backend="hga", options={"inner": "aot_eager"})
    weight = model.model.layers[0].self_attn.k_proj.weight
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(ids, labels=ids).loss.backward()
        grads.append(weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)
    assert {site.reason for site in hga_compile.report().sites} == {"gradients are needed"}
