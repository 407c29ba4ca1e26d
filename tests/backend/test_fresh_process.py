"""One line, no import: each way of asking for the backend, in a process that has never heard of it."""

import json
import os
import subprocess
import sys

import pytest

START = """
import json, sys, warnings
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=None,
    bos_token_id=None)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 96, (1, 300))
settings = dict(max_new_tokens=8, do_sample=False)
options = {"inner": "eager", "budget": 64, "routing.dense_below": 64, "routing.centre_tokens": 32}
assert "hga_compile" not in sys.modules
"""
END = """
import hga_compile
report = hga_compile.report()
print(json.dumps({
    "routed": sorted({site.phase for site in report.sites if site.routed}),
    "reasons": sorted({site.reason for site in report.sites}),
    "prefill": report.totals("prefill").attended_fraction,
    "decode": report.totals("decode").attended_fraction,
}))
"""
FORMS = {
    "torch.compile": 'torch.compile(model, backend="hga", options=options).generate(ids, **settings)',
    "model.compile": 'model.compile(backend="hga", options=options); model.generate(ids, **settings)',
}


def run(body):
    done = subprocess.run(
        [sys.executable, "-c", START + body + END],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("form", FORMS)
def test_generate_runs_routed_attention(form):
    found, _ = run(FORMS[form])
    assert found["routed"] == ["decode", "prefill"]
    assert 0 < found["prefill"] < 0.9 and 0 < found["decode"] < 0.3


COMPILE_CONFIG = """
from transformers import CompileConfig, GenerationConfig
chosen = CompileConfig(backend="hga", mode=None, options=options)
chosen._compile_all_devices = True  # transformers compiles on accelerators only
generation = GenerationConfig(compile_config=chosen, **settings)
"""


def test_compile_config_with_an_hga_cache_decodes_routed():
    found, _ = run(
        COMPILE_CONFIG
        + "from hga_compile import HGACache\n"
        + "model.generate(ids, generation_config=generation, past_key_values=HGACache(config))"
    )
    assert found["routed"] == ["decode"] and 0 < found["decode"] < 0.3


def test_compile_config_with_a_static_cache_says_what_to_write():
    found, errors = run(
        COMPILE_CONFIG
        + 'generation.cache_implementation = "static"\nmodel.generate(ids, generation_config=generation)'
    )
    assert found["routed"] == []
    assert "past_key_values=HGACache(model.config)" in errors
