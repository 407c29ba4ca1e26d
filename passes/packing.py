"""Packed sequences: which table tells documents apart by the breaks in a table of positions."""

from typing import Any

import torch
from torch.fx import Node

from hga_compile.passes.index_algebra import Lookup, Sum
from hga_compile.passes.mask_values import MaskValues, NotUnderstood

__all__ = ["positions_of"]

_ATEN = torch.ops.aten


def positions_of(table: Node, values: MaskValues) -> Sum | None:
    """Return the positions whose breaks a table counts, ``cumsum(diff(positions, prepend=...) != 1)``.

    Between tokens whose entries are equal, positions then differ by as much as the tokens' places do.

    Parameters
    ----------
    table : Node
        Of document numbers, ``[batch, tokens]`` or ``[tokens]``.
    values : MaskValues
        Formulas of the graph's nodes.

    Returns
    -------
    Sum or None
        The positions at the table's own indices; None for a table that was made in another way.
    """
    last = table.meta["val"].dim() - 1
    breaks = _operand(table, _ATEN.cumsum.default)
    steps = None if breaks is None else _operand(breaks, _ATEN.ne.Scalar)
    source = None if steps is None else _operand(steps, _ATEN.diff.default)
    if breaks is None or steps is None or source is None:
        return None
    default: tuple[Any, ...] = (1, -1, None, None)
    order, dim, before, after = steps.args[1:] + default[len(steps.args) - 1 :]
    along = dim in (last, -1) and table.args[1] in (last, -1)
    # The entry before the first one only shifts all counts.
    if not along or (breaks.args[1], order, after) != (1, 1, None) or not _one_entry(before):
        return None
    try:
        for node in (breaks, steps):
            values.of(node)  # refused if it is written in place
        found = values.of(source)
    except NotUnderstood:
        return None
    exact = source.meta["val"].dtype is torch.int64
    return Sum.of(found, last + 1) if exact and isinstance(found, (Lookup, Sum)) else None


def _operand(node: Node, target: Any) -> Node | None:
    source = node.args[0] if node.target is target else None
    return source if isinstance(source, Node) else None


def _one_entry(node: Any) -> bool:
    return isinstance(node, Node) and node.meta["val"].shape[-1] == 1
