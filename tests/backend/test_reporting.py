import json

import pytest
import torch
from tiny_models import FULL, TIGHT, Pair, make_model, run, tokens

import hga_compile
from hga_compile.kernels.ledger import LEDGER
from hga_compile.passes.decision import Decision, Reason
from hga_compile.reporting import note_graph


@pytest.fixture
def spoken(pairs):
    pair = pairs("gemma3")
    run(pair.compiled, pair.cache(), list(tokens(2, 22).split([20, 1, 1], 1)))
    return hga_compile.report()


def test_counts_are_sums_over_batch_heads_and_queries(spoken):
    (decode,) = [use for use in spoken.layers if use.phase == "decode"]
    (prefill,) = [use for use in spoken.layers if use.phase == "prefill"]
    assert decode.layer == prefill.layer == 1  # the layer with all of the sequence
    assert (decode.calls, decode.queries, prefill.calls, prefill.queries) == (2, 4, 1, 40)
    assert decode.visible == decode.attended == 2 * 2 * (21 + 22)
    assert prefill.visible == 2 * 2 * (20 * 21 // 2)
    assert decode.kv_bytes == decode.dense_bytes == decode.visible * 2 * 16 * 4


def test_totals_add_up(spoken):
    both, decode, prefill = spoken.totals(), spoken.totals("decode"), spoken.totals("prefill")
    assert both.attended == decode.attended + prefill.attended and both.layer == -1
    assert both.phase == "all" and decode.phase == "decode"
    assert spoken.totals("decode").bytes_fraction == 1.0
    assert hga_compile.Report((), (), {}).totals().attended_fraction == 0.0


def test_the_report_is_plain_data(spoken):
    document = json.loads(spoken.to_json())
    assert set(document) == {"sites", "layers", "totals", "fallbacks"}
    assert document["totals"]["decode"]["attended_fraction"] == 1.0
    assert set(document["layers"][0]) >= {
        "layer",
        "phase",
        "calls",
        "kv_bytes",
        "summary_bytes",
        "hits",
        "misses",
    }


def test_reset_keeps_the_sites_unless_asked(spoken):
    note_graph([Decision("site", 0, "decode", Reason.ROUTED)])
    hga_compile.reset_report()
    report = hga_compile.report()
    assert report.layers == () and len(report.sites) >= 1
    hga_compile.reset_report(sites=True)
    assert hga_compile.report().sites == ()


def test_the_table_puts_runs_of_layers_into_one_line():
    hga_compile.reset_report(sites=True)
    note_graph([Decision(f"site{layer}", layer, "decode", Reason.ROUTED, "causal") for layer in range(3)])
    note_graph(
        [
            Decision("a", 0, "prefill", Reason.ROUTED),
            Decision("b", 1, "prefill", Reason.SLIDING_WINDOW, "window 8"),
            Decision("c", 2, "prefill", Reason.ROUTED),
        ]
    )
    note_graph(
        [Decision("x", None, "any", Reason.REQUIRES_GRAD), Decision("y", None, "any", Reason.REQUIRES_GRAD)]
    )
    lines = [line.split() for line in str(hga_compile.report()).splitlines()[1:]]
    assert [line[:3] for line in lines] == [
        ["0", "0-2", "decode"],
        ["1", "0", "prefill"],
        ["1", "1", "prefill"],
        ["1", "2", "prefill"],
        ["2", "-", "any"],
    ]


def test_fallbacks_are_listed():
    LEDGER.count_fallback("a reason")
    LEDGER.count_fallback("a reason")
    report = hga_compile.report()
    assert report.fallbacks == {"a reason": 2}
    assert "fallback: a reason: 2" in str(report)


def test_sites_say_graph_layer_phase_and_reason(recompile):
    pair = Pair(make_model("llama", num_hidden_layers=1), TIGHT)
    run(pair.compiled, pair.cache(), list(tokens(1, 13).split([12, 1], 1)))
    sites = hga_compile.report().sites
    assert [(site.graph, site.layer, site.phase, site.routed) for site in sites] == [
        (0, 0, "prefill", True),
        (1, 0, "decode", True),
    ]
    assert all(site.reason == "routed" and site.detail for site in sites)


def test_attention_that_is_written_out_is_routed_and_in_the_report(recompile):
    model = make_model("llama", num_hidden_layers=1)
    model.set_attn_implementation("eager")
    pair = Pair(model)
    ids = tokens(2, 12)
    got = run(pair.compiled, pair.cache(), list(ids.split([11, 1], 1)))
    torch.testing.assert_close(torch.cat(got, 1), model(ids).logits, atol=1e-5, rtol=0)
    sites = hga_compile.report().sites
    assert [(site.reason, site.phase) for site in sites] == [
        (Reason.ROUTED, "prefill"),
        (Reason.ROUTED, "decode"),
    ]


class OfAGradient(torch.nn.Module):
    """Attention in a graph with a transform that is no vmap."""

    def forward(self, query, key, value):
        query = torch.func.grad(lambda given: given.sin().sum())(query)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def test_a_graph_that_cannot_be_traced_again_runs_as_it_came_and_is_reported(recompile, caplog):
    model, rows = OfAGradient(), torch.randn(3, 1, 2, 16, 8).unbind()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="hga")(*rows), model(*rows))
    (site,) = hga_compile.report().sites
    assert site.reason == Reason.RETRACE_FAILED and "tensor of a transform" in site.detail and not site.routed
    assert any("left as it is" in record.message for record in caplog.records)


@pytest.mark.slow
def test_flex_attention_is_left_as_it_is(recompile):
    model = make_model("llama", num_hidden_layers=1)
    model.set_attn_implementation("flex_attention")
    compiled = torch.compile(model, backend="hga", options=FULL)
    ids = tokens(1, 16)
    expected = torch.compile(model, backend="eager")(ids).logits
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(ids).logits, expected, atol=1e-4, rtol=0)
    assert not any(site.routed for site in hga_compile.report().sites)


def test_a_failure_inside_the_passes_leaves_the_graph_dense(recompile, monkeypatch):
    def broken(*given):
        raise KeyError("something unforeseen")

    monkeypatch.setattr("hga_compile.passes.pipeline.find_attention", broken)
    pair, ids = Pair(make_model("llama", num_hidden_layers=1)), tokens(2, 12)
    torch.testing.assert_close(pair.compiled(ids).logits, pair.plain(ids).logits, atol=1e-5, rtol=0)
    (site,) = hga_compile.report().sites
    assert site.reason == Reason.RETRACE_FAILED and "something unforeseen" in site.detail and not site.routed
