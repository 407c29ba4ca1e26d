"""Forms of ATen ops that attention is made of: names, shapes, constants, and how to add one to a graph."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = [
    "PRODUCTS",
    "RESHAPES",
    "SAME",
    "NoChain",
    "add_call",
    "alike",
    "constant",
    "merges_heads",
    "plain_name",
]

SAME = (
    "aten.to.dtype",
    "aten._to_copy.default",
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.type_as.default",
)
"""Copies and conversions."""
RESHAPES = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
PRODUCTS = ("aten.matmul.default", "aten.bmm.default", "aten.einsum.default", "aten.baddbmm.default")
_IN_PLACE = ("add", "mul", "div", "masked_fill", "tanh")


class NoChain(Exception):
    """A softmax that is no attention, or one of a form that is not known."""


def plain_name(node: Any) -> str:
    """Return the name of an op, of in-place ones that of their other form; empty for anything else."""
    if not isinstance(node, Node) or node.op != "call_function":
        return ""
    name = str(node.target)
    for stem in _IN_PLACE:
        if name.startswith(f"aten.{stem}_."):
            return name.replace(f"aten.{stem}_.", f"aten.{stem}.", 1)
    return name


def add_call(graph: Graph, target: Callable[..., Any], *args: Any) -> Node:
    """Add the call of an op at the graph's insertion point, with the value that tracing would have noted."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node


def alike(one: Any, other: Any) -> bool:
    """Say whether two shapes are equal, without a guard."""
    return len(one) == len(other) and all(
        bool(statically_known_true(a == b)) for a, b in zip(one, other, strict=True)
    )


def merges_heads(four: Node, three: Node) -> bool:
    """Say whether ``[batch, heads, n, m]`` became ``[batch * heads, n, m]``."""
    before, after = four.meta["val"].shape, three.meta["val"].shape
    if len(before) != 4 or len(after) != 3:
        return False
    return alike((before[0] * before[1], before[2], before[3]), after)


def constant(value: Any, changed: Mapping[Node, Node], but: Node | None = None) -> float | None:
    """Return the number that fills a tensor, or a number as it is.

    Parameters
    ----------
    value : Node, int or float
        What to look at.
    changed : mapping
        From `aliasing.changed_in_place`: memory that is written holds no constant.
    but : Node or None
        A write that is known.
    """
    while isinstance(value, Node) and changed.get(value, but) is but:
        name = str(value.target)
        if name not in (*SAME, "aten.expand.default", "aten.lift_fresh_copy.default", "aten.detach_.default"):
            return _fill(value, name)
        value = value.args[0]
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _fill(node: Node, name: str) -> float | None:
    if node.op == "get_attr":
        return _literal(node)
    stem = name.split(".")[1] if name.startswith("aten.") else ""
    if stem in ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"):
        return float("ones" in stem)
    place = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}.get(stem)
    fill = node.args[place] if place is not None and len(node.args) > place else None
    return float(fill) if isinstance(fill, (int, float)) and not isinstance(fill, bool) else None


def _literal(node: Node) -> float | None:
    """Return the number in ``torch.tensor(0.0)``, which tracing keeps as a constant of the program."""
    value = getattr(node.graph.owning_module, str(node.target), None)
    if not str(node.target).startswith("_tensor_constant") or not isinstance(value, torch.Tensor):
        return None
    if value.dim() != 0 or isinstance(value, torch._subclasses.FakeTensor) or value.device.type != "cpu":
        return None
    return float(value)
