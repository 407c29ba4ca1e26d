"""The cheap stage: how much routing changes the attention of some layers, on captured Q, K and V.

The number is the energy of the change, projected as the model projects it, over the energy of the residual
stream that it is added to; summed over layers and averaged over texts. It is a proxy: it orders settings, it
is no KL.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.site import SiteConfig
from hga_compile.store import LayerStore
from hga_compile.tuning.capture import Captured

__all__ = ["Screen", "layer_change", "spread"]


def spread(layers: Sequence[int], count: int) -> list[int]:
    """Return `count` of the layers, spread over the depth, the first and last among them."""
    if count >= len(layers):
        return list(layers)
    if count == 1:
        return [layers[len(layers) // 2]]
    return [layers[round(part * (len(layers) - 1) / (count - 1))] for part in range(count)]


def layer_change(captured: Captured, routing: Routing, queries: int) -> float:
    """Return how much routing changes one layer, over the energy of its residual stream.

    Parameters
    ----------
    captured : Captured
        The layer on one text.
    routing : Routing
        Of this layer; every query is routed by itself.
    queries : int
        How many of the last ones are looked at.
    """
    own = routing.model_copy(
        update={"prefill": "routed", "prefill_tile": 1, "overrides": (), "dense_layers": ()}
    )
    tokens, new = captured.key.shape[2], min(queries, captured.query.shape[2])
    body = tokens - new
    store = LayerStore("gpu")
    # Where the model runs: what the tier is does not change the result, and pinning memory takes time.
    store.put(captured.key[:, :, :body], captured.value[:, :, :body], body)
    got = store.attend(
        captured.query[:, :, -new:], captured.key[:, :, body:], captured.value[:, :, body:], tokens, None,
        captured.scale, SiteConfig(captured.layer, "gpu", own), captured.scoring,
    )  # fmt: skip
    return _energy(got.float() - captured.dense[:, :, -new:].float(), captured)


def _energy(change: Tensor, captured: Captured) -> float:
    flat = change.transpose(1, 2).flatten(2)
    if captured.output is not None and captured.output.shape[1] == flat.shape[2]:
        flat = flat @ captured.output.float().T
    found = float(flat.square().sum(-1).mean())
    dense = captured.dense.transpose(1, 2).flatten(2).float().square().sum(-1).mean()
    return found / (captured.residual or float(dense))


class Screen:
    """Captured layers of some texts.

    Parameters
    ----------
    texts : sequence of sequence of Captured
        All full-attention layers of each text.
    layers : int
        How many of them a setting is tried on.
    queries : int
        How many queries of each.
    """

    def __init__(self, texts: Sequence[Sequence[Captured]], layers: int, queries: int) -> None:
        self.texts, self.queries = texts, queries
        numbers = [captured.layer for captured in texts[0]]
        self.layers = set(spread(numbers, layers))
        self.count, self.depth = len(numbers), max(numbers) + 1

    def change(self, routing: Routing) -> float:
        """Return the summed change of the chosen layers, averaged over texts, scaled up to all layers."""
        with torch.no_grad():
            found = [
                layer_change(captured, routing.for_layer(captured.layer, self.depth), self.queries)
                for text in self.texts
                for captured in text
                if captured.layer in self.layers and not routing.is_dense(captured.layer, self.depth)
            ]
        return sum(found) / len(self.texts) * self.count / len(self.layers)

    def sensitivities(self, routing: Routing, queries: int = 16) -> dict[int, float]:
        """Return the change of each layer by itself: where a wider budget helps most."""
        with torch.no_grad():
            return {
                same[0].layer: sum(layer_change(captured, routing, queries) for captured in same) / len(same)
                for same in zip(*self.texts, strict=True)
            }
