"""The generation loop of the commands: prefill in steps, then one token at a time, both timed."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class Pace:
    """Tokens and seconds of every step, those that compiled a graph kept apart."""

    device: str = "cpu"
    steps: list[tuple[int, float, bool]] = field(default_factory=list)
    """(tokens, seconds, whether a graph or a kernel was compiled during the step)"""

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Time one step; on CUDA until its kernels are done."""
        before, start = _compiled(self.device), time.perf_counter()
        yield
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.device)
        self.steps.append((tokens, time.perf_counter() - start, _compiled(self.device) != before))

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(tokens for tokens, _, _ in self.steps)

    @property
    def seconds(self) -> float:
        """Time of all steps, compilation included."""
        return sum(seconds for _, seconds, _ in self.steps)

    @property
    def rate(self) -> float | None:
        """Tokens per second of the steps that compiled nothing; None if every step did."""
        steady = [(tokens, seconds) for tokens, seconds, compiled in self.steps if not compiled]
        seconds = sum(seconds for _, seconds in steady)
        return sum(tokens for tokens, _ in steady) / seconds if seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Tokens, seconds with compilation, tokens/s without."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.rate,
            "compiled_steps": sum(compiled for _, _, compiled in self.steps),
        }


class Forward:
    """Forward pass that returns the logits of the last tokens, and computes no others where it can.

    Parameters
    ----------
    call
        The model, compiled or not.
    model
        The uncompiled model, whose signature says what it can do.
    """

    def __init__(self, call: Callable[..., Any], model: Any) -> None:
        self._call = call
        self._can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, ids: torch.Tensor, cache: Any, keep: int = 1) -> torch.Tensor:
        """Read ``[batch, tokens]`` ids and return logits ``[batch, keep, vocabulary]``."""
        named = {"logits_to_keep": keep} if self._can_keep else {}
        import torch

        # Dynamo would guard on where a view lies in its base, and compile again for the next one.
        own = ids.clone(memory_format=torch.contiguous_format)
        found = self._call(input_ids=own, past_key_values=cache, use_cache=True, **named)
        logits: torch.Tensor = found.logits[:, -keep:]
        return logits


def prefill(
    forward: Forward,
    ids: torch.Tensor,
    cache: Any,
    *,
    step: int,
    pace: Pace,
    advance: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Run a prompt through the model in steps.

    Parameters
    ----------
    forward
        Of the model.
    ids
        Prompt, ``[batch, tokens]`` int64, at least one token.
    cache
        Takes the keys and values; tokens that it holds already come before the prompt.
    step
        Tokens a call, at most.
    pace
        Gets the time of each call.
    advance
        Told the number of tokens after each call.

    Returns
    -------
    torch.Tensor
        Logits of the last token, ``[batch, 1, vocabulary]``.
    """
    import torch

    logits: torch.Tensor | None = None
    for piece in torch.split(ids, step, dim=1):
        with pace.step(piece.shape[1]):
            logits = forward(piece, cache)
        advance(piece.shape[1])
    assert logits is not None, "a prompt has at least one token"
    return logits


def greedy(
    forward: Forward, logits: torch.Tensor, cache: Any, *, limit: int, stop: frozenset[int], pace: Pace
) -> Iterator[int]:
    """Yield the most probable tokens of a sequence until a stop token or the limit.

    Parameters
    ----------
    forward
        Of the model.
    logits
        Logits of the last prompt token, ``[1, 1, vocabulary]``.
    cache
        Holds the prompt; grows by the tokens that are yielded, except the last.
    limit
        Tokens to yield, at most.
    stop
        Token ids that end the text; they are not yielded.
    pace
        Gets the time of each model call.

    Yields
    ------
    int
        Token ids.
    """
    import torch

    token = int(logits[0, -1].argmax())
    for index in range(limit):
        if token in stop:
            return
        yield token
        if index + 1 == limit:
            return
        with pace.step(1):
            step = torch.tensor([[token]], device=logits.device)
            logits = forward(step, cache)
            token = int(logits[0, -1].argmax())


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a text, of the generation settings and of the tokenizer."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    ids = [*listed] if isinstance(listed, list | tuple) else [listed]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


class _Kernels:
    """Counts kernels that Triton compiles, or finds compiled on disk."""

    def __init__(self, former: Callable[..., Any] | None) -> None:
        self.count, self._former = 0, former

    def __call__(self, *given: Any, **named: Any) -> None:
        """Be told of one."""
        self.count += 1
        if self._former is not None:
            self._former(*given, **named)


def _compiled(device: str) -> tuple[int, int]:
    """Return how many graphs, and on CUDA kernels, this process has compiled."""
    from torch._dynamo.utils import counters

    graphs = int(counters["stats"]["unique_graphs"])
    if not device.startswith("cuda") or find_spec("triton") is None:
        return graphs, 0
    from triton import knobs

    if not isinstance(knobs.compilation.listener, _Kernels):
        knobs.compilation.listener = _Kernels(knobs.compilation.listener)
    return graphs, knobs.compilation.listener.count
