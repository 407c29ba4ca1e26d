"""Tiny random models, each beside itself compiled with backend "hga"."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 97
WINDOW = 8

# Everything is attended to: results must equal the dense ones.
FULL = {"inner": "eager", "routing.budget": {"fraction": 1.0, "tokens": None}}
# A budget that bites after a few tokens.
TIGHT = {
    "inner": "eager",
    "routing.budget": {"fraction": None, "tokens": 24},
    "routing.window": {"fraction": None, "tokens": 8},
    "routing.dense_below": 0,
    "routing.centre_tokens": 8,
}

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "decoder_start_token_id": 2,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def make_config(name: str, **more: Any) -> PreTrainedConfig:
    decoder = _DECODER | more
    match name:
        case "llama":
            return LlamaConfig(**decoder)
        case "qwen3":
            return Qwen3Config(**decoder, head_dim=16)
        case "qwen3_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            return Qwen3MoeConfig(**decoder, **experts, head_dim=16)
        case "gemma3":
            layers = ["sliding_attention", "full_attention"] * (decoder["num_hidden_layers"] // 2)
            return Gemma3TextConfig(**decoder, head_dim=16, sliding_window=WINDOW, layer_types=layers)
        case "mistral":
            return MistralConfig(**decoder, sliding_window=WINDOW)
        case "gpt2":
            dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
            sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": VOCABULARY}
            return GPT2Config(**sizes, **dropout, eos_token_id=None, bos_token_id=1, pad_token_id=0)
        case "t5":
            return T5Config(**_ENCODER_DECODER, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0)
        case "bart":
            sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in _BART_SIZES}
            return BartConfig(
                **_ENCODER_DECODER,
                **sizes,
                max_position_embeddings=128,
                dropout=0.0,
                forced_eos_token_id=None,
            )
    raise ValueError(name)


_BART_SIZES = (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))


def make_model(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = make_config(name, **more)
    match name:
        case "t5":
            model = T5ForConditionalGeneration(config)
        case "bart":
            model = BartForConditionalGeneration(config)
        case _:
            model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def tokens(batch: int, count: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def left_padded(batch: int, count: int, padding: int) -> Tensor:
    """A mask whose first sequence begins with padding."""
    mask = torch.ones(batch, count, dtype=torch.int64)
    mask[0, :padding] = 0
    return mask


class Pair:
    """A model and itself compiled, with a call that makes and carries on caches."""

    def __init__(self, model: nn.Module, options: dict[str, object] | None = None, **compiled: Any) -> None:
        self.plain = model
        options = FULL if options is None else options
        self.compiled = torch.compile(model, backend="hga", options=options, **compiled)

    def cache(self) -> DynamicCache:
        return DynamicCache(config=self.plain.config)


def run(model: Any, cache: Any, chunks: list[Tensor], mask: Tensor | None = None) -> list[Tensor]:
    """Feed chunk after chunk into a cache; the mask grows by ones."""
    outputs, seen = [], cache.get_seq_length()
    for chunk in chunks:
        seen += chunk.shape[1]
        grown = None
        if mask is not None:
            grown = torch.nn.functional.pad(mask, (0, seen - mask.shape[1]), value=1)
        outputs.append(model(chunk, past_key_values=cache, attention_mask=grown).logits)
    return outputs


def largest_error(got: list[Tensor], expected: list[Tensor], mask: Tensor | None = None) -> float:
    """Largest difference, rows of padding left out."""
    errors = []
    for place, (one, other) in enumerate(zip(got, expected, strict=True)):
        difference = (one - other).abs()
        if mask is not None and place == 0:
            difference = difference[mask.bool()]
        errors.append(float(difference.max()))
    return max(errors)
