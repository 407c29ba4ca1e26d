"""Routed sets recorded from a real checkpoint in the place of those that random weights come to.

Random weights attend to nothing in particular: what a step is routed to has little to do with the last one's,
and a hot cache finds little. Here routing runs, and costs what it costs, and then its lists are overwritten
by recorded ones, of as many groups; what crosses PCIe is what a real model and text would have had cross.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.plan import plan_queries

__all__ = ["Recorded", "Replay", "fitted"]


class Recorded(Protocol):
    """Routed sets of consecutive decode steps (`recorded.Recording`)."""

    groups: NDArray[np.bool_]
    """``[steps, heads, groups]``: sinks, window and chosen groups of every KV head of every layer."""
    tokens: int
    """Tokens of the sequence at the last step."""
    routing: Routing


class Replay:
    """Lists for every layer of a model, step by step.

    A context n times as long as the recorded one is n stretches of that length; in each, a row has the chosen
    groups of another recorded head. Sinks and window are those of the context itself. Past the last recorded
    step the steps go back, and forth again.

    Parameters
    ----------
    recorded : Recorded
        What is replayed.
    layers, rows : int
        Layers that are routed, in the order in which they run; KV heads of each.
    length : int
        Tokens of the sequence at its longest.
    routing : Routing
        Of the model, with the group size of the recording.
    device : torch.device
        Where the lists are read.
    """

    def __init__(
        self, recorded: Recorded, layers: int, rows: int, length: int, routing: Routing, device: torch.device
    ) -> None:
        if routing.group_size != recorded.routing.group_size:
            raise ValueError(
                f"lists of groups of {recorded.routing.group_size} tokens cannot stand for groups of "
                f"{routing.group_size} (--replay, routing.group_size)"
            )
        self.recorded, self.routing, self.rows, self.layers = recorded, routing, rows, layers
        self.stretches = -(-length // recorded.tokens)
        heads = recorded.groups.shape[1]
        order = np.random.default_rng(0).permutation(heads)
        need = np.arange(layers * rows * self.stretches) % heads
        self.taken = order[need].reshape(layers, rows, self.stretches)
        width = len(_parts(routing, length)[0]) + sum(_parts(routing, length)[1:3]) + 2
        self.current = torch.zeros(layers, rows, width, dtype=torch.int32, device=device)
        """``[layers, rows, width]`` int32: the lists of the step that runs."""
        self.calls = 0
        """Lists that were overwritten."""
        self._ready: list[Tensor] = []

    def prepare(self, lengths: Sequence[int]) -> None:
        """Work the lists of all steps out before the first is timed: the CPU's caches are the model's then.

        Parameters
        ----------
        lengths : sequence of int
            Tokens of the sequence with each step.
        """
        lists = [self._lists(step, length) for step, length in enumerate(lengths)]
        self._ready = [part.pin_memory() if self.current.is_cuda else part for part in lists]

    def load(self, step: int, length: int) -> None:
        """Make the lists of a step, whose sequence is `length` tokens long with it, those that are read."""
        source = self._ready[step] if self._ready else self._lists(step, length)
        self.current[:, :, : source.shape[2]].copy_(source)

    def _lists(self, step: int, length: int) -> Tensor:
        """Return the lists of a step, ``[layers, rows, width]`` int32 on the CPU."""
        fixed, taken, sinks, window = _parts(self.routing, length)
        last, steps = -(-length // self.routing.group_size), len(self.recorded.groups)
        back = step % max(1, 2 * steps - 2)
        number = back if back < steps else 2 * steps - 2 - back
        lists = np.zeros((self.layers, self.rows, len(fixed) + taken), np.int32)
        lists[:, :, :sinks] = fixed[:sinks]
        lists[:, :, sinks + taken :] = fixed[sinks:]
        for layer in range(self.layers):
            for row in range(self.rows):
                own = self._chosen(number, self.taken[layer, row])
                lists[layer, row, sinks : sinks + taken] = fitted(own, taken, sinks, window)
        assert lists.max() < last
        return torch.from_numpy(lists)

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Have every list that is routed to on a GPU overwritten, layer after layer."""
        from hga_compile.kernels import triton_route

        route = triton_route.route

        def replayed(*given: Any, **named: Any) -> Tensor:
            return self.overwrite(route(*given, **named))

        triton_route.route = replayed
        try:
            yield
        finally:
            triton_route.route = route

    def overwrite(self, chosen: Tensor) -> Tensor:
        """Write the next layer's lists over ``[rows, width]`` int32; what is behind them may be anything."""
        own = self.current[self.calls % self.layers]
        self.calls += 1
        width = min(own.shape[1], chosen.shape[1])
        chosen[:, :width].copy_(own[:, :width])
        return chosen

    def _chosen(self, step: int, heads: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what was chosen between sinks and window, stretch behind stretch, ascending."""
        each = self.recorded.tokens // self.routing.group_size
        # Of a step before the last one the window began earlier.
        length = self.recorded.tokens - (len(self.recorded.groups) - 1 - step)
        _, _, sinks, window = _parts(self.recorded.routing, length)
        # All stretches at once: there is a list for every row of every layer, and a step waits for them.
        stretch, own = np.nonzero(self.recorded.groups[step, heads, sinks : min(window, each)])
        return (own + sinks + stretch * each).astype(np.int64)


def fitted(groups: NDArray[np.int64], count: int, low: int, high: int) -> NDArray[np.int64]:
    """Return `count` groups of ``low <= group < high``, ascending: those given, thinned out or filled up.

    What fills up are neighbours of what is there, so that the same groups come to the same list.
    """
    if not 0 <= count <= high - low:
        raise ValueError(f"{count} groups do not lie between {low} and {high}")
    own = groups[(groups >= low) & (groups < high)]
    own = own if bool((np.diff(own) > 0).all()) else np.unique(own)
    if len(own) > count:
        return own[np.linspace(0, len(own) - 1, count).round().astype(np.int64)] if count else own[:0]
    if len(own) == count:
        return own
    marks = np.zeros(high - low, dtype=np.bool_)
    marks[own - low] = True
    for missing in iter(lambda: count - int(marks.sum()), 0):
        near = np.zeros_like(marks)
        near[1:], near[0] = marks[:-1], True
        near[:-1] |= marks[1:]
        marks[np.flatnonzero(near & ~marks)[:missing]] = True
    return np.flatnonzero(marks) + low


def _parts(routing: Routing, length: int) -> tuple[NDArray[np.int64], int, int, int]:
    """Return a query's groups of sinks and window, how many it chooses, sinks' end and window's begin."""
    plan = plan_queries(routing, length - 1, 1, None)
    start, end, window = int(plan.sink_start), int(plan.sink_end), int(plan.window)
    last = -(-length // routing.group_size)
    fixed = np.concatenate([np.arange(start, end), np.arange(window, last)])
    return fixed, int(plan.taken), end, window
