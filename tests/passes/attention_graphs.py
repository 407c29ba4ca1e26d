"""Graphs of one attention, and what a decision about it claims, checked against what the graph computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from hga_compile.configs.routing import Routing
from hga_compile.kernels import ops
from hga_compile.passes.decide import Plan, decide
from hga_compile.passes.mask_values import MaskValues
from hga_compile.passes.match import Site, find_sites

assert ops.attention  # imported for the registration of the ops

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 8


def rows(queries: int, keys: int | None = None, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of an attention without grouped heads."""
    keys = queries if keys is None else keys
    return (
        torch.randn(BATCH, HEADS, queries, DIM),
        torch.randn(BATCH, heads, keys, DIM),
        torch.randn(BATCH, heads, keys, DIM),
    )


def traced(function: Callable[..., Any], *inputs: Any, mode: str = "fake") -> GraphModule:
    """Trace to pre-dispatch ATen, as the retrace does, without Dynamo before it."""
    return make_fx(function, pre_dispatch=True, tracing_mode=mode)(*inputs)


def sites_of(function: Callable[..., Any], *inputs: Any) -> list[Site]:
    return find_sites(traced(function, *inputs).graph)


def plan_of(function: Callable[..., Any], *inputs: Any, routing: Routing | None = None) -> Plan:
    """Decide about the only attention of a function."""
    graph = traced(function, *inputs)
    (site,) = find_sites(graph.graph)
    return decide(site, 0, 1, routing or Routing(), MaskValues(graph.graph))


def masked(
    build: Callable[..., Tensor], queries: int, keys: int, *tables: Any, cached: bool = False
) -> tuple[Plan, GraphModule, tuple]:
    """Decide about an attention under the mask that `build(*tables)` returns, with all keys or an hga cache."""

    def attend(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, *more: Any) -> Tensor:
        if cached:
            k, v = torch.ops.hga.append(k, v, handle, keys)
        return scaled_dot_product_attention(q, k, v, build(*more))

    inputs = (*rows(queries, queries if cached else keys), torch.zeros(1, dtype=torch.int64), *tables)
    graph = traced(attend, *inputs)
    (site,) = find_sites(graph.graph)
    return decide(site, 0, 1, Routing(), MaskValues(graph.graph)), graph, inputs


def claimed_mask(
    plan: Plan, padding: Tensor | None, single: Tensor | None, queries: int, keys: int
) -> Tensor:
    """What a plan says that the attention may see, ``[batch, 1, queries, keys]``."""
    if single is not None:
        return single.bool().expand(BATCH, 1, queries, keys)
    position = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)
    allowed = key <= position
    if plan.window is not None:
        allowed = allowed & (key > position - plan.window)
    allowed = allowed.expand(BATCH, 1, queries, keys)
    return allowed if padding is None else allowed & padding.bool()[:, None, None, :keys]


class _AtTheAttention(Interpreter):
    """Runs a graph and keeps what the plan's nodes hold when the attention runs."""

    def __init__(self, graph: GraphModule, plan: Plan) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.plan = plan

    def run_node(self, node: Any) -> Any:
        if node is self.plan.site.node:
            for name, of in (
                ("mask", self.plan.site.mask),
                ("padding", self.plan.padding),
                ("single", self.plan.single_query_mask),
            ):
                setattr(self, name, None if of is None else self.env[of].clone())
        if node is self.plan.site.append:
            # There is no store: the masks do not depend on what is in it.
            return tuple(torch.zeros(part.shape) for part in node.meta["val"])
        return super().run_node(node)


def assert_claim_holds(plan: Plan, graph: GraphModule, inputs: tuple) -> None:
    """Check a plan that rewrites against the mask that the graph computes for these inputs."""
    if not (plan.decision.routed or plan.window is not None):
        return
    run = _AtTheAttention(graph, plan)
    run.run(*inputs)
    queries, keys = plan.site.queries, plan.site.keys
    real = run.mask.expand(BATCH, HEADS, queries, keys)
    claim = claimed_mask(plan, run.padding, run.single, queries, keys).expand_as(real)
    assert torch.equal(claim, real), f"claimed {claim.int().tolist()}, the mask is {real.int().tolist()}"


def dynamo_graph(
    function: Callable[..., Any], *inputs: Any, use: Callable[[GraphModule], Any], **compiled: Any
) -> Any:
    """Return what `use` makes of the graph that Dynamo hands to a backend, while Dynamo is still at it."""
    found = []

    def backend(graph: GraphModule, example_inputs: Any) -> Any:
        found.append(use(graph))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, **compiled)(*inputs)
    (only,) = found
    return only


def counted(graph: GraphModule, name: str) -> int:
    """Number of calls of an op, such as `hga.append`, in a graph."""
    return sum(str(node.target).startswith(name) for node in graph.graph.nodes if node.op == "call_function")
