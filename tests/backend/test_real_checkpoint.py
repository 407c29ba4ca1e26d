"""The main promise on a real checkpoint: at full budget nothing changes, at 3% little does."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hga_compile
from hga_compile.demo.store import cache_root, is_intact
from hga_compile.demo.text import paragraphs

pytestmark = [pytest.mark.checkpoint, pytest.mark.slow]
TOKENS = 2048


def _folder() -> Path | None:
    named = Path(os.environ.get("HGA_MODELS", "")) / "smollm2-135m"
    if os.environ.get("HGA_MODELS") and named.is_dir():
        return named
    cached = cache_root() / "smollm2-135m-instruct-q4_1"
    return cached if is_intact(cached) else None


@pytest.fixture(scope="module")
def checkpoint():
    folder = _folder()
    if folder is None:
        pytest.skip("no SmolLM2-135M: set HGA_MODELS to a folder with smollm2-135m, or run `hga demo` once")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer("\n\n".join(paragraphs()), return_tensors="pt").input_ids[:, :TOKENS]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    hga_compile.reset_report(sites=True)
    yield
    torch._dynamo.reset()


def test_full_budget_gives_the_dense_logits_and_the_same_tokens(checkpoint):
    model, ids = checkpoint
    compiled = torch.compile(model, backend="hga", options={"inner": "eager", "budget": 1.0})
    with torch.no_grad():
        dense, routed = model(ids).logits, compiled(ids).logits
    assert (dense - routed).abs().max() <= 1e-4
    settings = {"max_new_tokens": 64, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), compiled.generate(ids, **settings))
    phases = {use.phase for use in hga_compile.report().layers}
    assert phases == {"prefill", "decode"}


def test_three_percent_stays_close_to_dense_and_is_not_dense(checkpoint):
    model, ids = checkpoint
    scored = 128
    with torch.no_grad():
        cache = DynamicCache()
        dense = model(ids, past_key_values=cache, logits_to_keep=scored).logits[0, :-1].log_softmax(-1)
        options = {
            "inner": "eager",
            "routing.dense_below": 256,
            "routing.budget.fraction": 0.03,
            "routing.budget.tokens": 64,
        }
        compiled = torch.compile(model, backend="hga", options=options)
        history = hga_compile.HGACache(model.config)
        model(ids[:, :-scored], past_key_values=history, logits_to_keep=1)
        routed = compiled(ids[:, -scored:], past_key_values=history).logits[0, :-1].log_softmax(-1)
    total = hga_compile.report().totals("prefill")
    assert 0.02 < total.attended_fraction < 0.06
    kl = (dense.exp() * (dense - routed)).sum(-1).mean()
    # 64 of 2,048 tokens is a quarter of the default's least budget: close, yet clearly not dense.
    assert 1e-3 < kl < 0.3
    expected = ids[0, -scored + 1 :, None]
    delta = (dense.gather(-1, expected) - routed.gather(-1, expected)).mean()
    assert abs(delta) < 0.25
