"""Ours: the package's own low-bit keys, scored token by token, groups by the log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hga_compile.configs.routing import Bits, Routing
from hga_compile.kernels.lowbit import LowBitSummary
from routers.router import Index, Layer, Router


@dataclass(frozen=True)
class LowBit(Router):
    """Keys in `bits` bits a channel, less the mean of the first `centre_tokens`, rotated; groups of 4."""

    unit: int = 4
    bits: Bits = 2
    centre_tokens: int = 256

    def index(self, layer: Layer) -> Index:
        """Encode the keys of whole groups."""
        routing = Routing(summary="lowbit", bits=self.bits, group_size=self.unit)
        summary = LowBitSummary(routing, layer.keys[:, : self.centre_tokens].mean(1), "reference")
        keys = self.blocks(layer)
        groups = keys.shape[1]
        summary.append(keys.flatten(1, 2))
        scorer = summary.scorer(groups)

        def score(query: Tensor) -> Tensor:
            return scorer(query, groups).logsumexp(-1)

        return Index(score, summary.bytes_per_token())
