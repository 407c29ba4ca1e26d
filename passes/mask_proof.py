"""Prove from the ops that build it what an attention mask lets through; never by looking at values."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any

import sympy
from torch.fx import Node

from hga_compile.passes.index_algebra import (
    Affine,
    AtMost,
    Either,
    Fact,
    Lookup,
    Same,
    Sum,
    Truth,
    Zero,
)
from hga_compile.passes.mask_places import Places
from hga_compile.passes.mask_values import MaskValues, NotUnderstood
from hga_compile.passes.packing import positions_of

__all__ = ["MaskProof", "prove_mask"]


@dataclass(frozen=True)
class MaskProof:
    """What a mask ``[batch, 1, queries, keys]`` was proven to be.

    A key is visible if it is not later than the query (with the last query at the last key), lies within the
    window, the document and the chunk of the query if there are any, and is not padding if there is a padding
    table; or if one of the formulas in `ahead` holds.
    """

    causal: bool
    window: int | None = None
    """A query sees itself and ``window - 1`` keys before it."""
    padding: Node | None = None
    """Node of the ``[batch, >= keys]`` table, not zero for real tokens."""
    documents: Node | None = None
    """Node of the ``[batch, >= keys]`` or ``[>= keys]`` table, equal for the tokens of one document."""
    chunk: tuple[int, Node | None] | None = None
    """Tokens of a chunk, and node of the ``[batch]`` table with the token that the first begins at."""
    ahead: frozenset[Truth] = frozenset()
    """Formulas of ``[batch, head, query, key]`` indices that make later keys visible: a prefix, or blocks."""
    unknown: str = ""
    """What could not be proven; empty if all was."""

    @property
    def proven(self) -> bool:
        """Whether nothing is left unknown."""
        return not self.unknown


def prove_mask(mask: Node, values: MaskValues) -> MaskProof:
    """Work out what the mask operand of an attention lets through.

    Parameters
    ----------
    mask : Node
        Of a four-dimensional bool tensor.
    values : MaskValues
        Formulas of the graph's nodes.

    Returns
    -------
    MaskProof
        With `unknown` set where a proof fails.
    """
    shape = mask.meta["val"].shape
    if len(shape) != 4:
        return MaskProof(False, unknown=f"a mask of {len(shape)} dimensions")
    try:
        places = Places(shape)
        return _read(places.settled(values.truth(mask)).facts, places, values)
    except NotUnderstood as unknown:
        return MaskProof(False, unknown=str(unknown))


def _read(facts: frozenset[Fact], places: Places, values: MaskValues) -> MaskProof:
    choices = [fact for fact in facts if isinstance(fact, Either)]
    always = facts.difference(choices)
    by_tokens = partial(_by_tokens, always, places, values)
    if not choices:
        return _conjunction(by_tokens(always), places)
    choice, *more = choices
    options = {Truth(by_tokens(option.facts)) for option in choice.options}
    ahead = {option for option in options if _picks_keys(option.facts, places)}
    rest = options - ahead
    if more or len(rest) != 1:
        raise NotUnderstood(f"alternatives: {len(ahead)} prefixes or blocks, {len(rest)} others")
    (base,) = rest
    proof = _conjunction(by_tokens(always) | base.facts, places)
    if not proof.causal:
        raise NotUnderstood("alternatives none of which is causal")
    return replace(proof, ahead=frozenset(Truth(always | option.facts) for option in ahead))


def _conjunction(facts: Iterable[Fact], places: Places) -> MaskProof:
    """Say what facts that all hold make of a mask."""
    found: dict[str, Any] = {}
    for fact in facts:
        for name, value in _meaning(fact, places).items():
            if found.setdefault(name, value) != value:
                raise NotUnderstood(f"two different values of {name}")
    proof = MaskProof(**{"causal": False} | found)
    if proof.window is not None and not proof.causal:
        raise NotUnderstood("a window that looks ahead")
    return proof


def _meaning(fact: Fact, places: Places) -> dict[str, Any]:
    """Return what a fact says, as fields of a proof."""
    if isinstance(fact, AtMost):
        return _inequality(fact.formula, places)
    if isinstance(fact, Lookup):
        if len(fact.indices) == 2 and places.reads(fact, places.key):
            return {"padding": fact.source}
        raise NotUnderstood(f"a look-up in {fact.source.name}, which is no padding table")
    if isinstance(fact, Zero) and (pair := _documents(fact, places)):
        return {"documents": pair[0].source}
    if isinstance(fact, Same) and (chunk := _chunk(fact, places)):
        return {"chunk": chunk}
    raise NotUnderstood("an equality that tells neither documents nor chunks apart")


def _inequality(formula: Sum, places: Places) -> dict[str, Any]:
    """Recognise ``key <= query`` and ``key > query - window``, both aligned to the last key."""
    gap = Sum(places.query.plus(places.key, -1))
    if places.is_zero(formula.plus(gap)):
        return {"causal": True}
    # query - key - (window - 1) <= 0
    rest = formula.plus(gap, -1)
    width = sympy.expand(1 - rest.affine.constant)
    if not rest.lookups and rest.affine.is_constant and width.is_Integer and width > 0:
        return {"window": int(width)}
    parts = (*formula.affine.coefficients, formula.affine.constant)
    if not formula.lookups and all(part.is_nonpositive for part in parts):
        return {}  # indices are never negative: it holds everywhere
    raise NotUnderstood(f"an inequality between positions: {formula.affine.coefficients}")


def _documents(fact: Zero, places: Places) -> tuple[Lookup, Lookup] | None:
    """Recognise ``table[batch, query] == table[batch, key]``; return both look-ups in this order."""
    pair = sorted(fact.formula.lookups, key=lambda term: places.reads(term[0], places.key))
    if not places.is_zero(fact.formula.affine) or sorted(factor for _, factor in pair) != [-1, 1]:
        return None
    (query, _), (key, _) = pair
    known = places.reads(query, places.query) and places.reads(key, places.key)
    return (query, key) if known and query.source is key.source else None


def _chunk(fact: Same, places: Places) -> tuple[int, Node | None] | None:
    """Recognise ``(query - start) // size == (key - start) // size``."""
    for query, key in permutations(fact.sides, 2):
        shift = query.numerator.plus(Sum(places.query), -1)
        same = places.is_zero(key.numerator.plus(Sum(places.key), -1).plus(shift, -1))
        starts = [lookup for lookup, factor in shift.lookups if factor == -1 and places.per_sequence(lookup)]
        known = places.is_zero(shift.affine) and len(starts) == len(shift.lookups) < 2
        if same and known and query.divisor == key.divisor:
            return query.divisor, starts[0].source if starts else None
    return None


