"""One layer of `offload.py`: what it replays, and what a step of it reads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from recorded import Recording, Step
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.gpu import Spans, fetched, spans_of
from hga_compile.kernels.hot import HotCache
from hga_compile.kernels.plan import plan_queries
from hga_compile.store.tier import Tier
from hga_compile.tuning.uncached import copies

__all__ = ["Layer", "Shape", "Traffic", "layers_for", "mean", "read_bytes"]

PIECE = 2**15  # tokens that are stored at once


@dataclass(frozen=True)
class Shape:
    """One layer."""

    kv_heads: int = 4
    heads: int = 8
    """Query heads of a KV head."""
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16


class Layer:
    """Lists, index, query and new token of one layer; K/V are in the tiers that `fill` fills.

    Parameters
    ----------
    number : int
        Which heads of the recording it replays, and its random numbers.
    shape : Shape
        Heads and channels.
    recording : Recording
        Where the lists come from.
    tokens : int
        Tokens at the last step.
    device : torch.device
        Where it runs.
    """

    def __init__(
        self, number: int, shape: Shape, recording: Recording, tokens: int, device: torch.device
    ) -> None:
        self.shape, self.tokens, self.device = shape, tokens, device
        self.routing: Routing = recording.routing.model_copy(update={"auto_chunk_tokens": 2**21})
        self.steps: list[Step] = recording.layer(number, shape.kv_heads, tokens)
        width = max(len(own) for step in self.steps for own in step.lists)
        self.chosen = [step.chosen(width).to(device) for step in self.steps]
        self.spans = [
            Spans(step.spans.to(device), width, -(-step.length // self.routing.group_size), step.listed)
            for step in self.steps
        ]
        # What all rows share: routing runs as it would in a model.
        self.plans = [
            spans_of(self.routing, plan_queries(self.routing, step.length - 1, 1, None), None, device)
            for step in self.steps
        ]
        self.random = torch.Generator(device).manual_seed(number)
        rows, dim = shape.kv_heads, shape.dim
        self.query = self._noise(rows, shape.heads, dim)
        self.key, self.value = self._noise(2, rows, 1, dim).unbind()
        room = -(-tokens // self.routing.group_size) * self.routing.group_size
        codes = (rows, room, dim * self.routing.bits // 8)
        self.codes = torch.randint(
            0, 256, codes, dtype=torch.uint8, device=device, generator=self.random
        ).transpose(1, 2)
        self.scales = torch.rand(rows, room, device=device, generator=self.random).half() + 0.5

    @property
    def group_bytes(self) -> int:
        """Bytes of a group of one KV head."""
        return self.routing.group_size * 2 * self.shape.dim * self.shape.dtype.itemsize

    def index_bytes(self) -> float:
        """Return the bytes of summaries that routing reads in the last step."""
        each = self.shape.dim * self.routing.bits / 8 + 2
        return self.shape.kv_heads * self.plans[-1].groups * self.routing.group_size * each

    def fill(self, tier: Tier) -> None:
        """Store random K/V of all tokens, the same in every tier."""
        random = torch.Generator(self.device).manual_seed(self.random.initial_seed() + 2**20)
        rows, dim = self.shape.kv_heads, self.shape.dim
        for begin in range(0, self.tokens, PIECE):
            new = min(PIECE, self.tokens - begin)
            pair = torch.randn(2, rows, new, dim, device=self.device, generator=random).to(self.shape.dtype)
            tier.write(*pair.unbind(), begin)
        # What the steps store, whichever of them run.
        new = len(self.steps)
        tier.write(*(part.expand(rows, new, dim) for part in (self.key, self.value)), self.tokens - new)

    def step(self, number: int, tier: Tier, hot: HotCache | None) -> Tensor:
        """Run a step; return what is attended to, ``[rows, heads, dim]``."""
        from hga_compile.kernels.triton_attend import attend_listed
        from hga_compile.kernels.triton_route import route

        step, chosen, spans = self.steps[number], self.chosen[number], self.spans[number]
        size, rows, scale = self.routing.group_size, self.shape.kv_heads, self.shape.dim**-0.5
        tier.write(self.key, self.value, step.length - 1)
        route(
            self.codes, self.scales, self.query, self.plans[number], routing=self.routing, scale=scale,
            rows_of_span=rows, parts=None,
        )  # fmt: skip
        pages, slots = tier.gpu_pages if self.device.type == "cuda" else tier.host_pages, None
        if pages is None:
            pages, slots = fetched(chosen, spans, -(-step.length // size), tier.fetch)
        near = None
        if hot is not None:
            entries = hot.place(chosen, spans.table, step.length, size, 1)
            near = hot.pool, entries
        return attend_listed(
            pages, chosen, spans.table, self.query, None, group_size=size, scale=scale, softcap=0.0,
            rows_of_span=1, kv_heads=rows, slots=slots, hot=near,
        )  # fmt: skip

    def hot_cache(self, share: float) -> HotCache:
        """Return an empty hot cache that will not grow."""
        size, rows = self.routing.group_size, self.shape.kv_heads
        hot = HotCache(rows, size * 2 * self.shape.dim, share, self.shape.dtype, self.device)
        hot.place(self.chosen[-1], self.spans[-1].table, self.steps[-1].length, size, 1)
        hot.forget(0)
        return hot

    def _noise(self, *shape: int) -> Tensor:
        noise = torch.randn(shape, device=self.device, generator=self.random)
        return noise.to(self.shape.dtype)


@dataclass(frozen=True)
class Traffic:
    """What one layer's step reads, on average: listed groups of all rows, and bytes by place."""

    listed: float
    fetched: float
    """Groups that are not in the GPU's memory."""
    gpu: float
    pcie: float
    files: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the listed groups that were at hand."""
        return 1 - self.fetched / self.listed

    def floor(self, bandwidth: dict[str, float]) -> float:
        """Return the microseconds that reading it takes."""
        parts = ((self.gpu, "gpu"), (self.pcie, "host"), (self.files, "nvme"))
        return 1e6 * sum(count / bandwidth[place] for count, place in parts if count)


def read_bytes(layer: Layer, steps: Sequence[int], tier: str, misses: float | None) -> Traffic:
    """Work out what the steps of a layer read on average.

    Parameters
    ----------
    layer : Layer
        Whose steps.
    steps : sequence of int
        Their numbers.
    tier : {"gpu", "host"}
        Where K/V lie.
    misses : float or None
        Complete groups a step that the hot cache did not have; None without one.
    """
    size = layer.routing.group_size
    listed = sum(layer.steps[step].listed for step in steps) / len(steps)
    fetched = 0.0 if tier == "gpu" else listed
    if misses is not None:
        fetched = misses + sum(layer.steps[step].incomplete(size) for step in steps) / len(steps)
    inside = layer.index_bytes() + (listed - fetched) * layer.group_bytes
    return Traffic(listed, fetched, inside, fetched * layer.group_bytes)


def layers_for(tokens: int, shape: Shape, share: float = 0.03) -> int:
    """Return how many layers together read more than any cache of a GPU holds, 2 to 20."""
    each = tokens * shape.kv_heads * (shape.dim / 4 + 2 + share * 2 * shape.dim * shape.dtype.itemsize)
    return max(2, copies(round(each)))


def mean(parts: Sequence[Traffic]) -> Traffic:
    """Average over layers."""
    names = ("listed", "fetched", "gpu", "pcie", "files")
    return Traffic(*(statistics.fmean(getattr(part, name) for part in parts) for name in names))
