"""At full budget a compiled model computes what it computes uncompiled."""

import pytest
import torch
from tiny_models import TIGHT, Pair, largest_error, left_padded, make_model, run, tokens

import hga_compile
from hga_compile.cache import HGALayer, HGASlidingLayer

MODELS = [
    "llama",
    "gemma3",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "qwen3", "mistral")),
]
PREFILL, CHUNK, STEPS = 20, 7, 16


def conversation(batch: int = 2) -> list[torch.Tensor]:
    """Prefill, a second chunk over the cache, and single tokens that cross the sliding window."""
    whole = tokens(batch, PREFILL + CHUNK + STEPS)
    return list(whole.split([PREFILL, CHUNK] + [1] * STEPS, dim=1))


@pytest.mark.parametrize("name", MODELS)
def test_prefill_chunk_and_decode_of_a_padded_batch_equal_the_uncompiled_model(pairs, name):
    pair, mask = pairs(name), left_padded(2, PREFILL, 5)
    expected = run(pair.plain, pair.cache(), conversation(), mask)
    cache = pair.cache()
    got = run(pair.compiled, cache, conversation(), mask)
    assert largest_error(got, expected, mask) < 1e-4
    report = hga_compile.report()
    assert all(
        isinstance(layer, (HGALayer, HGASlidingLayer)) and layer.handle is not None for layer in cache.layers
    )
    if name != "mistral":  # all of whose layers slide
        assert report.totals("prefill").attended_fraction == report.totals("decode").attended_fraction == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_same_without_a_mask(pairs, name):
    pair = pairs(name)
    expected = run(pair.plain, pair.cache(), conversation())
    assert largest_error(run(pair.compiled, pair.cache(), conversation()), expected) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_gives_the_same_tokens(pairs, name):
    pair = pairs(name)
    prompt, mask = tokens(2, 20), left_padded(2, 20, 5)
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = pair.plain.generate(prompt, **settings)
    assert torch.equal(pair.compiled.generate(prompt, **settings), expected)
    uses = hga_compile.report().layers
    if name == "mistral":
        assert uses == ()
    else:
        assert {use.phase for use in uses} == {"prefill", "decode"}


def test_a_call_without_a_cache_equals_too(pairs):
    pair, ids, mask = pairs("llama"), tokens(2, 20), left_padded(2, 20, 5)
    expected = pair.plain(ids, attention_mask=mask, use_cache=False).logits
    got = pair.compiled(ids, attention_mask=mask, use_cache=False).logits
    assert largest_error([got], [expected], mask) < 1e-4


def test_a_tight_budget_holds_without_a_cache_too(recompile):
    compiled = Pair(make_model("llama"), TIGHT).compiled
    compiled(tokens(1, 300), use_cache=False)
    report = hga_compile.report()
    assert 0 < report.totals("prefill").attended_fraction < 0.3
    assert {site.detail for site in report.sites if site.routed}
    assert set(report.fallbacks) == {"C++ kernels do not cover K/V without a cache: plain torch"}


def test_a_call_that_makes_its_own_cache_returns_one_that_goes_on(pairs):
    pair, ids = pairs("llama"), tokens(2, 21)
    first = pair.compiled(ids[:, :20])
    second = pair.compiled(ids[:, 20:], past_key_values=first.past_key_values).logits
    expected = pair.plain(ids).logits
    assert largest_error([first.logits, second], [expected[:, :20], expected[:, 20:]]) < 1e-4
    assert first.past_key_values.get_seq_length() == 21


def test_a_tight_budget_attends_to_less(pairs, recompile):
    pair = Pair(make_model("llama"), TIGHT)
    run(pair.compiled, pair.cache(), list(tokens(2, 132).split([128, 1, 1, 1, 1], 1)))
    report = hga_compile.report()
    assert report.totals("decode").attended_fraction < 0.25
    # The first queries see little and attend to most of it.
    assert report.totals("prefill").attended_fraction < 0.45
    assert all(site.routed for site in report.sites)


def test_autocast_is_followed(recompile):
    pair = Pair(make_model("llama", num_hidden_layers=1))
    ids = tokens(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = pair.plain(ids).logits, pair.compiled(ids).logits
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected.float(), atol=0.02, rtol=0.05)


def test_inference_mode_is_followed(pairs):
    pair, prompt = pairs("llama"), tokens(2, 20)
    settings = {"attention_mask": left_padded(2, 20, 5), "max_new_tokens": 4, "do_sample": False}
    with torch.inference_mode():
        assert torch.equal(
            pair.compiled.generate(prompt, **settings), pair.plain.generate(prompt, **settings)
        )
