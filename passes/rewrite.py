"""Rewrite: put hga's ops in the place of the sites that were proven, on a copy of the graph."""

import torch
from torch.fx import GraphModule, Node

from hga_compile.kernels.site import SiteConfig
from hga_compile.passes.decide import Plan

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
        if site.append is None:
            new = graph.graph.call_function(
                torch.ops.hga.attention.default,
                (site.query, site.key, site.value, mask, site.scale, config.to_text()),
            )
        else:
            key, value, handle, length = site.append.args
            target = (
                torch.ops.hga.cached_attention.default
                if plan.window is None
                else torch.ops.hga.window_attention.default
            )
            last = config.to_text() if plan.window is None else plan.window
            new = graph.graph.call_function(
                target, (site.query, key, value, handle, length, mask, site.scale, last)
            )
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    if site.append is not None:
        _erase_views(graph, site.append)


def _table(graph: GraphModule, mask: Node) -> Node:
    """``[batch, 1, 1, keys]`` to ``[batch, keys]``."""
    value, node = mask.meta["val"], mask
    for _ in range(2):
        value = value.select(1, 0)
        node = graph.graph.call_function(torch.ops.aten.select.int, (node, 1, 0))
        node.meta["val"] = value
    return node


def _erase_views(graph: GraphModule, node: Node) -> None:
    """Erase a node and the views of it, which nothing reads any more; an append is no dead code by itself."""
    for user in list(node.users):
        _erase_views(graph, user)
    graph.graph.erase_node(node)
