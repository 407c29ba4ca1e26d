"""Dispatched: put the ops on plain tensors that ops on some wrapper subclasses stand for in their place.

A trace before dispatch does not reach subclasses that act in ``__torch_dispatch__`` alone, such as the
DTensors of tensor parallelism; what they stand for, collectives included, is traced below that level.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hga_compile.passes.regions import Trace, example_of, inlined

__all__ = ["without_dispatched"]

# Attention below dispatch has other forms, in which no site would be found.
_ATTENTION = ("scaled_dot_product", "_softmax", "hga.", "flex_attention")


def without_dispatched(graph: GraphModule, trace: Trace) -> GraphModule:
    """Trace what computes with such subclasses by itself.

    Parameters
    ----------
    graph : GraphModule
        As Dynamo hands it to a backend; not changed.
    trace : callable
        Traces a function of these inputs to ATen ops, below dispatch.

    Returns
    -------
    GraphModule
        The same one where there are none; else one whose inputs are the leaves of those that were (see
        `flatten`).

    Raises
    ------
    NotImplementedError
        Attention over such subclasses.
    """
    regions = list(_regions(graph.graph))
    return inlined(graph, regions, lambda run, given: _checked(trace(run, given))) if regions else graph


def _regions(graph: Graph) -> Iterator[list[Node]]:
    """Yield runs of nodes that read or return such a subclass."""
    region: list[Node] = []
    for node in graph.nodes:
        touched = (example_of(part) for part in (node, *node.all_input_nodes))
        if node.op not in ("placeholder", "output") and any(map(_acts_in_dispatch, touched)):
            region.append(node)
        elif region:
            yield region
            region = []


def _acts_in_dispatch(value: Any) -> bool:
    return any(
        is_traceable_wrapper_subclass(leaf)
        and getattr(type(leaf), "__torch_function__", None) is torch._C._disabled_torch_function_impl
        for leaf in pytree.tree_leaves(value)
    )


def _checked(traced: GraphModule) -> GraphModule:
    for node in traced.graph.nodes:
        if any(name in str(node.target) for name in _ATTENTION):
            raise NotImplementedError("attention over tensors that act in dispatch alone, such as DTensors")
    return traced
