"""Timing by CUDA-graph replay where no call finds in the cache what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from hga_compile.kernels.tuner import graph_microseconds

__all__ = ["CALLS", "copies", "microseconds"]

# Bytes that no cache of a GPU holds, and calls of one graph, each of which may have inputs of its own.
UNCACHED, CALLS = 2**28, 20


def copies(size: int) -> int:
    """Return of how many inputs of `size` bytes none is in the cache when it is read again."""
    return min(CALLS, -(-UNCACHED // size))


def microseconds(step: Callable[..., object], inputs: Sequence[tuple[Any, ...]], calls: int = CALLS) -> float:
    """Return the median time of a call, each with the next input's parts."""
    each = cycle(inputs)
    return graph_microseconds(lambda: step(*next(each)), calls)
