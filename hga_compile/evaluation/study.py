"""A study: sequences times rows times modes, each run once, saved at once, and taken again on `resume`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hga_compile.evaluation.candidates import Candidate, Outcome
from hga_compile.evaluation.files import write_json
from hga_compile.evaluation.reference import DENSE, Reference, dense_reference, run_mode
from hga_compile.evaluation.rows import Row

MEASUREMENT = 1  # raised when the same run would give other numbers, so that old ones are not taken again

Run = dict[str, Any]
Scores = Callable[[Reference, Outcome | None], Run]
MakeCandidate = Callable[[Row, str], Candidate]


class StudyError(ValueError):
    """A result that cannot be gone on from; the message says why."""


@dataclass(frozen=True)
class Case:
    """One sequence to measure on."""

    where: Mapping[str, Any]
    """What its rows say about it: text, length, depth, ..."""
    ids: Tensor
    """All tokens, `[1, tokens]` int64, on the CPU."""
    scored: int
    """How many of the last tokens are predicted."""
    scores: Scores
    """Numbers of a run, from the reference and the candidate's outcome; None is the dense row."""
    scoring: str = ""
    """What `scores` depends on: runs of another scoring are not taken again."""

    def identity(self) -> dict[str, object]:
        """Return what a saved run must agree in."""
        digest = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()
        return {"ids": digest, "scored": self.scored, "scoring": self.scoring, "where": dict(self.where)}


@dataclass
class Study:
    """All runs of one call: knows which are done, computes the others, saves after each.

    Parameters
    ----------
    header
        What the result says about model, environment and settings.
    out
        Result file; None: nothing is saved.
    resume
        Take the runs of `out` that still hold.
    say
        Told about every run that was computed.
    """

    header: Mapping[str, Any]
    out: Path | None = None
    resume: bool = False
    say: Callable[[Run], None] = lambda run: None
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.old: dict[str, Run] = {}
        if self.resume and self.out is not None and self.out.is_file():
            try:
                saved = json.loads(self.out.read_text(encoding="utf-8"))
                self.old = {run["key"]: run for run in saved["runs"] + saved.get("unvisited", [])}
            except (ValueError, KeyError, TypeError) as error:
                raise StudyError(
                    f"{self.out.name} is no result to go on from: {error}; leave out --resume"
                ) from error

    def case(
        self, case: Case, rows: Sequence[Row], modes: Sequence[str], model: PreTrainedModel,
        candidate: MakeCandidate, skip: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Measure dense, and every row in every mode, on one sequence.

        Parameters
        ----------
        case
            The sequence.
        rows, modes
            What to measure.
        model
            The uncompiled model; it runs only if a number is missing.
        candidate
            Makes or finds the compiled model of a row in a mode.
        skip
            Told the tokens of a run that is taken again.
        """
        made: list[Reference] = []

        def dense() -> Reference:
            if not made:
                made.append(dense_reference(model, case.ids.to(model.device), case.scored))
            return made[0]

        facts = {"measurement": MEASUREMENT, "model": self.header["model"], **case.identity()}
        environment = self.header["environment"]
        facts |= {"dtype": self.header["settings"]["dtype"]}
        facts |= {key: environment.get(key) for key in ("device", "torch", "transformers")}
        code = environment["code"]
        plan: list[tuple[Row | None, str]] = [(None, "-"), *((row, mode) for mode in modes for row in rows)]
        for row, mode in plan:
            what = {"row": row.identity, "mode": mode, "code": code} if row else {"row": DENSE}
            key = run_key(**what, **facts)
            found = self.old.pop(key, None)
            if found is None:
                with torch.no_grad():
                    outcome = run_mode(candidate(row, mode), mode, dense()) if row else None
                    numbers = case.scores(dense(), outcome)
                name = row.name if row else DENSE
                found = {
                    "key": key,
                    **case.where,
                    "scored": case.scored,
                    "row": name,
                    "mode": mode,
                    **numbers,
                }
                if outcome is not None:
                    use = outcome.use
                    found |= {"attended": use.attended, "kv_bytes": use.kv_bytes}
                    found |= {"summary_bytes": use.summary_bytes, "fallbacks": dict(use.fallbacks)}
                else:
                    found |= {"attended": 1.0, "kv_bytes": 1.0, "summary_bytes": 0.0, "fallbacks": {}}
                self._add(found)
                self.say(found)
                continue
            if row is not None:
                found = {**found, "row": row.name}
                skip(case_tokens(case, mode))
            self._add(found)

    def _add(self, run: Run) -> None:
        self.runs.append(run)
        self.save()

    def save(self, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write everything measured so far; without a summary also older runs not come to yet."""
        result = {**self.header, "runs": self.runs}
        if self.old and summary is None:
            result["unvisited"] = list(self.old.values())
        result |= summary or {}
        if self.out is not None:
            write_json(self.out, result)
        return result


def case_tokens(case: Case, mode: str) -> int:
    """Return the tokens that a candidate reads in a mode: what a progress bar counts."""
    return case.scored if mode == "decode" else case.ids.shape[1] - 1


def run_key(**facts: object) -> str:
    """Return what must be the same for a saved run to be taken again."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
