"""ShadowKV (Sun et al. 2024, arXiv:2410.21465): means of chunks of 8; the worst fits are pinned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from routers.router import BYTES, Index, Layer, Router


@dataclass(frozen=True)
class ShadowKV(Router):
    """Landmarks. Its low-rank keys are left out: attention is exact here, for all routers.

    `outliers` is 48 chunks of 128K tokens as a share; the budget holds them.
    """

    unit: int = 8
    outliers: float = 0.003
    vote = "mass_max"

    def index(self, layer: Layer) -> Index:
        """Average the keys of each chunk; pin the chunks with the least cosine of a key and its mean."""
        keys = self.blocks(layer)
        mean = keys.mean(2)
        worst = torch.cosine_similarity(keys, mean[:, :, None], dim=-1).amin(-1)
        pinned = torch.zeros_like(worst, dtype=torch.bool)
        count = min(max(1, round(self.outliers * worst.shape[1])), worst.shape[1])
        pinned.scatter_(1, worst.topk(count, -1, largest=False).indices, True)
        share = BYTES * mean.shape[-1] / self.unit
        return Index(lambda query: query @ mean[:, None].mT, share, pinned)
