"""Models that are not plain float32 modules: other dtypes, weights that live elsewhere, quantised weights."""

import copy
import json

import accelerate
import pytest
import torch
import transformers
from families import FAMILIES, OPTIONS, build, converse
from safetensors.torch import load_file, save_file
from tiny_models import left_padded, tokens
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import hga_compile
from hga_compile.passes.decision import Reason

WHOLE, PADDED = tokens(2, 20), left_padded(2, 12, 3)
PARTS = [12, 1]
CPU = torch.device("cpu")

# Compiled code of other tests would hide what is compiled here.
pytestmark = pytest.mark.usefixtures("recompile")


def compiled(model, **options):
    return torch.compile(model, backend="hga", options=OPTIONS | options)


def differences(model, reference, parts, device=CPU):
    """Differences of two models' logits at every real token, in float32."""
    whole, padded = WHOLE.to(device), PADDED.to(device)
    got, expected = (torch.cat(converse(one, whole, parts, padded), 1).float() for one in (model, reference))
    real = torch.nn.functional.pad(padded, (0, got.shape[1] - padded.shape[1]), value=1).bool()
    return (got - expected)[real].abs()


def largest(model, reference, parts=PARTS):
    return float(differences(model, reference, parts).max())


def typical(model, reference, device=CPU):
    """Root mean square: the largest difference of rounded values is a matter of luck."""
    return float(differences(model, reference, PARTS, device).square().mean().sqrt())


def reasons():
    return {site.reason for site in hga_compile.report().sites}


def on_disk(model, folder):
    """The model again, the weights of its last layer in files."""
    model.save_pretrained(folder / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offload", dtype=torch.float32
    ).eval()


def spread(model, folder, share, gpu=None):
    """The model again, spread by accelerate: RAM has a share of its weights, a GPU `gpu` bytes of them."""
    model.save_pretrained(folder / "model")
    room = {"cpu": int(share * sum(part.nbytes for part in model.parameters()))}
    room |= {} if gpu is None else {0: gpu}
    placed = {"device_map": "auto", "max_memory": room, "offload_folder": folder / "offload"}
    return AutoModelForCausalLM.from_pretrained(folder / "model", **placed, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("name", "config"),
    # Of gpt-oss all experts: which are best may depend on the last bit.
    [("Llama", {}), ("Gemma 2", {}), ("gpt-oss", {"num_experts_per_tok": 4})],
)
def test_in_bfloat16_errors_are_no_larger_than_the_uncompiled_models(name, config):
    plain = build(FAMILIES[name], **config).bfloat16()
    exact = copy.deepcopy(plain).float()
    assert typical(compiled(plain), exact) < 1.1 * typical(plain, exact)
    assert reasons() - {Reason.SLIDING_WINDOW} == {Reason.ROUTED}


def test_a_float32_norm_and_head_on_a_bfloat16_body_are_followed():
    plain = build(FAMILIES["Llama"]).bfloat16()
    plain.model.norm.float()
    plain.lm_head.float()
    exact = copy.deepcopy(plain).float()
    assert converse(compiled(plain), WHOLE, [12], PADDED)[0].dtype == torch.float32
    assert typical(compiled(plain), exact) < 1.1 * typical(plain, exact)
    assert reasons() == {Reason.ROUTED}


def test_a_head_in_another_dtype_behind_a_hook_is_followed():
    plain = build(FAMILIES["Llama"]).bfloat16()
    plain.lm_head.double()
    plain.lm_head.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    exact = build(FAMILIES["Llama"]).bfloat16().float()
    assert converse(compiled(plain), WHOLE, [12], PADDED)[0].dtype == torch.float64
    assert typical(compiled(plain), exact) < 1.1 * typical(plain, exact)
    assert reasons() == {Reason.ROUTED}


def test_a_device_map_with_one_device_leaves_everything_routed(tmp_path):
    plain = build(FAMILIES["Llama"])
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32).eval()
    assert largest(compiled(loaded), plain) < 1e-4
    assert reasons() == {Reason.ROUTED}


