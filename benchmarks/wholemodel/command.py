"""What the commands that measure a whole model share: options, which points are missing, and the model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from transformers import PreTrainedModel

from wholemodel.results import Results
from wholemodel.shape import SHAPES, build

__all__ = ["SETTINGS", "common_parser", "has_device", "made", "missing", "named", "settings_of"]

SETTINGS = ("steps", "warmup", "profile", "set", "inner", "dtype")
"""Options that points of one file agree in."""


def common_parser(
    doc: str | None,
    systems: Collection[str],
    name: str,
    *,
    cap: float,
    steps: int,
    prefill: str,
    limit: float,
) -> argparse.ArgumentParser:  # fmt: skip
    """Return a parser of the shared options.

    Parameters
    ----------
    doc
        The command's docstring.
    systems
        That it knows.
    name
        Of its result, without ``.json``.
    cap, steps, prefill, limit
        Defaults of the options `cap`, `steps`, `dense-prefill` and `limit`.
    """
    found = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    add = found.add_argument
    inner = ("inductor", "eager")
    add("--shape", default="qwen3-30b", choices=SHAPES)
    add("--layers", type=int, help="the shape with its first so many layers, for trying")
    add("--systems", default=",".join(systems), help=f"some of {','.join(systems)}")
    add("--cap", type=float, default=cap, help="GiB of GPU memory for the systems that are capped")
    add("--steps", type=int, default=steps, help="decode steps that are timed")
    add("--warmup", type=int, default=16, help="decode steps before these")
    add("--step", type=int, help="prompt tokens a forward pass (default: by `hga plan`)")
    add("--profile", default="default", help="of hga")
    add("--set", action="append", default=[], metavar="FIELD=JSON", help="a setting of hga")
    add("--inner", default="inductor", choices=inner, help="compiles all but attention")
    add("--dense-prefill", default=prefill, choices=inner, help="compiles the prefill of the static cache")
    add("--patience", type=float, default=20.0, help="seconds of decode steps that are enough, if 16")
    add("--limit", type=float, default=limit, help="seconds for each point")
    add("--fresh", action="store_true", help="forget the points in the file")
    add("--device", default="cuda")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--json", type=Path, default=RESULTS / f"{name}.json")
    return found


def has_device(device: torch.device) -> bool:
    """Say whether the device is there, and on stderr if it is not."""
    if device.type != "cuda" or torch.cuda.is_available():
        return True
    print("a CUDA device wanted, got none (--device cpu tries the command out)", file=sys.stderr)
    return False


def named(given: str, systems: Collection[str]) -> list[str]:
    """Return the systems that are named, comma-separated.

    Raises
    ------
    SystemExit
        One that the command does not know.
    """
    names = [name for name in given.split(",") if name]
    unknown = [name for name in names if name not in systems]
    if unknown:
        raise SystemExit(f"--systems has {', '.join(systems)}, got {', '.join(unknown)}")
    return names


def missing(
    names: Sequence[str], systems: Iterable[str], numbers: Sequence[int], results: Results, code: str
) -> list[tuple[str, int]]:
    """Return the points that are to be measured, system by system; say so where there is none."""
    todo = [
        (name, number)
        for name in systems
        for number in numbers
        if name in names and not results.has(name, number, code)
    ]
    if not todo:
        print("every point is there already: --fresh measures them again", file=sys.stderr)
    return todo


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of hga that are given one by one (`--set`)."""
    return {key: json.loads(value) for key, value in (one.split("=", 1) for one in options.set)}


def made(options: argparse.Namespace, config: Any, device: torch.device) -> PreTrainedModel:
    """Build the model, and set what all systems are compiled with."""
    torch._dynamo.config.recompile_limit = 64
    # A model's floats do not change: they are none of the inputs that guards and calls pay for.
    torch._dynamo.config.specialize_float = True
    return build(config, device, getattr(torch, options.dtype))
