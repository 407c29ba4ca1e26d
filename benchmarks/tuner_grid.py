"""Times of a layer's decode step over a grid of settings: what the tuner's hardware model is fitted to.

    python benchmarks/tuner_grid.py
    python -m hga_compile.tuning.calibrate benchmarks/results      # then: fit it anew

Random K/V: time does not depend on them. CUDA-graph replay, routing included. Group size, bits, budget,
length, shape and tier are changed one or two at a time from the default; less than a minute of GPU time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write_json
from rich.console import Console
from rich.table import Table

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.tuning.hardware import Step, step_us
from hga_compile.tuning.timing import measured_us

QWEN, LLAMA, SMOL = (4, 8, 128), (8, 4, 128), (3, 3, 64)  # KV heads, query heads of each, channels


def _case(
    tokens: int, shape: tuple[int, int, int] = QWEN, tier: str = "gpu", **routing: Any
) -> dict[str, Any]:
    fraction = routing.pop("budget", 0.03)
    settings = Routing(budget=Budget(fraction=fraction, tokens=256), **routing)
    changed = [f"{key} {value}" for key, value in routing.items()]
    if fraction != 0.03:
        changed.append(f"budget {fraction:.0%}")
    heads = f"{shape[0]} x {shape[1]} heads x {shape[2]}"
    name = ", ".join([f"{tokens:,} tokens", heads, tier, *changed])
    rows, group, dim = shape
    return {
        "name": name, "tokens": tokens, "rows": rows, "heads": group, "dim": dim, "tier": tier,
        "routing": settings.model_dump(mode="json"),
    }  # fmt: skip


def grid() -> list[dict[str, Any]]:
    """Return the settings: default at four lengths, then what differs from it."""
    near, far = 65536, 262144
    cases = [_case(tokens) for tokens in (16384, 32768, near, 131072, far)]
    for tokens in (near, far):
        cases += [_case(tokens, group_size=size) for size in (8, 16)]
        cases += [_case(tokens, bits=bits) for bits in (1, 4)]
        cases += [_case(tokens, budget=share) for share in (0.01, 0.1)]
        cases += [_case(tokens, shape) for shape in (LLAMA, SMOL)]
    cases += [_case(tokens, tier="host") for tokens in (16384, near, far)]
    cases += [_case(near, tier="host", budget=share) for share in (0.01, 0.1)]
    cases += [_case(near, tier="host", group_size=size) for size in (8, 16)]
    cases.append(_case(near, LLAMA, tier="host"))
    cases += [_case(tokens, summary="mean", group_size=16) for tokens in (near, far)]
    return cases


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "tuner_grid.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("a CUDA device wanted, got none", file=sys.stderr)
        return 1
    from hga_compile.configs.catalogue import gpu_of_device

    device = torch.device("cuda", torch.cuda.current_device())
    card = gpu_of_device(torch.cuda.get_device_name(device))
    table = Table(title="decode step of one layer, microseconds")
    for heading in ("setting", "measured", "model", "error"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    cases, failed = [], []
    for case in grid():
        routing = Routing.model_validate(case["routing"], strict=False)
        step = Step(*(case[key] for key in ("tokens", "rows", "heads", "dim")), routing, case["tier"])
        try:
            took = measured_us(step, device)
        except Exception as error:  # one setting that does not run must not cost the others
            failed.append({"name": case["name"], "error": f"{type(error).__name__}: {error}"[:300]})
            continue
        cases.append({**case, "microseconds": took})
        guess = step_us(step, card) if card else float("nan")
        table.add_row(case["name"], f"{took:.1f}", f"{guess:.1f}", f"{guess / took - 1:+.0%}")
        torch.cuda.empty_cache()
    write_json(
        options.json,
        {
            "benchmark": "tuner_grid",
            "environment": environment("cuda"),
            "model": {"name": "one layer, bfloat16"},
            "settings": {"replay": "CUDA graph of 20 calls, indexes in no cache, median of 30"},
            "cases": cases,
            "failed": failed,
        },
    )
    Console().print(table)
    for failure in failed:
        print(f"{failure['name']}: {failure['error']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
