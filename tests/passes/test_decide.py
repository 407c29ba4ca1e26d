import pytest
import torch
from attention_graphs import BATCH, DIM, HEADS, KV_HEADS, dynamo_graph, masked, plan_of, rows, traced
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hga_compile.configs.routing import Routing
from hga_compile.passes.decide import decide
from hga_compile.passes.decision import Reason
from hga_compile.passes.mask_values import MaskValues
from hga_compile.passes.match import find_attention
from hga_compile.passes.retrace import retrace

HANDLE = torch.zeros(1, dtype=torch.int64)


def cached(attend, queries, length, *more, new=None, routing=None):
    """Plan for `attend(q, K, V, *more)` where K and V come from an append."""

    def step(q, k, v, handle, *more):
        return attend(q, *torch.ops.hga.append(k, v, handle, length), *more)

    q, k, v = rows(queries, queries if new is None else new)
    return plan_of(step, q, k, v, HANDLE, *more, routing=routing)


def causal(queries, keys):
    return (
        torch.arange(keys)[None, None, None] <= (torch.arange(queries) + keys - queries)[None, None, :, None]
    )


def test_a_prefill_that_says_causal_is_routed():
    plan = plan_of(lambda q, k, v: sdpa(q, k, v, is_causal=True), *rows(6))
    assert plan.decision.reason is Reason.ROUTED and plan.decision.routed
    assert plan.decision.phase == "prefill"


def test_a_decode_over_the_cache_is_routed_without_a_mask():
    plan = cached(lambda q, k, v: sdpa(q, k, v), 1, 9)
    assert plan.decision.reason is Reason.ROUTED and plan.decision.phase == "decode"


def test_a_decode_under_a_mask_from_outside_takes_the_mask_as_the_table():
    mask = torch.ones(BATCH, 1, 1, 9, dtype=torch.bool)
    plan = cached(lambda q, k, v, m: sdpa(q, k, v, m), 1, 9, mask)
    assert plan.decision.reason is Reason.ROUTED
    assert plan.single_query_mask is plan.site.mask and plan.padding is None


def test_a_decode_under_a_mask_that_is_proven_takes_the_table():
    def attend(q, k, v, table):
        return sdpa(q, k, v, causal(1, 9) & table[:, None, None, :])

    plan = cached(attend, 1, 9, torch.ones(BATCH, 9, dtype=torch.bool))
    assert plan.decision.reason is Reason.ROUTED
    assert plan.single_query_mask is None and plan.padding is not None


def test_a_sliding_window_over_the_cache_keeps_its_window():
    def attend(q, k, v):
        return sdpa(q, k, v, causal(3, 9) & (torch.arange(9) > (torch.arange(3) + 6)[:, None] - 4))

    plan = cached(attend, 3, 9)
    assert plan.decision.reason is Reason.SLIDING_WINDOW
    assert plan.window == 4 and not plan.decision.routed


@pytest.mark.parametrize("window", [None, 4])
def test_dense_layers_do_not_stop_a_window(window):
    def attend(q, k, v):
        mask = causal(3, 9)
        return sdpa(
            q, k, v, mask if window is None else mask & (torch.arange(9) > (torch.arange(3) + 6)[:, None] - 4)
        )

    plan = cached(attend, 3, 9, routing=Routing(dense_layers=(0,)))
    assert plan.decision.reason is (Reason.CONFIGURED if window is None else Reason.SLIDING_WINDOW)
    assert plan.window == window


def test_a_dense_prefill_without_a_cache_is_configured():
    routing = Routing(prefill="dense")
    plan = plan_of(lambda q, k, v: sdpa(q, k, v, is_causal=True), *rows(6), routing=routing)
    assert plan.decision.reason is Reason.CONFIGURED
    # With a cache the op sees to it at run time: the same graph may serve one query and several.
    assert cached(lambda q, k, v: sdpa(q, k, v, is_causal=True), 6, 6, routing=routing).decision.routed


def test_an_encoder_is_not_causal():
    assert plan_of(sdpa, *rows(6)).decision.reason is Reason.NOT_CAUSAL


def test_cross_attention_is_not_causal():
    assert plan_of(sdpa, *rows(6, 9)).decision.reason is Reason.NOT_CAUSAL


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("with_mask", [False, True])
def test_cross_attention_that_fills_a_cache_is_not_causal(queries, with_mask):
    mask = torch.ones(BATCH, 1, queries, 9, dtype=torch.bool)
    plan = cached(lambda q, k, v, m: sdpa(q, k, v, m if with_mask else None), queries, 9, mask, new=9)
    assert plan.decision.reason is Reason.NOT_CAUSAL
    assert "9 new keys" in plan.decision.detail


