"""How far routed attention is from dense attention on real texts.

    python benchmarks/quality.py --model DIR --lengths 8192 --texts emma,asyncio,email,hamlet --scored 512

The last `--scored` tokens of each text's first `--lengths` tokens are scored, teacher-forced, in two modes:
`decode` (dense prefill by the uncompiled model, then the scored queries routed) and `all` (the whole text
through the compiled model, every query routed). Rows: dense, a window-only control (the same budget, no group
chosen), and each profile. Every finished row is saved at once; `--resume` goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, find_model, load_model, model_facts
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from hga_compile.evaluation import corpora
from hga_compile.evaluation.candidates import Candidate, RoutedCandidate
from hga_compile.evaluation.nll import cases, summarise
from hga_compile.evaluation.reference import MODES
from hga_compile.evaluation.rows import Row, make_rows
from hga_compile.evaluation.study import Run, Study

SUMMARY_HEADINGS = (
    "tokens",
    "row",
    "mode",
    "texts",
    "delta NLL",
    "KL",
    "top-1",
    "attended",
    "K/V read",
    "summaries",
)
TEXT_HEADINGS = ("text", "tokens", "row", "mode", "NLL", "delta NLL", "KL")


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("text", "row", "mode") else "right")
    return table


def show(summary: list[dict[str, Any]], runs: list[dict[str, Any]], console: Console) -> None:
    """Print the averages, then each text."""
    title = "routed against dense, mean over texts (± standard error) [95% bootstrap interval]"
    table = _table(title, SUMMARY_HEADINGS)
    for entry in summary:
        cells = [f"{entry[key]['mean']:.1%}" for key in ("top1", "attended", "kv_bytes", "summary_bytes")]
        spread = [_spread(entry[key]) for key in ("delta_nll", "kl")]
        first = (str(entry["length"]), entry["row"], entry["mode"], str(entry["documents"]))
        table.add_row(*first, *spread, *cells)
    console.print(table)
    each = _table("each text (± standard error over its tokens)", TEXT_HEADINGS)
    for run in runs:
        delta = f"{run['delta_nll']:+.4f} ± {run['delta_nll_error']:.4f}"
        kl = f"{run['kl']:.4f} ± {run['kl_error']:.4f}"
        where = (run["text"], str(run["length"]), run["row"], run["mode"], f"{run['nll']:.3f}")
        each.add_row(*where, delta, kl)
    console.print(each)


def _spread(value: dict[str, float | None]) -> str:
    if value["error"] is None:
        return f"{value['mean']:.4f}"
    return f"{value['mean']:.4f} ± {value['error']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", help="checkpoint folder (default: HGA_MODELS/smollm2-135m)")
    add("--lengths", default="8192", help="tokens of each text, comma-separated")
    add("--texts", default="emma,asyncio,email,hamlet", help="names that `hga eval texts` shows")
    add("--scored", type=int, default=512, help="tokens scored at the end of each text")
    add("--profiles", default="default,paper", help="names or paths of profiles, comma-separated")
    add("--modes", default="decode,all", help="of decode and all")
    add("--set", action="append", default=[], metavar="FIELD=JSON", help="routing.budget.fraction=0.02")
    # Numbers do not depend on the inner compiler, and eager starts at once.
    add("--inner", default="eager", choices=("inductor", "aot_eager", "eager"))
    add("--no-control", action="store_true", help="leave out the window-only row")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--json", type=Path, default=RESULTS / "quality.json", help="where the result goes")
    add("--resume", action="store_true", help="keep the runs of --json that still hold")
    options = parser.parse_args(arguments)
    options.modes = options.modes.split(",")
    options.lengths = [int(length) for length in options.lengths.split(",")]
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"--modes takes {' and '.join(MODES)}, got {', '.join(sorted(unknown))}")
    if not 1 <= options.scored < min(options.lengths):
        parser.error(f"--scored must be at least 1 and below every length, got {options.scored}")
    return options


def say(run: Run) -> None:
    numbers = f"{run['delta_nll']:+.4f} {run['kl']:.4f}"
    print(f"{run['text']:14} {run['length']:>6} {run['row']:12} {run['mode']:7} {numbers}", file=sys.stderr)


def warn(line: str) -> None:
    print(line, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch._dynamo.config.recompile_limit = 64  # each row is a backend of its own for the same forward
    path = find_model(options.model)
    profiles = options.profiles.split(",")
    pairs = [pair.split("=", 1) for pair in options.set]
    extra = {"compile.inner": options.inner, **{key: json.loads(value) for key, value in pairs}}
    rows = make_rows(profiles, extra, not options.no_control)
    documents = [corpora.load(name) for name in options.texts.split(",")]
    settings = {key: getattr(options, key) for key in ("lengths", "scored", "modes", "inner", "dtype")}
    settings |= {"profiles": [Path(name).stem for name in profiles], "set": dict(pairs)}
    header = {"benchmark": "quality", "environment": environment(options.device), "model": model_facts(path)}
    header |= {"settings": settings, "documents": [document.entry() for document in documents]}
    study = Study(header, options.json, options.resume, say)
    model = load_model(path, options.device, getattr(torch, options.dtype))
    made: dict[tuple[str, str], Candidate] = {}

    def candidate(row: Row, mode: str) -> Candidate:
        if (row.name, mode) not in made:
            made[row.name, mode] = RoutedCandidate(model, row.in_mode(mode), dynamic=True)
        return made[row.name, mode]

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    for case in cases(documents, options.lengths, options.scored, 4, tokenizer, warn):
        study.case(case, rows, options.modes, model, candidate)
    study.save({"summary": summarise(study.runs)})
    console = Console(width=None if sys.stdout.isatty() else 160)
    show(summarise(study.runs), study.runs, console)
    console.print(f"saved to {os.path.relpath(options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
