import pytest
import torch
from attention_graphs import BATCH, DIM, HEADS, KV_HEADS, counted, dynamo_run, rows
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import Budget, LayerOverride, Routing
from hga_compile.kernels.site import SiteConfig
from hga_compile.kernels.states import STATES
from hga_compile.passes.decision import Reason
from hga_compile.passes.pipeline import rewrite_graph
from hga_compile.store import LayerStore

ALL = Routing(budget=Budget(fraction=1.0))
SDPA = "aten.scaled_dot_product_attention"
HANDLE = torch.zeros(1, dtype=torch.int64)
assert LayerStore


def spread(x):
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, 2, tokens, dim).reshape(batch, heads * 2, tokens, dim)


def causal(queries, keys):
    return (
        torch.arange(keys)[None, None, None] <= (torch.arange(queries) + keys - queries)[None, None, :, None]
    )


def rewritten(function, *inputs, routing=ALL):
    """What the passes make of a function, and what it then returns."""

    def use(graph):
        before = str(graph.graph)
        result = rewrite_graph(graph, Profile(name="test", routing=routing))
        assert str(graph.graph) == before, "Dynamo's graph was changed"
        result.graph.graph.lint()
        return result

    return dynamo_run(function, *inputs, use=use)


def prefill(q, k, v, handle, table):
    keys, values = torch.ops.hga.append(k, v, handle, 6)
    mask = causal(6, 6) & table[:, None, None, :].bool()
    return sdpa(q, spread(keys), spread(values), mask)


def opened() -> torch.Tensor:
    return STATES.open()


def test_append_repeat_mask_and_attention_become_one_op():
    handle = opened()
    q, k, v = rows(6, 6, KV_HEADS)
    table = torch.ones(BATCH, 6, dtype=torch.int64)
    table[0, :2] = 0
    result, routed = rewritten(prefill, q, k, v, handle, table)
    graph = result.graph
    assert [decision.reason for decision in result.decisions] == [Reason.ROUTED]
    assert counted(graph, "hga.cached_attention") == 1
    for gone in (
        SDPA,
        "hga.append",
        "aten.expand",
        "aten.arange",
        "aten.le",
        "aten.__and__",
        "aten.bitwise_and",
    ):
        assert counted(graph, gone) == 0, gone
    dense = sdpa(q, spread(k), spread(v), causal(6, 6) & table[:, None, None, :].bool())
    real = table[:, None, :, None].bool().expand_as(dense)
    torch.testing.assert_close(routed[real], dense[real])
    assert STATES.get(handle).length == 6


def test_the_new_op_carries_the_layer_s_own_settings():
    routing = Routing(overrides=(LayerOverride(layers=(0,), budget=Budget(tokens=32)),))
    result, out = rewritten(
        prefill, *rows(6, 6, KV_HEADS), opened(), torch.ones(BATCH, 6, dtype=torch.int64), routing=routing
    )
    graph = result.graph
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.hga.cached_attention.default)
    config = SiteConfig.from_text(node.args[-1])
    assert config.layer == 0 and config.tier == "host"
    assert config.routing.budget == Budget(tokens=32) and config.routing.overrides == ()
    assert node.args[6] == pytest.approx(DIM**-0.5)


def test_a_decode_under_a_mask_from_outside_keeps_the_mask_as_a_table():
    handle = opened()
    q, k, v = rows(1, 1, KV_HEADS)

    def decode(q, k, v, handle, mask):
        return sdpa(q, *map(spread, torch.ops.hga.append(k, v, handle, 4)), mask)

    past_k, past_v = torch.randn(BATCH, KV_HEADS, 3, DIM), torch.randn(BATCH, KV_HEADS, 3, DIM)
    STATES.get(handle).put(past_k, past_v, 3)
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])[:, None, None, :]
    result, out = rewritten(decode, q, k, v, handle, mask)
    graph = result.graph
    assert counted(graph, "hga.cached_attention") == 1 and counted(graph, "aten.select") == 2
    dense = sdpa(q, spread(torch.cat([past_k, k], 2)), spread(torch.cat([past_v, v], 2)), mask)
    torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("tail", ["drop", "estimate"])
