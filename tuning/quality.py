"""The checkpoint and the texts that quality is measured on: the model's own, or one that stands in for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from hga_compile.configs.cards import ModelCard
from hga_compile.configs.catalogue import model_card
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import Routing
from hga_compile.evaluation.corpora import Document
from hga_compile.evaluation.nll import first_tokens
from hga_compile.evaluation.provenance import model_facts
from hga_compile.evaluation.reference import Reference
from hga_compile.tuning.capture import capture
from hga_compile.tuning.measure import Quality, measure
from hga_compile.tuning.screen import Screen
from hga_compile.tuning.target import Target, TargetError, find_model, local_weights

__all__ = ["STAND_IN", "Calibration", "Checkpoint", "quality_checkpoint"]

# What quality is transferred from where a model's own weights are not at hand.
STAND_IN = "smollm2-135m"


@dataclass(frozen=True)
class Checkpoint:
    """Weights that quality is measured on."""

    folder: Path
    card: ModelCard
    own: bool
    """Whether they are the tuned model's; else what is measured on them is transferred."""


@dataclass(frozen=True)
class _Run:
    """A loaded checkpoint, and dense runs of it on texts."""

    model: Any
    texts: list[tuple[str, Reference]]
    screen: Screen


class Calibration:
    """A checkpoint and texts; it is loaded and run densely when a number is asked for first.

    Parameters
    ----------
    checkpoint
        What quality is measured on.
    documents, lengths
        Each text is cut to each length; too short ones are left out.
    scored
        Tokens at the end of each that are predicted.
    screen_layers, screen_queries
        What the cheap stage looks at.
    device
        Where it runs.
    say
        Told what takes time.
    """

    def __init__(
        self, checkpoint: Checkpoint, documents: Sequence[Document], lengths: Sequence[int], *, scored: int,
        screen_layers: int, screen_queries: int, device: torch.device, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.checkpoint, self.documents, self.lengths = checkpoint, documents, sorted(lengths)
        self.scored, self.device, self.say = scored, device, say
        self.screen_layers, self.screen_queries = screen_layers, screen_queries
        self.facts = model_facts(checkpoint.folder)
        """Name, shape and SHA-256 of the checkpoint."""
        self._made: _Run | None = None
        self._lock = Lock()

    @property
    def length(self) -> int:
        """Tokens of the shortest text."""
        return self.lengths[0]

    def change(self, routing: Routing) -> float:
        """Return the cheap stage's number."""
        return self._run().screen.change(routing)

    def sensitivities(self, routing: Routing) -> dict[int, float]:
        """Return the cheap stage's number of each layer by itself."""
        return self._run().screen.sensitivities(routing)

    def quality(self, profile: Profile, compiled: bool = False) -> Quality:
        """Return the full model's numbers."""
        run = self._run()
        return measure(run.model, profile, run.texts, compiled)

    def _run(self) -> _Run:
        with self._lock:  # trials may be threads
            if self._made is None:
                self._made = self._load()
            return self._made

    def _load(self) -> _Run:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = self.checkpoint.folder
        self.say(f"loading {self.checkpoint.card.name}")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        model = model.to(self.device).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        texts, seen = [], []
        for length in self.lengths:
            for document in self.documents:
                ids = first_tokens(tokenizer, document.text, length)
                if ids is None:
                    self.say(f"text {document.name!r} has fewer than {length:,} tokens: left out")
                    continue
                self.say(f"dense run of {document.name}, {length:,} tokens")
                reference, captured = capture(model, ids, self.scored)
                texts.append((f"{document.name}@{length}", reference))
                seen.append(captured)
        if not texts:
            raise TargetError(f"no text has {self.length:,} tokens (--text, --corpus, --lengths)")
        return _Run(model, texts, Screen(seen, self.screen_layers, self.screen_queries))


def quality_checkpoint(target: Target, named: str | None) -> Checkpoint:
    """Return the checkpoint to measure on: the named one, the model's own, or the stand-in.

    Parameters
    ----------
    target
        The tuned model.
    named
        `--quality-model`: a folder, a name of the catalogue or a hub id whose weights are here.

    Raises
    ------
    TargetError
        None of them is on this machine.
    """
    if named is not None:
        found = find_model(named)
        if found.folder is None:
            raise TargetError(
                f"the weights of {named!r} are not on this machine: name a folder, or put them where "
                "HGA_MODELS points (--quality-model)"
            )
        return Checkpoint(found.folder, found.card, _same(found.card, target.card))
    if target.folder is not None:
        return Checkpoint(target.folder, target.card, True)
    card = model_card(STAND_IN)
    folder = local_weights(card)
    if folder is None:
        where = os.environ.get("HGA_MODELS")
        raise TargetError(
            f"no weights to measure quality on: neither those of {target.card.name} nor of {STAND_IN} are in "
            f"HGA_MODELS ({where or 'not set'}) or the hub's cache; name a checkpoint (--quality-model)"
        )
    return Checkpoint(folder, card, False)


def _same(one: ModelCard, other: ModelCard) -> bool:
    """Say whether two cards are of one model: by hub id, or by shape where one of them has none."""
    if one.hub_id and other.hub_id:
        return one.hub_id == other.hub_id
    ignored = {"geometry": {"source"}}
    return one.geometry.model_dump(exclude=ignored["geometry"]) == other.geometry.model_dump(
        exclude=ignored["geometry"]
    )
