"""Vmap: put the batched ops that code inside `torch.vmap` stands for in its place."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.fx import Graph, GraphModule, Node

__all__ = ["without_vmap"]

_OPENS, _CLOSES = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def without_vmap(graph: GraphModule, trace: Callable[[GraphModule, list[Any]], GraphModule]) -> GraphModule:
    """Trace what is inside of `torch.vmap` by itself, below the level at which it is batched.

    Masks of functions that users give to transformers are made so.

    Parameters
    ----------
    graph : GraphModule
        As Dynamo hands it to a backend; not changed.
    trace : callable
        Traces a graph with these inputs to ATen ops, of which none is in a vmap.

    Returns
    -------
    GraphModule
        The same one where there is no vmap.
    """
    regions = list(_regions(graph.graph))
    if not regions:
        return graph
    new, copies = Graph(), dict[Node, Node]()
    first = {region[0]: region for region in regions}
    inside = {node for region in regions for node in region}
    for node in graph.graph.nodes:
        if node in first:
            _inline(graph, first[node], new, copies, trace)
        elif node not in inside:
            copies[node] = new.node_copy(node, copies.__getitem__)
    return GraphModule(graph, new)


def _regions(graph: Graph) -> Iterator[list[Node]]:
    """Yield the nodes from where an outermost vmap begins to where it ends."""
    depth, region = 0, list[Node]()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name == _OPENS
        if depth:
            region.append(node)
        depth -= name == _CLOSES
        if region and not depth:
            yield region
            region = []


def _inline(
    graph: GraphModule,
    region: list[Node],
    new: Graph,
    copies: dict[Node, Node],
    trace: Callable[[GraphModule, list[Any]], GraphModule],
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
    traced = trace(GraphModule(graph, part), [node.meta["example_value"] for node in given]).graph
    if traced.find_nodes(op="get_attr"):
        raise NotImplementedError("a tensor made of numbers inside of a vmap")
    inputs = traced.find_nodes(op="placeholder")
    outputs = new.graph_copy(
        traced, {node: copies[source] for node, source in zip(inputs, given, strict=True)}
    )
    copies.update(zip(results, outputs, strict=True))  # type: ignore[arg-type] # a list went in
