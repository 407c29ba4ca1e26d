"""Aliases: which nodes of a graph share memory that some op writes to."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = ["changed_in_place"]


def changed_in_place(graph: Graph) -> dict[Node, Node]:
    """Return every node whose memory an op of the graph writes to, and the last op that does.

    What the ops that made such a node say about its values does not hold for the whole graph.

    Parameters
    ----------
    graph : Graph
        Of ATen ops, whose schemas tell views and writes.

    Returns
    -------
    dict of Node to Node
        All views of written memory, made before or after the write, and the last op that writes to it.
    """
    groups = _Groups()
    writes: list[tuple[Node, Node]] = []
    attributes: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            groups.join(attributes.setdefault(str(node.target), node), node)
        if node.op != "call_function":
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            # A tuple's item, or something without a schema: it may be any of its inputs.
            for source in node.all_input_nodes:
                groups.join(source, node)
            continue
        schema = node.target._schema
        # What it changes is no number.
        detaches = node.target is torch.ops.aten.detach_.default
        views = any(result.alias_info is not None for result in schema.returns)
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is None:
                continue
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            for source in _nodes(given):
                if argument.alias_info.is_write and not detaches:
                    writes.append((source, node))
                if views:
                    groups.join(source, node)
    last = {groups.root(source): op for source, op in writes}
    return {node: last[root] for node in graph.nodes if (root := groups.root(node)) in last}


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _nodes(inner)


class _Groups:
    """Disjoint sets of nodes."""

    def __init__(self) -> None:
        self._parent: dict[Node, Node] = {}

    def root(self, node: Node) -> Node:
        while (parent := self._parent.get(node, node)) is not node:
            self._parent[node] = self._parent.get(parent, parent)
            node = parent
        return node

    def join(self, one: Node, other: Node) -> None:
        self._parent[self.root(one)] = self.root(other)
