"""Handles: how a compiled graph names the K/V of a layer.

A handle is a one-element int64 CPU tensor filled in by `hga::open`. It is an operand of every op that touches
the layer's K/V, and listed as mutated, so that the compiler keeps those ops and their order. The number in it
leads to the layer's state here.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.kernels.scoring import Scoring
from hga_compile.kernels.site import SiteConfig

__all__ = ["STATES", "LayerState", "States"]


class LayerState(Protocol):
    """K/V and index of one layer of one cache; `hga_compile.store` implements it."""

    length: int
    """Tokens stored."""

    def put(self, key: Tensor, value: Tensor, length: int, kernels: Kernels = "auto") -> None:
        """Store ``[batch, kv_heads, n, dim]`` rows as the last `n` of `length` tokens."""

    def full(self) -> tuple[Tensor, Tensor]:
        """Return all K and V, ``[batch, kv_heads, length, dim]``, on the compute device."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        key_mask: Tensor | None,
        scale: float,
        site: SiteConfig,
        scoring: Scoring,
    ) -> Tensor:
        """Store the new rows, then routed attention of the last queries."""

    def attend_window(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        key_mask: Tensor | None,
        scale: float,
        window: int,
        scoring: Scoring,
    ) -> Tensor:
        """Store the new rows, attend to the last `window` tokens, and forget older ones."""


class States:
    """All open states of the process, by number."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._states: dict[int, LayerState] = {}
        self._closed: deque[Tensor] = deque()
        self._watches = threading.local()
        self.make: Callable[[], LayerState] | None = None
        """Makes an empty state; set by `hga_compile.store` when it is imported."""

    def open(self) -> Tensor:
        """Make an empty state and return its handle."""
        if self.make is None:
            raise RuntimeError("no K/V store is loaded: import hga_compile before running a graph of its")
        self.collect()
        handle = self.adopt(self.make())
        for opened in getattr(self._watches, "stack", ()):
            opened.append(handle)
        return handle

    @contextmanager
    def watch(self) -> Iterator[list[Tensor]]:
        """Yield a list that the handles of states which this thread opens meanwhile are put on."""
        stack = self._watches.__dict__.setdefault("stack", [])
        stack.append([])
        try:
            yield stack[-1]
        finally:
            stack.pop()

    def adopt(self, state: LayerState) -> Tensor:
        """Register an existing state and return its handle."""
        with self._lock:
            number = next(self._numbers)
            self._states[number] = state
        return torch.tensor([number], dtype=torch.int64, device="cpu")

    def get(self, handle: Tensor) -> LayerState:
        """Return the state that a handle names.

        Raises
        ------
        RuntimeError
            The handle's cache is gone.
        """
        number = int(handle)
        try:
            return self._states[number]
        except KeyError:
            raise RuntimeError(
                f"the K/V of handle {number} is gone: its cache was freed or belongs to another process; "
                "start with a new cache"
            ) from None

    def close(self, handle: Tensor) -> None:
        """Give a handle up; safe inside a finaliser, since the state is dropped at the next `open`."""
        self._closed.append(handle)

    def count(self) -> int:
        """Return the number of open states, given-up ones not counted."""
        self.collect()
        return len(self._states)

    def collect(self) -> None:
        """Drop the states that were given up; not to be called by a finaliser."""
        with suppress(IndexError):  # another thread may take the last one
            while self._closed:
                handle = self._closed.popleft()
                with self._lock:
                    self._states.pop(int(handle), None)


STATES = States()
"""The process's states, named by handles inside graphs."""
