"""Teacher-forced distance from dense attention on texts, by the position of the scored token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hga_compile.evaluation.candidates import Outcome
from hga_compile.evaluation.corpora import Document
from hga_compile.evaluation.metrics import TokenScores, compare, over_documents, token_error
from hga_compile.evaluation.reference import Reference
from hga_compile.evaluation.study import Case, Run, Scores

DISTANCES = ("nll", "delta_nll", "kl", "top1")
SHARES = ("attended", "kv_bytes", "summary_bytes")
# More characters a token than texts have: a whole novel need not be tokenised for its first pages.
_CHARACTERS = 10


def first_tokens(tokenizer: Any, text: str, length: int) -> Tensor | None:
    """Return the first `length` token ids of a text, `[1, length]`; None if it has fewer."""
    for part in (text[: _CHARACTERS * length], text):
        ids: list[int] = tokenizer(part).input_ids
        if len(ids) >= length:
            return torch.tensor([ids[:length]])
    return None


def cases(
    documents: Iterable[Document], lengths: Sequence[int], scored: int, buckets: int, tokenizer: Any,
    say: Callable[[str], None] = lambda _: None,
) -> list[Case]:  # fmt: skip
    """Cut texts to lengths; a text that is too short for a length is left out there, which is said.

    Parameters
    ----------
    documents
        Texts.
    lengths
        Tokens of each case.
    scored
        Tokens at its end that are predicted.
    buckets
        Runs of positions that the scored tokens are divided into.
    tokenizer
        Of transformers.
    say
        Told what is left out.
    """
    found = []
    for document in documents:
        for length in sorted(lengths):
            ids = first_tokens(tokenizer, document.text, length)
            if ids is None:
                say(f"text {document.name!r} has fewer than {length:,} tokens: left out at that length")
                continue
            where = {"text": document.name, "length": length}
            scores = scores_in(bounds(length, scored, buckets))
            found.append(Case(where, ids, scored, scores, f"{buckets} buckets"))
    return sorted(found, key=lambda case: int(case.where["length"]))


def bounds(length: int, scored: int, buckets: int) -> list[tuple[int, int]]:
    """Divide the positions of the last `scored` of `length` tokens into runs, ``first <= position < end``."""
    edges = [length - scored + scored * number // buckets for number in range(buckets + 1)]
    return [(first, end) for first, end in pairwise(edges) if first < end]


def scores_in(parts: Sequence[tuple[int, int]]) -> Scores:
    """Return the function that scores a run, as a whole and in each run of positions."""

    def scores(reference: Reference, outcome: Outcome | None) -> Run:
        routed = reference.logits if outcome is None else outcome.logits
        found = compare(reference.logits, routed, reference.targets)
        delta = found.nll - found.dense_nll
        whole = {**_means(found, slice(None)), "delta_nll_error": token_error(delta)}
        whole |= {"kl_error": token_error(found.kl)}
        start = parts[0][0]
        buckets = [
            {"first": first, "end": end, **_means(found, slice(first - start, end - start))}
            for first, end in parts
        ]
        return {**whole, "buckets": buckets}

    return scores


def _means(scores: TokenScores, part: slice) -> dict[str, float]:
    nll, dense = scores.nll[part], scores.dense_nll[part]
    return {
        "nll": float(nll.mean()),
        "delta_nll": float((nll - dense).mean()),
        "kl": float(scores.kl[part].mean()),
        "top1": float(scores.agree[part].mean()),
    }


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Average the runs over texts, one entry for each length, row and mode, in order of appearance."""
    groups: dict[tuple[int, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["length"], run["row"], run["mode"]), []).append(run)
    entries = []
    for (length, row, mode), members in groups.items():
        entry: dict[str, Any] = {"length": length, "row": row, "mode": mode, "documents": len(members)}
        entry |= {key: vars(over_documents([m[key] for m in members])) for key in (*DISTANCES, *SHARES)}
        entry["buckets"] = []
        for number, bucket in enumerate(members[0]["buckets"]):
            place = {"first": bucket["first"], "end": bucket["end"]}
            values = {key: [m["buckets"][number][key] for m in members] for key in DISTANCES}
            entry["buckets"].append(place | {key: vars(over_documents(v)) for key, v in values.items()})
        entries.append(entry)
    return entries


def flat(summary: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the summary as rows of a CSV: all scored positions first, then each run of them."""
    rows = []
    for entry in summary:
        head = {key: entry[key] for key in ("length", "row", "mode", "documents")}
        whole = {"first": entry["buckets"][0]["first"], "end": entry["buckets"][-1]["end"]}
        for part in ({**entry, **whole, "part": "all"}, *({**b, "part": "bucket"} for b in entry["buckets"])):
            row = {**head, "part": part["part"], "first": part["first"], "end": part["end"]}
            for key in (*DISTANCES, *SHARES):
                if key in part:
                    row[key] = part[key]["mean"]
                    row |= {f"{key}_low": part[key]["low"], f"{key}_high": part[key]["high"]}
            rows.append(row)
    return rows