def _by_tokens(
    always: Iterable[Fact], places: Places, values: MaskValues, facts: Iterable[Fact]
) -> frozenset[Fact]:
    """Compare tokens instead of positions, where only those within one document are compared."""
    for fact in always:
        pair = _documents(fact, places) if isinstance(fact, Zero) else None
        positions = positions_of(pair[0].source, values) if pair else None
        if pair and positions:
            query, key = (positions.mapped(partial(Affine.at, indices=part.indices)) for part in pair)
            # Within a document a position is as far from another as the token is from the other's.
            nothing = query.plus(key, -1).plus(Sum(places.query.plus(places.key, -1)), -1)
            facts = [_without_lookups(part, nothing) for part in facts]
    return frozenset(facts)


def _without_lookups(fact: Fact, nothing: Sum) -> Fact:
    """Add a formula that is 0, or its opposite, to a comparison if no look-up remains then."""
    if not isinstance(fact, (AtMost, Zero)) or not fact.formula.lookups:
        return fact
    swapped = (fact.formula.plus(nothing, sign) for sign in (1, -1))
    return next((type(fact)(formula) for formula in swapped if not formula.lookups), fact)


def _picks_keys(facts: Iterable[Fact], places: Places) -> bool:
    """Say whether facts pick keys wherever the query is: a prefix, marked keys, or blocks of a table."""
    picks = False
    for fact in facts:
        if not isinstance(fact, (AtMost, Zero, Lookup)):
            return False
        formula = Sum.of(fact, 4) if isinstance(fact, Lookup) else fact.formula
        for lookup, _ in formula.lookups:
            at_key = places.reads(lookup, places.key)
            picks = picks or at_key
            if not (at_key or places.reads(lookup, places.query) or places.per_sequence(lookup)):
                return False
        if not formula.affine.is_constant:
            # The first keys, as many as a number or a table says.
            if not isinstance(fact, AtMost) or not formula.affine.plus(places.key, -1).is_constant:
                return False
            picks = True
    return picks
