"""Operands of attention written out: Q, K and V of its two products, in one layout."""

from typing import Any

import torch
from torch.fx import Graph, Node

from hga_compile.passes.forms import RESHAPES, NoChain, add_call, merges_heads

__all__ = ["query_and_key", "value_and_order"]

_STRAIGHT = (0, 1, 2, 3)


def query_and_key(graph: Graph, product: Node) -> tuple[Node, Node]:
    """Return Q ``[batch, heads, queries, dim]`` and K ``[batch, heads, keys, dim]`` of a product.

    Raises
    ------
    NoChain
        A product of another form.
    """
    name = str(product.target)
    if name == "aten.einsum.default":
        return _einsum_scores(graph, product)
    left, right = product.args[1:3] if name == "aten.baddbmm.default" else product.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node):
        raise NoChain
    return _four(left), _four(_transposed(graph, right))


def value_and_order(graph: Graph, product: Node) -> tuple[Node, tuple[int, ...]]:
    """Return V ``[batch, heads, keys, v_dim]`` of the second product, and the order of its output.

    Raises
    ------
    NoChain
        A product of another form.
    """
    if str(product.target) != "aten.einsum.default":
        right = product.args[1]
        if not isinstance(right, Node):
            raise NoChain
        return _four(right), _STRAIGHT
    weights, value, out = _letters(product)
    batch, head, query, key = weights
    channel = _only(value, weights)
    if set(value) != {batch, head, key, channel} or set(out) != {batch, head, query, channel}:
        raise NoChain
    operand = product.args[1][1]  # type: ignore[index]
    wanted = (batch, head, query, channel)
    return (
        _permuted(graph, product, operand, [value.index(x) for x in (batch, head, key, channel)]),
        tuple(wanted.index(letter) for letter in out),
    )


def _einsum_scores(graph: Graph, product: Node) -> tuple[Node, Node]:
    one, other, out = _letters(product)
    batch, head, query, key = out
    operands: Any = product.args[1]
    left, right = operands
    if query not in one:
        one, other, left, right = other, one, right, left
    channel = _only(one, out)
    if set(one) != {batch, head, query, channel} or set(other) != {batch, head, key, channel}:
        raise NoChain
    return (
        _permuted(graph, product, left, [one.index(x) for x in (batch, head, query, channel)]),
        _permuted(graph, product, right, [other.index(x) for x in (batch, head, key, channel)]),
    )


def _letters(product: Node) -> tuple[list[str], list[str], list[str]]:
    """Return the letters of both operands and of the result, four different ones each."""
    operands, _, out = str(product.args[0]).replace(" ", "").partition("->")
    parts = [list(part) for part in (*operands.split(","), out)]
    if len(parts) != 3 or any(len(part) != 4 or len(set(part)) != 4 or "." in part for part in parts):
        raise NoChain
    return parts[0], parts[1], parts[2]


def _only(letters: list[str], others: list[str]) -> str:
    rest = [letter for letter in letters if letter not in others]
    if len(rest) != 1:
        raise NoChain
    return rest[0]


def _permuted(graph: Graph, before: Node, node: Any, order: list[int]) -> Node:
    if order == list(_STRAIGHT):
        return node  # type: ignore[no-any-return]
    with graph.inserting_before(before):
        return add_call(graph, torch.ops.aten.permute.default, node, order)


def _transposed(graph: Graph, node: Node) -> Node:
    """Undo the transposition of K, or add another one."""
    rank, name, source = node.meta["val"].dim(), str(node.target), node.args[0] if node.args else None
    last = (rank - 2, rank - 1)
    order: Any = list(range(rank))
    if name == "aten.transpose.int":
        dims = sorted(int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
        if tuple(dims) == last:
            return source  # type: ignore[return-value]
    elif name == "aten.mT.default":
        return source  # type: ignore[return-value]
    elif name == "aten.permute.default":
        order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr,arg-type]
        order[-2], order[-1] = order[-1], order[-2]
        if order == list(range(rank)):
            return source  # type: ignore[return-value]
        with graph.inserting_after(node):
            return add_call(graph, torch.ops.aten.permute.default, source, order)
    with graph.inserting_after(node):
        return add_call(graph, torch.ops.aten.transpose.int, node, *last)


def _four(node: Node) -> Node:
    """Return the four-dimensional tensor whose heads were merged into the batch, if that is what it is."""
    source: Any = node
    while str(source.target) in ("aten.contiguous.default", "aten.clone.default"):
        source = source.args[0]
    if str(source.target) in RESHAPES and merges_heads(source.args[0], source):
        return source.args[0]  # type: ignore[no-any-return]
    return node
