"""Values that mask proofs reason about: what a tensor holds at each index, as a formula of the index.

A tensor of positions is affine in its indices (``arange(n)[:, None] + 5`` holds ``i + 5``); a bool tensor is
a conjunction of inequalities between such formulas and of look-ups in a tensor that came from outside.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Expr
from torch.fx import Node

__all__ = ["Affine", "AtMost", "Fact", "Lookup", "Truth", "Value", "expression", "is_zero"]


@dataclass(frozen=True)
class Affine:
    """An integer tensor whose entry at index ``i`` is ``sum(coefficients[d] * i[d]) + constant``."""

    coefficients: tuple[Expr, ...]
    constant: Expr

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.coefficients)

    def plus(self, other: "Affine", sign: int = 1) -> "Affine":
        """Add or subtract another tensor, broadcast."""
        rank = max(self.rank, other.rank)
        left, right = self.widened(rank), other.widened(rank)
        pairs = zip(left.coefficients, right.coefficients, strict=True)
        return Affine(
            tuple(sympy.expand(a + sign * b) for a, b in pairs),
            sympy.expand(left.constant + sign * right.constant),
        )

    def times(self, factor: Expr) -> "Affine":
        """Multiply by an integer that does not depend on the index."""
        return Affine(
            tuple(sympy.expand(c * factor) for c in self.coefficients), sympy.expand(self.constant * factor)
        )

    def widened(self, rank: int) -> "Affine":
        """Prepend dimensions, as broadcasting does."""
        return Affine((sympy.Integer(0),) * (rank - self.rank) + self.coefficients, self.constant)

    def at(self, indices: Sequence["Affine"]) -> "Affine":
        """Read the tensor at affine indices: the composition of the formulas."""
        rank = max((index.rank for index in indices), default=0)
        total = Affine((sympy.Integer(0),) * rank, self.constant)
        for coefficient, index in zip(self.coefficients, indices, strict=True):
            total = total.plus(index.times(coefficient))
        return total


@dataclass(frozen=True)
class Lookup:
    """A tensor that holds ``source[indices]``, entry by entry; as a fact, that this is true (not zero)."""

    source: Node
    indices: tuple[Affine, ...]

    def widened(self, rank: int) -> "Lookup":
        """Prepend dimensions, as broadcasting does."""
        return Lookup(self.source, tuple(index.widened(rank) for index in self.indices))


@dataclass(frozen=True)
class AtMost:
    """The fact that a formula is at most 0."""

    formula: Affine

    def widened(self, rank: int) -> "AtMost":
        """Prepend dimensions, as broadcasting does."""
        return AtMost(self.formula.widened(rank))


Fact = AtMost | Lookup


@dataclass(frozen=True)
class Truth:
    """A bool tensor that is True where all facts hold; without facts it is True everywhere."""

    facts: frozenset[Fact]
    rank: int

    def both(self, other: "Truth") -> "Truth":
        """Return the conjunction, broadcast."""
        rank = max(self.rank, other.rank)
        return Truth(self.widened(rank).facts | other.widened(rank).facts, rank)

    def widened(self, rank: int) -> "Truth":
        """Prepend dimensions, as broadcasting does."""
        return Truth(frozenset(fact.widened(rank) for fact in self.facts), rank)


Value = Affine | Lookup | Truth


def expression(value: Any) -> Expr | None:
    """Return an int, a SymInt or a graph node that holds one as a formula; None for anything else."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, torch.SymInt):
        return sympy.expand(value.node.expr)
    return None


def is_zero(formula: Expr, shapes: Iterable[torch.SymInt] = ()) -> bool:
    """Say whether a formula is 0 for all values of its symbols.

    Parameters
    ----------
    formula : sympy expression
        Of shape symbols.
    shapes : iterable of SymInt
        Any of the graph's; their shape environment knows which symbols are equal.
    """
    if sympy.expand(formula) == 0:
        return True
    for shape in shapes:
        environment = shape.node.shape_env
        if environment is not None:
            return bool(sympy.expand(environment.simplify(formula)) == 0)
    return False
