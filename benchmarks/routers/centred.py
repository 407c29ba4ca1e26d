"""Low-bit keys centred by the mean of the block before (`routing.centre: block`), which RoPE turns too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hga_compile.configs.routing import Bits
from hga_compile.kernels.lowbit import decode_keys, encode_keys
from hga_compile.kernels.rotation import rotation
from routers.router import BYTES, Index, Layer, Router

SCALE_BYTES = 2


@dataclass(frozen=True)
class Centred(Router):
    """The codes of `LowBit`; a block of keys is centred by the mean of the one before, known when it begins.

    The first block is centred by the mean of its own keys. A score is that of the codes and the query's
    product with the block's centre, kept in 16 bits.
    """

    unit: int = 1
    bits: Bits = 2
    block: int = 128

    def index(self, layer: Layer) -> Index:
        """Encode the keys of whole units."""
        keys = self.blocks(layer).flatten(1, 2)
        tokens, dim = keys.shape[1:]
        sums = torch.nn.functional.pad(keys, (0, 0, 0, -tokens % self.block)).unflatten(1, (-1, self.block))
        means = sums.mean(2)
        centre = torch.cat([means[:, :1], means[:, :-1]], 1).bfloat16().float()
        centre = centre.repeat_interleave(self.block, 1)[:, :tokens]
        turn = rotation(dim, keys.device)
        codes, scales = encode_keys((keys - centre) @ turn, self.bits)
        known = decode_keys(codes, scales, self.bits, dim) @ turn.T + centre

        def score(query: Tensor) -> Tensor:
            return (query @ known[:, None].mT).unflatten(-1, (-1, self.unit)).logsumexp(-1)

        share = codes.shape[1] + SCALE_BYTES + BYTES * dim / self.block
        return Index(score, share)
