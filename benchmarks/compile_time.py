"""What the passes add to compiling: their time beside that of the rest, for a model of 30 layers.

    OMP_NUM_THREADS=2 python benchmarks/compile_time.py

The model has the shape of SmolLM2-135M and random weights: time does not depend on them. Compiled are a
prefill step and a decode step, with Inductor's caches off. The floor is nothing; the peer is the same model
compiled by Inductor without hga, in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write_json
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def compile_steps(model: LlamaForCausalLM, **options: Any) -> tuple[float, int]:
    """Return the seconds that the first prefill and decode take longer than the second, and the graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, **options)
    ids = torch.randint(0, 100, (1, 96))
    took = []
    with torch.no_grad():
        for _ in range(2):
            cache = DynamicCache(config=model.config)
            begin = time.perf_counter()
            compiled(input_ids=ids, past_key_values=cache, use_cache=True)
            compiled(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            took.append(time.perf_counter() - begin)
    return took[0] - took[1], torch._dynamo.utils.counters["stats"]["unique_graphs"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--json", type=Path, default=RESULTS / "compile_time.json")
    options = parser.parse_args(arguments)
    torch._inductor.config.force_disable_caches = True
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, num_hidden_layers=options.layers, eos_token_id=None, **SHAPE)
    model = LlamaForCausalLM(config).eval()
    peer, peer_graphs = compile_steps(model)
    whole, graphs = compile_steps(model, backend="hga")
    passes = torch._dynamo.utils.counters["hga"]["microseconds"] / 1e6
    result = {
        "benchmark": "compile_time",
        "environment": environment("cpu"),
        "model": {"name": f"random weights, the shape of SmolLM2-135M, {options.layers} layers"},
        "settings": {"layers": options.layers, **SHAPE},
        "seconds": {"inductor": peer, "hga": whole, "passes": passes},
        "graphs": {"inductor": peer_graphs, "hga": graphs},
        "passes_over_rest": passes / (whole - passes),
    }
    table = Table(title=f"compiling prefill and decode of {options.layers} layers")
    for heading in ("what", "seconds", "graphs"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    table.add_row("Inductor, dense", f"{peer:.1f}", str(peer_graphs))
    table.add_row("hga", f"{whole:.1f}", str(graphs))
    table.add_row("of which the passes", f"{passes:.1f}", "")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(f"the passes add {result['passes_over_rest']:.1%} to the rest of hga's own compile time")
    write_json(options.json, result)
    print(f"saved to {os.path.relpath(options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
