"""The control: the whole budget is window."""

from __future__ import annotations

from dataclasses import dataclass

from routers.router import Index, Layer, Router


@dataclass(frozen=True)
class Window(Router):
    """Chooses nothing: the budget goes to the latest tokens."""

    unit: int = 1

    def index(self, layer: Layer) -> Index:
        """Keep nothing; every unit has the same score, and later ones come first."""
        rows, tokens = layer.keys.shape[:2]
        recency = layer.keys.new_ones(rows, tokens).cumsum(1) / tokens
        return Index(lambda query: recency[:, None, None].expand(-1, *query.shape[1:3], -1), 0.0)
