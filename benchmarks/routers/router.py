"""The interface of a router: from the keys of a layer, an index that scores units of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

BYTES = 2  # of a number in K, V and in an index: 16 bits, unless a router says otherwise


@dataclass(frozen=True)
class Layer:
    """What a router may look at in one layer; a row is one KV head."""

    keys: Tensor
    """``[rows, tokens, dim]`` float32, rotated as they are cached."""
    received: Tensor
    """``[rows, tokens]``: mean score of a key against queries that follow it (see `attention.received`)."""


@dataclass(frozen=True)
class Index:
    """What is kept of a layer's whole units."""

    score: Callable[[Tensor], Tensor]
    """Maps queries ``[rows, heads, queries, dim]``, softmax scale applied, to each head's estimate of the
    units' log-masses, up to a constant, ``[rows, heads, queries, units]``."""
    bytes_per_token: float
    """Bytes that scoring reads for each token before the window, in one KV head."""
    pinned: Tensor | None = None
    """``[rows, units]`` bool: units that are always attended to, inside the budget."""


@dataclass(frozen=True)
class Router(ABC):
    """A way to choose units of `unit` consecutive tokens; its fields are its settings."""

    unit: int
    vote = "mass_sum"
    """How the query heads of a KV head merge: the sum or the maximum (`mass_max`) of their softmax masses."""

    @abstractmethod
    def index(self, layer: Layer) -> Index:
        """Summarise a layer."""

    def blocks(self, layer: Layer) -> Tensor:
        """Return the keys of whole units, ``[rows, units, unit, dim]``."""
        return whole(layer.keys, self.unit)


def whole(values: Tensor, unit: int) -> Tensor:
    """Divide ``[rows, tokens, ...]`` into whole units, ``[rows, units, unit, ...]``."""
    units = values.shape[1] // unit
    return values[:, : units * unit].unflatten(1, (units, unit))
