"""Attention written out: every form that is matched gives the same result, and near misses are left alone."""

import math

import pytest
import torch
from attention_graphs import BATCH, DIM, HEADS, KV_HEADS, counted, dynamo_run, rows

from hga_compile.configs.budget import Budget
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import Routing
from hga_compile.kernels.states import STATES
from hga_compile.passes.decision import Reason
from hga_compile.passes.pipeline import rewrite_graph
from hga_compile.store import LayerStore

assert LayerStore
N = 12
MIN = torch.finfo(torch.float32).min
SCALE = DIM**-0.5
FULL = Routing(budget=Budget(fraction=1.0))


def run(function, *inputs, routing=FULL):
    """The decisions about a function, its rewritten graph, and what that returns."""

    def use(graph):
        result = rewrite_graph(graph, Profile(name="test", routing=routing))
        result.graph.graph.lint()
        return result

    result, out = dynamo_run(function, *inputs, use=use)
    return result.decisions, result.graph, out


def causal(n=N):
    return torch.arange(n)[None, :] <= torch.arange(n)[:, None]


def added(mask):
    return torch.where(mask, torch.tensor(0.0), MIN)


def spread(x):
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, 2, tokens, dim).reshape(batch, heads * 2, tokens, dim)


def usual(q, k, v):
    scores = torch.matmul(q, k.transpose(2, 3)) * SCALE + added(causal())
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(torch.nn.functional.dropout(weights, 0.3, training=False), v)


def divided_in_place(q, k, v):
    scores = q @ k.mT
    scores /= math.sqrt(DIM)
    return (scores + added(causal())).softmax(dim=-1) @ v


def scaled_query(q, k, v):
    return torch.softmax((q * SCALE) @ k.permute(0, 1, 3, 2) + added(causal()), 3) @ v


def filled(q, k, v):
    hidden = torch.arange(N)[None, :] > torch.arange(N)[:, None]
    return torch.softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(hidden, float("-inf")), -1) @ v


def filled_where_not_visible(q, k, v):
    return torch.softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~causal(), -1e9), -1) @ v


def chosen(q, k, v):
    return torch.softmax(torch.where(causal(), q @ k.transpose(-2, -1) * SCALE, MIN), -1) @ v


def chosen_the_other_way(q, k, v):
    hidden = torch.arange(N)[None, :] > torch.arange(N)[:, None]
    return torch.softmax(torch.where(hidden, -math.inf, q @ k.transpose(-2, -1) * SCALE), -1) @ v


def masked_zeros(q, k, v):
    hidden = torch.arange(N)[None, :] > torch.arange(N)[:, None]
    mask = torch.zeros(N, N).masked_fill(hidden, float("-inf"))
    return torch.softmax(q @ k.transpose(-2, -1) * SCALE + mask, -1) @ v


def masked_zeros_in_place(q, k, v):
    mask = torch.zeros(N, N)
    mask.masked_fill_(torch.arange(N)[None, :] > torch.arange(N)[:, None], float("-inf"))
    return torch.softmax(mask + q @ k.transpose(-2, -1) * SCALE, -1) @ v


