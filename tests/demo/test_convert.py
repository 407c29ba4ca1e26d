from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hga_compile.cli.errors import CommandError
from hga_compile.demo.convert import convert_gguf

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
HIDDEN, MLP, HEADS, KV_HEADS, LAYERS = 32, 64, 4, 2, 2


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a GGUF file with unquantised weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if number < 2 else 1 for number in range(len(words))])
    # Two of them: transformers 5.17 reads a list of one as a string.
    writer.add_token_merges(["~ ~", "~~ ~~"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in tensors(model.state_dict()):
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tensors(state: dict[str, torch.Tensor]) -> list[tuple[str, np.ndarray]]:
    """Weights under GGUF's names, query and key rows in llama.cpp's order of rotary pairs."""

    def rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        of = f"model.layers.{layer}"
        to = f"blk.{layer}"
        found[f"{to}.attn_norm.weight"] = state[f"{of}.input_layernorm.weight"]
        found[f"{to}.ffn_norm.weight"] = state[f"{of}.post_attention_layernorm.weight"]
        found[f"{to}.attn_q.weight"] = rows(state[f"{of}.self_attn.q_proj.weight"], HEADS)
        found[f"{to}.attn_k.weight"] = rows(state[f"{of}.self_attn.k_proj.weight"], KV_HEADS)
        found[f"{to}.attn_v.weight"] = state[f"{of}.self_attn.v_proj.weight"]
        found[f"{to}.attn_output.weight"] = state[f"{of}.self_attn.o_proj.weight"]
        for short in ("gate", "up", "down"):
            found[f"{to}.ffn_{short}.weight"] = state[f"{of}.mlp.{short}_proj.weight"]
    return [(name, weight.contiguous().numpy()) for name, weight in found.items()]


def test_a_converted_model_computes_what_the_gguf_file_holds(
    tiny_model: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    convert_gguf(tiny_gguf, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert not hasattr(found.config, "quantization_config")
    assert found.config.num_key_value_heads == KV_HEADS
    ids = torch.arange(40)[None]
    with torch.no_grad():
        # bfloat16 weights: two to three digits.
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, atol=0.02, rtol=0.02)
    text = "Sir Walter"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_without_the_gguf_package_the_command_is_named(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"pip install 'hga-compile\[demo\]'"):
        convert_gguf(tiny_gguf, tmp_path)
    assert list(tmp_path.iterdir()) == []
