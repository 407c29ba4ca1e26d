"""Models that accelerate spread over devices: its hooks move weights and inputs around the modules."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny_models import TIGHT, make_model, tokens
from transformers import AutoModelForCausalLM

import hga_compile

pytestmark = pytest.mark.usefixtures("recompile")


# Some versions of transformers hand a layer's graph a mask made outside of it, which cannot be proven.
OPTIONS = TIGHT | {"routing.prefill": "dense"}


def generated(model, options=OPTIONS, new=4):
    """Tokens, and which layers were decided about how in decode."""
    torch._dynamo.reset()
    hga_compile.reset_report(sites=True)
    compiled = torch.compile(model, backend="hga", options=options)
    out = compiled.generate(tokens(1, 40), max_new_tokens=new, do_sample=False)
    sites = (site for site in hga_compile.report().sites if site.phase == "decode")
    return out, {(site.layer, str(site.reason)) for site in sites}


def hooked(model):
    """As a split over devices leaves a model: a hook around each layer that brings its inputs there."""
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
    return model


@pytest.mark.slow
def test_layers_with_hooks_of_their_own_are_routed_by_their_own_settings():
    # The last of all layers: a graph of one layer must know its number and how many there are.
    options = OPTIONS | {"routing.dense_layers": [-1]}
    expected, decided = generated(make_model("llama"), options)
    assert decided == {(0, "routed"), (1, "configured dense")}
    got, hooked_decided = generated(hooked(make_model("llama")), options)
    assert torch.equal(got, expected) and hooked_decided == decided
    assert {use.layer for use in hga_compile.report().layers if use.phase == "decode"} == {0}


@pytest.mark.slow
def test_layers_whose_weights_lie_on_disk_are_routed(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.layers.1": "disk"} | dict.fromkeys(names, "cpu")
    split = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    assert split.model.layers[1].mlp.up_proj.weight.is_meta
    split.generation_config.eos_token_id = None
    expected, decided = generated(model)
    got, hooked_decided = generated(split.eval())
    assert torch.equal(got, expected)
    assert hooked_decided == decided == {(0, "routed"), (1, "routed")}


def test_layers_past_dynamos_limit_read_all_and_are_counted():
    with torch._dynamo.config.patch(recompile_limit=1):
        generated(hooked(make_model("llama")))
    assert any("not compiled" in reason for reason in hga_compile.report().fallbacks)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_layers_on_two_gpus_are_routed_as_on_one(tmp_path, inner):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    names = ("model.layers.1", "model.norm", "lm_head")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb"), 0)
    split = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places | dict.fromkeys(names, 1))
    split.generation_config.eos_token_id = None
    options = OPTIONS | {"inner": inner}
    results = []
    for part in (model.to("cuda:0"), split.eval()):
        torch._dynamo.reset()
        hga_compile.reset_report(sites=True)
        cache = hga_compile.HGACache(part.config, None)
        compiled = torch.compile(part, backend="hga", options=options)
        ids = tokens(1, 40).to("cuda:0")
        results.append(compiled.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False))
        decode = [site for site in hga_compile.report().sites if site.phase == "decode"]
        assert {(site.layer, str(site.reason)) for site in decode} == {(0, "routed"), (1, "routed")}
    assert torch.equal(*results)
    assert [layer.device.index for layer in cache.layers] == [0, 1]
