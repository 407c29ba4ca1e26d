"""One reading of the demo's document by one model: scored text, answer, speed, bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hga_compile.cli.decode import Forward, Pace, greedy, stop_tokens
from hga_compile.cli.engine import Engine
from hga_compile.demo.text import ANSWER, Document

if TYPE_CHECKING:
    import torch

STEP = 1024  # tokens a forward pass of the prefill
SCORED_STEP = 256  # the logits of so many tokens exist at a time
ANSWER_TOKENS = 32  # decoded tokens, past the answer's end too: the speed of few tokens is noise
WARM_UP = 64  # tokens whose reading compiles the graphs
# Logits that a prefill step asks for: one would be another graph than the scored steps' many.
KEEP = 2

Score = Callable[["torch.Tensor", "torch.Tensor"], float]


@dataclass(frozen=True)
class Parts:
    """The document cut where the reading changes: each part is a run of token ids, ``[1, tokens]``."""

    body: torch.Tensor
    """Read without looking at the logits."""
    scored: torch.Tensor
    """Its logits predict `targets`."""
    targets: torch.Tensor
    """The last tokens of the text."""
    question: torch.Tensor
    """The last token of the text, the question, and the start of the answer."""


@dataclass
class Reading:
    """What one model did with the document."""

    text: str = ""
    """Decoded answer, up to where the model stops."""
    tokens: list[int] = field(default_factory=list)
    """Every decoded token, past the answer's end too."""
    nll: float = float("nan")
    """Mean negative log-likelihood of the scored tokens, in nats."""
    prefill: Pace = field(default_factory=Pace)
    decode: Pace = field(default_factory=Pace)
    cache: Any = None
    """What holds the K/V."""
    peak_bytes: int | None = None
    """Most accelerator memory allocated during the reading; None without an accelerator."""

    @property
    def correct(self) -> bool:
        """Whether the answer holds the planted fact."""
        return ANSWER in self.text


def cut(document: Document, scored: int, device: torch.device) -> Parts:
    """Cut a document so that the last `scored` tokens of its text are predicted."""
    import torch

    ids = torch.tensor([document.ids], device=device)
    end = document.text.end
    first = end - scored - 1
    return Parts(
        body=ids[:, :first],
        scored=ids[:, first : end - 1],
        targets=ids[:, end - scored : end],
        question=ids[:, end - 1 :],
    )


class Reader:
    """Reads documents with one model.

    Parameters
    ----------
    engine
        The model, dense or compiled.
    tokenizer
        Its tokenizer.
    """

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.forward = Forward(engine.call, engine.model)

    def warm_up(self, parts: Parts) -> None:
        """Make both kinds of call once, so that no reading is timed with compilation."""
        import torch

        cache, rest = self.engine.start(parts.body[:, :WARM_UP])
        with torch.no_grad():
            self.forward(rest, cache, keep=KEEP)
            self.forward(rest[:, :1], cache)
        if parts.body.is_cuda:
            # Triton's kernels are compiled as they are met, for the lengths that they are met with.
            self.read(parts, score=lambda logits, targets: 0.0)

    def read(
        self,
        parts: Parts,
        *,
        score: Score,
        advance: Callable[[int], None] = lambda _: None,
        around_question: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Reading:
        """Read a document and answer its question.

        Parameters
        ----------
        parts
            The document.
        score
            Called with the logits ``[tokens, vocabulary]`` and targets ``[tokens]`` of each scored step, in
            order; returns the sum of the negative log-likelihoods.
        advance
            Told the number of prompt tokens after each step.
        around_question
            Context in which the question is read and answered.
        """
        import torch

        device = parts.body.device
        found = Reading(prefill=Pace(str(device)), decode=Pace(str(device)))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            found.cache, body = self.engine.start(parts.body)

            def step(ids: torch.Tensor, keep: int = KEEP) -> torch.Tensor:
                with found.prefill.step(ids.shape[1]):
                    logits = self.forward(ids, found.cache, keep)
                advance(ids.shape[1])
                return logits

            for piece in torch.split(body, STEP, dim=1):
                step(piece)
            nll = 0.0
            pieces = torch.split(parts.scored, SCORED_STEP, dim=1)
            for piece, targets in zip(pieces, torch.split(parts.targets, SCORED_STEP, dim=1), strict=True):
                nll += score(step(piece, piece.shape[1])[0], targets[0])
            with around_question():
                logits = step(parts.question)[:, -1:]
                answer = greedy(
                    self.forward,
                    logits,
                    found.cache,
                    limit=ANSWER_TOKENS,
                    stop=frozenset(),
                    pace=found.decode,
                )
                found.tokens = list(answer)
        if device.type == "cuda":
            found.peak_bytes = torch.cuda.max_memory_allocated(device)
        found.nll = nll / parts.targets.shape[1]
        found.text = self._until_stop(found.tokens)
        return found

    def _until_stop(self, tokens: list[int]) -> str:
        stop = stop_tokens(self.engine.model, self.tokenizer)
        end = next((index for index, token in enumerate(tokens) if token in stop), len(tokens))
        text: str = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return " ".join(text.split())
