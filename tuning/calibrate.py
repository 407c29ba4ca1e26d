"""Fit the hardware model to recorded measurements, and say how far off it is on what it was not fitted to.

    python -m hga_compile.tuning.calibrate benchmarks/results     # writes configs/hardware.json

Errors are of leaving one setting out: it is predicted by factors fitted to all others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hga_compile.configs.budget import Budget
from hga_compile.configs.cards import GpuCard
from hga_compile.configs.catalogue import gpu_of_device
from hga_compile.configs.routing import Routing
from hga_compile.tuning.hardware import (
    CALIBRATION,
    Step,
    Terms,
    dense_terms,
    gather_terms,
    hot_terms,
    predict,
    step_terms,
)

__all__ = ["Setting", "calibrate", "fit", "left_out", "read_settings"]

# Of decode_attention.json, whose cases leave it out.
_HEADS, _KV_HEADS, _DIM = 8, 4, 128


@dataclass(frozen=True)
class Setting:
    """One recorded time."""

    kernel: str
    """What was timed: `step`, `gather`, `dense`; `hot`: what a hot cache took beyond a step in GPU memory."""
    name: str
    terms: Terms
    microseconds: float
    source: str


def read_settings(folder: Path) -> tuple[list[Setting], GpuCard]:
    """Read every recorded time that the model describes, of one GPU.

    Parameters
    ----------
    folder : pathlib.Path
        With decode_attention.json, gpu_limits.json, offload.json and, if there is one, tuner_grid.json.

    Raises
    ------
    ValueError
        Results of different GPUs, or of one that the catalogue does not have.
    """
    names = ("decode_attention.json", "gpu_limits.json", "offload.json", "tuner_grid.json")
    results = {name: json.loads((folder / name).read_text()) for name in names if (folder / name).is_file()}
    devices = {result["environment"]["device"] for result in results.values()}
    gpu = gpu_of_device(next(iter(devices))) if len(devices) == 1 else None
    if gpu is None:
        raise ValueError(
            f"results of one GPU of the catalogue wanted, got {', '.join(sorted(devices)) or 'none'}"
        )
    found = []
    for name, result in results.items():
        for setting in _READERS[name](result, gpu):
            found.append(setting)
    return found, gpu


def fit(settings: Sequence[Setting]) -> dict[str, float]:
    """Return the factors, none negative, with the least squared relative error."""
    from scipy.optimize import nnls

    names = list(settings[0].terms)
    rows = [[setting.terms[name] / setting.microseconds for name in names] for setting in settings]
    found, _ = nnls(np.array(rows), np.ones(len(rows)))
    return dict(zip(names, found.tolist(), strict=True))


def left_out(settings: Sequence[Setting]) -> list[float]:
    """Return the relative error of each setting under factors fitted to all others."""
    errors = []
    for number, setting in enumerate(settings):
        factors = fit([*settings[:number], *settings[number + 1 :]])
        errors.append(predict(setting.terms, factors) / setting.microseconds - 1)
    return errors


def calibrate(folder: Path) -> dict[str, Any]:
    """Return the calibration as it is shipped: factors and errors by kernel, reached shares, sources."""
    settings, gpu = read_settings(folder)
    kernels: dict[str, Any] = {}
    every: list[float] = []
    for kernel in sorted({setting.kernel for setting in settings}):
        own = [setting for setting in settings if setting.kernel == kernel]
        errors = [abs(error) for error in left_out(own)]
        every += errors
        kernels[kernel] = {
            "factors": {name: round(value, 4) for name, value in fit(own).items()},
            "settings": len(own),
            "mean_error": round(float(np.mean(errors)), 4),
            "worst_error": round(max(errors), 4),
            "sources": sorted({setting.source for setting in own}),
        }
    limits = json.loads((folder / "gpu_limits.json").read_text())
    bandwidth = json.loads((folder / "decode_attention.json").read_text())["bandwidth"]["gpu"]
    reached = [case["tflops"] * 1e12 for case in limits["dense_prefill"] if case["kernel"] == "cuDNN"]
    return {
        "gpu": gpu.name,
        "what": "factors of the terms of hga_compile.tuning.hardware; errors of leaving one setting out",
        "written_by": "python -m hga_compile.tuning.calibrate benchmarks/results",
        "settings": len(settings),
        "mean_error": round(float(np.mean(every)), 4),
        "kernels": kernels,
        "hits": _hits(json.loads((folder / "offload.json").read_text())),
        "reached": {
            "memory": round(bandwidth / gpu.bandwidth.value, 4),
            "matrix": round(min(reached) / gpu.matrix_rate.value, 4),
        },
    }


def _steps(result: dict[str, Any], gpu: GpuCard) -> list[Setting]:
    routing = Routing(
        budget=Budget(fraction=result["settings"]["budget"], tokens=256), auto_chunk_tokens=2**21
    )
    found = []
    for case in result["cases"]:
        tokens, batch, tier = case["tokens"], case["batch"], case["tier"]
        step = Step(tokens, batch * _KV_HEADS, _HEADS, _DIM, routing, tier)
        name = f"{tokens} tokens, batch {batch}, {tier}"
        found.append(
            _setting("step", name, step_terms(step, gpu), case["microseconds"], "decode_attention.json")
        )
        if "cuDNN" in case["peers"]:
            terms = dense_terms(tokens, batch * _KV_HEADS, _DIM, gpu)
            found.append(_setting("dense", name, terms, case["peers"]["cuDNN"], "decode_attention.json"))
    return found


def _limits(result: dict[str, Any], gpu: GpuCard) -> list[Setting]:
    found = []
    for case in result["gather"]:
        terms = gather_terms(case["block_bytes"], case["blocks"], gpu)
        name = f"{case['blocks']} blocks of {case['block_bytes']} bytes"
        found.append(_setting("gather", name, terms, case["microseconds"], "gpu_limits.json"))
    return found


def _offload(result: dict[str, Any], gpu: GpuCard) -> list[Setting]:
    found, near = [], {c["tokens"]: c["microseconds"] for c in result["cases"] if c["tier"] == "gpu"}
    for case in _with_hot_cache(result):
        terms, name = hot_terms(case["pcie_bytes"], gpu), f"{case['tokens']} tokens, {case['hot_cache']:.0%}"
        took = case["microseconds"] - near[case["tokens"]]
        found.append(_setting("hot", name, terms, took, "offload.json"))
    return found


def _hits(result: dict[str, Any]) -> list[list[float]]:
    """Return sizes of a hot cache, over what a step is routed to, and the mean of the rates of each."""
    rates: dict[float, list[tuple[float, float]]] = {}
    for case in _with_hot_cache(result):
        attended = case["listed_groups"] * Routing().group_size / _KV_HEADS / case["tokens"]
        rates.setdefault(case["hot_cache"], []).append((case["hot_cache"] / attended, case["hit_rate"]))
    return [[round(float(mean), 4) for mean in np.mean(rates[share], 0)] for share in sorted(rates)]


def _with_hot_cache(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [case for case in result["cases"] if case["tier"] == "host" and case["hot_cache"]]


def _grid(result: dict[str, Any], gpu: GpuCard) -> list[Setting]:
    found = []
    for case in result["cases"]:
        routing = Routing.model_validate_json(json.dumps(case["routing"]))
        shape = {key: case[key] for key in ("tokens", "rows", "heads", "dim", "tier")}
        step = Step(routing=routing, **shape)
        found.append(
            _setting("step", case["name"], step_terms(step, gpu), case["microseconds"], "tuner_grid.json")
        )
    return found


def _setting(kernel: str, name: str, terms: Terms, took: float, source: str) -> Setting:
    return Setting(kernel, name, terms, took, source)


_READERS = {
    "decode_attention.json": _steps, "gpu_limits.json": _limits, "offload.json": _offload,
    "tuner_grid.json": _grid,
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Write the calibration beside the profiles."""
    if len(arguments) != 1:
        print("usage: python -m hga_compile.tuning.calibrate FOLDER_OF_RESULTS", file=sys.stderr)
        return 2
    found = calibrate(Path(arguments[0]))
    from hga_compile.configs import cards

    target = Path(cards.__file__).with_name(CALIBRATION)
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for kernel, numbers in found["kernels"].items():
        errors = f"{numbers['mean_error']:.1%} on average, {numbers['worst_error']:.1%} at worst"
        print(f"{kernel}: {numbers['settings']} settings, {errors}")
    print(f"all: {found['settings']} settings, {found['mean_error']:.1%} on average")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
