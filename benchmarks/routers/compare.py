"""Routers side by side at one budget: how far each is from dense attention on real texts, and what it reads.

    python benchmarks/routers/compare.py --model DIR --length 4096 --texts emma,asyncio,hamlet --resume

Dense prefill, then the last `--scored` tokens routed, teacher-forced, each query by itself, in plain torch.
Sinks, window, votes and the fill of the budget are the same for all; a router brings its unit, its summaries
and its scores. `--equal bytes` gives every router but the oracles the bytes that ours reads, summaries
included. `default, compiled` is the package's compiled model on the same texts: it checks the frame.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import RESULTS, environment, find_model, load_model, model_facts
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.evaluation import corpora
from hga_compile.evaluation.candidates import Candidate, Outcome, RoutedCandidate
from hga_compile.evaluation.nll import cases, summarise
from hga_compile.evaluation.rows import Row
from hga_compile.evaluation.study import Run, Study
from routers.arkvale import ArkVale
from routers.attention import NAME, RoutedModel
from routers.centred import Centred
from routers.infllm import InfLLM
from routers.lowbit import LowBit
from routers.mean import Mean
from routers.oracle import Oracle
from routers.quest import Quest
from routers.router import BYTES, Layer, Router
from routers.shadowkv import ShadowKV
from routers.window import Window

ROUTERS: dict[str, Router] = {
    "window only": Window(),
    "mean, 16": Mean(16),
    "mean, 4": Mean(4),
    "Quest, 16": Quest(16),
    "ArkVale, 32": ArkVale(32),
    "InfLLM, 128": InfLLM(128),
    "InfLLM, 32": InfLLM(32),
    "ShadowKV, 8": ShadowKV(8),
    "low-bit, 4 (ours)": LowBit(4),
    "low-bit, 2": LowBit(2),
    "low-bit, 1": LowBit(1),
    "low-bit, 4, centred by blocks": Centred(4),
    "low-bit, 1, centred by blocks": Centred(1),
    "oracle groups, 4": Oracle(4),
    "oracle tokens": Oracle(1),
}
OURS = "low-bit, 4 (ours)"
COMPILED = "default, compiled"


def digest() -> str:
    """Return a digest of the routers' sources: `--resume` never mixes results of two."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.name != "compare.py":
            found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def index_share(router: Router, head_dim: int) -> float:
    """Return the bytes of a router's index as a share of the K/V bytes."""
    tokens = 1024
    layer = Layer(torch.randn(1, tokens, head_dim), torch.randn(1, tokens))
    return router.index(layer).bytes_per_token / (2 * BYTES * head_dim)


def bonuses(equal: str, head_dim: int) -> dict[str, float]:
    """Return by how large a share of the tokens each router's budget grows, so that all read the same."""
    if equal == "tokens":
        return dict.fromkeys(ROUTERS, 0.0)
    ours = index_share(ROUTERS[OURS], head_dim)
    shares = {name: ours - index_share(router, head_dim) for name, router in ROUTERS.items()}
    return {name: 0.0 if isinstance(ROUTERS[name], Oracle) else share for name, share in shares.items()}


