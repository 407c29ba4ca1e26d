"""Prove from the ops that build it what an attention mask lets through; never by looking at values."""

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hga_compile.passes.index_algebra import Affine, AtMost, Lookup, Truth, expression, is_zero
from hga_compile.passes.mask_values import MaskValues, NotUnderstood

__all__ = ["MaskProof", "prove_mask"]


@dataclass(frozen=True)
class MaskProof:
    """What a mask ``[batch, 1, queries, keys]`` was proven to be.

    A key is visible if it is not later than the query (with the last query at the last key), lies within the
    window if there is one, and is not padding if there is a padding table.
    """

    causal: bool
    window: int | None = None
    """A query sees itself and ``window - 1`` keys before it."""
    padding: Node | None = None
    """Node of the ``[batch, >= keys]`` table, not zero for real tokens."""
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
        truth = values.truth(mask)
    except NotUnderstood as unknown:
        return MaskProof(False, unknown=str(unknown))
    return _classify(truth, shape)


def _classify(truth: Truth, shape: Any) -> MaskProof:
    queries, keys = expression(shape[2]), expression(shape[3])
    if queries is None or keys is None:
        return MaskProof(False, unknown="a mask of unknown size")
    symbols = [size for size in shape if isinstance(size, torch.SymInt)]
    causal, window, padding = False, None, None
    for fact in truth.facts:
        if isinstance(fact, Lookup):
            if not _is_padding(fact, shape):
                return MaskProof(False, unknown=f"a look-up in {fact.source.name}, which is no padding table")
            if padding is not None and padding is not fact.source:
                return MaskProof(False, unknown="two padding tables")
            padding = fact.source
            continue
        kind = _inequality(fact, queries, keys, symbols)
        if kind == "causal":
            causal = True
        elif isinstance(kind, int) and window in (None, kind):
            window = kind
        elif all(part.is_nonpositive for part in (*fact.formula.coefficients, fact.formula.constant)):
            continue  # indices are never negative: it holds everywhere
        else:
            return MaskProof(False, unknown=f"an inequality between positions: {fact.formula.coefficients}")
    if not causal and window is not None:
        return MaskProof(False, unknown="a window that looks ahead")
    return MaskProof(causal, window, padding)


def _inequality(
    fact: AtMost, queries: sympy.Expr, keys: sympy.Expr, symbols: list[torch.SymInt]
) -> str | int | None:
    """Recognise ``key <= query`` and ``key > query - window``, both aligned to the last key."""
    *others, query, key = fact.formula.coefficients
    if any(c != 0 for c in others):
        return None
    # Row q of the mask is token ``offset + q``; column k is token k.
    offset = keys - queries
    constant = fact.formula.constant
    if is_zero(queries - 1, symbols):
        query = -key  # with one query its index is 0, whatever its coefficient
    # key - (offset + query) <= 0
    if key == 1 and query == -1 and is_zero(constant + offset, symbols):
        return "causal"
    # (offset + query) - window + 1 - key <= 0
    if key == -1 and query == 1:
        window = sympy.expand(offset + 1 - constant)
        if window.is_Integer and window > 0:
            return int(window)
    return None


def _is_padding(fact: Lookup, shape: Any) -> bool:
    """Say whether a look-up reads ``table[batch, key]``."""
    if len(fact.indices) != 2:
        return False
    batch, key = fact.indices
    rows = fact.source.meta["val"].shape[0]
    # A table of one row holds for every sequence; of a larger one each sequence must read its own. Sizes with
    # names of their own may still be equal: the ops read the first rows, as the mask does.
    named = isinstance(rows, torch.SymInt) or isinstance(shape[0], torch.SymInt)
    by_batch = (_selects(batch, 0) and (named or statically_known_true(rows == shape[0]))) or (
        _constant_zero(batch) and statically_known_true(rows == 1)
    )
    one_key = isinstance(shape[3], int) and shape[3] == 1
    return by_batch and (_selects(key, 3) or (one_key and _constant_zero(key)))


def _selects(index: Affine, dim: int) -> bool:
    """Say whether a formula is just the index of dimension `dim` (of four)."""
    wanted = tuple(sympy.Integer(int(place == dim)) for place in range(4))
    return index.coefficients == wanted and index.constant == 0


def _constant_zero(index: Affine) -> bool:
    return all(c == 0 for c in (*index.coefficients, index.constant))
