"""The models that benchmarks measure, behind one interface: the compiled one, and dense in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from common import fill_cache
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


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
    """

    def __init__(self, model: PreTrainedModel, options: Mapping[str, Any]) -> None:
        from hga_compile.configs.loader import resolve_profile

        self.profile = resolve_profile(options)
        self.model = model
        self.compiled: Any = torch.compile(model, backend="hga", options=dict(options))

    def cache(self) -> Any:
        """Return an empty cache with this candidate's profile."""
        from hga_compile import HGACache

        return HGACache(self.model.config, profile=self.profile)

    def _call(self, **inputs: Any) -> Outcome:
        import hga_compile

        hga_compile.reset_report()
        logits = self.compiled(use_cache=True, **inputs).logits[0]
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

    def decode(self, dense: DynamicCache, prefix: int, queries: Tensor) -> Outcome:
        """See `Candidate.decode`; every query is routed, each over the tokens before it."""
        return self._call(input_ids=queries, past_key_values=fill_cache(self.cache(), dense, prefix))

    def whole(self, ids: Tensor, scored: int) -> Outcome:
        """See `Candidate.whole`; every query is routed."""
        return self._call(input_ids=ids, past_key_values=self.cache(), logits_to_keep=scored)
