"""A whole model in the shape of Qwen3-30B-A3B under a cap on GPU memory: hga beside five dense caches.

    python benchmarks/headline.py                                        # all; goes on where it stopped
    python benchmarks/headline.py --systems hga,dense --contexts 65536   # a part, merged into the same file
    python benchmarks/headline.py --shape tiny --device cpu --dtype float32 --contexts 1024 --json out.json

Weights are random, in 8-bit floats with one scale a row where the model's 8-bit checkpoint has 8 bits; memory
and speed do not depend on their values. Paging does: random weights are routed to nothing in particular. So
`--replay FILE` decodes a second time, with lists that a real checkpoint was routed to (`record_routes.py`).

For each system and context: prefill in steps, then decode, one token after the other, each read by the host
before the next. A system that runs out of memory says so, which is a result. Each point is written when it is
done; `--limit` bounds its time, and a later call goes on with those that are missing. A system keeps its
compiled code from one context to the next where the code does not depend on it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from common import environment
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from wholemodel.command import SETTINGS, common_parser, has_device, made, missing, named, settings_of
from wholemodel.measuring import Plan, measure
from wholemodel.picture import draw
from wholemodel.planned import facts, planned
from wholemodel.replay import Replay
from wholemodel.results import Results
from wholemodel.shape import config_of
from wholemodel.systems import SYSTEMS, Dense, Hga, Setup

from hga_compile.configs.loader import resolve_profile
from hga_compile.configs.profile import Profile

WHOLE = 65536  # tokens a step of a dense prefill whose memory is not capped: the more, the faster


def parser() -> argparse.ArgumentParser:
    found = common_parser(__doc__, SYSTEMS, "headline", cap=32.0, steps=256, prefill="inductor", limit=300.0)
    add = found.add_argument
    add("--contexts", default="16384,65536,131072,262144", help="tokens of the prompt")
    add("--replay", type=Path, action="append", default=[], metavar="FILE", help="recorded routes")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if not has_device(device):
        return 1
    names = named(options.systems, SYSTEMS)
    contexts = sorted(int(context) for context in options.contexts.split(","))
    config = config_of(options.shape, options.layers)
    cap = int(options.cap * 2**30)
    header, results = _results(options, config, cap)
    code = str(header["environment"]["code"])
    todo = missing(names, SYSTEMS, contexts, results, code)
    if todo:
        _run(options, config, device, cap, todo, results, code)
    draw(results.points, options.json.with_suffix(".png"), cap if device.type == "cuda" else None)
    show(results.points, str(header["environment"]["device"]))
    print(f"saved to {os.path.relpath(options.json)} and .png")
    return 0


def _results(options: argparse.Namespace, config: Any, cap: int) -> tuple[dict[str, Any], Results]:
    settings = {key: getattr(options, key) for key in SETTINGS}
    settings |= {"cap": cap, "replay": [path.name for path in options.replay]}
    header = {
        "benchmark": "headline",
        "environment": environment(options.device),
        "model": facts(config, options.shape, options.layers),
        "settings": settings,
    }
    return header, Results(options.json, header, options.fresh)


def _run(
    options: argparse.Namespace, config: Any, device: torch.device, cap: int, todo: list[tuple[str, int]],
    results: Results, code: str,
) -> None:  # fmt: skip
    model = made(options, config, device)
    longest = max(context for _, context in todo)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, longest), generator=generator).to(device)
    kept: dict[str, Any] = {}
    before = ""
    for name, context in todo:
        entry = SYSTEMS[name]
        if name != before:
            kept, before = {}, name
        profile, step = _settings(options, model, config, context, cap if entry.capped else None)
        plan = Plan(step, options.steps, options.warmup, options.limit, cap, options.patience)
        setup = Setup(
            context, plan.new, profile, settings_of(options), options.inner, options.dense_prefill, kept
        )
        print(f"{name} at {context:,} tokens, {step:,} a step", file=sys.stderr)
        maker = _replay_maker(options.replay, context + plan.new) if entry.routed else None
        point = measure(entry, model, ids[:, :context], setup, plan, maker)
        about = {"system": name, "label": entry.label, "context": context, "order": list(SYSTEMS).index(name)}
        about |= {"capped": entry.capped, "code": code, "hot_cache": profile.offload.hot_cache}
        if entry.make is Dense and options.inner == "inductor":
            about["prefill_inner"] = options.dense_prefill
        results.add(about | point)
        print(f"  {point['status']} {point['reason']}, {point['seconds']:.0f} s", file=sys.stderr)


def _settings(
    options: argparse.Namespace, model: PreTrainedModel, config: Any, context: int, cap: int | None
) -> tuple[Profile, int]:
    """Return what `hga run` would pick under the cap: the hot cache and the prefill step."""
    profile = resolve_profile({"profile": options.profile, "offload.tier": "host"})
    if cap is None:
        # Two steps at least: the first one compiles, and is not counted.
        return profile, options.step or min(WHOLE, -(-context // 2))
    return planned(model, config, options.shape, profile, context, cap, options.step)


def _replay_maker(paths: list[Path], length: int) -> Any:
    """Return what makes the lists of a routed system, of the longest recording that is short enough."""
    if not paths:
        return None
    from recorded import Recording

    recordings = [Recording.load(path) for path in paths]
    fit = [one for one in recordings if one.tokens <= length] or recordings
    chosen = max(fit, key=lambda one: one.tokens)

    def make(system: Hga) -> Replay:
        config = system.model.config
        layers, rows = config.num_hidden_layers, config.num_key_value_heads
        routing = system.profile.routing
        return Replay(chosen, layers, rows, length, routing, system.model.device)

    return make


def show(points: list[dict[str, Any]], device: str) -> None:
    """Print a row a point."""
    table = Table(title=f"a whole model, {device}")
    for heading in (
        "context",
        "system",
        "GPU GiB",
        "prefill tokens/s",
        "ms a token",
        "p99",
        "MB over PCIe",
        "hits",
    ):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for point in points:
        first = (str(point["context"]), point["label"])
        if point["status"] != "ok":
            table.add_row(*first, f"{point['status']} in {point['stage']} at {point['reached']:,}")
            continue
        rate = point["prefill"]["tokens_per_second"]
        near = (f"{point['memory']['reserved'] / 2**30:.2f}", f"{rate:,.0f}" if rate else "-")
        for key in ("decode", "decode_replayed"):
            if key in point:
                run = point[key]
                hits = "-" if run["hit_rate"] is None else f"{run['hit_rate']:.0%}"
                times = (f"{run['median_ms']:.2f}", f"{run['p99_ms']:.2f}", f"{run['pcie_bytes'] / 1e6:.1f}")
                table.add_row(*(first if key == "decode" else ("", "  recorded routes")), *near, *times, hits)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    sys.exit(main())
