r"""Hardware counters of a decode step's kernels: from what Nsight Compute prints to JSON.

    ncu --profile-from-start off --clock-control none --set detailed --csv \
        python benchmarks/decode_parts.py --once > step.csv
    python benchmarks/decode_counters.py step.csv

Under the profiler kernels run one after another, each from a cold start: they take longer than in a replayed
graph, and do not overlap. The counters say what a kernel is bound by, not how long a step takes.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import RESULTS, environment, write_json
from decode_attention import CASES
from table import render

# The kernel that a step begins with.
_FIRST = "_turn"
_NUMBERS = {
    "microseconds": ("Duration", 1e-3),
    "dram": ("DRAM Throughput", 1e-2),
    "arithmetic": ("Compute (SM) Throughput", 1e-2),
    "issued": ("Issue Slots Busy", 1e-2),
    "occupancy": ("Achieved Occupancy", 1e-2),
    "waves": ("Waves Per SM", 1.0),
    "registers": ("Registers Per Thread", 1.0),
}


def read(lines: Iterable[str]) -> list[list[dict[str, Any]]]:
    """Return the kernels of each step, in the order of their launches.

    Parameters
    ----------
    lines
        Of the CSV; others are passed over.

    Raises
    ------
    ValueError
        There is no kernel, or one lacks a counter.
    """
    kernels: dict[str, dict[str, Any]] = {}
    units: dict[str, str] = {}
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        kernel[row["Metric Name"]] = row["Metric Value"]
        units[row["Metric Name"]] = row["Metric Unit"]
    if not kernels:
        raise ValueError("no kernel in it; expected what ncu --csv prints of decode_parts.py --once")
    if units.get("Duration") not in ("ns", "nsecond"):
        raise ValueError(f"durations in ns expected, got {units.get('Duration')}")
    steps: list[list[dict[str, Any]]] = []
    for kernel in kernels.values():
        if kernel["kernel"] == _FIRST or not steps:
            steps.append([])
        found: dict[str, Any] = {"kernel": kernel["kernel"]}
        for name, (metric, factor) in _NUMBERS.items():
            if metric not in kernel:
                raise ValueError(f"{kernel['kernel']} has no {metric!r}; expected those of --set detailed")
            found[name] = round(float(kernel[metric].replace(",", "")) * factor, 4)
        steps[-1].append(found)
    return steps


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("csv", type=Path, help="what ncu printed")
    parser.add_argument("--json", type=Path, default=RESULTS / "decode_counters.json")
    parser.add_argument("--environment", type=Path, help="result of the same machine to take it from")
    options = parser.parse_args(arguments)
    try:
        steps = read(options.csv.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        print(f"{options.csv.name}: {error}", file=sys.stderr)
        return 1
    if len(steps) != len(CASES):
        print(f"{options.csv.name}: {len(CASES)} steps expected, got {len(steps)}", file=sys.stderr)
        return 1
    if options.environment:
        where = json.loads(options.environment.read_text(encoding="utf-8"))["environment"]
    else:
        where = environment("cuda")
    cases = [
        {"batch": batch, "tokens": tokens, "kernels": kernels}
        for (batch, tokens), kernels in zip(CASES, steps, strict=True)
    ]
    model = {"name": "one layer, 32 query / 4 KV heads x 128, bfloat16"}
    write_json(
        options.json, {"benchmark": "decode_counters", "environment": where, "model": model, "cases": cases}
    )
    print(render(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
