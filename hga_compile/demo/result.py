"""What the demo was asked for and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hga_compile.cli.checkpoint import Checkpoint
from hga_compile.demo.measure import Reading
from hga_compile.demo.text import ANSWER, FACT, QUESTION, Document

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Settings:
    """What the demo is asked for."""

    checkpoint: Checkpoint
    profile: Any
    device: torch.device
    dtype: torch.dtype
    tokens: int = 8192
    """Context length, the answer included."""
    depth: float = 0.5
    """Where the fact is planted: 0 before the text, 1 behind it."""
    picture: Path | None = None
    """PNG of the routes; None for none."""
    inner: str | None = None
    """Compiler of the rest of the graph, instead of the profile's."""


@dataclass(frozen=True)
class Side:
    """One model's column of the result."""

    reading: Reading
    memory: dict[str, int]
    """Bytes of K/V by place after the last token."""
    prefill_reads: dict[str, Any]
    """Shares of the prefill, see `hga_compile.cli.engine.Engine.reads`."""
    decode_reads: dict[str, Any]
    """Shares of the decode."""
    read_per_token: float
    """Bytes of K/V and summaries that one decoded token reads, all layers."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        found = self.reading
        return {
            "answer": found.text,
            "correct": found.correct,
            "nll": found.nll,
            "prefill": {**found.prefill.to_dict(), **self.prefill_reads},
            "decode": {**found.decode.to_dict(), **self.decode_reads},
            "kv_bytes": self.memory,
            "bytes_read_per_decoded_token": self.read_per_token,
            "peak_accelerator_bytes": found.peak_bytes,
        }


@dataclass(frozen=True)
class Result:
    """Both columns and what they have in common."""

    settings: Settings
    document: Document
    scored: int
    """Tokens that were scored."""
    dense: Side
    hga: Side
    divergence: float
    """Mean KL(dense || hga) over the scored tokens, in nats."""
    agreement: float
    """Share of scored tokens at which both choose the same token."""
    compile_seconds: float
    sites: dict[str, Any]
    """Routed and dense attention sites, and fallbacks."""
    seconds: float
    """The whole demo, from loading the model on."""

    @property
    def delta_nll(self) -> float:
        """NLL of HGA minus NLL of dense, in nats a token."""
        return self.hga.reading.nll - self.dense.reading.nll

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "model": str(self.settings.checkpoint.folder),
            "device": str(self.settings.device),
            "dtype": str(self.settings.dtype).removeprefix("torch."),
            "profile": self.settings.profile.name,
            "inner": self.settings.inner or self.settings.profile.compile.inner,
            "tokens": self.settings.tokens,
            "fact": FACT,
            "fact_at": self.document.fact.start,
            "question": QUESTION,
            "expected_answer": ANSWER,
            "scored_tokens": self.scored,
            "delta_nll": self.delta_nll,
            "kl": self.divergence,
            "same_first_choice": self.agreement,
            "dense": self.dense.to_dict(),
            "hga": {**self.hga.to_dict(), "compile_seconds": self.compile_seconds, "sites": self.sites},
            "picture": None if self.settings.picture is None else str(self.settings.picture),
            "seconds": self.seconds,
        }
