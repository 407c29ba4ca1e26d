"""Recorded routes as densities: how often each stretch of the context was read by each query."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    Grid = np.ndarray[Any, np.dtype[np.float32]]


class Route(Protocol):
    """A record of `hga_compile.record_routes`."""

    layer: int
    first_query: int
    group_size: int
    groups: torch.Tensor


def density(records: Iterable[Route], *, first: int, end: int, cell: int) -> Grid:
    """Share of (layer, KV head) pairs that read any token of a cell, for each query.

    Parameters
    ----------
    records
        Of the first sequence of a batch; any number of layers and runs of queries.
    first, end
        Positions of the queries, ``first <= query < end``.
    cell
        Tokens of a cell.

    Returns
    -------
    numpy.ndarray
        ``[end - first, ceil(end / cell)]`` float32 in 0 to 1; nothing recorded counts as nothing read.
    """
    import torch

    cells = -(-end // cell)
    found = torch.zeros(end - first, cells)
    layers = torch.zeros(end - first)
    for record in records:
        queries = record.groups.shape[2]
        start, stop = max(first, record.first_query), min(end, record.first_query + queries)
        if start >= stop:
            continue
        groups = record.groups[0, :, start - record.first_query : stop - record.first_query]
        tokens = groups.repeat_interleave(record.group_size, -1)[..., : cells * cell]
        tokens = torch.nn.functional.pad(tokens, (0, cells * cell - tokens.shape[-1]))
        found[start - first : stop - first] += (
            tokens.reshape(*tokens.shape[:-1], cells, cell).any(-1).float().mean(0)
        )
        layers[start - first : stop - first] += 1
    grid: Grid = (found / layers.clamp(min=1)[:, None]).numpy()
    return grid


def pooled(grid: Grid, rows: int) -> Grid:
    """Mean over runs of `rows` queries; the last run may be shorter."""
    import numpy as np

    starts = np.arange(0, len(grid), rows)
    sums = np.add.reduceat(grid, starts, axis=0)
    counts = np.minimum(rows, len(grid) - starts)
    means: Grid = (sums / counts[:, None]).astype(np.float32)
    return means


def fact_share(records: Iterable[Route], first: int, start: int, end: int) -> dict[int, float]:
    """Share of (query, KV head) pairs that read any token of ``start <= token < end``, for each layer.

    Only queries from position `first` on count.
    """
    hits: dict[int, list[float]] = {}
    for record in records:
        skip = max(0, first - record.first_query)
        touched = record.groups[0, :, skip:, start // record.group_size : -(-end // record.group_size)]
        if touched.numel():
            hits.setdefault(record.layer, []).extend(touched.any(-1).float().mean(0).tolist())
    return {layer: sum(shares) / len(shares) for layer, shares in hits.items()}