def test_a_decode_in_chunks_attends_to_nothing_outside_of_the_chunk(tail):
    """Routing wants the first tokens of all, and the best of the others: none of them may be seen."""
    handle, tokens, size = opened(), 64, 24
    routing = Routing(budget=Budget(tokens=16), dense_below=0, centre_tokens=8, tail=tail)

    def decode(q, k, v, handle):
        keys = torch.arange(tokens)[None, None, None, :]
        here = (torch.arange(1) + tokens - 1)[None, None, :, None]
        mask = (keys <= here) & (keys // size == here // size)
        return sdpa(q, *map(spread, torch.ops.hga.append(k, v, handle, tokens)), mask)

    q, k, v = rows(1, 1, KV_HEADS)
    past_k, past_v = (torch.randn(BATCH, KV_HEADS, tokens - 1, DIM) for _ in range(2))
    outside = (tokens - 1) // size * size
    past_v[:, :, :outside] = 1e4
    STATES.get(handle).put(past_k, past_v, tokens - 1)
    result, out = rewritten(decode, q, k, v, handle, routing=routing)
    assert [decision.reason for decision in result.decisions] == [Reason.ROUTED]
    assert out.abs().max() < 100
    # What is left of the chunk fits into the budget.
    keys, values = torch.cat([past_k, k], 2)[:, :, outside:], torch.cat([past_v, v], 2)[:, :, outside:]
    torch.testing.assert_close(out, sdpa(q, spread(keys), spread(values)))


def test_a_sliding_window_becomes_window_attention_and_keeps_the_window():
    handle = opened()

    def step(q, k, v, handle):
        mask = causal(6, 6) & (torch.arange(6)[None, :] > torch.arange(6)[:, None] - 3)
        return sdpa(q, *map(spread, torch.ops.hga.append(k, v, handle, 6)), mask)

    q, k, v = rows(6, 6, KV_HEADS)
    result, out = rewritten(step, q, k, v, handle)
    assert [decision.reason for decision in result.decisions] == [Reason.SLIDING_WINDOW]
    assert counted(result.graph, "hga.window_attention") == 1 and counted(result.graph, SDPA) == 0
    (node,) = result.graph.graph.find_nodes(op="call_function", target=torch.ops.hga.window_attention.default)
    assert node.args[-1] == 3
    mask = causal(6, 6) & (torch.arange(6)[None, :] > torch.arange(6)[:, None] - 3)
    torch.testing.assert_close(out, sdpa(q, spread(k), spread(v), mask))


@pytest.mark.parametrize("gqa", [False, True])
def test_attention_without_a_cache_becomes_the_stateless_op(gqa):
    q, k, v = rows(6, 6, KV_HEADS)

    def attend(q, k, v):
        if gqa:
            return sdpa(q, k, v, is_causal=True, enable_gqa=True)
        return sdpa(q, spread(k), spread(v), is_causal=True)

    result, out = rewritten(attend, q, k, v)
    graph = result.graph
    assert counted(graph, "hga.attention") == 1 and counted(graph, SDPA) == 0
    # K and V go in as they are, not repeated.
    assert counted(graph, "aten.expand") == 0
    torch.testing.assert_close(out, attend(q, k, v))


def test_a_site_that_stays_keeps_its_append_and_its_mask():
    handle = opened()

    def step(q, k, v, handle):
        mask = causal(6, 6) | (torch.arange(6) < 2)
        return sdpa(q, *map(spread, torch.ops.hga.append(k, v, handle, 6)), mask)

    q, k, v = rows(6, 6, KV_HEADS)
    result, out = rewritten(step, q, k, v, handle)
    graph = result.graph
    assert counted(graph, "hga.append") == counted(graph, SDPA) == 1
    mask = causal(6, 6) | (torch.arange(6) < 2)
    torch.testing.assert_close(out, sdpa(q, spread(k), spread(v), mask))


def test_a_mask_that_another_site_needs_is_kept():
    def two(q, k, v):
        mask = causal(6, 6)
        first = sdpa(q, k, v, mask)
        return first, sdpa(q, k, v, mask | (torch.arange(6) < 2))

    result, out = rewritten(two, *rows(6))
    assert [decision.reason for decision in result.decisions] == [Reason.ROUTED, Reason.PREFIX_LM]
    assert counted(result.graph, "hga.attention") == counted(result.graph, SDPA) == 1
    assert counted(result.graph, "aten.le") == 1


def test_two_steps_of_one_store_in_one_graph_stay_in_order():
    handle = opened()
    q, k, v = rows(2, 2, KV_HEADS)

    def steps(q, k, v, handle):
        outs = []
        for place in range(2):
            new = slice(place, place + 1)
            whole = torch.ops.hga.append(k[:, :, new], v[:, :, new], handle, place + 1)
            outs.append(sdpa(q[:, :, new], *map(spread, whole)))
        return torch.cat(outs, 2)

    result, out = rewritten(steps, q, k, v, handle)
    graph = result.graph
    assert counted(graph, "hga.cached_attention") == 2 and counted(graph, "hga.append") == 0
    dense = sdpa(q, spread(k), spread(v), is_causal=True)
    torch.testing.assert_close(out, dense)


def test_cross_attention_over_a_filled_cache_is_left_to_read_all_of_it():
    handle = opened()

    def cross(q, k, v, handle):
        return sdpa(q, *map(spread, torch.ops.hga.append(k, v, handle, 9)))

    q, k, v = rows(1, 9, KV_HEADS)
    result, out = rewritten(cross, q, k, v, handle, routing=Routing(budget=Budget(tokens=8), dense_below=0))
    graph = result.graph
    assert counted(graph, "hga.append") == 1
    torch.testing.assert_close(out, sdpa(q, spread(k), spread(v)))


def test_the_shape_of_the_result_is_the_shape_of_the_attention():
    q, k, v = rows(6)
    wide = torch.randn(BATCH, HEADS, 6, 5)
    result, out = rewritten(lambda q, k, v: sdpa(q, k, v, is_causal=True), q, k, wide)
    graph = result.graph
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.hga.attention.default)
    assert node.meta["val"].shape == (BATCH, HEADS, 6, 5) == out.shape


def test_the_layout_of_the_result_is_that_of_the_attention():
    def attend(q, k, v):
        # A view that holds only because the result lies in memory as the query does.
        return sdpa(q, k, v, is_causal=True).transpose(1, 2).view(BATCH, 6, -1)

    q, k, v = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in rows(6, 6))
    result, out = rewritten(attend, q, k, v)
    assert result.decisions[0].reason is Reason.ROUTED
    torch.testing.assert_close(out, attend(q, k, v))
