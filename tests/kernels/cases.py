"""Inputs and ways to run routed attention that several tests share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.profile import Kernels
from hga_compile.configs.routing import Routing
from hga_compile.kernels import ops
from hga_compile.kernels.ledger import LEDGER, RouteRecord
from hga_compile.kernels.site import SiteConfig
from hga_compile.kernels.states import STATES
from hga_compile.store import LayerStore

SMALL: dict[str, Any] = {
    "budget": Budget(fraction=0.1, tokens=32),
    "window": Window(tokens=6),
    "chunk_size": 16,
    "chunk_parts": 4,
    "chunk_budget": Budget(tokens=48),
    "auto_chunk_tokens": 100,
    "chunk_stage": "off",
    "prefill_tile": 1,
    "centre_tokens": 16,
    "dense_below": 40,
}


def routing(**changes: Any) -> Routing:
    """A routing that is at work from 40 tokens on."""
    return Routing(**(SMALL | changes))


def site(setting: Routing, layer: int = 0, tier: str = "host", kernels: Kernels = "auto") -> str:
    return SiteConfig(layer, tier, setting, kernels).to_text()


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    def to(self, device: torch.device) -> "Inputs":
        mask = None if self.mask is None else self.mask.to(device)
        return Inputs(self.query.to(device), self.key.to(device), self.value.to(device), self.scale, mask)


def inputs(
    tokens: int = 130,
    batch: int = 1,
    kv_heads: int = 2,
    heads: int = 2,
    dim: int = 16,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    seed: int = 0,
) -> Inputs:
    """Random Q, K and V with clusters of keys that queries look for; `heads` are query heads of one KV head.

    Keys are multiples of 1/32: their centre and rotation are exact in float32, so that an oracle in float64
    gets the same codes.
    """
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * heads, tokens, dim, generator=random)
    key = torch.randn(batch, kv_heads, tokens, dim, generator=random)
    topic = torch.randint(0, 8, (batch, 1, tokens), generator=random)
    topics = torch.randn(8, dim, generator=random)
    key = (key + topics[topic]).mul(32).round().div(32).clamp(-6, 6)
    value = torch.randn(batch, kv_heads, tokens, v_dim or dim, generator=random)
    return Inputs(query.to(dtype), key.to(dtype), value.to(dtype), 1.5 * dim**-0.5, mask)


def left_padding(lengths: Sequence[int], tokens: int) -> Tensor:
    """Rows of `lengths` real tokens at the end of `tokens`."""
    return torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]


def run_whole(setting: Routing, given: Inputs, layer: int = 0, kernels: Kernels = "auto") -> Tensor:
    """Everything in one stateless call."""
    text = site(setting, layer, kernels=kernels)
    return ops.attention(given.query, given.key, given.value, given.mask, given.scale, text)


def opened(key: Tensor, value: Tensor) -> Tensor:
    """Open a store that starts with these rows; return its handle."""
    handle = torch.empty(1, dtype=torch.int64, device="cpu")
    ops.open_state(key, value, handle)
    return handle


def run_steps(
    setting: Routing, given: Inputs, steps: Sequence[int], layer: int = 0, kernels: Kernels = "auto"
) -> Tensor:
    """The same sequence through one cache, `steps` tokens at a time."""
    assert sum(steps) == given.tokens
    handle = opened(given.key[:, :, :0], given.value[:, :, :0])
    parts, length = [], 0
    for step in steps:
        begin, length = length, length + step
        parts.append(
            ops.cached_attention(
                given.query[:, :, begin:length],
                given.key[:, :, begin:length],
                given.value[:, :, begin:length],
                handle,
                length,
                None if given.mask is None else given.mask[:, :length],
                given.scale,
                site(setting, layer, kernels=kernels),
            )
        )
    return torch.cat(parts, 2)


def store_of(handle: Tensor) -> LayerStore:
    store = STATES.get(handle)
    assert isinstance(store, LayerStore)
    return store


def recorded_groups(records: Sequence[RouteRecord], given: Inputs, group_size: int) -> Tensor:
    """Join records into ``[batch, kv_heads, queries, groups]`` bool."""
    batch, kv_heads, tokens = given.key.shape[:3]
    joined = torch.zeros(batch, kv_heads, tokens, -(-tokens // group_size), dtype=torch.bool)
    for record in records:
        assert record.group_size == group_size
        queries, groups = record.groups.shape[2:]
        joined[:, :, record.first_query : record.first_query + queries, :groups] = record.groups
    return joined


def attended(layer: int = 0) -> tuple[int, int]:
    """Tokens attended and visible that the ledger has of a layer, both phases together."""
    uses = [use for (number, _), use in LEDGER.uses().items() if number == layer]
    return sum(use.attended for use in uses), sum(use.visible for use in uses)
