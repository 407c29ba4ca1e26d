"""Graphs of one attention, and what a decision about it claims, checked against what the graph computes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from hga_compile.configs.routing import Routing
from hga_compile.kernels import ops
from hga_compile.passes.decide import Plan, decide
from hga_compile.passes.decision import Reason
from hga_compile.passes.index_algebra import (
    Affine,
    AtMost,
    Either,
    Fact,
    Lookup,
    Quotient,
    Same,
    Sum,
    Truth,
    Value,
    Zero,
)
from hga_compile.passes.mask_proof import MaskProof, prove_mask
from hga_compile.passes.mask_values import MaskValues, NotUnderstood
from hga_compile.passes.match import Site, find_attention
from hga_compile.passes.retrace import retrace

assert ops.attention  # imported for the registration of the ops

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 8
CLAIMS = (Reason.ROUTED, Reason.SLIDING_WINDOW, Reason.PACKED, Reason.CHUNKED, Reason.PREFIX_LM)


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
    build: Callable[..., Tensor],
    queries: int,
    keys: int,
    *tables: Any,
    cached: bool = False,
    slides: bool = False,
) -> tuple[Plan, GraphModule, tuple]:
    """Decide about an attention under the mask that `build(*tables)` returns, with all keys or an hga cache."""

    def attend(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, *more: Any) -> Tensor:
        if cached:
            k, v = torch.ops.hga.append(k, v, handle, keys, slides)
        return scaled_dot_product_attention(q, k, v, build(*more))

    inputs = (*rows(queries, queries if cached else keys), torch.zeros(1, dtype=torch.int64), *tables)
    graph = traced(attend, *inputs)
    (site,) = find_attention(graph.graph)[0]
    return decide(site, 0, 1, Routing(), MaskValues(graph.graph)), graph, inputs


def claimed_mask(proof: MaskProof, shape: Sequence[int], env: Mapping[Node, Tensor]) -> Tensor:
    """What a proof says that a mask of some shape is, given what the nodes of its graph hold."""
    batch, _, queries, keys = shape
    query, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    allowed = (key <= query if proof.causal else torch.ones(queries, keys, dtype=torch.bool)).expand(shape)
    if proof.window is not None:
        allowed = allowed & (key > query - proof.window)
    if proof.padding is not None:
        allowed = allowed & env[proof.padding].bool()[:batch, None, None, :keys]
    if proof.documents is not None:
        table = env[proof.documents].expand(batch, -1)[:, None, :keys]
        allowed = allowed & (table[..., keys - queries :, None] == table[..., None, :])
    if proof.chunk is not None:
        size, start = proof.chunk
        begin = torch.zeros(1, dtype=torch.int64) if start is None else env[start]
        begin = begin.reshape(-1, 1, 1, 1)
        allowed = allowed & ((query - begin) // size == (key - begin) // size)
    for option in proof.ahead:
        allowed = allowed | entries(option, shape, env)
    return allowed


def entries(value: Value | Fact, shape: Sequence[int], env: Mapping[Node, Tensor]) -> Tensor:
    """Return the tensor of some shape that a formula stands for, given what the nodes of its graph hold."""

    def of(part: Value | Fact) -> Tensor:
        return entries(part, shape, env)

    if isinstance(value, Affine):
        total = torch.full(shape, int(value.constant))
        for dim, coefficient in enumerate(value.coefficients):
            place = torch.arange(shape[dim]).reshape(
                [-1 if other == dim else 1 for other in range(len(shape))]
            )
            total = total + int(coefficient) * place
        return total
    if isinstance(value, Lookup):
        return env[value.source][tuple(map(of, value.indices))].expand(shape)
    if isinstance(value, Sum):
        return of(value.affine) + sum(int(factor) * of(part) for part, factor in value.lookups)
    if isinstance(value, Quotient):
        return of(value.numerator) // value.divisor
    if isinstance(value, AtMost):
        return of(value.formula) <= 0
    if isinstance(value, Zero):
        return of(value.formula) == 0
    if isinstance(value, Same):
        first, *others = map(of, value.sides)
        return all_of(shape, (first == other for other in others))
    if isinstance(value, Either):
        return ~all_of(shape, (~of(option) for option in value.options))
    assert isinstance(value, Truth)
    return all_of(shape, (of(fact).bool() for fact in value.facts))


def all_of(shape: Sequence[int], parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.logical_and, parts, torch.ones(shape, dtype=torch.bool))


class _Checked(Interpreter):
    """Runs a graph and checks what is known of it against what it computes.

    Of every node its formula, and of every plan that claims something about a mask this mask.
    """

    def __init__(self, graph: GraphModule, plans: Sequence[Plan], values: MaskValues) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.plans = {plan.site.node: plan for plan in plans}
        self.values = values
        self.claims: list[bool] = []

    def run_node(self, node: Node) -> Any:
        if node.target is torch.ops.hga.append.default:
            # There is no store: the masks do not depend on what is in it.
            return tuple(torch.zeros(part.shape) for part in node.meta["val"])
        if node in self.plans:
            plan = self.plans[node]
            self.claims.append(plan.decision.reason in CLAIMS)
            if self.claims[-1]:
                self.check(plan)
        result = self.env[node] = super().run_node(node)
        if node.op == "call_function" and isinstance(result, Tensor) and not result.is_floating_point():
            self.check_formula(node, result)
        return result

    def check_formula(self, node: Node, result: Tensor) -> None:
        try:
            found = self.values.of(node)
        except NotUnderstood:
            return
        formula = entries(found, result.shape, self.env)
        held = result.bool() if isinstance(found, Truth) else result
        assert torch.equal(formula.to(held.dtype), held), (
            f"{node.format_node()}: {formula.tolist()}, it is {held.tolist()}"
        )

    def check(self, plan: Plan) -> None:
        mask = self.env[plan.site.mask]
        proof = MaskProof(True, plan.window, plan.padding)
        if not plan.decision.routed and plan.window is None:
            # Left as it is; the claim is in the words.
            proof = prove_mask(plan.site.mask, self.values)
        shape = (BATCH, 1, plan.site.queries, plan.site.keys)
        if plan.single_query_mask is not None:
            claim = self.env[plan.single_query_mask].bool()
        else:
            claim = claimed_mask(proof, shape, self.env)
        real = mask.expand(BATCH, HEADS, *shape[2:])
        claim = claim.expand_as(real)
        place = len(self.claims) - 1
        assert torch.equal(claim, real), (
            f"{place}: claimed {claim.int().tolist()}, it is {real.int().tolist()}"
        )


def assert_claim_holds(plan: Plan, graph: GraphModule, inputs: tuple) -> None:
    """Check a plan that rewrites against the mask that the graph computes for these inputs."""
    _Checked(graph, [plan], MaskValues(graph.graph)).run(*inputs)


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
    run = _Checked(graph, plans, values)
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


def compiled_plan(function: Callable[..., Any], *inputs: Any) -> Plan:
    """Decide about the only attention of Dynamo's graph; what is claimed is checked while the graph runs."""

    def use(graph: GraphModule) -> GraphModule:
        new = retrace(graph)
        (site,) = find_attention(new.graph)[0]
        values = MaskValues(new.graph)
        plans.append(decide(site, 0, 1, Routing(), values))
        new.forward = _Checked(new, plans, values).run
        return new

    plans: list[Plan] = []
    _, result = dynamo_run(function, *inputs, use=use)
    torch.testing.assert_close(result, function(*inputs))
    return plans[0]


def dynamo_graph(function: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    """Return what `use` makes of the graph that Dynamo hands to a backend."""
    return dynamo_run(function, *inputs, **settings)[0]


def counted(graph: GraphModule, name: str) -> int:
    """Number of calls of an op, such as `hga.append`, in a graph."""
    return sum(str(node.target).startswith(name) for node in graph.graph.nodes if node.op == "call_function")