def test_a_static_cache_is_named():
    def attend(q, k, v, keys, values):
        place = torch.tensor([4])
        return sdpa(q, keys.index_copy_(2, place, k), values.index_copy_(2, place, v), causal(1, 9))

    plan = plan_of(attend, *rows(1), torch.zeros(BATCH, HEADS, 9, DIM), torch.zeros(BATCH, HEADS, 9, DIM))
    assert plan.decision.reason is Reason.SINGLE_QUERY and plan.decision.detail == "a static cache"


def test_a_stock_dynamic_cache_is_named():
    def attend(q, k, v, keys, values):
        return sdpa(q, torch.cat([keys, k], 2), torch.cat([values, v], 2))

    plan = plan_of(attend, *rows(1), torch.zeros(BATCH, HEADS, 9, DIM), torch.zeros(BATCH, HEADS, 9, DIM))
    assert plan.decision.reason is Reason.SINGLE_QUERY and plan.decision.detail == "a stock dynamic cache"


def test_is_causal_with_more_keys_than_queries_is_another_alignment():
    plan = plan_of(lambda q, k, v: sdpa(q, k, v, is_causal=True), *rows(5, 9))
    assert plan.decision.reason is Reason.ALIGNMENT
    plan = cached(lambda q, k, v: sdpa(q, k, v, is_causal=True), 5, 9)
    assert plan.decision.reason is Reason.ALIGNMENT
    plan = cached(lambda q, k, v: sdpa(q, k, v, is_causal=True), 1, 9)
    assert plan.decision.reason is Reason.ALIGNMENT  # torch would show the query the first key only


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_additive_mask_stays(dtype):
    plan, *_ = masked(lambda m: m, 6, 6, torch.zeros(1, HEADS, 6, 6, dtype=torch.float32))
    assert plan.decision.reason is Reason.FLOAT_MASK
    plan, *_ = masked(lambda m: torch.where(causal(6, 6), m, float("-inf")), 6, 6, torch.zeros(6, 6))
    assert plan.decision.reason is Reason.FLOAT_MASK


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_float_mask_that_only_hides_is_a_bool_mask(hidden):
    plan, *_ = masked(lambda: torch.where(causal(6, 6), 0.0, hidden), 6, 6)
    assert plan.decision.reason is Reason.ROUTED
    plan, *_ = masked(lambda: torch.zeros(6, 6).masked_fill(~causal(6, 6), hidden), 6, 6)
    assert plan.decision.reason is Reason.ROUTED
    plan, *_ = masked(lambda: torch.where(causal(6, 6), 0.0, -100.0), 6, 6)
    assert plan.decision.reason is Reason.FLOAT_MASK


@pytest.mark.parametrize("shape", [(BATCH, 1, 3, 9), (1, 1, 3, 9), (1, HEADS, 3, 9)])
def test_a_mask_from_outside_for_several_queries_stays_unproven(shape):
    plan = cached(lambda q, k, v, m: sdpa(q, k, v, m), 3, 9, torch.ones(shape, dtype=torch.bool))
    assert plan.decision.reason is Reason.UNPROVEN_MASK


@pytest.mark.parametrize("shape", [(BATCH, HEADS, 1, 9), (BATCH, 1, 1, 1)])
def test_a_mask_of_one_query_that_is_no_table_stays_unproven(shape):
    plan = cached(lambda q, k, v, m: sdpa(q, k, v, m), 1, 9, torch.ones(shape, dtype=torch.bool))
    assert plan.decision.reason is Reason.UNPROVEN_MASK


def test_dropout_stays():
    plan = plan_of(lambda q, k, v: sdpa(q, k, v, dropout_p=0.1, is_causal=True), *rows(6))
    assert plan.decision.reason is Reason.DROPOUT and "0.1" in plan.decision.detail


@pytest.mark.parametrize(
    "use",
    [
        lambda k, v: k.sum(),
        lambda k, v: v.sum(),
        lambda k, v: k[:, :, :1] + 1,
        lambda k, v: k.contiguous() + 1,
        lambda k, v: k.mul_(1.0),
        lambda k, v: sdpa(k[:, :, -1:], k, v),
    ],
    ids=["K summed", "V summed", "K sliced", "K copied", "K written", "a second attention"],
)
def test_k_or_v_that_something_else_reads_stays(use):
    def attend(q, k, v):
        return sdpa(q, k, v), use(k, v)

    def step(q, k, v, handle):
        return attend(q, *torch.ops.hga.append(k, v, handle, 9))

    graph = traced(step, *rows(1), HANDLE)
    sites = find_attention(graph.graph)[0]
    plan = decide(sites[0], 0, 1, Routing(), MaskValues(graph.graph))
    assert plan.decision.reason is Reason.SHARED_KV


