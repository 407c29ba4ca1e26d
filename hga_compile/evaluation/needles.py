"""Retrieval from long texts: facts planted at a depth, asked for at the end, scored teacher-forced.

Greedy decoding gives the answer exactly if at every token of it the likeliest next one is right, so one
forward pass over question and answer says what a generation would.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hga_compile.demo.text import frame
from hga_compile.evaluation.candidates import Outcome
from hga_compile.evaluation.metrics import compare, over_documents
from hga_compile.evaluation.nll import SHARES
from hga_compile.evaluation.reference import Reference
from hga_compile.evaluation.study import Case, Run, Scores
from hga_compile.evaluation.tasks import TASK, TASKS, Task

MEASURES = ("exact", "found", "nll", "delta_nll", "kl")


class HaystackError(ValueError):
    """A text or length that a task does not fit; the message says which and the knob."""


@dataclass(frozen=True)
class Haystack:
    """Tokens of a text, paragraph by paragraph."""

    paragraphs: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, text: str, tokenizer: Any) -> Haystack:
        """Split a text at its empty lines and tokenise the parts."""
        blocks = [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]
        return cls(tuple(tuple(_encode(tokenizer, block + "\n\n")) for block in blocks))

    def cut(self, start: int, tokens: int) -> tuple[list[int], list[int]]:
        """Return `tokens` tokens from paragraph `start` on, around the end, and where paragraphs begin.

        Raises
        ------
        HaystackError
            If the text is shorter.
        """
        body: list[int] = []
        edges = [0]
        for number in range(len(self.paragraphs)):
            body += self.paragraphs[(start + number) % len(self.paragraphs)]
            if len(body) >= tokens:
                return body[:tokens], [*edges, tokens]
            edges.append(len(body))
        raise HaystackError(
            f"the text to hide facts in has {len(body):,} tokens, wanted {tokens:,}; give a longer one "
            "(--text) or smaller --lengths"
        )


@dataclass(frozen=True)
class Plan:
    """One cell of the map: which task, how many facts, how long, how deep."""

    task: str
    count: int
    length: int
    depth: float
    trial: int


def plans(
    tasks: Sequence[tuple[str, int]], lengths: Sequence[int], depths: Sequence[float], trials: int
) -> list[Plan]:
    """Return every cell, all of one length together."""
    return [
        Plan(task, count, length, depth, trial)
        for length in sorted(lengths)
        for task, count in tasks
        for depth in depths
        for trial in range(trials)
    ]


def build(plan: Plan, haystack: Haystack, tokenizer: Any) -> Case:
    """Plant a task's facts in the text and frame it with the question and the answer.

    Parameters
    ----------
    plan
        What to build; the same plan gives the same case.
    haystack
        The text.
    tokenizer
        Of transformers; its chat template is used if it has one.

    Returns
    -------
    Case
        Exactly `plan.length` tokens. Question and answer are the scored ones, so that `decode` routes both.

    Raises
    ------
    HaystackError
        If the length has no room for a text, or the text is too short.
    """
    # Depth is left out: a map's columns differ in the place of the fact alone.
    draw = random.Random(f"{plan.task} {plan.count} {plan.trial}")
    task = TASKS[plan.task](draw, plan.depth, plan.count)
    opening, closing = (_encode(tokenizer, part) for part in frame(tokenizer, TASK, task.question))
    opening = [*_begin(tokenizer), *opening]
    closing = [*closing, *_encode(tokenizer, _lead(tokenizer, task.lead))]
    answer, spans = _answer(task, tokenizer)
    facts = [_encode(tokenizer, needle.text + "\n\n") for needle in task.needles]
    room = plan.length - sum(map(len, (opening, closing, answer, *facts)))
    if room < sum(map(len, facts)):
        raise HaystackError(
            f"the length must have room for the facts and a text, got {plan.length} tokens; try 1024 "
            "(--lengths)"
        )
    body, edges = haystack.cut(draw.randrange(len(haystack.paragraphs)), room)
    body = _plant(task, facts, body, edges, draw)
    ids = torch.tensor([[*opening, *body, *closing, *answer]])
    where = {"task": plan.task, "facts": plan.count, "length": plan.length}
    where |= {"depth": plan.depth, "trial": plan.trial}
    return Case(where, ids, len(closing) + len(answer), _scores(len(answer), spans))


def _plant(
    task: Task, facts: list[list[int]], body: list[int], edges: list[int], draw: random.Random
) -> list[int]:
    """Insert facts at the starts of paragraphs nearest to their depths; equal places keep their order."""
    places = []
    for number, (needle, fact) in enumerate(zip(task.needles, facts, strict=True)):
        depth = draw.random() if needle.depth is None else needle.depth
        places.append((min(edges, key=lambda edge: abs(edge - depth * len(body))), number, fact))
    for place, _, fact in sorted(places, reverse=True):
        body = [*body[:place], *fact, *body[place:]]
    return body


def _answer(task: Task, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the answer's tokens, and where each of its parts lies in them."""
    tokens: list[int] = []
    spans = []
    for number, part in enumerate(task.answers):
        if number:
            tokens += _encode(tokenizer, ",")
        found = _encode(tokenizer, f" {part}")
        spans.append((len(tokens), len(tokens) + len(found)))
        tokens += found
    return tokens, spans


