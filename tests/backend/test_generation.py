"""Ways to generate that reorder, crop or repeat the cache, and models with an encoder."""

import pytest
import torch
from tiny_models import FULL, TIGHT, Pair, left_padded, make_model, tokens
from transformers import EncoderDecoderCache

import hga_compile
from hga_compile.passes.decision import Reason


def same_tokens(pair, prompt, **settings):
    settings = {"do_sample": False, "attention_mask": torch.ones_like(prompt)} | settings
    return torch.equal(pair.compiled.generate(prompt, **settings), pair.plain.generate(prompt, **settings))


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_beam_search_equals_stock(pairs, name):
    assert same_tokens(
        pairs(name), tokens(2, 12), num_beams=3, max_new_tokens=8, attention_mask=left_padded(2, 12, 3)
    )
    assert hga_compile.report().layers


@pytest.mark.slow
def test_several_samples_of_one_prompt_equal_stock(pairs):
    results = []
    pair, prompt = pairs("llama"), tokens(1, 12)
    for model in (pair.plain, pair.compiled):
        torch.manual_seed(3)
        settings = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 6}
        results.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_prompt_lookup_crops_the_cache(pairs, name):
    prompt = torch.tensor([[5, 6, 7, 8, 9] * 5])
    assert same_tokens(pairs(name), prompt, prompt_lookup_num_tokens=5, max_new_tokens=16)


@pytest.mark.slow
def test_assisted_generation_crops_both_caches(pairs, recompile):
    pair, prompt = Pair(make_model("llama")), tokens(1, 12)
    assistant = make_model("llama", num_hidden_layers=1)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens = 4
    assistant.compile(backend="hga", options=FULL)
    assert same_tokens(pair, prompt, assistant_model=assistant, max_new_tokens=12)


def test_chunked_prefill_of_generate(pairs):
    assert same_tokens(pairs("llama"), tokens(2, 25), prefill_chunk_size=10, max_new_tokens=4)


def test_generation_goes_on_with_a_returned_cache(pairs):
    pair, prompt = pairs("gemma3"), tokens(1, 12)
    first = pair.compiled.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
    )
    longer = torch.cat([first.sequences, tokens(1, 3, seed=5)], 1)
    settings = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 4, "do_sample": False}
    expected = pair.plain.generate(longer, **settings)
    assert torch.equal(
        pair.compiled.generate(longer, past_key_values=first.past_key_values, **settings), expected
    )


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param("t5", TIGHT, marks=pytest.mark.slow), ("bart", FULL)]
)
def test_a_model_with_an_encoder_gives_the_same_tokens(recompile, name, options):
    """T5's relative positions are additive masks: dense. BART's own attention is routed."""
    pair = Pair(make_model(name), options)
    assert same_tokens(pair, tokens(2, 20), max_new_tokens=6, attention_mask=left_padded(2, 20, 5))
    sites = hga_compile.report().sites
    reasons = {site.reason for site in sites}
    assert Reason.NOT_CAUSAL in reasons  # the cross attention that fills its cache
    assert Reason.SINGLE_QUERY in reasons  # and the one that reads it
    routed = [site for site in sites if site.routed]
    if name == "t5":
        assert Reason.FLOAT_MASK in reasons and routed == []
    else:
        assert {site.layer for site in routed} == {0, 1}


def test_cross_attention_stays_dense_with_a_tight_budget(recompile):
    """Its only query is no decode step: most of the encoder's tokens would be dropped."""
    model = make_model("bart")
    compiled = torch.compile(model, backend="hga", options=TIGHT)
    source, start = tokens(2, 100), tokens(2, 1)
    expected = model(source, decoder_input_ids=start).logits
    encoded = model.get_encoder()(source)
    got = compiled(encoder_outputs=encoded, decoder_input_ids=start)
    torch.testing.assert_close(got.logits, expected, atol=1e-4, rtol=0)
    assert isinstance(got.past_key_values, EncoderDecoderCache)
    cross = got.past_key_values.cross_attention_cache
    assert [layer.get_seq_length() for layer in cross.layers] == [100, 100]
    assert got.past_key_values.get_seq_length() == 1
