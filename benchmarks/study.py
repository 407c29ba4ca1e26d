"""The runs behind `quality.py`: dense reference, routed rows, averages over texts, what is done already."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpora
from candidates import Candidate, Outcome
from common import write_json
from metrics import compare, over_documents, token_error
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

MODES = ("decode", "all")
DENSE = "dense"
MEASURES = ("nll", "delta_nll", "kl", "top1", "attended", "kv_bytes", "summary_bytes")


@dataclass(frozen=True)
class Row:
    """One setting to measure: its name in the table, its compile options, and what identifies it."""

    name: str
    options: Mapping[str, object]
    identity: str


@dataclass(frozen=True)
class Reference:
    """The dense model on one text: logits and K/V of all tokens but the last, and the tokens themselves."""

    ids: Tensor
    logits: Tensor
    cache: DynamicCache

    @property
    def scored(self) -> int:
        """Number of tokens that are scored."""
        return len(self.logits)


def dense_reference(model: PreTrainedModel, ids: Tensor, scored: int) -> Reference:
    """Run the uncompiled model once over `ids` `[1, tokens]`; predict the last `scored` of them."""
    cache = DynamicCache()  # without a config: transformers' own layers, whatever hooks are installed
    output = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=scored)
    return Reference(ids, output.logits[0], cache)


def run_mode(candidate: Candidate, mode: str, reference: Reference) -> Outcome:
    """Give the candidate's logits for the scored tokens in one of `MODES`."""
    queries = reference.ids[:, :-1]
    if mode == "all":
        return candidate.whole(queries, reference.scored)
    prefix = queries.shape[1] - reference.scored
    return candidate.decode(reference.cache, prefix, queries[:, prefix:])


def measure(candidate: Candidate, mode: str, reference: Reference) -> dict[str, Any]:
    """Score one candidate on one text: means over the scored tokens, with their standard errors."""
    start = time.perf_counter()
    outcome = run_mode(candidate, mode, reference)
    seconds = time.perf_counter() - start
    scores = compare(reference.logits, outcome.logits, reference.ids[0, -reference.scored :])
    delta = scores.nll - scores.dense_nll
    return {
        "nll": float(scores.nll.mean()),
        "delta_nll": float(delta.mean()),
        "delta_nll_error": token_error(delta),
        "kl": float(scores.kl.mean()),
        "kl_error": token_error(scores.kl),
        "top1": float(scores.agree.mean()),
        "attended": outcome.use.attended,
        "kv_bytes": outcome.use.kv_bytes,
        "summary_bytes": outcome.use.summary_bytes,
        "fallbacks": dict(outcome.use.fallbacks),
        "seconds": round(seconds, 2),
    }


def dense_row(reference: Reference) -> dict[str, Any]:
    """Return the dense model's own row: what every other one is compared with."""
    scores = compare(reference.logits, reference.logits, reference.ids[0, -reference.scored :])
    nll = float(scores.nll.mean())
    zeros = dict.fromkeys(("delta_nll", "delta_nll_error", "kl", "kl_error", "summary_bytes"), 0.0)
    return {"nll": nll, **zeros, **dict.fromkeys(("top1", "attended", "kv_bytes"), 1.0)}


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average the runs over documents, one entry for each length, row and mode, in order of appearance."""
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["length"], run["row"], run["mode"]), []).append(run)
    entries = []
    for (length, row, mode), members in groups.items():
        entry: dict[str, Any] = {"length": length, "row": row, "mode": mode, "documents": len(members)}
        for key in MEASURES:
            entry[key] = vars(over_documents([member[key] for member in members]))
        entries.append(entry)
    return entries


def run_key(**facts: object) -> str:
    """Return what must be the same for a saved run to be taken again."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


class Study:
    """All runs of one call: knows which are done, computes the others, saves after each."""

    def __init__(self, out: Path, header: dict[str, Any], resume: bool) -> None:
        self.out = out
        self.header = header
        self.old: dict[str, dict[str, Any]] = {}
        if resume and out.is_file():
            saved = json.loads(out.read_text())
            self.old = {run["key"]: run for run in saved["runs"] + saved.get("unvisited", [])}
        self.runs: list[dict[str, Any]] = []
        self.documents: dict[str, dict[str, object]] = {}

    def text(
        self,
        document: corpora.Document,
        length: int,
        scored: int,
        rows: list[Row],
        modes: list[str],
        reference: Callable[[], Reference],
        candidate: Callable[[Row], Candidate],
    ) -> None:
        """Measure every row and mode on one text; the dense reference is made only if a run is missing."""
        self.documents[document.name] = document.entry()
        made: list[Reference] = []

        def dense() -> Reference:
            if not made:
                made.append(reference())
            return made[0]

        shared = {"text": document.sha256, "length": length, "scored": scored, "model": self.header["model"]}
        shared |= {"dtype": self.header["settings"]["dtype"], "device": self.header["environment"]["device"]}
        code = self.header["environment"]["code"]
        plan: list[tuple[Row | None, str]] = [(None, "-"), *((row, mode) for mode in modes for row in rows)]
        for row, mode in plan:
            name = row.name if row else DENSE
            what = {"row": row.identity, "mode": mode, "code": code} if row else {"row": DENSE}
            key = run_key(**what, **shared)
            found = self.old.pop(key, None)
            if found is None:
                result = measure(candidate(row), mode, dense()) if row else dense_row(dense())
                where = {"text": document.name, "length": length, "scored": scored, "row": name, "mode": mode}
                found = {"key": key, **where, **result}
                numbers = f"{found['delta_nll']:+.4f} {found['kl']:.4f}"
                print(f"{document.name:14} {length:>6} {name:12} {mode:7} {numbers}", file=sys.stderr)
            self.runs.append(found)
            self.save()

    def save(self, finished: bool = False) -> None:
        """Write everything measured so far; until the end also older runs that this call has not come to."""
        result = {**self.header, "documents": list(self.documents.values()), "runs": self.runs}
        if self.old and not finished:
            result["unvisited"] = list(self.old.values())
        write_json(self.out, {**result, "summary": summarise(self.runs)})
