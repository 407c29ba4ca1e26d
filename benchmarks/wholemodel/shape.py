"""A model of the shape that a config describes, with random weights in 8 bits, built layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from hga_compile.configs.cards import ModelCard
from hga_compile.configs.catalogue import model_card
from wholemodel.eight_bit import Experts8, Linear8, random_weight

__all__ = ["SHAPES", "build", "config_of", "weight_bytes"]

TINY = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, intermediate_size=96, moe_intermediate_size=48, num_experts=6, num_experts_per_tok=2,
    norm_topk_prob=True, max_position_embeddings=1 << 18,
)  # fmt: skip
SHAPES = ("qwen3-30b", "tiny")
_SPREAD = 0.02


def config_of(shape: str, layers: int | None = None) -> Qwen3MoeConfig:
    """Return the config of one of `SHAPES`, with its first `layers` layers alone if that is given."""
    config = Qwen3MoeConfig(**(TINY if shape == "tiny" else _from_card(model_card(shape))))
    if layers is not None:
        if not 0 < layers <= config.num_hidden_layers:
            raise SystemExit(f"{shape} has {config.num_hidden_layers} layers, got {layers} (--layers)")
        config.num_hidden_layers = layers
    config.eos_token_id = config.pad_token_id = None
    return config


def _from_card(card: ModelCard) -> dict[str, Any]:
    shape = card.geometry
    return dict(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        intermediate_size=3 * shape.hidden, moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts, num_experts_per_tok=shape.active_experts, norm_topk_prob=True,
        max_position_embeddings=card.context.max_tokens, tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": card.context.rope_theta},
    )  # fmt: skip


def build(config: Qwen3MoeConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Build the model on the device.

    The linear layers and experts of every decoder layer are made in 8 bits where they stay; embedding, output
    layer, routers and norms have `dtype`, as in the 8-bit checkpoint of Qwen3-30B-A3B.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for layer in model.model.layers:
        _replace(layer, device)
    _fill(model, device)
    # Its frequencies are computed from the config, not random.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    tensors = {id(part): part for part in (*model.parameters(), *model.buffers())}
    return sum(part.nbytes for part in tensors.values())


def _replace(layer: nn.Module, device: torch.device) -> None:
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                weight = random_weight(tuple(child.weight.shape), device, _SPREAD)
                setattr(module, name, Linear8(*weight))
            elif hasattr(child, "gate_up_proj"):
                parts = (child.gate_up_proj.shape, child.down_proj.shape)
                up, down = (random_weight(tuple(shape), device, _SPREAD) for shape in parts)
                setattr(module, name, Experts8(up, down))


def _fill(model: nn.Module, device: torch.device) -> None:
    """Make every parameter that has no values yet: ones for norms, normal numbers for the rest."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if not old.is_meta:
                continue
            if id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
                new = new.fill_(1.0) if old.ndim == 1 else new.normal_(0.0, _SPREAD)
                made[id(old)] = nn.Parameter(new, requires_grad=False)
            # An output layer that is the embedding stays one.
            setattr(module, name, made[id(old)])
