"""Decoding is one graph, whatever the length, and never a graph break."""

import pytest
import torch
from tiny_models import WINDOW, Pair, largest_error, left_padded, make_model, run, tokens

import hga_compile
from hga_compile.cache import cache_memory

STEPS = 64


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", pytest.param("mistral", marks=pytest.mark.slow)])
def test_decoding_does_not_recompile(recompile, name, with_mask):
    pair = Pair(make_model(name), fullgraph=True)
    ids = tokens(2, 5 + 3 + STEPS)
    mask = torch.ones(2, 5, dtype=torch.int64) if with_mask else None
    chunks = list(ids.split([5] + [1] * (3 + STEPS), 1))
    cache = pair.cache()
    got = run(pair.compiled, cache, chunks[:3], mask)
    # The sliding layer is not full yet: the window is crossed below.
    assert cache.get_seq_length() < WINDOW
    with torch.compiler.set_stance("fail_on_recompile"):
        got += run(pair.compiled, cache, chunks[3:], mask)
        again = pair.cache()
    expected = run(pair.plain, pair.cache(), chunks, mask)
    assert largest_error(got, expected) < 1e-4
    # A second conversation needs no new graph either.
    run(pair.compiled, again, chunks[:2], mask)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(pair.compiled, again, chunks[2:8], mask)
        run(pair.compiled, pair.cache(), chunks[:8], mask)


def test_generation_does_not_recompile_after_the_first_call(pairs):
    pair = pairs("llama")
    settings = {"max_new_tokens": 6, "do_sample": False}
    for prompt in (tokens(2, 20), tokens(2, 23)):
        pair.compiled.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (20, 31):
            prompt = tokens(2, length)
            pair.compiled.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


@pytest.mark.parametrize("name", [pytest.param("gemma3", marks=pytest.mark.slow), "mistral"])
def test_sliding_layers_keep_only_their_window(pairs, name):
    pair = pairs(name)
    cache = pair.cache()
    sizes = []
    for chunk in tokens(2, 20 + 7 + 40).split([20, 7] + [1] * 40, 1):
        run(pair.compiled, cache, [chunk])
        sizes.append(cache.layers[0].memory()[0])
    row = 2 * 2 * (16 + 16) * 4  # batch, KV heads, K and V, float32
    assert sizes[-1] == sizes[-20]
    # The window is 8: seven tokens, and what may be run again.
    assert (WINDOW - 1) * row <= sizes[-1] <= (WINDOW - 1 + 16) * row
    assert sizes[0] <= (WINDOW - 1 + 20) * row
    stock = pair.cache()
    run(pair.plain, stock, [tokens(2, 20)])
    assert cache.layers[0].keys.shape == stock.layers[0].keys.shape
    assert cache_memory(cache).accelerator_kv >= sizes[-1]


@pytest.mark.slow
def test_other_batch_sizes_with_padding_stay_routed(recompile):
    """Once sizes have names of their own, the mask's batch and the padding table's are two names."""
    pair = Pair(make_model("llama", num_hidden_layers=1))
    for batch, length in ((2, 20), (2, 23), (3, 31), (4, 17)):
        mask = left_padded(batch, length, 5)
        chunks = list(tokens(batch, length + 8).split([length, 7, 1], 1))
        expected = run(pair.plain, pair.cache(), chunks, mask)
        assert largest_error(run(pair.compiled, pair.cache(), chunks, mask), expected, mask) < 1e-4
    assert {site.reason for site in hga_compile.report().sites} == {"routed"}
