"""Vmap: put the batched ops that code inside `torch.vmap` stands for in its place."""

from collections.abc import Iterator

from torch.fx import Graph, GraphModule, Node

from hga_compile.passes.regions import Trace, inlined

__all__ = ["without_vmap"]

_OPENS, _CLOSES = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def without_vmap(graph: GraphModule, trace: Trace) -> GraphModule:
    """Trace what is inside of `torch.vmap` by itself, below the level at which it is batched.

    Masks of functions that users give to transformers are made so.

    Parameters
    ----------
    graph : GraphModule
        As Dynamo hands it to a backend; not changed.
    trace : callable
        Traces a function of these inputs to ATen ops, of which none is in a vmap.

    Returns
    -------
    GraphModule
        The same one where there is no vmap.
    """
    regions = list(_regions(graph.graph))
    return inlined(graph, regions, trace) if regions else graph


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
