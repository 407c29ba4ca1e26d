"""Quest (Tang et al. 2024, arXiv:2406.10774): a box around a page's keys bounds the score of each of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from routers.router import BYTES, Index, Layer, Router


@dataclass(frozen=True)
class Quest(Router):
    """Least and greatest value of every channel; pages of 16. Quest routes each query head by itself."""

    unit: int = 16

    def index(self, layer: Layer) -> Index:
        """Keep the two corners of each page's box."""
        low, high = self.blocks(layer).aminmax(dim=2)

        def score(query: Tensor) -> Tensor:
            # sum over channels of max(q * low, q * high)
            return query.clamp(min=0) @ high[:, None].mT + query.clamp(max=0) @ low[:, None].mT

        return Index(score, 2 * BYTES * low.shape[-1] / self.unit)
