"""How much a long prompt allocates: nothing as large as a mask of all its queries and keys."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import hga_compile

LONG, SHORT, PADDING = 65536, 2048, 100
# One routing level of few, large groups: 64K tokens are routed in a quarter of a minute on one core.
OPTIONS: dict[str, object] = {
    "routing.summary": "mean",
    "routing.group_size": 64,
    "routing.budget": {"fraction": None, "tokens": 256},
    "routing.dense_below": 0,
    "routing.centre_tokens": 64,
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "head_dim": 16,
    "max_position_embeddings": LONG,
    "eos_token_id": None,
}
MODELS: dict[str, Callable[[], Any]] = {
    "routed": lambda: LlamaConfig(**SIZES, num_attention_heads=1, num_key_value_heads=1),
    "sliding": lambda: MistralConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=64
    ),
}


def model(name: str) -> Any:
    return AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="sdpa").eval()


def largest_allocation(run: Any, tokens: int) -> int:
    """Bytes of the largest tensor that a prompt with left padding allocates, compiling included."""
    ids, mask = torch.randint(2, 97, (1, tokens)), torch.ones(1, tokens, dtype=torch.int64)
    mask[:, :PADDING] = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(ids, attention_mask=mask, logits_to_keep=1)
    events = profiled.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize(
    ("name", "inner", "decision"),
    [
        pytest.param("routed", "eager", "routed", marks=pytest.mark.slow),
        ("sliding", "eager", "sliding window: exact, only the window is kept"),
        pytest.param(
            "sliding",
            "inductor",
            "sliding window: exact, only the window is kept",
            marks=[pytest.mark.inductor, pytest.mark.slow],
        ),
    ],
)
def test_no_tensor_of_a_64k_prompt_is_as_large_as_its_mask(name, inner, decision, recompile):
    compiled = torch.compile(model(name), backend="hga", options=OPTIONS | {"inner": inner})
    largest = largest_allocation(compiled, LONG)
    assert [site.reason for site in hga_compile.report().sites] == [decision]
    # A bool a query and key would be 4 GiB; tiles of scores are 64 MiB.
    assert largest <= LONG * LONG // 64


@pytest.mark.parametrize("name", MODELS)
def test_the_uncompiled_model_allocates_the_mask(name):
    """What is measured above would show it."""
    assert largest_allocation(model(name), SHORT) >= SHORT * SHORT
