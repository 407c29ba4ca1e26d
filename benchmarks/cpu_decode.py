"""Decode tokens a second on a CPU: hga against the same model compiled with Inductor and a dense cache.

    OMP_NUM_THREADS=2 python benchmarks/cpu_decode.py --model DIR --length 8192 --steps 64

One process, one prefill of a real text by the uncompiled model, whose K/V fill both caches. A step is
``model(input_ids=[1, 1], past_key_values=cache, use_cache=True)`` and an argmax; both sides are fed the
text's own tokens, in alternating blocks of steps whose order flips each round. The floor is the bytes a step
must read (weights once, K/V, summaries) at the measured memory bandwidth: the better of a copy and a read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, fill_cache, find_model, load_model, model_facts, tokenize, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hga_compile.evaluation import corpora
from hga_compile.evaluation.candidates import NothingRouted, RoutedCandidate

LEAST_AGREEMENT = 0.5  # of the likeliest tokens with dense: below, the speed is of something else
Step = Callable[[Tensor], Tensor]


@dataclass
class Lane:
    """One side of the race: its step, the seconds of each timed step, and the tokens it found likeliest."""

    name: str
    step: Step
    seconds: list[float] = field(default_factory=list)
    likeliest: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds a step."""
        return statistics.median(self.seconds)