@pytest.mark.slow
def test_weights_offloaded_to_the_cpu_give_the_same_logits():
    plain = build(FAMILIES["Gemma 3"])
    offloaded = accelerate.cpu_offload(copy.deepcopy(plain), execution_device=CPU)
    assert largest(compiled(offloaded), plain) < 1e-4
    sites = hga_compile.report().sites
    # Hooks cut the model into many graphs; the attention of both layers is in some of them.
    assert len({site.graph for site in sites if site.phase == "prefill"}) >= 2
    assert len({site.graph for site in sites if site.phase == "decode"}) >= 2


@pytest.mark.slow
def test_sliding_layers_of_an_offloaded_model_stay_exact_at_a_budget_below_their_window():
    plain = build(FAMILIES["Mistral"], sliding_window=16)
    offloaded = accelerate.cpu_offload(copy.deepcopy(plain), execution_device=CPU)
    tight = {
        "routing.budget": {"fraction": None, "tokens": 8},
        "routing.window": {"fraction": None, "tokens": 4},
    }
    model = compiled(offloaded, **tight, **{"routing.centre_tokens": 4})
    assert largest(model, plain, [19, 1]) < 1e-4


@pytest.mark.slow
def test_weights_on_disk_give_the_same_logits(tmp_path):
    plain = build(FAMILIES["Llama"])
    offloaded = on_disk(plain, tmp_path)
    assert offloaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert largest(compiled(offloaded), plain) < 1e-4
    assert Reason.ROUTED in reasons()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE"])
def test_layers_that_max_memory_sends_elsewhere_give_the_same_tokens(name, tmp_path):
    plain = build(FAMILIES[name])
    model = spread(plain, tmp_path, 0.7)
    assert {"cpu", "disk"} == set(model.hf_device_map.values())
    settings = {"attention_mask": PADDED, "max_new_tokens": 6, "do_sample": False}
    got = compiled(model).generate(WHOLE[:, :12], **settings)
    assert torch.equal(got, plain.generate(WHOLE[:, :12], **settings))
    assert Reason.ROUTED in reasons()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_in_ram_and_kv_in_ram_give_the_same_tokens_on_a_gpu(tmp_path):
    plain = build(FAMILIES["Llama"], num_hidden_layers=4)
    size = sum(part.nbytes for part in plain.parameters())
    model = spread(plain, tmp_path, 2.0, gpu=int(0.9 * size))
    assert {0, "cpu"} <= set(model.hf_device_map.values())
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = plain.cuda().generate(WHOLE[:, :12].cuda(), **settings)
    got = compiled(model, tier="host").generate(WHOLE[:, :12].cuda(), **settings)
    assert torch.equal(got, expected)
    assert Reason.ROUTED in reasons()


@pytest.mark.slow
def test_what_torch_compile_leaves_uncompiled_gives_the_same_logits_and_tokens():
    """All modules with hooks share one code object, of which torch compiles eight forms."""
    plain = build(FAMILIES["Gemma 3"])
    offloaded = accelerate.cpu_offload(copy.deepcopy(plain), execution_device=CPU)
    settings = {"attention_mask": PADDED, "max_new_tokens": 12, "do_sample": False}
    prompt = WHOLE[:, :12]
    with torch._dynamo.config.patch(recompile_limit=8):
        model = compiled(offloaded)
        assert largest(model, plain, [12, 5, 1, 1, 1]) < 1e-4
        assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))


def test_what_torch_compile_leaves_uncompiled_is_counted():
    offloaded = accelerate.cpu_offload(build(FAMILIES["Llama"]), execution_device=CPU)
    with torch._dynamo.config.patch(recompile_limit=8):
        converse(compiled(offloaded), WHOLE, [12, 5, 1, 1, 1], PADDED)
    report = hga_compile.report()
    assert report.fallbacks or {site.phase for site in report.sites} == {"prefill", "decode"}


