"""The hooks: in place once the backend is looked up, gone when removed, without effect on the rest."""

import pytest
import torch
from tiny_models import Pair, make_model, run, tokens
from torch._dynamo.eval_frame import OptimizedModule
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hga_compile
from hga_compile.cache import HGALayer, HGASlidingLayer
from hga_compile.hooks import install_hooks, remove_hooks


@pytest.fixture
def stock():
    """Without the hooks, which come back afterwards."""
    remove_hooks()
    yield
    install_hooks()


def generate_hook():
    return OptimizedModule.__dict__.get("generate")


def test_looking_the_backend_up_installs_them(stock):
    assert generate_hook() is None
    from torch._dynamo.backends.registry import lookup_backend

    # The module is loaded already: what its loading does is done again here.
    assert lookup_backend("hga").__name__ == "hga"
    install_hooks()
    mapping = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    assert (mapping["full_attention"], mapping["sliding_attention"]) == (HGALayer, HGASlidingLayer)
    assert generate_hook() is not None


def test_installing_twice_is_once():
    before = dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING), generate_hook()
    install_hooks()
    assert (dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING), generate_hook()) == before
    remove_hooks()
    try:
        mapping = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
        assert (mapping["full_attention"], mapping["sliding_attention"]) == (
            DynamicLayer,
            DynamicSlidingWindowLayer,
        )
        assert generate_hook() is None
        remove_hooks()
    finally:
        install_hooks()


def test_caches_made_before_go_on_after_removal(pairs):
    pair, ids = pairs("llama"), tokens(2, 21)
    cache = pair.cache()
    first = run(pair.compiled, cache, [ids[:, :20]])
    remove_hooks()
    try:
        second = run(pair.plain, cache, [ids[:, 20:]])
    finally:
        install_hooks()
    torch.testing.assert_close(torch.cat(first + second, 1), pair.plain(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_uncompiled_model_sees_stock_layers(name, open_states):
    model, ids = make_model(name), tokens(2, 30)
    before = open_states()
    results = []
    for hooked in (True, False):
        (install_hooks if hooked else remove_hooks)()
        cache = DynamicCache(config=model.config)
        outputs = run(model, cache, list(ids.split([20, 4, 1, 1, 4], 1)))
        kept = [(layer.keys, layer.values, layer.get_seq_length()) for layer in cache.layers]
        sizes = [layer.get_mask_sizes(3) for layer in cache.layers]
        flags = cache.is_compileable, cache.is_sliding, cache.get_max_length()
        results.append((outputs, kept, sizes, flags))
    install_hooks()
    (outputs, kept, sizes, flags), (stock_outputs, stock_kept, stock_sizes, stock_flags) = results
    assert all(torch.equal(one, other) for one, other in zip(outputs, stock_outputs, strict=True))
    for one, other in zip(kept, stock_kept, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]
    assert sizes == stock_sizes and flags == stock_flags
    assert open_states() == before and hga_compile.report().layers == ()


def graphs_of(model, chunks):
    """Ops of the graphs that another backend gets."""
    found = []

    def listing(graph, example_inputs):
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    run(torch.compile(model, backend=listing), DynamicCache(config=model.config), chunks)
    return found


@pytest.mark.slow
def test_other_backends_get_the_graphs_that_they_got_before(open_states):
    model, before = make_model("gemma3"), open_states()
    chunks = list(tokens(2, 8).split([6, 1, 1], 1))
    hooked = graphs_of(model, chunks)
    remove_hooks()
    try:
        stock = graphs_of(model, chunks)
    finally:
        install_hooks()
        torch._dynamo.reset()
    assert hooked == stock
    assert not any("hga" in name for graph in hooked for name in graph)
    assert open_states() == before


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_models_compiled_with_another_backend_have_stock_layers(recompile, backend, open_states):
    model, before = make_model("gemma3"), open_states()
    compiled = torch.compile(model, backend=backend)
    chunks = list(tokens(2, 13).split([12, 1], 1))
    cache, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    got, expected = run(compiled, cache, chunks), run(model, plain, chunks)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert all(layer.handle is None for layer in cache.layers)
    for one, other in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=0)
    assert open_states() == before and hga_compile.report().sites == ()


def test_generate_of_a_model_compiled_with_another_backend_works(recompile):
    model, prompt = make_model("llama"), tokens(2, 10)
    compiled = torch.compile(model, backend="eager")
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(compiled.generate(prompt, **settings), model.generate(prompt, **settings))
    assert hga_compile.report().sites == ()


def test_generate_of_a_compiled_module_without_one_is_an_attribute_error():
    for backend in ("hga", "eager"):
        compiled = torch.compile(torch.nn.Linear(2, 2), backend=backend)
        assert not hasattr(compiled, "generate")
        with pytest.raises(AttributeError, match="generate"):
            _ = compiled.generate


def test_a_model_whose_compilation_is_disabled_generates():
    model, prompt = make_model("llama"), tokens(1, 6)
    compiled = torch.compile(model, backend="hga", disable=True)
    assert compiled.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2).shape == (1, 8)
    assert hga_compile.report().sites == ()


def test_generate_leaves_the_model_as_it_was(pairs):
    pair, prompt = pairs("llama"), tokens(2, 20)
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 2, "do_sample": False}
    pair.compiled.generate(prompt, **settings)
    assert pair.plain._compiled_call_impl is None
    with pytest.raises(ValueError, match="max_new_tokens"):
        pair.compiled.generate(prompt, max_new_tokens=-1)
    assert pair.plain._compiled_call_impl is None
    hga_compile.reset_report()
    pair.plain.generate(prompt, **settings)
    assert hga_compile.report().layers == ()


def test_two_compiled_forms_of_one_model_live_side_by_side(recompile):
    model, ids = make_model("llama"), tokens(2, 12)
    routed, other = Pair(model).compiled, torch.compile(model, backend="eager")
    expected = model(ids).logits
    cache, stock = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for compiled, own, is_open in ((routed, cache, True), (other, stock, False)):
        torch.testing.assert_close(compiled(ids, past_key_values=own).logits, expected, atol=1e-5, rtol=0)
        assert all((layer.handle is not None) == is_open for layer in own.layers)


def test_export_of_a_model_has_nothing_of_ours(recompile, open_states):
    model, before = make_model("llama", num_hidden_layers=1), open_states()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=True).logits

    program = torch.export.export(Logits(), (tokens(1, 6),))
    assert not any("hga" in str(node.target) for node in program.graph.nodes)
    assert open_states() == before
