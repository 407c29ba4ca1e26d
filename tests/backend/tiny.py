"""Tiny random models of several families, one table for all backend tests."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=20),
    "gemma3": Gemma3TextConfig(
        **SHAPE, head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=24),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=1024),
}

# Settings under which routing is at work on a few hundred tokens.
ROUTED = {
    "inner": "eager",
    "routing.budget": {"fraction": 0.1, "tokens": 32},
    "routing.dense_below": 64,
    "routing.centre_tokens": 32,
}
FULL = {"inner": "eager", "budget": 1.0}


def make(family: str):
    """Build the family's model, the same one every time."""
    torch.manual_seed(0)
    config = CONFIGS[family]
    config._attn_implementation = "sdpa"
    # No end of text: generation runs as long as it is told to.
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    return AutoModelForCausalLM.from_config(config).eval()


def prompt(tokens: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Draw random tokens, ``[batch, tokens]``."""
    return torch.randint(0, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))