def rows_of(names: list[str], routing: Routing, extra: dict[str, float]) -> list[Row]:
    """Return a row for each router; what identifies it are its settings, its budget and the routers' code."""
    section = routing.model_dump(mode="json")
    code = digest()
    budget = section["budget"]
    options = {"profile": "default", "compile.inner": "eager", "routing.budget": budget}
    rows = []
    for name in names:
        identity = COMPILED if name == COMPILED else f"{ROUTERS[name]!r} {extra[name]} {code}"
        rows.append(Row(name, options if name == COMPILED else {}, f"{identity} {routing!r}", section))
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", help="checkpoint folder (default: HGA_MODELS/smollm2-135m)")
    add("--length", type=int, default=4096, help="tokens of each text")
    add("--texts", default="emma,asyncio,email,hamlet", help="names that `hga eval texts` shows")
    add("--scored", type=int, default=256, help="tokens scored at the end of each text")
    add("--budget", type=float, default=0.03, help="share of the visible tokens that is attended to")
    add("--equal", choices=("tokens", "bytes"), default="tokens", help="what is the same for all routers")
    add("--routers", help=f"names with semicolons, of: {'; '.join([*ROUTERS, COMPILED])}")
    add("--json", type=Path, default=RESULTS / "routers.json", help="where the result goes")
    add("--resume", action="store_true", help="keep the runs of --json that still hold")
    options = parser.parse_args(arguments)
    every = [*ROUTERS, COMPILED]
    options.names = [name.strip() for name in options.routers.split(";")] if options.routers else every
    if unknown := [name for name in options.names if name not in every]:
        parser.error(f"--routers takes {'; '.join(every)}, got {'; '.join(unknown)}")
    if not 1 <= options.scored < options.length:
        parser.error(f"--scored must be at least 1 and below --length, got {options.scored}")
    if not 0 < options.budget <= 1:
        parser.error(f"--budget must be above 0 and at most 1, got {options.budget}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison."""
    options = parse(arguments)
    path = find_model(options.model)
    # No least number of tokens: the share is what is compared.
    routing = Routing(budget=Budget(fraction=options.budget))
    model = load_model(path)
    head_dim = getattr(model.config, "head_dim", None)
    head_dim = head_dim or model.config.hidden_size // model.config.num_attention_heads
    extra = bonuses(options.equal, head_dim)
    documents = [corpora.load(name) for name in options.texts.split(",")]
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    found = cases(documents, [options.length], options.scored, 1, tokenizer, warn)
    settings = {key: getattr(options, key) for key in ("length", "scored", "budget", "equal")}
    header = {
        "benchmark": "routers",
        "environment": environment("cpu"),
        "model": model_facts(path),
        "settings": {**settings, "dtype": "float32", "routing": routing.model_dump(mode="json")},
        "documents": [document.entry() for document in documents],
    }
    study = Study(header, options.json, options.resume, say)
    candidate = make_candidates(model, routing, extra)
    rows = rows_of(options.names, routing, extra)
    for case in found:
        study.case(case, rows, ["decode"], model, candidate)
    summary = summarise(study.runs)
    study.save({"summary": summary})
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(summary, options))
    console.print(f"saved to {os.path.relpath(options.json)}")
    return 0


def make_candidates(
    model: PreTrainedModel, routing: Routing, extra: dict[str, float]
) -> Callable[[Row, str], Candidate]:
    """Return what finds or makes the model of a row."""
    routed = RoutedModel(model)
    compiled: list[Candidate] = []

    def candidate(row: Row, mode: str) -> Candidate:
        if row.name != COMPILED:
            return routed.candidate(ROUTERS[row.name], routing, extra[row.name])
        if not compiled:
            compiled.append(Compiled(model, row.in_mode(mode)))
        return compiled[0]

    return candidate


class Compiled(RoutedCandidate):
    """The package's compiled model, with transformers' own attention for as long as it runs."""

    def __init__(self, model: PreTrainedModel, options: Mapping[str, object]) -> None:
        super().__init__(model, options, dynamic=True)

    def decode(self, dense: DynamicCache, prefix: int, queries: Tensor) -> Outcome:
        """See `RoutedCandidate.decode`."""
        self.model.set_attn_implementation("sdpa")
        try:
            return super().decode(dense, prefix, queries)
        finally:
            self.model.set_attn_implementation(NAME)


def say(run: Run) -> None:
    """Tell about a finished run."""
    numbers = f"{run['delta_nll']:+.4f} {run['kl']:.4f} {run['attended']:.3%}"
    print(f"{run['text']:14} {run['length']:>6} {run['row']:20} {numbers}", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Tell what is left out."""
    print(line, file=sys.stderr)


def table(summary: list[dict[str, Any]], options: argparse.Namespace) -> Table:
    """Return the averages over texts as a table."""
    title = f"{options.length:,} tokens, {options.budget:.1%}, equal {options.equal}: mean over texts [95%]"
    found = Table(title=title, title_justify="left")
    for heading in ("router", "texts", "KL(dense || row)", "delta NLL", "top-1", "attended", "summaries"):
        found.add_column(heading, justify="left" if heading == "router" else "right")
    for entry in summary:
        cells = [f"{entry[key]['mean']:.2%}" for key in ("top1", "attended", "summary_bytes")]
        spread = [_spread(entry[key]) for key in ("kl", "delta_nll")]
        found.add_row(entry["row"], str(entry["documents"]), *spread, *cells)
    return found


def _spread(value: dict[str, float | None]) -> str:
    mean = f"{value['mean']:.4f}"
    return mean if value["low"] is None else f"{mean} [{value['low']:.4f}, {value['high']:.4f}]"


if __name__ == "__main__":
    sys.exit(main())
