"""Where the entries of a mask are: query and key as tokens, and what a look-up reads there."""

from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hga_compile.passes.index_algebra import Affine, Lookup, Sum, Truth, expression, is_zero
from hga_compile.passes.mask_values import NotUnderstood

__all__ = ["Places"]


class Places:
    """Tokens of the entries of one mask, the last query at the last key.

    Parameters
    ----------
    shape : sequence of int or SymInt
        ``[batch, heads, queries, keys]``.

    Raises
    ------
    NotUnderstood
        A size without a formula.
    """

    def __init__(self, shape: Any) -> None:
        queries, keys = expression(shape[2]), expression(shape[3])
        if queries is None or keys is None:
            raise NotUnderstood("a mask of unknown size")
        self._batch = shape[0]
        self._symbols = [size for size in shape if isinstance(size, torch.SymInt)]
        # With one query, or one key, its index is 0 whatever its coefficient.
        self._kept = (1, 1, *(int(not is_zero(size - 1, self._symbols)) for size in (queries, keys)))
        # Row q of the mask is token ``keys - queries + q``; column k is token k.
        self.query = self._settled(_axis(2, keys - queries))
        self.key = self._settled(_axis(3))

    def settled(self, truth: Truth) -> Truth:
        """Return the formula of the mask's entries without indices that are always 0."""
        return truth.mapped(self._settled)

    def is_zero(self, formula: Sum | Affine) -> bool:
        """Say whether a formula is 0 everywhere."""
        if isinstance(formula, Sum):
            return not formula.lookups and self.is_zero(formula.affine)
        return formula.is_constant and is_zero(formula.constant, self._symbols)

    def reads(self, lookup: Lookup, token: Affine) -> bool:
        """Say whether a look-up reads ``table[batch, token]``, or ``table[token]`` for all sequences."""
        *batch, place = lookup.indices or (None,)
        if place is None or len(batch) > 1 or not self.is_zero(place.plus(token, -1)):
            return False
        return not batch or self._by_batch(lookup)

    def per_sequence(self, lookup: Lookup) -> bool:
        """Say whether a look-up reads ``table[batch]``, or a single number."""
        return not lookup.indices or (len(lookup.indices) == 1 and self._by_batch(lookup))

    def _by_batch(self, lookup: Lookup) -> bool:
        """Say whether each sequence reads its own row, or all read the only one."""
        batch, rows = lookup.indices[0], lookup.source.meta["val"].shape[0]
        if batch.is_constant:
            return bool(batch.constant == 0) and statically_known_true(rows == 1)
        # Sizes with names of their own may still be equal: the ops read the first rows, as the mask does.
        named = isinstance(rows, torch.SymInt) or isinstance(self._batch, torch.SymInt)
        own = batch == _axis(0)
        return own and (named or statically_known_true(rows == self._batch))

    def _settled(self, formula: Affine) -> Affine:
        pairs = zip(formula.coefficients, self._kept, strict=True)
        return Affine(tuple(c * kept for c, kept in pairs), formula.constant)


def _axis(dim: int, start: Any = 0) -> Affine:
    """Return the index of one dimension of four, counted from `start`."""
    return Affine(tuple(sympy.Integer(int(place == dim)) for place in range(4)), sympy.sympify(start))
