"""Choosing one profile from the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

__all__ = ["PREFERENCES", "Preference", "choose", "front"]

Preference = Literal["quality", "balanced", "speed"]
PREFERENCES: tuple[Preference, ...] = ("quality", "balanced", "speed")
Point = tuple[float, ...]
# Slower than the default's decode step by at most this: `balanced`.
_SLOWER = 1.1


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

    `quality` is the least KL; `balanced` the least KL of those at most 10% slower than the default setting;
    `speed` the fastest whose KL is not above the default setting's.

    Parameters
    ----------
    points : sequence of tuple of float
        Feasible ones: KL first, then milliseconds a token; less is better. Where these are equal, later ones
        count.
    prefer : {"quality", "balanced", "speed"}
        The rule.
    baseline : tuple of float or None
        The default setting's point. Where it was not measured, or no point keeps to its bound, which needs a
        default setting that is not feasible itself, all rules are that of `quality`.

    Raises
    ------
    ValueError
        No points.
    """
    if not points:
        raise ValueError("at least one feasible point is wanted, got none")
    numbers = range(len(points))
    if baseline is not None and prefer == "balanced":
        kept = [number for number in numbers if points[number][1] <= _SLOWER * baseline[1]]
        return min(kept or numbers, key=lambda number: points[number])
    if baseline is not None and prefer == "speed":
        kept = [number for number in numbers if points[number][0] <= baseline[0]]
        if kept:
            return min(kept, key=lambda number: (points[number][1], points[number][0], points[number][2:]))
    return min(numbers, key=lambda number: points[number])
