"""Values that mask proofs reason about: what a tensor holds at each index, as a formula of the index.

A tensor of positions is affine in its indices (``arange(n)[:, None] + 5`` holds ``i + 5``), with look-ups in
tensors that came from outside added to it or not, and divided or not; a bool tensor is a conjunction of
comparisons of such formulas, of look-ups, and of alternatives.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Expr
from torch.fx import Node

__all__ = [
    "Affine",
    "AtMost",
    "Either",
    "Fact",
    "Lookup",
    "Number",
    "Quotient",
    "Same",
    "Sum",
    "Truth",
    "Value",
    "Zero",
    "expression",
    "is_zero",
    "lookups",
]


@dataclass(frozen=True)
class Affine:
    """An integer tensor whose entry at index ``i`` is ``sum(coefficients[d] * i[d]) + constant``."""

    coefficients: tuple[Expr, ...]
    constant: Expr

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.coefficients)

    @property
    def is_constant(self) -> bool:
        """Whether all entries are equal."""
        return all(c == 0 for c in self.coefficients)

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

    def mapped(self, change: "Change") -> "Affine":
        """Apply an index change."""
        return change(self)


Change = Callable[[Affine], Affine]
"""Rewrites a formula of some indices as one of others."""


@dataclass(frozen=True)
class Lookup:
    """A tensor that holds ``source[indices]``, entry by entry; as a fact, that this is true (not zero)."""

    source: Node
    indices: tuple[Affine, ...]

    def mapped(self, change: Change) -> "Lookup":
        """Apply an index change."""
        return Lookup(self.source, tuple(change(index) for index in self.indices))


@dataclass(frozen=True)
class Sum:
    """An integer tensor that holds a formula of the index plus multiples of look-ups."""

    affine: Affine
    lookups: frozenset[tuple[Lookup, Expr]] = frozenset()
    """Every look-up once, with its factor."""

    @staticmethod
    def of(value: "Affine | Lookup | Sum", rank: int) -> "Sum":
        """Return a number of `rank` dimensions as a sum."""
        if isinstance(value, Lookup):
            zero = Affine((sympy.Integer(0),) * rank, sympy.Integer(0))
            return Sum(zero, frozenset([(value, sympy.Integer(1))]))
        return value if isinstance(value, Sum) else Sum(value)

    def plus(self, other: "Sum", sign: int = 1) -> "Sum":
        """Add or subtract another tensor, broadcast."""
        rank = max(self.affine.rank, other.affine.rank)
        left, right = (part.mapped(lambda a: a.widened(rank)) for part in (self, other))
        return Sum(
            left.affine.plus(right.affine, sign), _collected([*left.lookups, *right.times(sign).lookups])
        )

    def times(self, factor: Expr) -> "Sum":
        """Multiply by an integer that does not depend on the index."""
        return Sum(self.affine.times(factor), _collected((part, c * factor) for part, c in self.lookups))

    def mapped(self, change: Change) -> "Sum":
        """Apply an index change."""
        return Sum(change(self.affine), _collected((part.mapped(change), c) for part, c in self.lookups))

    def simplest(self) -> "Affine | Lookup | Sum":
        """Return the formula, or the look-up, if it is nothing else."""
        if not self.lookups:
            return self.affine
        (first, factor), *more = self.lookups
        alone = not more and factor == 1 and self.affine.is_constant and self.affine.constant == 0
        return first if alone else self


def _collected(terms: Iterable[tuple[Lookup, Expr]]) -> frozenset[tuple[Lookup, Expr]]:
    factors: defaultdict[Lookup, Expr] = defaultdict(lambda: sympy.Integer(0))
    for lookup, factor in terms:
        factors[lookup] = sympy.expand(factors[lookup] + factor)
    return frozenset((lookup, factor) for lookup, factor in factors.items() if factor != 0)


@dataclass(frozen=True)
class Quotient:
    """An integer tensor that holds a sum divided by a positive integer, rounded down."""

    numerator: Sum
    divisor: int

    def mapped(self, change: Change) -> "Quotient":
        """Apply an index change."""
        return Quotient(self.numerator.mapped(change), self.divisor)


@dataclass(frozen=True)
class AtMost:
    """The fact that a sum is at most 0."""

    formula: Sum

    def mapped(self, change: Change) -> "AtMost":
        """Apply an index change."""
        return AtMost(self.formula.mapped(change))


@dataclass(frozen=True)
class Zero:
    """The fact that a sum is 0."""

    formula: Sum

    def mapped(self, change: Change) -> "Zero":
        """Apply an index change."""
        return Zero(self.formula.mapped(change))


@dataclass(frozen=True)
class Same:
    """The fact that two quotients are equal."""

    sides: frozenset[Quotient]

    def mapped(self, change: Change) -> "Same":
        """Apply an index change."""
        return Same(frozenset(side.mapped(change) for side in self.sides))


@dataclass(frozen=True)
class Either:
    """The fact that at least one of some conjunctions holds; without any it is False everywhere."""

    options: frozenset["Truth"]

    def mapped(self, change: Change) -> "Either":
        """Apply an index change."""
        return Either(frozenset(option.mapped(change) for option in self.options))


Fact = AtMost | Zero | Same | Lookup | Either


@dataclass(frozen=True)
class Truth:
    """A bool tensor that is True where all facts hold; without facts it is True everywhere."""

    facts: frozenset[Fact] = frozenset()

    def both(self, other: "Truth") -> "Truth":
        """Return the conjunction of two tensors of equal rank."""
        return Truth(self.facts | other.facts)

    def either(self, other: "Truth") -> "Truth":
        """Return the disjunction of two tensors of equal rank."""
        options = self.options | other.options
        if Truth() in options:
            return Truth()
        (only,) = options if len(options) == 1 else (None,)
        return only or Truth(frozenset([Either(options)]))

    @property
    def options(self) -> frozenset["Truth"]:
        """The conjunctions of which one must hold; the tensor itself if it is one."""
        (only,) = self.facts if len(self.facts) == 1 else (None,)
        return only.options if isinstance(only, Either) else frozenset([self])

    def mapped(self, change: Change) -> "Truth":
        """Apply an index change."""
        return Truth(frozenset(fact.mapped(change) for fact in self.facts))


Number = Affine | Lookup | Sum | Quotient
Value = Number | Truth


def lookups(value: Value | Fact) -> set[Lookup]:
    """Return the look-ups that a number, a fact or a bool tensor depends on."""
    if isinstance(value, Lookup):
        return {value}
    if isinstance(value, Sum):
        return {lookup for lookup, _ in value.lookups}
    parts: Iterable[Value | Fact] = ()
    if isinstance(value, (AtMost, Zero)):
        parts = [value.formula]
    elif isinstance(value, Quotient):
        parts = [value.numerator]
    elif isinstance(value, Same):
        parts = value.sides
    elif isinstance(value, Either):
        parts = value.options
    elif isinstance(value, Truth):
        parts = value.facts
    return set().union(*map(lookups, parts))


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
