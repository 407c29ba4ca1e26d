"""The same through Inductor, which keeps compiled graphs on disk, and what must not be reused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import Pair, largest_error, left_padded, make_model, run, tokens

import hga_compile

pytestmark = pytest.mark.inductor

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


@pytest.mark.slow
def test_decode_of_many_layers_through_inductor(recompile):
    """From five layers on, Inductor once named a layer's length without defining it."""
    pair = Pair(make_model("llama", hidden_size=32, intermediate_size=32, num_hidden_layers=6), OPTIONS)
    chunks = list(tokens(1, 15).split([12, 1, 1, 1], 1))
    expected = run(pair.plain, pair.cache(), chunks)
    cache = pair.cache()
    run(pair.plain, cache, chunks[:1])
    assert largest_error(run(pair.compiled, cache, chunks[1:]), expected[1:]) < 1e-4


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig
torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
        self.embed, self.qkv = torch.nn.Embedding(32, 16), torch.nn.Linear(16, 48)
        self.head = torch.nn.Linear(16, 32)

    def forward(self, ids, cache):
        q, k, v = self.qkv(self.embed(ids)).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        k, v = cache.update(k, v, 0)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=ids.shape[1] > 1)
        return self.head(mixed.transpose(1, 2).flatten(2))

model, path = Model(), Path(sys.argv[1])

def run(budget):
    torch._dynamo.reset()
    counters.clear()
    options = {
        "budget": budget,
        "routing.dense_below": 0,
        "routing.centre_tokens": 1,
        "routing.window": {"fraction": None, "tokens": 4},
    }
    compiled, cache = torch.compile(model, backend="hga", options=options), DynamicCache(config=model.config)
    prefill, decode = (compiled(ids, cache) for ids in torch.arange(24)[None].split([23, 1], 1))
    hits, misses = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
    return [torch.cat([prefill, decode], 1).tolist(), hits, misses]

if path.exists():
    torch.compiler.load_cache_artifacts(path.read_bytes())
print("RESULT" + json.dumps([run(int(budget)) for budget in sys.argv[2:]]))
if not path.exists():
    path.write_bytes(torch.compiler.save_cache_artifacts()[0])
"""


def result_of(cache, *arguments):
    """Run the program in a process of its own, with Inductor's cache in a folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HGA_")}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    # What vectors the CPU has is found out by compiling programs, again for every new folder.
    environment |= {"TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.slow
def test_saved_artifacts_serve_another_process_but_no_other_budget(tmp_path):
    artifacts = tmp_path / "artifacts"
    ((expected, hits, misses),) = result_of(tmp_path / "one", artifacts, 8)
    assert (hits, misses) == (0, 2)  # prefill and decode
    same, other = result_of(tmp_path / "other", artifacts, 8, 12)
    assert same == [expected, 2, 0]
    logits, hits, misses = other
    assert (hits, misses) == (0, 2) and logits != expected
