"""Caches whose K/V live in a store: every operation of transformers' caches, and the ways in and out."""

import copy
import pickle

import pytest
import torch
from tiny_models import WINDOW, largest_error, make_config, run, tokens

import hga_compile
from hga_compile.cache import HGACache, HGALayer, HGASlidingLayer, cache_memory
from hga_compile.configs.profile import Offload, Profile
from hga_compile.kernels.states import STATES

MODELS = ["llama", "gemma3"]
PROMPT, MORE = 20, 6


@pytest.fixture(params=MODELS)
def talk(request, pairs):
    """A compiled model, a filled cache, and what the uncompiled model says to six more tokens."""
    return Talk(pairs(request.param))


class Talk:
    def __init__(self, pair):
        self.pair = pair
        self.prompt, self.more = tokens(2, PROMPT), list(tokens(2, MORE, seed=2).split(1, 1))
        stock = pair.cache()
        run(pair.plain, stock, [self.prompt])
        self.stock = copy.deepcopy(stock)
        self.expected = run(pair.plain, stock, self.more)
        self.cache = pair.cache()
        run(pair.compiled, self.cache, [self.prompt])

    def error(self, cache, steps=range(MORE), model=None):
        """Largest error of the next tokens."""
        got = run(self.pair.compiled if model is None else model, cache, [self.more[step] for step in steps])
        return largest_error(got, [self.expected[step] for step in steps])


def test_length_and_mask_sizes(talk):
    cache = talk.cache
    assert cache.get_seq_length() == PROMPT
    assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT] * 2
    assert cache.get_mask_sizes(3, 1) == (PROMPT + 3, 0)
    assert talk.pair.cache().get_seq_length() == 0


def test_reset_starts_anew(talk, open_states):
    before = open_states()
    talk.cache.reset()
    assert talk.cache.get_seq_length() == 0
    assert open_states() == before - 2
    run(talk.pair.compiled, talk.cache, [talk.prompt])
    assert talk.error(talk.cache) < 1e-4


@pytest.mark.parametrize("removed", [1, 5])
def test_crop_takes_the_last_tokens_back(talk, removed):
    run(talk.pair.compiled, talk.cache, [tokens(2, 5, seed=3)])
    talk.cache.crop(-removed)
    assert talk.cache.get_seq_length() == PROMPT + 5 - removed
    if removed == 5:
        assert talk.error(talk.cache) < 1e-4


def test_crop_refuses_a_length_and_takes_nothing_for_zero(talk):
    with pytest.raises(ValueError, match="negative"):
        talk.cache.crop(PROMPT - 1)
    talk.cache.crop(0)
    assert talk.error(talk.cache) < 1e-4


def test_crop_of_everything_leaves_an_empty_cache(pairs):
    talk = Talk(pairs("llama"))
    talk.cache.crop(-100)
    assert talk.cache.get_seq_length() == 0
    run(talk.pair.compiled, talk.cache, [talk.prompt])
    assert talk.error(talk.cache) < 1e-4


def test_reorder_repeat_and_select_change_the_sequences(talk):
    cache = talk.cache
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 3, 0, 1]))
    order = torch.tensor([1, 1, 0, 0])
    got = run(talk.pair.compiled, cache, [talk.more[0][order]])
    assert largest_error(got, [talk.expected[0][order]]) < 1e-4
    cache.batch_select_indices(torch.tensor([0, 2]))
    got = run(talk.pair.compiled, cache, [talk.more[1].flip(0)])
    assert largest_error(got, [talk.expected[1].flip(0)]) < 1e-4
    cache.batch_select_indices(torch.tensor([False, True]))
    assert [layer.sizes[0] for layer in cache.layers] == [1, 1]


def test_a_deep_copy_is_independent(talk, open_states):
    before = open_states()
    other = copy.deepcopy(talk.cache)
    assert open_states() == before + 2
    run(talk.pair.compiled, talk.cache, [tokens(2, 5, seed=3)])
    assert other.get_seq_length() == PROMPT
    assert talk.error(other) < 1e-4
    del other
    assert open_states() == before


def test_a_pickled_cache_goes_on_compiled_and_not(talk, open_states):
    before = open_states()
    data = pickle.dumps(talk.cache)
    one, other = pickle.loads(data), pickle.loads(data)
    assert open_states() == before and one.get_seq_length() == PROMPT
    assert talk.error(one) < 1e-4
    assert talk.error(other, model=talk.pair.plain) < 1e-4
    # The original is as it was.
    assert talk.error(talk.cache) < 1e-4


def test_stores_go_with_their_cache(talk, open_states):
    before = open_states()
    talk.cache = None
    assert open_states() == before - 2


def test_keys_and_values_can_be_read_as_from_a_stock_cache(talk):
    for layer, stock in zip(talk.cache.layers, talk.stock.layers, strict=True):
        torch.testing.assert_close(layer.keys, stock.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.values, stock.values, atol=1e-5, rtol=0)


def test_what_the_uncompiled_model_filled_goes_on_compiled(talk):
    assert talk.error(talk.stock) < 1e-4
    assert all(layer.handle is not None for layer in talk.stock.layers)
    assert talk.stock.get_seq_length() == PROMPT + MORE


def test_what_the_compiled_model_filled_goes_on_uncompiled(talk):
    assert talk.error(talk.cache, model=talk.pair.plain) < 1e-4
    assert talk.cache.get_seq_length() == PROMPT + MORE


