"""In a fresh process, without an import of hga_compile, each one-line form runs routed attention."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
HEAD = f"""
import json, sys, warnings
import torch
sys.path.insert(0, {str(HERE)!r})
from tiny_models import make_model, tokens
torch.set_num_threads(1)
model, prompt = make_model("llama"), tokens(2, 40)
settings = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
dense = model.generate(prompt, **settings)
options = {{"inner": "eager"}}
assert "hga_compile" not in sys.modules
caught = []
"""
FORMS = {
    "torch.compile": """
model = torch.compile(model, backend="hga", options=options)
routed = model.generate(prompt, **settings)
""",
    "model.compile": """
model.compile(backend="hga", options=options)
routed = model.generate(prompt, **settings)
""",
    "CompileConfig": """
from transformers import CompileConfig
config = CompileConfig(backend="hga", mode=None, options=options)
config._compile_all_devices = True
from hga_compile import HGACache
routed = model.generate(prompt, past_key_values=HGACache(model.config), compile_config=config, **settings)
""",
    "CompileConfig in a GenerationConfig, static cache": """
from transformers import CompileConfig, GenerationConfig
config = CompileConfig(backend="hga", mode=None, options=options)
config._compile_all_devices = True
generation = GenerationConfig(
    compile_config=config, cache_implementation="static", max_new_tokens=5, do_sample=False, pad_token_id=0
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    routed = model.generate(prompt, attention_mask=settings["attention_mask"], generation_config=generation)
""",
}
TAIL = """
import hga_compile
report = hga_compile.report()
print("RESULT" + json.dumps({
    "same": torch.equal(routed, dense),
    "phases": sorted({site.phase for site in report.sites if site.routed}),
    "used": sorted({use.phase for use in report.layers}),
    "reasons": sorted({site.reason for site in report.sites}),
    "warnings": [str(entry.message) for entry in caught],
}))
"""


def result_of(form: str) -> dict:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HGA_")}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + FORMS[form] + TAIL],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.fixture(scope="module")
def results():
    """All forms, two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FORMS, pool.map(result_of, FORMS), strict=True))


@pytest.mark.parametrize("form", ["torch.compile", "model.compile"])
def test_generate_routes_prefill_and_decode(results, form):
    assert results[form]["phases"] == results[form]["used"] == ["decode", "prefill"]
    assert results[form]["same"]  # so short a context is attended to in full


def test_a_compile_config_routes_decoding_with_our_cache(results):
    result = results["CompileConfig"]
    assert result["phases"] == result["used"] == ["decode"]
    assert result["same"]


def test_a_static_cache_is_dense_and_a_warning_says_what_to_write(results):
    result = results["CompileConfig in a GenerationConfig, static cache"]
    assert result["same"] and result["phases"] == result["used"] == []
    assert any("static cache" in reason or "one query" in reason for reason in result["reasons"])
    (text,) = [text for text in result["warnings"] if "static cache" in text]
    assert "HGACache(model.config)" in text and 'model.compile(backend="hga")' in text


def test_a_cache_that_outlives_the_package_says_nothing() -> None:
    """At the interpreter's end modules are emptied before what is held in circles."""
    script = """
import torch
from transformers import LlamaConfig
from hga_compile import HGACache
config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
cache = HGACache(config)
cache.update(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), 0)
torch.kept = cache
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
