"""Mean keys: the score of a unit's average key (the paper's summary)."""

from __future__ import annotations

from dataclasses import dataclass

from routers.router import BYTES, Index, Layer, Router


@dataclass(frozen=True)
class Mean(Router):
    """One vector a unit."""

    unit: int = 16

    def index(self, layer: Layer) -> Index:
        """Average the keys of each unit."""
        mean = self.blocks(layer).mean(2)
        share = BYTES * mean.shape[-1] / self.unit
        return Index(lambda query: query @ mean[:, None].mT, share)
