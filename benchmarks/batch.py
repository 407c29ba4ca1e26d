"""Several requests at once under a cap on GPU memory: tokens a second of hga beside a dense cache.

    python benchmarks/batch.py --context 32768 --requests 1,4,16 --cap 40
    python benchmarks/batch.py --systems hga --requests 16     # a part, merged into the same file
    python benchmarks/batch.py --shape tiny --device cpu --dtype float32 --context 768 --json out.json

The model is that of `headline.py`: random weights in 8 bits. Prompts have different lengths, from the context
down to a share of it (`--shortest`; 1: all alike, without padding). Each is read by itself, in steps; then
all are decoded together, greedily, with padding ahead of the shorter ones.

hga keeps the K/V of each request in a cache of its own in host RAM, joins them, and gives these up; after
decoding it splits the batch again. Its hot cache and prefill step are those that `hga plan` picks for one
sequence as long as all of them together: index and hot cache are as large, and one prompt is read at a time.
The dense peer has all K/V in a static cache and a CUDA graph for each number of requests. It neither computes
nor attends to padding. Both are under one cap; running out of memory is a result. Points are written as they
are done, and a later call goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
from common import environment
from rich.console import Console
from rich.table import Table
from wholemodel.batch_measuring import measure_batch
from wholemodel.batches import BATCHES, BatchSetup, lengths_of
from wholemodel.command import SETTINGS, common_parser, has_device, made, missing, named, settings_of
from wholemodel.measuring import Plan
from wholemodel.picture import draw_batches
from wholemodel.planned import facts, planned
from wholemodel.results import Results
from wholemodel.shape import config_of

from hga_compile.configs.loader import resolve_profile


def parser() -> argparse.ArgumentParser:
    # Compiling a dense prefill takes minutes for each number of requests.
    found = common_parser(__doc__, BATCHES, "batch", cap=40.0, steps=128, prefill="eager", limit=560.0)
    add = found.add_argument
    add("--context", type=int, default=32768, help="tokens of the longest prompt")
    add("--requests", default="1,4,16", help="numbers of requests at once")
    add("--shortest", type=float, default=0.5, help="tokens of the shortest prompt, as a share of these")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if not has_device(device):
        return 1
    names = named(options.systems, BATCHES)
    if not 0 < options.shortest <= 1:
        raise SystemExit(f"--shortest is a share, above 0 and at most 1, got {options.shortest}")
    numbers = sorted(int(number) for number in options.requests.split(","))
    config, cap = config_of(options.shape, options.layers), int(options.cap * 2**30)
    keys = ("context", "shortest", *SETTINGS)
    header = {
        "benchmark": "batch",
        "environment": environment(options.device),
        "model": facts(config, options.shape, options.layers),
        "settings": {key: getattr(options, key) for key in keys} | {"cap": cap},
    }
    results = Results(options.json, header, options.fresh, by="requests")
    code = str(header["environment"]["code"])
    todo = missing(names, BATCHES, numbers, results, code)
    if todo:
        _run(options, config, device, cap, todo, results, code)
    draw_batches(results.points, options.json.with_suffix(".png"))
    show(results.points, str(header["environment"]["device"]))
    print(f"saved to {os.path.relpath(options.json)} and .png")
    return 0


def _run(
    options: argparse.Namespace, config: Any, device: torch.device, cap: int, todo: list[tuple[str, int]],
    results: Results, code: str,
) -> None:  # fmt: skip
    model = made(options, config, device)
    most, generator = max(number for _, number in todo), torch.Generator().manual_seed(0)
    base = resolve_profile({"profile": options.profile, "offload.tier": "host", **settings_of(options)})
    kept: dict[str, Any] = {}
    before, context = "", options.context
    ids = torch.randint(config.vocab_size, (most, context), generator=generator).to(device)
    for name, number in todo:
        if name != before:
            kept, before = {}, name
        profile, step = planned(model, config, options.shape, base, number * context, cap, options.step)
        plan = Plan(step, options.steps, options.warmup, options.limit, cap, options.patience)
        lengths = lengths_of(context, number, options.shortest)
        setup = BatchSetup(
            context, options.warmup + options.steps, profile, {}, options.inner, options.dense_prefill, kept,
            lengths=lengths,
        )  # fmt: skip
        prompts = [row[None, -length:] for row, length in zip(ids, lengths, strict=False)]
        print(f"{name}, {number} requests of up to {context:,} tokens, {step:,} a step", file=sys.stderr)
        point = measure_batch(BATCHES[name], model, prompts, setup, plan)
        about = {"system": name, "label": BATCHES[name].label, "order": list(BATCHES).index(name)}
        about |= {"requests": number, "lengths": list(lengths), "code": code}
        if name == "hga":
            about["hot_cache"] = profile.offload.hot_cache
        results.add(about | point)
        print(f"  {point['status']} {point['reason']}, {point['seconds']:.0f} s", file=sys.stderr)


def show(points: list[dict[str, Any]], device: str) -> None:
    """Print a row a point."""
    table = Table(title=f"several requests at once, {device}")
    headings = ("requests", "system", "GPU GiB", "spare", "prefill tokens/s", "ms a step", "p99", "tokens/s")
    for heading in (*headings, "MB over PCIe", "hits", "join s", "split s"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for point in points:
        first = (str(point["requests"]), point["label"])
        if point["status"] != "ok":
            table.add_row(*first, f"{point['status']} in {point['stage']} at {point['reached']:,} tokens")
            continue
        run, memory, rate = point["decode"], point["memory"], point["prefill"]["tokens_per_second"]
        spare = "-" if memory["spare"] is None else f"{memory['spare'] / 2**30:.2f}"
        near = (f"{memory['reserved'] / 2**30:.2f}", spare, f"{rate:,.0f}" if rate else "-")
        times = (f"{run['median_ms']:.2f}", f"{run['p99_ms']:.2f}", f"{run['tokens_per_second']:,.1f}")
        hits = "-" if run["hit_rate"] is None else f"{run['hit_rate']:.0%}"
        copies = (f"{point[key]:.1f}" if key in point else "-" for key in ("join_seconds", "split_seconds"))
        table.add_row(*first, *near, *times, f"{run['pcie_bytes'] / 1e6:.1f}", hits, *copies)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for point in points:
        for reason, count in point.get("routed", {}).get("fallbacks", {}).items():
            print(f"{point['label']}, {point['requests']} requests: fallback: {reason}: {count}")


if __name__ == "__main__":
    sys.exit(main())