def _scores(length: int, spans: Sequence[tuple[int, int]]) -> Scores:
    """Return the function that scores a run by the answer's tokens, the last `length` scored ones."""

    def scores(reference: Reference, outcome: Outcome | None) -> Run:
        dense = reference.logits[-length:]
        routed = dense if outcome is None else outcome.logits[-length:]
        targets = reference.targets[-length:]
        numbers = compare(dense, routed, targets)
        right = routed.argmax(-1).eq(targets).tolist()
        found = [all(right[first:end]) for first, end in spans]
        return {
            "exact": float(all(found)),
            "found": sum(found) / len(found),
            "nll": float(numbers.nll.mean()),
            "delta_nll": float((numbers.nll - numbers.dense_nll).mean()),
            "kl": float(numbers.kl.mean()),
        }

    return scores


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Average the runs of each cell, and of all depths of a length (`depth` None), in order of appearance."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        for depth in (run["depth"], None):
            key = (run["task"], run["facts"], run["length"], run["row"], run["mode"], depth)
            groups.setdefault(key, []).append(run)
    names = ("task", "facts", "length", "row", "mode", "depth")
    return [
        dict(zip(names, key, strict=True))
        | {"trials": len(members)}
        | {measure: vars(over_documents([m[measure] for m in members])) for measure in (*MEASURES, *SHARES)}
        for key, members in groups.items()
    ]


def flat(summary: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the summary as rows of a CSV; a depth of ``all`` stands for all of them."""
    rows = []
    for entry in summary:
        row: dict[str, Any] = {key: entry[key] for key in ("task", "facts", "length", "row", "mode")}
        row |= {"depth": "all" if entry["depth"] is None else entry["depth"], "trials": entry["trials"]}
        for key in (*MEASURES, *SHARES):
            row[key] = entry[key]["mean"]
            row |= {f"{key}_low": entry[key]["low"], f"{key}_high": entry[key]["high"]}
        rows.append(row)
    return rows


def _encode(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


def _lead(tokenizer: Any, lead: str) -> str:
    """Return the lead as it goes on from the frame: a chat template ends in a line break or a mark."""
    return lead if getattr(tokenizer, "chat_template", None) else f" {lead}"


def _begin(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer opens every text with; a chat template has it in its text."""
    first = tokenizer.bos_token_id
    opens = first is not None and first in tokenizer("").input_ids
    return [first] if opens and not getattr(tokenizer, "chat_template", None) else []
