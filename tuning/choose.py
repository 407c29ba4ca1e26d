"""Choosing one profile from the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

__all__ = ["PREFERENCES", "Preference", "choose", "front"]

Preference = Literal["quality", "balanced", "speed"]
PREFERENCES: tuple[Preference, ...] = ("quality", "balanced", "speed")
Point = tuple[float, ...]
# Most of the default's quality and latency that a choice may have.
_MOST: dict[Preference, tuple[float, float]] = {
    "quality": (math.inf, math.inf),
    "balanced": (1.25, 1.25),
    "speed": (1.05, math.inf),
}


def front(points: Sequence[Point]) -> list[int]:
    """Return which points no other one is at least as good as in everything and better in something."""
    found: list[int] = []
    for number, point in enumerate(points):
        dominated = any(
            all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points
        )
        if not dominated and point not in (points[index] for index in found):
            found.append(number)
    return found


def choose(points: Sequence[Point], prefer: Preference, baseline: Point | None = None) -> int:
    """Return the number of the point to take.

    Parameters
    ----------
    points : sequence of tuple of float
        Feasible ones: quality first, then latency; less is better.
    prefer : {"quality", "balanced", "speed"}
        `quality` and `speed` take the best in the one, `balanced` the point with the least product of both,
        which is the one where a percent of the one costs a percent of the other.
    baseline : tuple of float or None
        The default setting's point. `speed` takes no worse one (5% count as nothing) and `balanced` one that
        is at most a quarter slower and a quarter worse, where there are such.

    Raises
    ------
    ValueError
        No points.
    """
    if not points:
        raise ValueError("at least one feasible point is wanted, got none")
    candidates = front(points)
    if baseline is not None:
        most = _MOST[prefer]
        near = [
            number
            for number in candidates
            if all(
                got <= limit * had for got, limit, had in zip(points[number], most, baseline, strict=False)
            )
        ]
        candidates = near or candidates

    def rank(number: int) -> tuple[float, float]:
        quality, time = points[number][:2]
        if prefer == "balanced":
            return max(quality, 1e-9) * time, quality
        return (quality, time) if prefer == "quality" else (time, quality)

    return min(candidates, key=rank)