def test_k_that_is_returned_too_stays():
    plan = cached(lambda q, k, v: (sdpa(q, k, v), k), 1, 9)
    assert plan.decision.reason is Reason.SHARED_KV


def test_k_that_is_the_query_too_stays():
    plan = cached(lambda q, k, v: sdpa(k, k, v, is_causal=True), 6, 6)
    assert plan.decision.reason is Reason.SHARED_KV


def test_a_store_that_is_read_before_the_attention_stays():
    def step(q, k, v, handle):
        whole = torch.ops.hga.append(k, v, handle, 9)
        seen, _ = torch.ops.hga.read(handle, [BATCH, HEADS, 9, DIM], DIM, torch.float32, torch.device("cpu"))
        return sdpa(q, *whole), seen

    assert plan_of(step, *rows(1), HANDLE).decision.reason is Reason.SHARED_KV


def by_hand(q, k, v, **keywords):
    """A graph that torch itself might refuse to trace."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(letter) for letter in "qkv"]
    for node, value in zip(nodes, (q, k, v), strict=True):
        node.meta["val"] = value
    graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, tuple(nodes), keywords)
    return graph


SHAPES = {
    "three dimensions": lambda: (torch.randn(4, 6, 8),) * 3,
    "query heads that KV heads do not divide": lambda: (
        torch.randn(2, 4, 6, 8),
        torch.randn(2, 3, 6, 8),
        torch.randn(2, 3, 6, 8),
    ),
    "one KV row for the batch": lambda: (
        torch.randn(2, 4, 6, 8),
        torch.randn(1, 4, 6, 8),
        torch.randn(1, 4, 6, 8),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_are_not_supported_stay(name):
    q, k, v = SHAPES[name]()
    if name.startswith("query heads"):
        # torch refuses it as well: only the decision is looked at, on a graph that is put together by hand.
        graph = by_hand(q, k, v, is_causal=True)
        (site,) = find_attention(graph)[0]
        plan = decide(site, 0, 1, Routing(), MaskValues(graph))
    else:
        plan = plan_of(lambda q, k, v: sdpa(q, k, v, is_causal=True), q, k, v)
    assert plan.decision.reason is Reason.SHAPE and plan.decision.detail


def test_values_of_another_width_are_fine():
    q, k, _ = rows(6)
    plan = plan_of(lambda q, k, v: sdpa(q, k, v, is_causal=True), q, k, torch.randn(BATCH, HEADS, 6, 5))
    assert plan.decision.routed


def dynamo_plan(function, *inputs, dims):
    """Decide in Dynamo's graph, with `dims` of all inputs marked dynamic."""
    for part in inputs:
        for dim in dims:
            torch._dynamo.mark_dynamic(part, dim)

    def use(graph):
        new = retrace(graph)
        (site,) = find_attention(new.graph)[0]
        return decide(site, 0, 1, Routing(), MaskValues(new.graph))

    return dynamo_graph(function, *inputs, use=use)


def test_a_scale_that_is_not_constant_stays():
    graph = by_hand(*rows(6), is_causal=True)
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    with graph.inserting_before(node):
        node.kwargs = {**node.kwargs, "scale": graph.placeholder("scale")}
    (site,) = find_attention(graph)[0]
    plan = decide(site, 0, 1, Routing(), MaskValues(graph))
    assert plan.decision.reason is Reason.SHAPE and "scale" in plan.decision.detail


def test_dynamic_tokens_and_batch_are_routed():
    plan = dynamo_plan(lambda x: sdpa(x, x * 2, x * 3, is_causal=True), rows(6)[0], dims=(0, 2))
    assert plan.decision.routed and plan.decision.phase == "prefill"


def test_is_causal_with_dynamic_sizes_that_may_differ_is_another_alignment():
    def attend(x, y):
        return sdpa(x, y * 2, y * 3, is_causal=True)

    assert dynamo_plan(attend, *rows(6, 9)[:2], dims=(2,)).decision.reason is Reason.ALIGNMENT


def test_the_layer_and_the_site_are_named():
    plan = plan_of(lambda q, k, v: sdpa(q, k, v, is_causal=True), *rows(6))
    assert plan.decision.site == plan.site.node.name
    assert plan.decision.layer is None


def test_every_reason_has_words():
    assert len({reason.value for reason in Reason}) == len(Reason)
    assert all(
        (reason.value and reason.value[0].islower()) or reason.value.startswith("K") for reason in Reason
    )


def test_grouped_heads_of_one_kv_head_are_routed():
    q, _, _ = rows(6)
    k, v = torch.randn(BATCH, 1, 6, DIM), torch.randn(BATCH, 1, 6, DIM)
    plan = plan_of(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), q, k, v)
    assert plan.decision.routed
    assert KV_HEADS > 1  # the other tests have more than one
