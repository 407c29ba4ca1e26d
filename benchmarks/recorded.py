"""Routed sets that a real model had while it decoded a real text: how they are kept, and made into lists.

A recording holds the groups of every KV head of every layer at each of its steps. A layer of the benchmark
takes heads from all over the recorded model; each of its rows replays one of them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.plan import QueryPlan, plan_queries

__all__ = ["DATA", "Recording", "Step", "lru_hits", "nearest"]

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Step:
    """What the rows of one layer attend to in one step."""

    length: int
    """Tokens of the sequence."""
    lists: tuple[NDArray[np.int32], ...]
    """Of each row: groups, ascending."""
    spans: Tensor
    """``[rows, 7]`` int32 on the CPU: `gpu.Spans.table`, a line for each row."""

    def chosen(self, width: int) -> Tensor:
        """Return the lists as ``[rows, width]`` int32, on the CPU."""
        out = torch.zeros(len(self.lists), width, dtype=torch.int32, device="cpu")
        for row, own in zip(out, self.lists, strict=True):
            row[: len(own)] = torch.from_numpy(own)
        return out

    @property
    def listed(self) -> int:
        """Entries of all lists."""
        return sum(map(len, self.lists))

    def incomplete(self, group_size: int) -> int:
        """Return how many listed groups lack their last tokens: no cache keeps them."""
        return sum(int((own >= self.length // group_size).sum()) for own in self.lists)


@dataclass(frozen=True)
class Recording:
    """Routed sets of consecutive decode steps.

    Attributes
    ----------
    groups : array
        ``[steps, heads, groups]`` bool: sinks, window and chosen groups of each KV head of each layer.
    tokens : int
        Tokens of the sequence at the last step.
    routing : Routing
        Under which it was made.
    facts : dict
        Model, text, versions.
    """

    groups: NDArray[np.bool_]
    tokens: int
    routing: Routing
    facts: dict[str, Any]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.groups)

    def save(self, path: Path) -> None:
        """Write to a compressed ``.npz``: what changes from step to step, as bits."""
        changes = self.groups.copy()
        changes[1:] ^= self.groups[:-1]
        about = {"tokens": self.tokens, "routing": self.routing.model_dump(mode="json"), **self.facts}
        np.savez_compressed(
            path, changes=np.packbits(changes, axis=2), groups=self.groups.shape[2], about=json.dumps(about)
        )

    @staticmethod
    def load(path: Path) -> Recording:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            changes = np.unpackbits(file["changes"], axis=2, count=int(file["groups"])).astype(np.bool_)
            about = json.loads(str(file["about"]))
        routing = Routing.model_validate_json(json.dumps(about.pop("routing")))
        return Recording(np.logical_xor.accumulate(changes), about.pop("tokens"), routing, about)

    def layer(self, number: int, rows: int, tokens: int) -> list[Step]:
        """Return the steps of one layer of the benchmark, whose last one sees `tokens` tokens.

        A context that is n times as long as the recorded one is n stretches of that length; in each a row
        has the chosen groups of another head. Sinks and window are those of the whole context.

        Parameters
        ----------
        number : int
            Of the layer: each takes other heads, until all have been taken.
        rows : int
            KV heads of the layer.
        tokens : int
            A multiple of the recorded length.
        """
        stretches, rest = divmod(tokens, self.tokens)
        if rest or not stretches:
            raise ValueError(f"tokens must be a multiple of the {self.tokens} recorded ones, got {tokens}")
        order = np.random.default_rng(0).permutation(self.groups.shape[1])
        first = number * rows * stretches
        taken = order[(first + np.arange(rows * stretches)) % len(order)].reshape(rows, stretches)
        return [self._step(step, taken, tokens) for step in range(self.steps)]

    def _step(self, step: int, taken: NDArray[np.int64], tokens: int) -> Step:
        back = self.steps - 1 - step
        own, plan = (_span(self.routing, length - back) for length in (self.tokens, tokens))
        lists, lines = [], []
        for heads in taken:
            marks = self.groups[step, heads].copy()
            marks[:, : own[1]] = False
            marks[:, own[2] :] = False
            # Stretches lie one behind the other.
            chosen = np.flatnonzero(marks[:, : self.tokens // self.routing.group_size])
            chosen = chosen[(chosen >= plan[1]) & (chosen < plan[2])]
            ends = np.arange(plan[0], plan[1]), np.arange(plan[2], plan[3])
            lists.append(np.concatenate([ends[0], chosen, ends[1]]).astype(np.int32))
            lines.append([*plan[:3], len(chosen), plan[3], 0, tokens - back])
        spans = torch.tensor(lines, dtype=torch.int32, device="cpu")
        return Step(tokens - back, tuple(lists), spans)


def _span(routing: Routing, length: int) -> tuple[int, int, int, int]:
    """First sink group, group past the sinks, first group of the window, groups in all."""
    plan: QueryPlan = plan_queries(routing, length - 1, 1, None)
    parts = (int(part) for part in (plan.sink_start, plan.sink_end, plan.window))
    return (*parts, -(-length // routing.group_size))  # type: ignore[return-value]


def nearest(recordings: Sequence[Recording], tokens: int) -> Recording | None:
    """Return the longest recording of which `tokens` is a multiple; None without one."""
    fit = [recording for recording in recordings if tokens % recording.tokens == 0]
    return max(fit, key=lambda recording: recording.tokens, default=None)


def lru_hits(steps: Sequence[Step], group_size: int, share: float, skipped: int) -> float:
    """Return the hit rate of a cache that gives up what was listed longest ago, one for each row.

    Parameters
    ----------
    steps : sequence of Step
        Of one layer, from an empty cache on.
    group_size : int
        Tokens of a group.
    share : float
        Of the groups that the cache holds.
    skipped : int
        First steps, which are not counted.
    """
    hits = listed = 0
    for row in range(len(steps[0].lists)):
        kept: OrderedDict[int, None] = OrderedDict()
        for number, step in enumerate(steps):
            complete = step.length // group_size
            slots = max(1, int(-(-step.length // group_size) * share))
            own = [int(group) for group in step.lists[row]]
            # What is listed now is looked up before anything gives way.
            found = [group for group in own if group in kept]
            if number >= skipped:
                hits, listed = hits + len(found), listed + len(own)
            for group in own:
                if group < complete:
                    kept[group] = None
                    kept.move_to_end(group)
            while len(kept) > slots:
                kept.popitem(last=False)
    return hits / listed
