"""The limits: units by their true softmax mass, which no index knows without reading every key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from routers.router import BYTES, Index, Layer, Router


@dataclass(frozen=True)
class Oracle(Router):
    """Groups by the log-sum-exp of their keys' scores; with a unit of 1, the true top-k tokens."""

    unit: int = 4

    def index(self, layer: Layer) -> Index:
        """Keep all keys."""
        keys = self.blocks(layer)
        flat = keys.flatten(1, 2)

        def score(query: Tensor) -> Tensor:
            exact = query @ flat[:, None].mT
            return exact if self.unit == 1 else exact.unflatten(-1, (-1, self.unit)).logsumexp(-1)

        return Index(score, float(BYTES * keys.shape[-1]))