def less_the_maximum(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE + added(causal())
    return torch.softmax(scores - scores.max(-1, keepdim=True).values, -1) @ v


def einsum(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE + added(causal())
    return torch.einsum("bhqk,bhkd->bqhd", torch.softmax(scores, -1), v)


def einsum_of_other_layouts(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bkhd,bqhd->bhqk", k, q) * SCALE
    return torch.einsum("xyqk,xkyd->xqyd", torch.softmax(scores.masked_fill(~causal(), MIN), -1), v)


def merged_heads(q, k, v):
    q, k, v = (x.reshape(BATCH * HEADS, N, DIM) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) * SCALE
    scores = scores.view(BATCH, HEADS, N, N) + added(causal())
    return torch.bmm(torch.softmax(scores, -1).view(BATCH * HEADS, N, N), v)


def baddbmm_without_bias(q, k, v):
    q, k, v = (x.reshape(BATCH * HEADS, N, DIM) for x in (q, k, v))
    scores = torch.baddbmm(torch.empty(BATCH * HEADS, N, N), q, k.transpose(1, 2), beta=0) * SCALE
    return torch.bmm(torch.softmax(scores + added(causal()), -1), v)


def one_key_head(q, k, v):
    return torch.softmax(q @ k[:, :1].transpose(2, 3) * SCALE + added(causal()), -1) @ v[:, :1]


def capped(q, k, v):
    scores = torch.tanh(q @ k.transpose(2, 3) * SCALE / 3.0) * 3.0
    return torch.softmax(scores + added(causal()), -1) @ v


FORMS = [
    usual,
    divided_in_place,
    scaled_query,
    filled,
    filled_where_not_visible,
    chosen,
    chosen_the_other_way,
    masked_zeros,
    masked_zeros_in_place,
    less_the_maximum,
    einsum,
    einsum_of_other_layouts,
    merged_heads,
    baddbmm_without_bias,
    one_key_head,
    capped,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_form_is_routed_and_gives_the_same(form):
    q, k, v = rows(N)
    expected = form(q, k, v)
    decisions, graph, out = run(form, q, k, v)
    assert [decision.reason for decision in decisions] == [Reason.ROUTED], decisions
    assert counted(graph, "hga.attention") == 1 and counted(graph, "aten.softmax") == 0
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert out.shape == expected.shape and out.dtype == expected.dtype


def test_a_small_budget_is_kept_by_a_written_out_attention():
    routing = Routing(budget=Budget(tokens=8), window={"tokens": 4}, dense_below=0, centre_tokens=4)
    q, k, v = rows(N)
    q[:, :, -1] *= 5
    _, _, out = run(usual, q, k, v, routing=routing)
    dense = usual(q, k, v)
    torch.testing.assert_close(out[:, :, :6], dense[:, :, :6], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[:, :, -1], dense[:, :, -1])


def test_padding_beside_causality_is_proven_whether_joined_or_added_twice():
    table = torch.ones(BATCH, N, dtype=torch.int64)
    table[0, :4] = 0

    def joined(q, k, v, table):
        mask = causal()[None, None] & table[:, None, None, :].bool()
        return torch.softmax(q @ k.transpose(2, 3) * SCALE + added(mask), -1) @ v

    def twice(q, k, v, table):
        scores = q @ k.transpose(2, 3) * SCALE + added(causal())
        return torch.softmax(scores.masked_fill(~table.bool()[:, None, None, :], -math.inf), -1) @ v

    q, k, v = rows(N)
    for function in (joined, twice):
        decisions, _, out = run(function, q, k, v, table)
        assert [decision.reason for decision in decisions] == [Reason.ROUTED]
        assert "padding" in decisions[0].detail
        real = table[:, None, :, None].bool().expand_as(out)
        torch.testing.assert_close(out[real], function(q, k, v, table)[real], atol=1e-5, rtol=1e-5)


def sinks_of(q, k, v, logits):
    scores = q @ k.transpose(2, 3) * SCALE + added(causal())
    sinks = logits.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    both = torch.cat([scores, sinks], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return torch.softmax(both, -1)[..., :-1] @ v


def test_attention_sinks_are_kept():
    q, k, v = rows(N)
    logits = torch.randn(HEADS)
    decisions, graph, out = run(sinks_of, q, k, v, logits)
    assert [decision.reason for decision in decisions] == [Reason.ROUTED]
    assert counted(graph, "aten.cat") == 0
    torch.testing.assert_close(out, sinks_of(q, k, v, logits), atol=1e-5, rtol=1e-5)


def cached(q, k, v, handle):
    keys, values = (spread(x) for x in torch.ops.hga.append(k, v, handle, N))
    scores = torch.tanh(q @ keys.transpose(2, 3) * SCALE / 5.0) * 5.0 + added(causal())
    return torch.softmax(scores, -1) @ values


def test_over_a_store_append_and_repeat_and_chain_become_one_op():
    q, k, v = rows(N, N, KV_HEADS)
    handle = STATES.open()
    decisions, graph, out = run(cached, q, k, v, handle)
    assert [decision.reason for decision in decisions] == [Reason.ROUTED]
    assert counted(graph, "hga.cached_attention") == 1
    for gone in ("hga.append", "aten.expand", "aten.matmul", "aten.tanh", "aten.where"):
        assert counted(graph, gone) == 0, gone
    scores = torch.tanh(q @ spread(k).transpose(2, 3) * SCALE / 5.0) * 5.0 + added(causal())
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ spread(v), atol=1e-5, rtol=1e-5)


def test_a_sliding_window_over_a_store_keeps_only_the_window():
    def sliding(q, k, v, handle):
        keys, values = (spread(x) for x in torch.ops.hga.append(k, v, handle, N))
        mask = causal() & (torch.arange(N)[None, :] > torch.arange(N)[:, None] - 3)
        return torch.softmax(q @ keys.transpose(2, 3) * SCALE + added(mask), -1) @ values

    q, k, v = rows(N, N, KV_HEADS)
    decisions, graph, out = run(sliding, q, k, v, STATES.open())
    assert [decision.reason for decision in decisions] == [Reason.SLIDING_WINDOW]
    assert counted(graph, "hga.window_attention") == 1
    mask = causal() & (torch.arange(N)[None, :] > torch.arange(N)[:, None] - 3)
    expected = torch.softmax(q @ spread(k).transpose(2, 3) * SCALE + added(mask), -1) @ spread(v)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def with_bias(q, k, v):
    bias = torch.arange(N)[None, :] * torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]
    return torch.softmax(q @ k.transpose(2, 3) * SCALE + bias, -1) @ v


def active_dropout(q, k, v):
    weights = torch.softmax(q @ k.transpose(2, 3) * SCALE + added(causal()), -1)
    return torch.nn.functional.dropout(weights, 0.5, training=True) @ v


def returned_weights(q, k, v):
    weights = torch.softmax(q @ k.transpose(2, 3) * SCALE + added(causal()), -1)
    return weights @ v, weights


def used_scores(q, k, v):
    scores = q @ k.transpose(2, 3) * SCALE
    return torch.softmax(scores + added(causal()), -1) @ v, scores.sum()


def not_causal(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) * SCALE, -1) @ v


def a_mask_that_hides_nothing(q, k, v):
    return torch.softmax((q @ k.transpose(2, 3) * SCALE).masked_fill(~causal(), -10.0), -1) @ v


def a_mask_from_outside(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) * SCALE + v.new_zeros(N, N).copy_(v[0, 0] @ v[0, 0].T), -1) @ v


NEAR = {
    with_bias: Reason.FLOAT_MASK,
    active_dropout: Reason.DROPOUT,
    returned_weights: Reason.WEIGHTS_USED,
    used_scores: Reason.WEIGHTS_USED,
    not_causal: Reason.NOT_CAUSAL,
    a_mask_that_hides_nothing: Reason.NOT_MATCHED,
    a_mask_from_outside: Reason.FLOAT_MASK,
}


@pytest.mark.parametrize("form", NEAR, ids=lambda form: form.__name__)
def test_a_near_miss_stays_as_it_is_and_says_why(form):
    q, k, v = rows(N)
    decisions, graph, out = run(form, q, k, v)
    assert [decision.reason for decision in decisions] == [NEAR[form]]
    assert counted(graph, "hga.") == 0
    if form is not active_dropout:
        torch.testing.assert_close(out, form(q, k, v))


def wrong_dimension(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) * SCALE + added(causal()), -2) @ v


