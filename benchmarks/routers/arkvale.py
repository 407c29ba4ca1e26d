"""ArkVale (Chen et al., NeurIPS 2024): Quest's box, shrunk to the mean distance from the centre."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from routers.router import BYTES, Index, Layer, Router


@dataclass(frozen=True)
class ArkVale(Router):
    """Centre and mean absolute deviation of every channel; pages of 32."""

    unit: int = 32

    def index(self, layer: Layer) -> Index:
        """Keep centre and radius of each page."""
        keys = self.blocks(layer)
        centre = keys.mean(2)
        radius = (keys - centre[:, :, None]).abs().mean(2)

        def score(query: Tensor) -> Tensor:
            return query @ centre[:, None].mT + query.abs() @ radius[:, None].mT

        return Index(score, 2 * BYTES * centre.shape[-1] / self.unit)
