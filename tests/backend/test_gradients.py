"""Routed attention has no backward: where gradients are needed everything is dense, and they are right."""

import pytest
import torch
from tiny_models import Pair, make_model, run, tokens

import hga_compile
from hga_compile.passes.decision import Reason

pytestmark = pytest.mark.gradients


def gradients(model, parameters, ids):
    for parameter in parameters:
        parameter.grad = None
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in parameters]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_training_is_dense_with_the_right_gradients(recompile, name):
    pair, ids = Pair(make_model(name)), tokens(2, 20)
    parameters = list(pair.plain.parameters())
    expected_loss, expected = gradients(pair.plain, parameters, ids)
    loss, got = gradients(pair.compiled, parameters, ids)
    torch.testing.assert_close(loss, expected_loss)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    sites = hga_compile.report().sites
    assert len(sites) == 2 and {site.reason for site in sites} == {Reason.REQUIRES_GRAD}
    assert not any(site.routed for site in sites) and "no_grad" in sites[0].detail
    # The same compiled model routes where no gradient is needed.
    with torch.no_grad():
        run(pair.compiled, pair.cache(), [ids])
    assert any(site.routed for site in hga_compile.report().sites)


def test_a_frozen_model_is_routed_although_gradients_are_on(recompile):
    pair, ids = Pair(make_model("llama", num_hidden_layers=1).requires_grad_(False)), tokens(2, 20)
    torch.testing.assert_close(pair.compiled(ids).logits, pair.plain(ids).logits, atol=1e-5, rtol=0)
    assert all(site.routed for site in hga_compile.report().sites)


def test_a_cache_filled_without_gradients_goes_on_with_them(recompile):
    pair, ids = Pair(make_model("llama", num_hidden_layers=1)), tokens(2, 24)
    results = []
    for model in (pair.plain, pair.compiled):
        cache = pair.cache()
        with torch.no_grad():
            run(model, cache, [ids[:, :20]])
        pair.plain.zero_grad()
        logits = model(ids[:, 20:], past_key_values=cache).logits
        logits.square().sum().backward()
        assert cache.get_seq_length() == 24
        results.append((logits.detach(), [parameter.grad.clone() for parameter in pair.plain.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_a_sliding_layer_trains_with_a_cache_beyond_its_window(recompile):
    """Under hga masks cover the whole sequence, the stock layer's rows do not: they are filled up."""
    pair, ids = Pair(make_model("mistral", num_hidden_layers=1)), tokens(2, 24)
    results = []
    for model in (pair.plain, pair.compiled):
        cache = pair.cache()
        first = model(ids[:, :20], past_key_values=cache).logits
        second = model(ids[:, 20:], past_key_values=cache).logits
        pair.plain.zero_grad()
        (first.square().sum() + second.square().sum()).backward()
        results.append((second.detach(), [parameter.grad.clone() for parameter in pair.plain.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
