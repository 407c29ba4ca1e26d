"""What a growing context costs in GPU memory: hga with K/V in pinned host RAM against a dense cache.

    python benchmarks/gpu_memory.py --model DIR                 # a checkpoint
    python benchmarks/gpu_memory.py --random llama-8b-4layers   # random weights, the shape of a larger model

For each context: prefill in pieces of `--piece` tokens, some decode steps, then the peak of
`torch.cuda.max_memory_allocated` above the weights, and the bytes of K/V that lie on the GPU. Writes JSON and
a PNG beside it.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, find_model, load_model, model_facts, tokenize, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from hga_compile.evaluation import corpora
from hga_compile.evaluation.candidates import RoutedCandidate

SHAPES: dict[str, dict[str, Any]] = {
    # Llama-3.1-8B's layer, four of them, with a small vocabulary: 1.9 GB of bf16 weights.
    "llama-8b-4layers": dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, num_hidden_layers=4, vocab_size=32000, max_position_embeddings=131072, rope_theta=5e5,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=2, vocab_size=256, max_position_embeddings=131072,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One context of one side: bytes on the GPU above the weights, and where the K/V lies."""

    side: str
    context: int
    peak_bytes: int
    gpu_kv_bytes: int
    gpu_index_bytes: int
    host_kv_bytes: int


def random_model(shape: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Build a Llama of one of `SHAPES` with random weights, made on the device."""
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype)
    return model.eval()


def run_context(model: Callable[..., Any], cache: Any, ids: Tensor, piece: int, steps: int) -> None:
    """Prefill `ids` `[1, tokens]` but its last `steps` tokens in pieces, then decode those one by one."""
    prefill = ids.shape[1] - steps
    for start in range(0, prefill, piece):
        part = ids[:, start : min(start + piece, prefill)]
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for at in range(prefill, ids.shape[1]):
        model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)


def cache_bytes(cache: Any) -> dict[str, int]:
    """Return where the K/V of a cache lies: on the accelerator, its index there, and in host RAM."""
    if type(cache) is DynamicCache:  # not a subclass: reading an HGA layer's keys would gather them
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return {"gpu_kv_bytes": sum(t.nbytes for t in tensors), "gpu_index_bytes": 0, "host_kv_bytes": 0}
    import hga_compile

    memory = hga_compile.cache_memory(cache)
    return {
        "gpu_kv_bytes": memory.accelerator_kv,
        "gpu_index_bytes": memory.accelerator_index,
        "host_kv_bytes": memory.host_kv + memory.nvme_kv,
    }


def measure(
    side: str, model: Any, new_cache: Callable[[], Any], ids: Tensor, piece: int, steps: int
) -> Point:
    """Run one context from an empty cache and read the allocator's peak above what was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cache = new_cache()
    with torch.no_grad():
        run_context(model, cache, ids, piece, steps)
    torch.cuda.synchronize()
    return Point(side, ids.shape[1], torch.cuda.max_memory_allocated() - before, **cache_bytes(cache))


def draw(points: list[Point], target: Path) -> None:
    """Draw peak memory and K/V on the GPU against the context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for colour, side in zip(("#888888", "#0a6cbc"), ("dense", "hga"), strict=True):
        mine = [point for point in points if point.side == side]
        contexts = [point.context / 1024 for point in mine]
        axes.plot(contexts, [p.peak_bytes / 2**20 for p in mine], "o-", color=colour, label=f"{side}: peak")
        on_gpu = [(p.gpu_kv_bytes + p.gpu_index_bytes) / 2**20 for p in mine]
        axes.plot(contexts, on_gpu, "s--", color=colour, label=f"{side}: K/V and index on the GPU")
    axes.set(
        xlabel="context, thousands of tokens", ylabel="GPU memory above the weights, MiB", ylim=(0, None)
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def show(points: list[Point], device: object) -> None:
    """Print both sides of each context."""
    table = Table(title=f"GPU memory above the weights, {device}")
    for heading in (
        "context",
        "what",
        "peak MiB",
        "K/V on GPU MiB",
        "index on GPU MiB",
        "K/V in host RAM MiB",
    ):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for p in sorted(points, key=lambda p: (p.context, p.side)):
        sizes = (p.peak_bytes, p.gpu_kv_bytes, p.gpu_index_bytes, p.host_kv_bytes)
        table.add_row(str(p.context), p.side, *(f"{size / 2**20:.1f}" for size in sizes))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", help="checkpoint folder (default: HGA_MODELS/smollm2-135m)")
    add("--random", choices=sorted(SHAPES), help="random weights of this shape instead of a checkpoint")
    add("--contexts", default="4096,8192,16384,32768,65536")
    add("--profile", default="default")
    add("--tier", default="host", choices=("host", "gpu"))
    add("--inner", default="eager", choices=("inductor", "aot_eager", "eager"))
    add("--piece", type=int, default=2048, help="tokens of one prefill call")
    add("--steps", type=int, default=8, help="decode steps after the prefill")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    add("--text", default="asyncio", help="a text with enough tokens (checkpoints only)")
    add("--json", type=Path, default=RESULTS / "gpu_memory.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark measures GPU memory: a CUDA device wanted, got none", file=sys.stderr)
        return 1
    contexts = sorted(int(context) for context in options.contexts.split(","))
    dtype = getattr(torch, options.dtype)
    torch._dynamo.config.recompile_limit = 64
    if options.random:
        model = random_model(options.random, "cuda", dtype)
        facts: dict[str, object] = {"name": f"random weights, {options.random}", **SHAPES[options.random]}
        ids = torch.randint(
            model.config.vocab_size, (1, contexts[-1]), generator=torch.Generator().manual_seed(0)
        )
    else:
        path = find_model(options.model)
        model, facts = load_model(path, "cuda", dtype), model_facts(path)
        ids = tokenize(path, corpora.load(options.text).text, contexts[-1])
    ids = ids.cuda()
    routed = RoutedCandidate(
        model, {"profile": options.profile, "inner": options.inner, "tier": options.tier}
    )
    points = []
    sides = (("dense", model, DynamicCache), ("hga", routed.compiled, routed.cache))
    for context in (contexts[0], *contexts):  # the first round compiles and loads kernels; it is not kept
        for side, callee, new_cache in sides:
            points.append(measure(side, callee, new_cache, ids[:, :context], options.piece, options.steps))
    points = points[len(sides) :]
    keys = ("contexts", "profile", "tier", "inner", "piece", "steps", "dtype")
    settings = {key: getattr(options, key) for key in keys}
    ran = environment("cuda")
    header = {"benchmark": "gpu_memory", "environment": ran, "model": facts}
    write_json(options.json, {**header, "settings": settings, "points": [asdict(point) for point in points]})
    draw(points, options.json.with_suffix(".png"))
    show(points, ran["device"])
    print(f"saved to {os.path.relpath(options.json)} and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
