"""The same through Inductor, which keeps compiled graphs on disk, and what must not be reused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import Pair, largest_error, left_padded, make_model, run, tokens

import hga_compile

pytestmark = pytest.mark.inductor
HERE = Path(__file__).resolve().parent


OPTIONS = {"routing.budget": {"fraction": 1.0, "tokens": None}}


def test_prefill_and_decode_through_inductor_equal_the_uncompiled_model(recompile):
    pair = Pair(make_model("gemma3", hidden_size=32, intermediate_size=32), OPTIONS, fullgraph=True)
    mask = left_padded(2, 12, 3)
    chunks = list(tokens(2, 18).split([12] + [1] * 6, 1))
    expected = run(pair.plain, pair.cache(), chunks, mask)
    cache = pair.cache()
    got = run(pair.compiled, cache, chunks[:3], mask)
    with torch.compiler.set_stance("fail_on_recompile"):
        got += run(pair.compiled, cache, chunks[3:], mask)
    assert largest_error(got, expected, mask) < 1e-4
    assert hga_compile.report().totals("decode").attended_fraction == 1.0


def test_decode_of_many_layers_through_inductor(recompile):
    """From five layers on, Inductor once named a layer's length without defining it."""
    pair = Pair(make_model("llama", hidden_size=32, intermediate_size=32, num_hidden_layers=6), OPTIONS)
    chunks = list(tokens(1, 15).split([12, 1, 1, 1], 1))
    expected = run(pair.plain, pair.cache(), chunks)
    cache = pair.cache()
    run(pair.plain, cache, chunks[:1])
    assert largest_error(run(pair.compiled, cache, chunks[1:]), expected[1:]) < 1e-4


PROGRAM = f"""
import json, sys
import torch
sys.path.insert(0, {str(HERE)!r})
from torch._dynamo.utils import counters
import hga_compile
torch.set_num_threads(1)
torch.manual_seed(0)

class Attention(torch.nn.Module):
    def forward(self, x):
        x = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(x, x * 2, x * 3, is_causal=True)

options = {{
    "budget": int(sys.argv[1]),
    "routing.dense_below": 0,
    "routing.centre_tokens": 1,
    "routing.window": {{"fraction": None, "tokens": 4}},
}}
with torch.no_grad():
    torch.compile(Attention(), backend="hga", options=options)(torch.randn(1, 64, 16))
found = counters["inductor"] | counters["aot_autograd"]
hits = {{name: count for name, count in found.items() if "hit" in name}}
print("RESULT" + json.dumps([hga_compile.report().totals().attended_fraction, hits]))
"""


def test_another_budget_never_gets_a_graph_from_the_cache_of_compiled_graphs(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HGA_")}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    results = []
    for budget in (8, 32, 8):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(budget)],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        results.append(json.loads(line.removeprefix("RESULT")))
    (few, first_hits), (many, second_hits), (again, third_hits) = results
    assert few < many and few == again
    assert not any(first_hits.values()) and not any(second_hits.values())
    # The cache was on: the same budget does get its graph back.
    assert any(third_hits.values())
