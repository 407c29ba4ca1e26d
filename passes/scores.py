"""Follow the scores of attention written out, from the softmax up to the product of Q and K."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from hga_compile.passes.float_masks import hides, visible_where
from hga_compile.passes.forms import (
    PRODUCTS,
    RESHAPES,
    SAME,
    NoChain,
    alike,
    constant,
    merges_heads,
    plain_name,
)

__all__ = ["Scores"]

_MASKINGS = ("aten.add.Tensor", "aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
_WHERES = ("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
_SCALINGS = ("aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar")
_FAR = 12
"""Ops between softmax and product, at most."""


@dataclass
class Scores:
    """What is known of the scores of one softmax.

    Parameters
    ----------
    changed : mapping
        From `aliasing.changed_in_place`.
    """

    changed: Mapping[Node, Node]
    inside: list[Node] = field(default_factory=list)
    """Ops that were stepped over."""
    masks: list[tuple[Node, bool]] = field(default_factory=list)
    """Bool tensors, and whether True means visible."""
    bias: Node | None = None
    """An added tensor that is no mask."""
    sinks: Node | None = None
    softcap: float = 0.0
    scale: float = 1.0

    def follow(self, node: Any, sliced: bool) -> Node:
        """Return the product of Q and K.

        Parameters
        ----------
        node : Node
            What the softmax is taken of.
        sliced : bool
            Whether the last column of the weights is dropped again: the sinks'.

        Raises
        ------
        NoChain
            An op on the way is not known, or stands where it changes the meaning.
        """
        node = self._without_maximum(self._same(node))
        if sliced:
            node = self._without_sinks(node)
        for step in (self._mask, self._cap, self._scaling):
            while (found := step(node := self._same(node))) is not None:
                node = found
        if plain_name(node) not in PRODUCTS:
            raise NoChain
        if plain_name(node) == "aten.baddbmm.default":
            self._added_to_product(node)
        self.inside.append(node)
        return node  # type: ignore[no-any-return]

    def _same(self, node: Any) -> Any:
        """Step over copies, conversions between floats, and merged or split heads."""
        while isinstance(node, Node) and node.op == "call_function" and node.args:
            name, source = str(node.target), node.args[0]
            if name in SAME:
                floats = isinstance(source, Node) and source.meta["val"].dtype.is_floating_point
                if not (floats and node.meta["val"].dtype.is_floating_point):
                    break
            elif name not in RESHAPES or not _merges_or_splits(source, node):
                break
            self.inside.append(node)
            node = source
        return node

    def _without_maximum(self, node: Any) -> Any:
        """Step over ``x - x.max()``, which changes nothing about a softmax."""
        if plain_name(node) != "aten.sub.Tensor" or node.kwargs:
            return node
        source, most = node.args
        item = isinstance(most, Node) and "getitem" in str(most.target) and most.args[1] == 0
        peak = most.args[0] if item else most
        if plain_name(peak) not in ("aten.max.dim", "aten.amax.default") or peak.args[0] is not source:
            return node
        dims = peak.args[1] if isinstance(peak.args[1], (list, tuple)) else [peak.args[1]]
        keep = peak.args[2] if len(peak.args) > 2 else False
        if list(dims) not in ([-1], [node.meta["val"].dim() - 1]) or not keep:
            return node
        self.inside += [node, peak, most] if item else [node, peak]
        return self._same(source)

    def _without_sinks(self, node: Any) -> Any:
        """Step over ``cat([scores, sinks])``."""
        if plain_name(node) != "aten.cat.default":
            raise NoChain
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        rank = node.meta["val"].dim()
        if rank != 4 or dim not in (-1, rank - 1) or len(parts) != 2:
            raise NoChain
        self.inside.append(node)
        self.sinks = _per_head(parts[1])
        return parts[0]

    def _mask(self, node: Any) -> Any:
        """Step over one mask."""
        name, changed = plain_name(node), self.changed
        if name not in (*_MASKINGS, *_WHERES):
            return None
        dtype = node.meta["val"].dtype
        if name == "aten.add.Tensor":
            left, right = node.args[:2]
            if node.kwargs or not (isinstance(left, Node) and isinstance(right, Node)):
                return None
            if not self._leads_to_product(left):
                left, right = right, left
            mask = visible_where(right, dtype, changed)
            if mask is None and self.bias is not None:
                raise NoChain
            self.bias = right if mask is None else self.bias
        else:
            if name in _WHERES:
                condition, left, fill = node.args
                visible = hides(fill, dtype, changed)
                left, fill = (left, fill) if visible else (fill, left)
            else:
                (left, condition, fill), visible = node.args, False
            if not hides(fill, dtype, changed) or condition.meta["val"].dtype is not torch.bool:
                return None
            mask = condition, visible
        if mask is not None:
            self.masks.append(mask)
        # A mask with more heads or queries than the scores would make another attention of them.
        if not isinstance(left, Node) or not alike(node.meta["val"].shape, left.meta["val"].shape):
            raise NoChain
        self.inside.append(node)
        return left

    def _added_to_product(self, node: Node) -> None:
        """Read what ``baddbmm`` adds to the product of Q and K."""
        beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
        if alpha != 1 or beta not in (0, 1):
            raise NoChain
        if beta == 0:
            return
        mask = visible_where(node.args[0], node.meta["val"].dtype, self.changed)
        if self.softcap or self.scale != 1 or (mask is None and self.bias is not None):
            raise NoChain  # what was added is scaled too
        if mask is None:
            self.bias = node.args[0]  # type: ignore[assignment]
        else:
            self.masks.append(mask)

    def _leads_to_product(self, node: Any) -> bool:
        """Say whether a node is made from a product by the ops that this class knows."""
        for _ in range(_FAR):
            name = plain_name(node)
            if name in PRODUCTS:
                return True
            if name in _WHERES:
                node = node.args[1] if constant(node.args[1], self.changed) is None else node.args[2]
            elif name in (*SAME, *RESHAPES, *_SCALINGS, *_MASKINGS, "aten.tanh.default"):
                node = node.args[0]
            else:
                return False
        return False

    def _cap(self, node: Any) -> Any:
        """Step over ``cap * tanh(x / cap)``."""
        if plain_name(node) != "aten.mul.Tensor":
            return None
        bent, cap = node.args[0], constant(node.args[1], self.changed)
        if cap is None or cap <= 0 or plain_name(bent) != "aten.tanh.default":
            return None
        small = bent.args[0]
        factor = self._factor(small)
        if factor is None or self.softcap or not math.isclose(factor * cap, 1.0, rel_tol=1e-6):
            raise NoChain
        self.softcap = cap
        self.inside += [node, bent, small]
        return small.args[0]

    def _scaling(self, node: Any) -> Any:
        """Step over a product with, or a division by, a constant."""
        factor = self._factor(node)
        if factor is None:
            return None
        self.scale *= factor
        self.inside.append(node)
        return node.args[0]

    def _factor(self, node: Any) -> float | None:
        name = plain_name(node)
        if name not in _SCALINGS or node.kwargs:
            return None
        number = constant(node.args[1], self.changed)
        if number is None or number == 0 or not math.isfinite(number):
            return None
        return number if "mul" in name else 1 / number


def _merges_or_splits(source: Any, node: Node) -> bool:
    return isinstance(source, Node) and (merges_heads(source, node) or merges_heads(node, source))


def _per_head(node: Any) -> Node:
    """Return the ``[heads]`` tensor that was spread to ``[batch, heads, queries, 1]``."""
    spread = node.args[0] if plain_name(node) == "aten.expand.default" else None
    source = spread.args[0] if plain_name(spread) in RESHAPES else None  # type: ignore[union-attr]
    if not isinstance(source, Node) or source.meta["val"].dim() != 1:
        raise NoChain
    heads = node.meta["val"].shape[1]
    if not isinstance(heads, int) or tuple(spread.meta["val"].shape) != (1, heads, 1, 1):  # type: ignore[union-attr]
        raise NoChain
    return source
