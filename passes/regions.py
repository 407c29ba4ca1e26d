"""Regions: put what a part of a graph does, traced below the level of its transforms, in the part's place."""

from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hga_compile.passes.flatten import flatten, leaves_of, unflatten

__all__ = ["Trace", "example_of", "inlined"]

Trace = Callable[[Callable[..., Any], list[Any]], GraphModule]
"""Traces a function of these inputs to ATen ops."""


def inlined(graph: GraphModule, regions: Iterable[list[Node]], trace: Trace) -> GraphModule:
    """Trace regions of a graph by themselves.

    Parameters
    ----------
    graph : GraphModule
        As Dynamo hands it to a backend; not changed.
    regions : iterable of list of Node
        Runs of nodes, in order. Wrapper subclasses that they read are taken apart (see `flatten`).
    trace : callable
        Traces a function of plain tensors.

    Returns
    -------
    GraphModule
        With the traced ops; an input that is a wrapper subclass and read by a region becomes its leaves.

    Raises
    ------
    NotImplementedError
        A wrapper subclass that is read both by a region and by what is outside of all of them.
    """
    new, copies, root = Graph(), _Copies(), copy(graph)
    first = {region[0]: region for region in regions}
    inside = {node for region in first.values() for node in region}
    for node in graph.graph.nodes:
        if node in first:
            _inline(root, first[node], new, copies, trace)
        elif node in inside:
            continue
        elif node.op == "placeholder" and any(user in inside for user in node.users):
            copies[node] = _spread(new, node)
        else:
            copies[node] = [new.node_copy(node, copies.whole)]
    return GraphModule(root, new)


def example_of(node: Node) -> Any:
    """Return the value that a node was traced with."""
    return node.meta.get("example_value", node.meta.get("val"))


class _Copies(dict[Node, list[Node]]):
    """What stands in the new graph for each node of the old one: as many nodes as its value has leaves."""

    def whole(self, node: Node) -> Node:
        copy = self[node]
        if is_traceable_wrapper_subclass(example_of(node)) and copy[0].name != node.name:
            raise NotImplementedError("a wrapper subclass is read by what does not compute with its leaves")
        return copy[0]


def _spread(new: Graph, node: Node) -> list[Node]:
    """Add a placeholder for each leaf of an input."""
    value = example_of(node)
    if not is_traceable_wrapper_subclass(value):
        return [new.node_copy(node)]
    placeholders = []
    for number, leaf in enumerate(flatten([value], leaves_of([value]))):
        placeholders.append(new.placeholder(f"{node.name}_leaf{number}"))
        placeholders[-1].meta["example_value"] = leaf
    return placeholders


def _inline(
    root: GraphModule, region: list[Node], new: Graph, copies: dict[Node, list[Node]], trace: Trace
) -> None:
    """Trace a region and add its ops to a new graph."""
    inside = set(region)
    read = (source for node in region for source in node.all_input_nodes)
    given = list(dict.fromkeys(source for source in read if source not in inside))
    results = [node for node in region if any(user not in inside for user in node.users)]
    part = Graph()
    parts = {node: part.placeholder(node.name) for node in given}
    for node in region:
        parts[node] = part.node_copy(node, parts.__getitem__)
    part.output([parts[node] for node in results])
    inner = GraphModule(root, part)
    examples = [example_of(node) for node in given]
    returned: list[int] = []

    def run(*flat: Any) -> list[Any]:
        outputs = torch.fx.Interpreter(inner).run(*unflatten(flat, examples))
        returned[:] = [len(leaves_of([value])) for value in outputs]
        return flatten(outputs, leaves_of(outputs))

    module = trace(run, flatten(examples, leaves_of(examples)))
    traced = module.graph
    for constant in traced.find_nodes(op="get_attr"):
        name = f"_{region[0].name}{constant.target}"
        setattr(root, name, getattr(module, str(constant.target)))
        constant.target = name
    inputs = traced.find_nodes(op="placeholder")
    sources = [leaf for node in given for leaf in copies[node]]
    outputs: Any = iter(new.graph_copy(traced, dict(zip(inputs, sources, strict=True))))  # type: ignore[arg-type] # a list went in
    for node, count in zip(results, returned, strict=True):
        copies[node] = [next(outputs) for _ in range(count)]
