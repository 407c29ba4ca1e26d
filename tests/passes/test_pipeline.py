import pytest
import torch
from attention_graphs import BATCH, DIM, KV_HEADS, dynamo_graph, dynamo_run, rows
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hga_compile.configs.errors import ProfileError
from hga_compile.configs.profile import CompileSettings, Offload, Profile
from hga_compile.configs.routing import Budget, LayerOverride, Routing
from hga_compile.passes.decision import Reason
from hga_compile.passes.pipeline import StrictError, rewrite_graph

HANDLE = torch.zeros(1, dtype=torch.int64)


def run(function, *inputs, layers=None, **settings):
    profile = Profile(name="test", **settings)
    return dynamo_graph(function, *inputs, use=lambda graph: rewrite_graph(graph, profile, layers))


def routed_and_dense(q, k, v):
    return sdpa(q, k, v, is_causal=True), sdpa(q, k, v)


def test_decisions_come_in_the_order_of_the_graph():
    result = run(routed_and_dense, *rows(6))
    assert [decision.reason for decision in result.decisions] == [Reason.ROUTED, Reason.NOT_CAUSAL]
    assert list(result.seconds) == ["retrace", "match", "decide", "rewrite", "clean"]
    assert all(time >= 0 for time in result.seconds.values())


def test_what_happened_is_counted():
    counters.clear()

    def use(graph):
        # Dynamo clears nothing between: what is counted is read before it goes on.
        rewrite_graph(graph, Profile(name="test"))
        return dict(counters["hga"])

    counted = dynamo_graph(routed_and_dense, *rows(6), use=use)
    assert counted.pop("microseconds") > 0
    assert counted == {"graphs": 1, "sites": 2, "rewritten": 1, "routed": 1, "not_causal": 1}


def test_a_graph_without_attention_passes_through():
    result, out = dynamo_run(
        lambda x: x * 2 + 1, torch.ones(3), use=lambda graph: rewrite_graph(graph, Profile(name="test"))
    )
    assert result.decisions == ()
    torch.testing.assert_close(out, torch.full((3,), 3.0))


def test_strict_names_the_site_its_reason_and_the_knob():
    with pytest.raises(Exception) as caught:
        run(routed_and_dense, *rows(6), compile=CompileSettings(strict=True))
    error = caught.value.inner_exception
    assert isinstance(error, StrictError)
    text = str(error)
    assert "\n" not in text and "not causal self-attention" in text and "compile.strict" in text


def test_strict_lets_the_profile_s_own_choices_pass():
    def attend(q, k, v):
        mask = torch.arange(6)[None, None, None] <= torch.arange(6)[None, None, :, None]
        window = mask & (torch.arange(6)[None, :] > torch.arange(6)[:, None] - 3)
        return sdpa(q, k, v, is_causal=True), sdpa(q, k, v, window)

    strict = CompileSettings(strict=True)
    result = run(attend, *rows(6), compile=strict)
    assert [decision.reason for decision in result.decisions] == [Reason.ROUTED, Reason.SLIDING_WINDOW]
    result = run(attend, *rows(6), compile=strict, routing=Routing(dense_layers=(0,)))
    assert [decision.reason for decision in result.decisions] == [Reason.CONFIGURED, Reason.SLIDING_WINDOW]


def unfused(q, k, v, handle):
    keys, values = torch.ops.hga.append(k, v, handle, 9)
    return torch.softmax(q[:, :KV_HEADS] @ keys.transpose(2, 3), -1) @ values


@pytest.mark.parametrize("tier", ["auto", "gpu", "host"])
def test_the_tier_goes_into_the_graph(tier):
    result = run(routed_and_dense, *rows(6), offload=Offload(tier=tier))
    (node,) = result.graph.graph.find_nodes(op="call_function", target=torch.ops.hga.attention.default)
    assert f'"tier":"{"gpu" if tier == "gpu" else "host"}"' in node.args[-1]


@pytest.mark.parametrize("kernels", ["auto", "reference", "native"])
def test_the_kernels_go_into_the_graph(kernels):
    result = run(routed_and_dense, *rows(6), compile=CompileSettings(kernels=kernels))
    (node,) = result.graph.graph.find_nodes(op="call_function", target=torch.ops.hga.attention.default)
    assert f'"kernels":"{kernels}"' in node.args[-1]
    new, handle = torch.randn(2, KV_HEADS, 9, DIM), torch.zeros(1, dtype=torch.int64)
    torch.ops.hga.open(new[:, :, :0], new[:, :, :0], handle)
    result = run(unfused, new, new, new, handle, compile=CompileSettings(kernels=kernels))
    (node,) = result.graph.graph.find_nodes(op="call_function", target=torch.ops.hga.append.default)
    assert node.kwargs.get("kernels", "auto") == kernels


@pytest.mark.parametrize(
    "routing",
    [
        Routing(dense_layers=(4,)),
        Routing(dense_layers=(-5,)),
        Routing(overrides=(LayerOverride(layers=(4,), budget=Budget(tokens=64)),)),
    ],
)
def test_settings_for_a_layer_that_the_model_does_not_have_are_an_error(routing):
    with pytest.raises(Exception) as caught:
        run(routed_and_dense, *rows(6), routing=routing, layers=4)
    error = caught.value.inner_exception
    assert isinstance(error, ProfileError)
    assert "4 layers" in str(error) and "routing." in str(error) and "\n" not in str(error)


def test_a_graph_with_a_part_of_the_model_counts_layers_from_the_model_s_end():
    layered = torch.nn.ModuleList([Attention() for _ in range(4)])

    def last(x):
        return layered[3](x)

    x = torch.randn(BATCH, 6, 4 * DIM)
    routing = Routing(dense_layers=(-1,))
    (decision,) = run(last, x, routing=routing, layers=4).decisions
    assert (decision.layer, decision.reason) == (3, Reason.CONFIGURED)
    (decision,) = run(lambda x: layered[1](x), x, routing=routing, layers=4).decisions
    assert (decision.layer, decision.reason) == (1, Reason.ROUTED)


class Attention(torch.nn.Module):
    def forward(self, x):
        x = x.unflatten(-1, (4, DIM)).transpose(1, 2)
        return sdpa(x, x * 2, x * 3, is_causal=True)


def test_per_layer_settings_reach_their_layers():
    model = torch.nn.ModuleList([Attention() for _ in range(3)])

    def all_of_them(x):
        return [layer(x) for layer in model]

    routing = Routing(dense_layers=(-1,), overrides=(LayerOverride(layers=(1,), sinks=0),))
    result = run(all_of_them, torch.randn(BATCH, 6, 4 * DIM), routing=routing)
    assert [(d.layer, d.reason) for d in result.decisions] == [
        (0, Reason.ROUTED),
        (1, Reason.ROUTED),
        (2, Reason.CONFIGURED),
    ]
    nodes = result.graph.graph.find_nodes(op="call_function", target=torch.ops.hga.attention.default)
    assert ['"sinks":0' in node.args[-1] for node in nodes] == [False, True]


def test_graphs_before_and_after_can_be_logged(caplog):
    with caplog.at_level("DEBUG", logger="hga_compile.passes"):
        run(routed_and_dense, *rows(6))
    ours = [record for record in caplog.records if record.name.startswith("hga_compile")]
    before, after = (record.message for record in ours if record.levelname == "DEBUG")
    assert before.startswith("before:") and "hga" not in before
    assert after.startswith("after:") and "hga.attention" in after