def test_a_cache_may_go_to_and_fro(talk):
    errors = [
        talk.error(talk.cache, [step], talk.pair.plain if step % 2 else talk.pair.compiled)
        for step in range(MORE)
    ]
    assert max(errors) < 1e-4


def test_a_filled_layer_given_to_another_backend_is_dense_and_right(pairs, recompile):
    talk = Talk(pairs("llama"))
    assert talk.error(talk.cache, [0, 1], torch.compile(talk.pair.plain, backend="eager")) < 1e-4


def test_memory_is_accounted_for(pairs):
    pair = pairs("gemma3")
    cache = pair.cache()
    assert cache_memory(cache).host_kv == 0
    run(pair.compiled, cache, [tokens(2, PROMPT)])
    row = 2 * 2 * 2 * 16 * 4
    memory = cache_memory(cache)
    assert memory.host_kv >= PROMPT * row  # the full layer
    assert 0 < memory.accelerator_kv <= (WINDOW - 1 + PROMPT) * row  # the window
    assert memory.nvme_kv == 0 and "host_kv=" in repr(memory)
    stock = pair.cache()
    run(pair.plain, stock, [tokens(2, PROMPT)])
    plain = cache_memory(stock)
    assert plain.host_kv == 0 and plain.accelerator_kv == (WINDOW - 1 + PROMPT) * row


@pytest.mark.parametrize("name", MODELS)
def test_an_explicit_cache_opens_its_stores_without_a_compiled_model(pairs, name):
    pair = pairs(name)
    talk = Talk(pair)
    cache = HGACache(pair.plain.config)
    assert [type(layer) for layer in cache.layers] == [
        HGASlidingLayer if sliding else HGALayer for sliding in cache.is_sliding
    ]
    run(pair.plain, cache, [talk.prompt])
    assert all(layer.handle is not None for layer in cache.layers)
    assert talk.error(cache, range(3), pair.plain) < 1e-4
    assert talk.error(cache, range(3, MORE), pair.compiled) < 1e-4


def test_an_explicit_cache_starts_where_its_profile_says(pairs):
    pair = pairs("llama")
    for tier, home in (("auto", "host"), ("host", "host"), ("gpu", "gpu")):
        cache = HGACache(pair.plain.config, profile=Profile(name="mine", offload=Offload(tier=tier)))
        run(pair.plain, cache, [tokens(1, 4)])
        assert {STATES.get(layer.handle).tier for layer in cache.layers} == {home}


def test_an_explicit_cache_reads_profiles_by_name_and_refuses_others():
    config = make_config("llama")
    assert HGACache(config, profile="paper").profile.name == "paper"
    with pytest.raises(ValueError, match=r"papr.*did you mean 'paper'"):
        HGACache(config, profile="papr")
    assert HGACache(config).is_compileable


def test_an_explicit_cache_without_hooks_has_our_layers_too():
    from hga_compile.hooks import install_hooks, remove_hooks

    remove_hooks()
    try:
        cache = HGACache(make_config("gemma3"))
    finally:
        install_hooks()
    assert [type(layer) for layer in cache.layers] == [HGASlidingLayer, HGALayer]
    assert all(layer.stored for layer in cache.layers)


def test_an_explicit_cache_goes_through_generate(pairs):
    pair, prompt = pairs("gemma3"), tokens(2, 12)
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False}
    expected = pair.plain.generate(prompt, **settings)
    cache = HGACache(pair.plain.config)
    assert torch.equal(pair.plain.generate(prompt, past_key_values=cache, **settings), expected)
    assert cache.get_seq_length() == 12 + 3


def test_the_handle_of_a_dead_cache_is_refused_with_a_remedy(pairs):
    talk = Talk(pairs("llama"))
    handle = talk.cache.layers[0].handle.clone()
    talk.cache.reset()
    STATES.count()
    with pytest.raises(RuntimeError, match="start with a new cache"):
        STATES.get(handle)


def test_a_layer_that_keeps_its_window_cannot_go_back_behind_it(pairs):
    talk = Talk(pairs("gemma3"))
    run(talk.pair.compiled, talk.cache, talk.more)
    with pytest.raises(RuntimeError, match="window of 8 cannot go back"):
        talk.cache.crop(-MORE - 1)


def test_gradients_take_the_stock_way(pairs):
    """Rows that need gradients cannot go through a store: the layer goes on as the stock one."""
    talk = Talk(pairs("llama"))
    with torch.enable_grad():
        got = talk.pair.plain(talk.more[0], past_key_values=talk.cache).logits
        got.sum().backward()
    assert all(layer.handle is None for layer in talk.cache.layers)
    torch.testing.assert_close(got.detach(), talk.expected[0], atol=1e-4, rtol=0)
    assert talk.cache.get_seq_length() == PROMPT + 1
    talk.pair.plain.zero_grad()


def test_routes_are_recorded_by_layer(pairs):
    talk = Talk(pairs("llama"))
    with hga_compile.record_routes(layers=[1]) as records:
        run(talk.pair.compiled, talk.cache, talk.more[:2])
    assert [record.layer for record in records] == [1, 1]
    assert [record.first_query for record in records] == [PROMPT, PROMPT + 1]
    assert records[0].groups.shape[:3] == (2, 2, 1) and bool(records[0].groups.all())
