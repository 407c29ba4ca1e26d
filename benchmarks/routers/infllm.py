"""InfLLM (Xiao et al. 2024, arXiv:2402.04617): a block stands behind its few most attended keys."""

from __future__ import annotations

from dataclasses import dataclass

from routers.router import BYTES, Index, Layer, Router, whole


@dataclass(frozen=True)
class InfLLM(Router):
    """The sum of the scores of those keys of a block that the queries behind it attend to most."""

    unit: int = 128
    representatives: int = 4

    def index(self, layer: Layer) -> Index:
        """Keep each block's representatives."""
        keys, count = self.blocks(layer), min(self.representatives, self.unit)
        best = whole(layer.received, self.unit).topk(count, -1).indices
        chosen = keys.gather(2, best[..., None].expand(-1, -1, -1, keys.shape[-1]))
        total = chosen.sum(2)
        return Index(lambda query: query @ total[:, None].mT, count * BYTES * keys.shape[-1] / self.unit)