def decode_step(model: Callable[..., Any], cache: Any) -> Step:
    """Return the step: one token `[1, 1]` in, the likeliest next one out."""

    def step(token: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        return logits[0, -1].argmax()

    return step


def race(lanes: list[Lane], tokens: Tensor, warmup: int, block: int) -> None:
    """Feed `tokens` `[steps]` to every lane in blocks; the order of the lanes flips after each block."""
    for lane in lanes:
        for token in tokens[:warmup]:
            lane.step(token.view(1, 1))
        print(f"{lane.name}: compiled and warm", file=sys.stderr)
    for number, start in enumerate(range(warmup, len(tokens), block)):
        for lane in lanes if number % 2 == 0 else lanes[::-1]:
            for token in tokens[start : start + block]:
                begin = time.perf_counter()
                likeliest = lane.step(token.view(1, 1))
                lane.seconds.append(time.perf_counter() - begin)
                lane.likeliest.append(int(likeliest))


def memory_bandwidth(megabytes: int = 512, repeats: int = 5) -> dict[str, float]:
    """Measure bytes a second of a copy (read and written bytes count) and of a plain read, best of runs."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return min(times)

    size = source.nbytes
    return {"copy": 2 * size / best(lambda: target.copy_(source)), "read": size / best(source.sum)}


def step_weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a step must read: all but an input embedding that the output does not share."""
    parameters = {id(p): p for p in model.parameters()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:
        parameters.pop(id(embedding))
    return sum(p.nbytes for p in parameters.values())


def agreement(first: list[int], second: list[int]) -> float:
    """Share of steps at which both found the same token likeliest."""
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def lane_result(lane: Lane, weights: int, reads: int, bandwidth: float) -> dict[str, float]:
    """Return a lane's numbers: tokens/s, spread, the bytes a step must read, and the time over that floor."""
    floor = (weights + reads) / bandwidth
    quarters = statistics.quantiles(lane.seconds, n=4)
    return {
        "tokens_per_second": 1 / lane.median,
        "milliseconds": 1e3 * lane.median,
        "milliseconds_q1": 1e3 * quarters[0],
        "milliseconds_q3": 1e3 * quarters[2],
        "steps": len(lane.seconds),
        "weight_bytes": weights,
        "kv_bytes": reads,
        "floor_milliseconds": 1e3 * floor,
        "measured_over_floor": lane.median / floor,
    }


def show(result: dict[str, Any]) -> None:
    """Print what, peer, ratio, floor, measured / floor."""
    table = Table(title=f"decode at {result['settings']['length']} tokens, {result['environment']['device']}")
    for heading in ("what", "tokens/s", "ms a step", "K/V read a step", "floor ms", "measured / floor"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, row in result["lanes"].items():
        cells = (
            f"{row['tokens_per_second']:.2f}",
            f"{row['milliseconds']:.1f}",
            f"{row['kv_bytes'] / 1e6:.1f} MB",
        )
        table.add_row(name, *cells, f"{row['floor_milliseconds']:.1f}", f"{row['measured_over_floor']:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(f"hga / dense Inductor: {result['ratio']:.2f}x the tokens a second")
    console.print(f"the same token is likeliest at {result['agreement']:.0%} of the steps")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", help="checkpoint folder (default: HGA_MODELS/smollm2-135m)")
    add("--length", type=int, default=8192, help="tokens in the cache when decoding starts")
    add("--text", default="emma", help="a name that `hga eval texts` shows")
    add("--profile", default="default")
    add("--steps", type=int, default=64, help="timed steps, at least 32")
    add("--warmup", type=int, default=12, help="untimed steps: compilation and its first recompilations")
    add("--block", type=int, default=8, help="steps of one side before the other's turn")
    add("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    add("--threads", type=int, default=2)
    add("--json", type=Path, default=RESULTS / "cpu_decode.json")
    options = parser.parse_args(arguments)
    if options.steps < 32:
        parser.error(f"--steps must be at least 32 for a median that holds, got {options.steps}")
    torch.set_num_threads(options.threads)
    path = find_model(options.model)
    document = corpora.load(options.text)
    ids = tokenize(path, document.text, options.length + options.warmup + options.steps)
    model = load_model(path)
    with torch.no_grad():
        dense = DynamicCache()
        model(input_ids=ids[:, : options.length], past_key_values=dense, use_cache=True, logits_to_keep=1)
        result = compare_lanes(model, dense, ids[0, options.length :], options)
    header = {"benchmark": "cpu_decode", "environment": environment("cpu"), "model": model_facts(path)}
    keys = ("length", "profile", "steps", "warmup", "block", "inner", "threads")
    settings = {key: getattr(options, key) for key in keys}
    result = {**header, "settings": settings, "document": document.entry(), **result}
    show(result)
    write_json(options.json, result)
    print(f"saved to {os.path.relpath(options.json)}")
    return 0


def compare_lanes(
    model: PreTrainedModel, dense: DynamicCache, tokens: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Race the dense model (Inductor) and hga from the same K/V; return both lanes, the ratio, the bandwidth.

    Raises
    ------
    NothingRouted
        If hga attended densely, or its tokens have little to do with dense ones: no speed is reported then.
    """
    import hga_compile

    torch._dynamo.config.recompile_limit = 64
    routed = RoutedCandidate(model, {"profile": options.profile, "inner": options.inner})
    length = dense.get_seq_length()
    peer = fill_cache(DynamicCache(), dense, length)
    lanes = [
        Lane("dense, Inductor", decode_step(torch.compile(model), peer)),
        Lane(
            f"hga, {options.profile}", decode_step(routed.compiled, fill_cache(routed.cache(), dense, length))
        ),
    ]
    hga_compile.reset_report()
    race(lanes, tokens, options.warmup, options.block)
    total = hga_compile.report().totals("decode")
    same = agreement(lanes[0].likeliest, lanes[1].likeliest)
    if not total.visible or same < LEAST_AGREEMENT:
        raise NothingRouted(
            f"nothing to time: {total.visible} tokens routed over, {same:.0%} of tokens agree"
        )
    steps = len(tokens)
    bandwidth = memory_bandwidth()
    weights, top = step_weight_bytes(model), max(bandwidth.values())
    reads = (total.dense_bytes // steps, (total.kv_bytes + total.summary_bytes) // steps)
    rows = {lane.name: lane_result(lane, weights, r, top) for lane, r in zip(lanes, reads, strict=True)}
    ratio = lanes[0].median / lanes[1].median
    return {"lanes": rows, "ratio": ratio, "agreement": same, "bandwidth": bandwidth}


if __name__ == "__main__":
    sys.exit(main())
