"""The models that are measured, behind one interface: the compiled one, and dense in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

STEP = 1024  # tokens of one forward pass
OPENING = 2  # tokens that the uncompiled model reads into a new cache: filling an empty one is another graph
KEEP = 2  # logits that a step asks for whose own are not wanted: one would be another graph than many

Advance = Callable[[int], None]


class NothingRouted(RuntimeError):
    """The compiled model attended densely, so that a comparison with dense would say nothing."""


@dataclass(frozen=True)
class Use:
    """Shares of what dense attention attends to and reads (K/V and summaries apart), all 1 or less."""

    attended: float
    kv_bytes: float
    summary_bytes: float
    fallbacks: Mapping[str, int]


@dataclass(frozen=True)
class Outcome:
    """Logits of the scored tokens, `[tokens, vocabulary]`, and what it took."""

    logits: Tensor
    use: Use


class Candidate(Protocol):
    """A model to compare with dense."""

    def decode(self, dense: DynamicCache, prefix: int, queries: Tensor) -> Outcome:
        """Give the logits of `queries` `[1, tokens]` after the first `prefix` tokens of a dense cache."""

    def whole(self, ids: Tensor, scored: int) -> Outcome:
        """Run all of `ids` `[1, tokens]` from an empty cache; give the logits of the last `scored`."""


class DenseCandidate:
    """The uncompiled model in the place of the compiled one: checks the plumbing, differs by rounding."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def decode(self, dense: DynamicCache, prefix: int, queries: Tensor) -> Outcome:
        """See `Candidate.decode`."""
        cache = fill_cache(DynamicCache(), dense, prefix)
        logits = self.model(input_ids=queries, past_key_values=cache, use_cache=True).logits
        return Outcome(logits[0], Use(1.0, 1.0, 0.0, {}))

    def whole(self, ids: Tensor, scored: int) -> Outcome:
        """See `Candidate.whole`."""
        output = self.model(
            input_ids=ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=scored
        )
        return Outcome(output.logits[0], Use(1.0, 1.0, 0.0, {}))


class RoutedCandidate:
    """The model compiled with ``backend="hga"``.

    Parameters
    ----------
    model
        The uncompiled model.
    options
        As `torch.compile` takes them: the profile and what differs from it.
    advance
        Told the number of tokens after each step.
    dynamic
        As `torch.compile` takes it; True: one graph for steps of every length.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: Mapping[str, Any],
        advance: Advance = lambda _: None,
        dynamic: bool | None = None,
    ) -> None:
        from hga_compile.configs.loader import resolve_profile
        from hga_compile.kernels.dispatch import triton_serves

        self.profile = resolve_profile(options)
        self.model, self.advance = model, advance
        self.piece = STEP
        """Tokens of a forward pass over decoded tokens."""
        if triton_serves(self.profile.compile.kernels, model.device, model.dtype, channels=1):
            # Triton has no kernels for many queries that are routed by themselves, and steps are recorded.
            self.piece = 1
        self.compiled: Any = torch.compile(model, backend="hga", dynamic=dynamic, options=dict(options))

    def cache(self) -> Any:
        """Return an empty cache with this candidate's profile."""
        from hga_compile import HGACache

        return HGACache(self.model.config, profile=self.profile)

    def decode(self, dense: DynamicCache, prefix: int, queries: Tensor) -> Outcome:
        """See `Candidate.decode`; every query is routed, each over the tokens before it."""
        cache = fill_cache(self.cache(), dense, prefix)
        self._reset()
        return self._outcome(self._score(queries, cache, self.piece))

    def whole(self, ids: Tensor, scored: int) -> Outcome:
        """See `Candidate.whole`; every query is routed, in steps of `STEP` tokens."""
        cache, body = self.cache(), ids.shape[1] - scored
        opening = min(OPENING, body)
        if opening:
            self.model(input_ids=ids[:, :opening], past_key_values=cache, use_cache=True)
            self.advance(opening)
        self._reset()
        for begin in range(opening, body, STEP):
            self._step(ids[:, begin : min(begin + STEP, body)], cache, KEEP)
        return self._outcome(self._score(ids[:, body:], cache, STEP))

    def _reset(self) -> None:
        import hga_compile

        hga_compile.reset_report()

    def _score(self, ids: Tensor, cache: Any, step: int) -> Tensor:
        pieces = [self._step(piece, cache, piece.shape[1]) for piece in torch.split(ids, step, dim=1)]
        return torch.cat(pieces)

    def _step(self, ids: Tensor, cache: Any, keep: int) -> Tensor:
        # Dynamo would guard on where a view lies in its base, and compile again for the next one.
        own = ids.clone(memory_format=torch.contiguous_format)
        found = self.compiled(input_ids=own, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        self.advance(ids.shape[1])
        logits: Tensor = found.logits[0, -keep:]
        return logits

    def _outcome(self, logits: Tensor) -> Outcome:
        import hga_compile

        report = hga_compile.report()
        total = report.totals()
        if not report.layers or not total.visible:
            reasons = ", ".join(sorted({str(site.reason) for site in report.sites if not site.routed}))
            raise NothingRouted(f"no attention was routed: {reasons or 'no site'}; see `hga explain`")
        use = Use(
            total.attended / total.visible,
            total.kv_bytes / total.dense_bytes,
            total.summary_bytes / total.dense_bytes,
            dict(report.fallbacks),
        )
        return Outcome(logits, use)


def fill_cache(cache: Any, dense: DynamicCache, length: int) -> Any:
    """Append the first `length` tokens of a dense cache to `cache`, layer by layer, and return it."""
    for index, layer in enumerate(dense.layers):
        cache.update(layer.keys[:, :, :length].contiguous(), layer.values[:, :, :length].contiguous(), index)
    return cache