def test_settings_of_one_layer_hold_for_that_layer_of_an_offloaded_model():
    offloaded = accelerate.cpu_offload(build(FAMILIES["Llama"]), execution_device=CPU)
    compiled(offloaded, **{"routing.dense_layers": [1]})(WHOLE[:, :12])
    decisions = [(site.layer, site.reason) for site in hga_compile.report().sites]
    if decisions[0][1] == Reason.UNPROVEN_MASK:
        pytest.skip(f"transformers {transformers.__version__} makes the mask outside of these layers' graphs")
    assert decisions == [(0, Reason.ROUTED), (1, Reason.CONFIGURED)]


def quantised(name, **settings):
    """Make a model whose weights are tensors of torchao."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = build(FAMILIES["Llama"])
    try:
        quantization.quantize_(model, getattr(quantization, name)(**settings))
    except (ImportError, NotImplementedError) as error:
        # Its int4 that is packed two to a byte needs a GPU or one more package.
        pytest.skip(f"torchao cannot quantise here: {error}")
    assert is_traceable_wrapper_subclass(model.model.layers[0].mlp.up_proj.weight)
    return model


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Int8WeightOnlyConfig", {}),
        ("Int4WeightOnlyConfig", {"group_size": 32}),
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4}),
        ("Float8WeightOnlyConfig", {}),
    ],
)
def test_attention_between_quantised_weights_is_routed_with_the_same_logits(name, settings):
    model = quantised(name, **settings)
    assert largest(compiled(model), model, [12, 5, 1, 1]) < 1e-4
    assert reasons() == {Reason.ROUTED}


def test_a_quantised_model_generates_the_same_tokens():
    model = quantised("Int8WeightOnlyConfig")
    settings = {"attention_mask": PADDED, "max_new_tokens": 12, "do_sample": False}
    got = compiled(model).generate(WHOLE[:, :12], **settings)
    assert torch.equal(got, model.generate(WHOLE[:, :12], **settings))
    decode = {site.routed for site in hga_compile.report().sites if site.phase == "decode"}
    assert decode == {True}


@pytest.mark.inductor
def test_a_quantised_model_through_inductor_gives_the_same_logits():
    model = quantised("Int8WeightOnlyConfig")
    assert largest(compiled(model, inner="inductor"), model) < 1e-4
    assert reasons() == {Reason.ROUTED}


def to_float8(folder, block=32):
    """Turn a saved model into a checkpoint with fine-grained float8 weights, as published ones are."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        blocks = tensors[name].unflatten(0, (-1, block)).unflatten(2, (-1, block))
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes.flatten(2).flatten(0, 1), scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_float8_checkpoint_that_is_dequantised_as_it_is_loaded_gives_the_same_logits(tmp_path):
    exact = build(FAMILIES["Llama"], hidden_size=64, intermediate_size=64)
    exact.save_pretrained(tmp_path)
    to_float8(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    ).eval()
    change = loaded.model.layers[0].mlp.up_proj.weight - exact.model.layers[0].mlp.up_proj.weight
    assert 0 < change.abs().max() < 0.1
    assert largest(compiled(loaded), loaded) < 1e-4
    assert reasons() == {Reason.ROUTED}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fine_grained_fp8_weights_give_the_same_logits(tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a device with float8 products (compute capability 8.9)")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4}
    cuda = torch.device("cuda")
    exact = build(FAMILIES["Llama"], **sizes).to(cuda)
    exact.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(), device_map=cuda, dtype=torch.bfloat16
    ).eval()
    try:
        bound = typical(plain, exact, cuda)
    except ImportError as absent:
        pytest.skip(f"needs the float8 kernels of transformers: {absent}")
    assert typical(compiled(plain), exact, cuda) < 1.1 * bound
    assert reasons()  # routed or not, it is in the report
