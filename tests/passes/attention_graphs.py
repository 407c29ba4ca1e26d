"""Graphs of one attention, and what a decision about it claims, checked against what the graph computes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from hga_compile.configs.routing import Routing
from hga_compile.kernels import ops
from hga_compile.passes.decide import Plan, decide
from hga_compile.passes.decision import Reason
from hga_compile.passes.mask_proof import prove_mask
from hga_compile.passes.mask_values import MaskValues
from hga_compile.passes.match import Site, find_attention

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
    return find_attention(traced(function, *inputs).graph)[0]


def plan_of(function: Callable[..., Any], *inputs: Any, routing: Routing | None = None) -> Plan:
    """Decide about the only attention of a function."""
    graph = traced(function, *inputs)
    (site,) = find_attention(graph.graph)[0]
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
    (site,) = find_attention(graph.graph)[0]
    return decide(site, 0, 1, Routing(), MaskValues(graph.graph)), graph, inputs


def claimed_mask(
    window: int | None, padding: Tensor | None, single: Tensor | None, queries: int, keys: int
) -> Tensor:
    """What a plan says that the attention may see, ``[batch, 1, queries, keys]``."""
    if single is not None:
        return single.bool().expand(BATCH, 1, queries, keys)
    position = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)
    allowed = key <= position
    if window is not None:
        allowed = allowed & (key > position - window)
    allowed = allowed.expand(BATCH, 1, queries, keys)
    return allowed if padding is None else allowed & padding.bool()[:, None, None, :keys]


class _AtTheAttention(Interpreter):
    """Runs a graph and checks every plan that claims something about a mask against the mask that the graph makes."""

    def __init__(self, graph: GraphModule, plans: Sequence[Plan], values: MaskValues) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.plans = {plan.site.node: plan for plan in plans}
        self.values = values
        self.claims: list[bool] = []

    def run_node(self, node: Any) -> Any:
        if node.target is torch.ops.hga.append.default:
            # There is no store: the masks do not depend on what is in it.
            return tuple(torch.zeros(part.shape) for part in node.meta["val"])
        if node in self.plans:
            plan = self.plans[node]
            self.claims.append(plan.decision.reason in (Reason.ROUTED, Reason.SLIDING_WINDOW))
            if self.claims[-1]:
                self.check(plan)
        return super().run_node(node)

    def check(self, plan: Plan) -> None:
        mask, padding, single = (
            None if part is None else self.env[part]
            for part in (plan.site.mask, plan.padding, plan.single_query_mask)
        )
        window = plan.window
        if plan.decision.reason is Reason.SLIDING_WINDOW and plan.site.append is None:
            # Left as it is without a cache; the claim is in the words.
            proof = prove_mask(plan.site.mask, self.values)
            window, padding = proof.window, None if proof.padding is None else self.env[proof.padding]
        queries, keys = plan.site.queries, plan.site.keys
        real = mask.expand(BATCH, HEADS, queries, keys)
        claim = claimed_mask(window, padding, single, queries, keys).expand_as(real)
        place = len(self.claims) - 1
        assert torch.equal(claim, real), (
            f"{place}: claimed {claim.int().tolist()}, it is {real.int().tolist()}"
        )


def assert_claim_holds(plan: Plan, graph: GraphModule, inputs: tuple) -> None:
    """Check a plan that rewrites against the mask that the graph computes for these inputs."""
    _AtTheAttention(graph, [plan], MaskValues(graph.graph)).run(*inputs)


def check_claims(
    builds: Sequence[Callable[..., Tensor]], queries: int, keys: int, *tables: Any
) -> list[bool]:
    """Check what is decided about an attention under each of many masks; says for each whether it is claimed."""
    graph = traced(lambda *given: [build(*given) for build in builds], *tables)
    inputs = rows(queries, keys)
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        operands = [graph.graph.placeholder(name) for name in ("query", "key", "value")]
    for node, value in zip(operands, inputs, strict=True):
        node.meta["val"] = value
    output = graph.graph.output_node()
    with graph.graph.inserting_before(output):
        for mask in output.args[0]:
            graph.graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, (*operands, mask))
    values = MaskValues(graph.graph)
    plans = [decide(site, 0, 1, Routing(), values) for site in find_attention(graph.graph)[0]]
    run = _AtTheAttention(graph, plans, values)
    run.run(*inputs, *tables)
    return run.claims


def dynamo_run(
    function: Callable[..., Any], *inputs: Any, use: Callable[[GraphModule], Any], **compiled: Any
) -> tuple[Any, Any]:
    """Return what `use` makes of the graph that Dynamo hands to a backend, and what the function then returns.

    Where `use` makes a graph, or something with a `graph`, that one runs.
    """
    found = []

    def backend(graph: GraphModule, example_inputs: Any) -> Any:
        made = use(graph)
        found.append(made)
        new = getattr(made, "graph", None)
        runs = next((part for part in (made, new) if isinstance(part, GraphModule)), graph)
        return runs.forward

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=backend, fullgraph=True, **compiled)(*inputs)
    (only,) = found
    return only, result


def dynamo_graph(function: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    """Return what `use` makes of the graph that Dynamo hands to a backend."""
    return dynamo_run(function, *inputs, **settings)[0]


def counted(graph: GraphModule, name: str) -> int:
    """Number of calls of an op, such as `hga.append`, in a graph."""
    return sum(str(node.target).startswith(name) for node in graph.graph.nodes if node.op == "call_function")