def a_cap_that_does_not_undo_itself(q, k, v):
    return torch.softmax(torch.tanh(q @ k.transpose(2, 3) / 3.0) * 4.0 + added(causal()), -1) @ v


def scaled_after_the_mask(q, k, v):
    return torch.softmax((q @ k.transpose(2, 3) + added(causal())) * SCALE, -1) @ v


def zeros_that_are_written(q, k, v):
    zeros = torch.zeros(N, N)
    zeros[0, 0] = 7.0
    return torch.softmax(q @ k.transpose(2, 3) + torch.where(causal(), zeros, MIN), -1) @ v


def query_written_between(q, k, v):
    q = q.clone()
    scores = q @ k.transpose(2, 3) * SCALE + added(causal())
    q.mul_(0.0)
    return torch.softmax(scores, -1) @ v + q


def weights_on_the_right(q, k, v):
    weights = torch.softmax(q @ k.transpose(2, 3) * SCALE + added(causal()), -1)
    return v.transpose(2, 3) @ weights


def a_router(q, k, v):
    return torch.softmax(q[:, :, :, 0], -1) * v.sum()


@pytest.mark.parametrize(
    "form",
    [
        wrong_dimension,
        a_cap_that_does_not_undo_itself,
        scaled_after_the_mask,
        zeros_that_are_written,
        query_written_between,
        weights_on_the_right,
        a_router,
    ],
    ids=lambda form: form.__name__,
)
def test_what_only_looks_like_attention_is_never_rewritten(form):
    q, k, v = rows(N)
    decisions, graph, out = run(form, q, k, v)
    assert not any(decision.routed for decision in decisions)
    assert counted(graph, "hga.") == 0
    torch.testing.assert_close(out, form(q, k, v))


