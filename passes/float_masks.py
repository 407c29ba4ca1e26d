"""Float masks: which added tensor is nothing but a bool mask."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from hga_compile.passes.forms import SAME, alike, constant, plain_name

__all__ = ["hides", "visible_where"]


def visible_where(node: Any, dtype: torch.dtype, changed: Mapping[Node, Node]) -> tuple[Node, bool] | None:
    """Return the bool tensor that an added float mask stands for, and whether True means visible.

    Parameters
    ----------
    node : Node
        Added to scores of `dtype`.
    dtype : torch.dtype
        Decides which numbers hide a key.
    changed : mapping
        From `aliasing.changed_in_place`.

    Returns
    -------
    tuple or None
        None where the tensor is not 0 for some entries and (as good as) minus infinity for the others.
    """
    while True:
        name = plain_name(node)
        # In place the mask itself may be the last write to its memory.
        if not isinstance(node, Node) or changed.get(node, node) is not node:
            return None
        whole = name == "aten.slice.Tensor" and alike(node.meta["val"].shape, node.args[0].meta["val"].shape)  # type: ignore[union-attr]
        if name not in SAME and not whole:
            break
        node = node.args[0]
    if name.startswith("aten.where."):
        condition, yes, no = node.args
        if not _is_bool(condition):
            return None
        if constant(yes, changed) == 0 and hides(no, dtype, changed):
            return condition, True  # type: ignore[return-value]
        if constant(no, changed) == 0 and hides(yes, dtype, changed):
            return condition, False  # type: ignore[return-value]
    elif name in ("aten.masked_fill.Scalar", "aten.masked_fill.Tensor"):
        base, hidden, fill = node.args
        own = node if str(node.target) != name else None
        if _is_bool(hidden) and constant(base, changed, own) == 0 and hides(fill, dtype, changed):
            return hidden, False  # type: ignore[return-value]
    return None


def hides(value: Any, dtype: torch.dtype, changed: Mapping[Node, Node]) -> bool:
    """Say whether a constant as a score, or added to one, leaves it no weight in a softmax."""
    number = constant(value, changed)
    return number is not None and number <= max(torch.finfo(dtype).min, -1e9)


def _is_bool(node: Any) -> bool:
    return isinstance(node, Node) and node.meta["val"].dtype is torch.bool
