"""The interface of group summaries: what a query is scored against instead of the keys themselves."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.configs.routing import Routing
from hga_compile.kernels.centres import BlockCentres
from hga_compile.kernels.coarse import TileKeys

__all__ = ["Scorer", "Summary", "make_summary", "register_summary"]


Scorer = Callable[[Tensor, int], Tensor]
"""Maps queries ``[rows, heads, queries, dim]`` (float32, softmax scale applied) and a number of groups to
scores ``[rows, heads, queries, groups, members]`` of the first groups. A group's score is the log-sum-exp
over its members (its low-bit keys, or its one mean): an estimate of that of its keys, up to a constant per
query. The caller may overwrite the result."""


class Summary(Protocol):
    """Summaries of all complete groups of one layer; a row is one KV head of one sequence of the batch."""

    groups: int
    """Complete groups summarised so far."""
    centres: BlockCentres | None
    """Centres of blocks, which must be known before keys are summarised; None: it needs none."""

    def expect(self, tokens: int) -> None:
        """Make room for the complete groups of a sequence of `tokens` tokens, and for no more."""

    def append(self, keys: Tensor) -> None:
        """Summarise ``[rows, tokens, dim]`` keys that follow on; `tokens` is a multiple of the group size."""

    def truncate(self, groups: int) -> None:
        """Forget every group from number `groups` on."""

    def scorer(self, groups: int) -> Scorer:
        """Return the scoring function of the first `groups` groups, unpacked once for many queries."""

    def tile_keys(self, groups: int, starts: Tensor | None, fused: bool) -> TileKeys:
        """Return what tiles of queries are routed by: of the first `groups` groups, at least one.

        `starts` is ``[rows]`` int64: the first token of each row's first group that is not padding; None: 0.
        With `fused` it is made for the kernels of `gpu_tiles`, else for `tiles.shared_groups`.
        """

    def turned(self, query: Tensor) -> Tensor:
        """Rotate queries ``[..., dim]`` as the vectors of `tile_keys` are."""

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by ``rows`` (int64 indices): beam search, batch repeat."""

    def bytes_per_token(self) -> float:
        """Return the bytes that one token's share of the summaries takes in one row."""

    def nbytes(self) -> int:
        """Return the bytes allocated."""


Factory = Callable[[Routing, Tensor, Kernels], Summary]
_KINDS: dict[str, Factory] = {}


def register_summary(kind: str) -> Callable[[Factory], Factory]:
    """Register the factory of a summary kind under the name that `routing.summary` uses."""

    def add(factory: Factory) -> Factory:
        _KINDS[kind] = factory
        return factory

    return add


def make_summary(routing: Routing, centre: Tensor, kernels: Kernels = "auto") -> Summary:
    """Build the empty summaries of one layer.

    Parameters
    ----------
    routing : Routing
        Names the kind and its settings.
    centre : Tensor
        ``[rows, dim]`` float32, the mean key of each row, fixed for the life of the layer.
    kernels : {"auto", "triton", "native", "reference"}
        What summarises and scores, for kinds that have a choice.

    Raises
    ------
    ValueError
        A kind that no module registered.
    """
    if routing.summary not in _KINDS:
        raise ValueError(
            f"unknown summary kind, got {routing.summary!r}, expected one of {sorted(_KINDS)} "
            "(routing.summary)"
        )
    return _KINDS[routing.summary](routing, centre, kernels)


def grown(buffer: Tensor, used: int, needed: int, dim: int, slack: bool = True) -> Tensor:
    """Return `buffer` with room for `needed` entries along `dim`, its first `used` ones kept.

    Without `slack` there is room for no more: who calls knows how many there will be.
    """
    if needed <= buffer.shape[dim]:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = max(needed, shape[dim] + shape[dim] // 4 + 64) if slack else needed
    larger = torch.empty(shape, dtype=buffer.dtype, device=buffer.device)
    larger.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
    return larger
