"""One reading of the demo's document by one model: scored text, answer, speed, bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hga_compile.cli.decode import Forward, Pace, greedy, last_token, stop_tokens
from hga_compile.demo.text import ANSWER, Document

if TYPE_CHECKING:
    import torch

STEP = 1024  # tokens a forward pass of the prefill
SCORED_STEP = 256  # the logits of so many tokens exist at a time
ANSWER_TOKENS = 32  # decoded tokens, past the answer's end too: the speed of few tokens is noise
WARM_UP = (300, 40, 1, 1)  # tokens of the calls that compile the graphs


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
    call
        The model as it is called: compiled or not.
    model
        The uncompiled model.
    tokenizer
        Its tokenizer.
    """

    def __init__(self, call: Forward, model: Any, tokenizer: Any) -> None:
        self.call, self.model, self.tokenizer = call, model, tokenizer
        self.one = last_token(call, model)

    def read(
        self,
        parts: Parts,
        cache: Any,
        *,
        score: Callable[[torch.Tensor, torch.Tensor], float],
        advance: Callable[[int], None] = lambda _: None,
        around_question: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Reading:
        """Read a document and answer its question.

        Parameters
        ----------
        parts
            The document.
        cache
            Empty.
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
            self._body(parts, cache, found, advance)
            nll = sum(
                score(logits[0], targets[0]) for logits, targets in self._scored(parts, cache, found, advance)
            )
            with around_question():
                with found.prefill.step(parts.question.shape[1]):
                    logits = self.one(input_ids=parts.question, past_key_values=cache).logits[:, -1:]
                advance(parts.question.shape[1])
                tokens = list(
                    greedy(self.one, logits, cache, limit=ANSWER_TOKENS, stop=frozenset(), pace=found.decode)
                )
        if device.type == "cuda":
            found.peak_bytes = torch.cuda.max_memory_allocated(device)
        found.nll = nll / parts.targets.shape[1]
        found.tokens = tokens
        found.text = self._until_stop(tokens)
        return found

    def warm_up(self, parts: Parts, cache: Any) -> None:
        """Make every kind of call once on a few tokens, so that no reading is timed with compilation.

        Parameters
        ----------
        parts
            The document; its first tokens are read.
        cache
            Empty; not to be used again.
        """
        import torch

        ids = parts.body
        with torch.no_grad():
            for tokens in WARM_UP:
                self.one(input_ids=ids[:, :tokens], past_key_values=cache)
            self.call(input_ids=ids[:, : WARM_UP[0]], past_key_values=cache, use_cache=True)

    def _body(self, parts: Parts, cache: Any, found: Reading, advance: Callable[[int], None]) -> None:
        import torch

        for piece in torch.split(parts.body, STEP, dim=1):
            with found.prefill.step(piece.shape[1]):
                self.one(input_ids=piece, past_key_values=cache)
            advance(piece.shape[1])

    def _scored(
        self, parts: Parts, cache: Any, found: Reading, advance: Callable[[int], None]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        pieces = torch.split(parts.scored, SCORED_STEP, dim=1)
        for piece, targets in zip(pieces, torch.split(parts.targets, SCORED_STEP, dim=1), strict=True):
            with found.prefill.step(piece.shape[1]):
                logits = self.call(input_ids=piece, past_key_values=cache, use_cache=True).logits
            advance(piece.shape[1])
            yield logits, targets

    def _until_stop(self, tokens: list[int]) -> str:
        stop = stop_tokens(self.model, self.tokenizer)
        end = next((index for index, token in enumerate(tokens) if token in stop), len(tokens))
        text: str = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return " ".join(text.split())
