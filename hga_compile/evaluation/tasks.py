"""Retrieval tasks: sentences to plant in a text, a question about them, and the answer.

The wording follows RULER (Hsieh et al. 2024, arXiv:2404.06654): needles single, among other keys and with
several values, and variable tracking.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

TASK = "Some special facts are hidden within the following text. Memorize them: you will be asked about them."
_FIRST = (
    "amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "idle", "jolly", "keen", "lucid",
    "mellow", "narrow", "ornate", "placid", "quiet", "rustic", "silent", "tender", "urban", "vivid", "wary",
)  # fmt: skip
_SECOND = (
    "anchor", "basket", "candle", "drawer", "engine", "feather", "garden", "hammer", "island", "jacket",
    "kettle", "ladder", "magnet", "orchard", "pencil", "quarry", "ribbon", "saddle", "temple", "umbrella",
    "violin", "window", "yard",
)  # fmt: skip


@dataclass(frozen=True)
class Needle:
    """A sentence to plant; its place is a share of the text, None anywhere."""

    text: str
    depth: float | None


@dataclass(frozen=True)
class Task:
    """What is planted and asked."""

    needles: tuple[Needle, ...]
    question: str
    lead: str
    """How the answer begins, given to the model."""
    answers: tuple[str, ...]
    """What it goes on with, in order, with commas between."""


Maker = Callable[[random.Random, float, int], Task]


def single(draw: random.Random, depth: float, count: int) -> Task:
    """Ask for the number of the one key that is planted; `count` is not used."""
    return multi_key(draw, depth, 1)


def multi_key(draw: random.Random, depth: float, count: int) -> Task:
    """Ask for the number of one of `count` keys; the others are planted anywhere."""
    keys, values = _keys(draw, count), _values(draw, count)
    needles = [
        Needle(_fact(key, value), depth if number == 0 else None)
        for number, (key, value) in enumerate(zip(keys, values, strict=True))
    ]
    return Task(
        tuple(needles),
        f"What is the special magic number for {keys[0]} mentioned in the provided text?",
        f"The special magic number for {keys[0]} mentioned in the provided text is",
        (values[0],),
    )


def multi_value(draw: random.Random, depth: float, count: int) -> Task:
    """Ask for all `count` numbers of one key, in the order of the text; the first lies at `depth`."""
    key, values = _keys(draw, 1)[0], _values(draw, count)
    return Task(
        tuple(
            Needle(_fact(key, value), place)
            for value, place in zip(values, _spread(depth, count), strict=True)
        ),
        f"What are all the special magic numbers for {key} mentioned in the provided text, in order?",
        f"The special magic numbers for {key} mentioned in the provided text are",
        tuple(values),
    )


def variables(draw: random.Random, depth: float, count: int) -> Task:
    """Ask for the `count` variables of a chain of assignments, in order; the first lies at `depth`."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(draw.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = str(draw.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in names)]
    facts = [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]
    return Task(
        tuple(Needle(fact, place) for fact, place in zip(facts, _spread(depth, count), strict=True)),
        f"Find all variables that are assigned the value {value} in the text above.",
        f"According to the chain of variable assignment in the text above, {count} variables are assigned "
        f"the value {value}, they are:",
        tuple(names),
    )


TASKS: Mapping[str, Maker] = {
    "single": single,
    "multi-key": multi_key,
    "multi-value": multi_value,
    "variables": variables,
}


def _fact(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _keys(draw: random.Random, count: int) -> list[str]:
    pairs = draw.sample(range(len(_FIRST) * len(_SECOND)), count)
    return [f"{_FIRST[pair // len(_SECOND)]}-{_SECOND[pair % len(_SECOND)]}" for pair in pairs]


def _values(draw: random.Random, count: int) -> list[str]:
    return [str(value) for value in draw.sample(range(1_000_000, 10_000_000), count)]


def _spread(depth: float, count: int) -> list[float]:
    """Return places in order: the first at `depth`, the others evenly behind it, up to the end."""
    return [depth + (1.0 - depth) * number / count for number in range(count)]
