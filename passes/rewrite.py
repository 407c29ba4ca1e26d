"""Rewrite: put hga's ops in the place of the sites that were proven, on a copy of the graph."""

from itertools import permutations
from typing import Any

import torch
from torch.fx import GraphModule, Node

from hga_compile.kernels.site import SiteConfig
from hga_compile.passes.decide import Plan
from hga_compile.passes.forms import add_call, alike
from hga_compile.passes.match import Site

__all__ = ["rewrite"]


def rewrite(graph: GraphModule, plan: Plan, config: SiteConfig) -> None:
    """Rewrite one site in place.

    Parameters
    ----------
    graph : GraphModule
        A private copy.
    plan : Plan
        Of a site that is routed or proven sliding.
    config : SiteConfig
        Settings that travel in the graph.
    """
    site, node = plan.site, plan.site.node
    with graph.graph.inserting_before(node):
        mask = plan.padding
        if plan.single_query_mask is not None:
            mask = _table(graph, plan.single_query_mask)
        form = () if site.softcap == 0 and site.sinks is None else (site.softcap, site.sinks)
        if site.append is None:
            new = graph.graph.call_function(
                torch.ops.hga.attention.default,
                (site.query, site.key, site.value, mask, site.scale, config.to_text(), *form),
            )
        else:
            key, value, handle, length = site.append.args[:4]
            target = (
                torch.ops.hga.cached_attention.default
                if plan.window is None
                else torch.ops.hga.window_attention.default
            )
            last = config.to_text() if plan.window is None else plan.window
            new = graph.graph.call_function(
                target, (site.query, key, value, handle, length, mask, site.scale, last, *form)
            )
        query, channels = site.query.meta["val"], site.value.meta["val"].shape[3]
        new.meta = dict(node.meta) | {"val": query.new_empty((*query.shape[:3], channels))}
        new = _as_before(graph, new, node, site.order)
    node.replace_all_uses_with(new)
    _erase_unread(graph, node, site)
    if site.append is not None:
        graph.graph.erase_node(site.append)


def _as_before(graph: GraphModule, new: Node, old: Node, order: tuple[int, ...]) -> Node:
    """Bring the result into order, shape, dtype and layout of what it replaces."""
    aten, wanted = torch.ops.aten, old.meta["val"]
    steps: list[tuple[Any, ...]] = []
    if order != (0, 1, 2, 3):
        steps.append((aten.permute.default, list(order)))
    if wanted.dim() == 3:
        steps.append((aten.flatten.using_ints, 0, 1))
    if wanted.dtype != new.meta["val"].dtype:
        steps.append((aten.to.dtype, wanted.dtype))
    layout = _layout(wanted)
    if layout is not None and layout != tuple(range(wanted.dim())):
        # What follows may be a view that this layout alone allows.
        back = [layout.index(dim) for dim in range(wanted.dim())]
        steps += [
            (aten.permute.default, list(layout)),
            (aten.contiguous.default,),
            (aten.permute.default, back),
        ]
    for target, *arguments in steps:
        new = add_call(graph.graph, target, new, *arguments)
        new.meta = dict(old.meta) | new.meta
    return new


def _layout(value: torch.Tensor) -> tuple[int, ...] | None:
    """Return the order of dimensions in which a tensor lies in memory without gaps; None if there is none."""
    for order in permutations(range(value.dim())):
        stride, fits = 1, True
        for dim in reversed(order):
            size = value.shape[dim]
            fits = fits and (alike([size], [1]) or alike([value.stride(dim)], [stride]))
            stride = stride * size
        if fits:
            return order
    return None


def _table(graph: GraphModule, mask: Node) -> Node:
    """``[batch, 1, 1, keys]`` to ``[batch, keys]``."""
    for _ in range(2):
        mask = add_call(graph.graph, torch.ops.aten.select.int, mask, 1, 0)
    return mask


def _erase_unread(graph: GraphModule, node: Node, site: Site) -> None:
    """Erase a node that nothing reads, and the nodes that only it read; an append is erased by the caller."""
    writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    # What is written in place may be read under another name, but for the memory of the site itself.
    if node.users or node.op != "call_function" or (writes and node not in site.inside):
        return
    sources = node.all_input_nodes
    graph.graph.erase_node(node)
    for source in sources:
        _erase_unread(graph, source, site)