def test_a_fused_layer_of_torch_is_reported():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    decisions, _, out = run(lambda x: layer(x), x)
    assert [(decision.reason, decision.detail) for decision in decisions] in (
        [(Reason.NOT_MATCHED, "a fused layer")],
        [(Reason.NOT_CAUSAL, "no mask")],
    )
    with torch.no_grad():
        torch.testing.assert_close(out, layer(x))


@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention_of_torch_is_found(weights):
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).requires_grad_(True).eval()
    x = torch.randn(2, 6, 16)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6)

    def attend(x):
        return module(x, x, x, attn_mask=mask, need_weights=weights, is_causal=not weights)[0]

    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            decisions, graph, out = run(attend, x)
            expected = attend(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    (decision,) = decisions
    # For its weights torch merges heads and batch before it scales Q.
    assert decision.reason is (Reason.SHAPE if weights else Reason.ROUTED)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_no_tail_estimate_where_there_is_a_cap():
    decisions, _, _ = run(capped, *rows(N), routing=Routing(tail="estimate"))
    assert [decision.reason for decision in decisions] == [Reason.TAIL]


def a_mask_that_is_returned(q, k, v):
    mask = causal()
    return torch.softmax(q @ k.transpose(2, 3) * SCALE + added(mask), -1) @ v, mask


def a_mask_of_two_attentions(q, k, v):
    mask = added(causal())
    first = torch.softmax(q @ k.transpose(2, 3) * SCALE + mask, -1) @ v
    return first + torch.softmax(first @ k.transpose(2, 3) * SCALE + mask, -1) @ v


def a_key_that_is_an_attention(q, k, v):
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, attend(k, k, v, is_causal=True), v, is_causal=True)


@pytest.mark.parametrize(
    ("form", "sites"),
    [(a_mask_that_is_returned, 1), (a_mask_of_two_attentions, 2), (a_key_that_is_an_attention, 2)],
)
def test_masks_and_results_may_have_other_uses(form, sites):
    q, k, v = rows(N)
    decisions, graph, out = run(form, q, k, v)
    assert [decision.reason for decision in decisions] == [Reason.ROUTED] * sites
    assert counted(graph, "hga.attention") == sites
    torch.testing.assert_close(out, form(q, k, v), atol=1e-5, rtol=1e-5)
