"""Options: checked when the first graph is compiled, one clear line; what they set shows in the report."""

import pytest
import torch
from tiny_models import FULL, TIGHT, Pair, make_model, run, tokens

import hga_compile
from hga_compile.configs.errors import ProfileError
from hga_compile.configs.loader import load_profile, save_profile
from hga_compile.configs.profile import CompileSettings, Profile
from hga_compile.configs.routing import Budget, Routing
from hga_compile.passes.decision import Reason
from hga_compile.passes.pipeline import StrictError


class Attention(torch.nn.Module):
    """The least that has an attention to route."""

    def forward(self, x):
        x = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(x, x * 2, x * 3, is_causal=True)


X = torch.randn(1, 48, 16, generator=torch.Generator().manual_seed(0))


def compiled(options, model=None, **more):
    torch._dynamo.reset()
    return torch.compile(model or Attention(), backend="hga", options=options, **more)


def refusal(options, model=None):
    """The exception of the backend for these options."""
    with pytest.raises(Exception) as caught:
        compiled(options, model)(X)
    return getattr(caught.value, "inner_exception", caught.value)


@pytest.mark.parametrize("kernels", ["auto", "native", "reference"])
def test_the_kernels_asked_for_are_the_ones_that_run(kernels):
    pair = Pair(make_model("llama"), {**TIGHT, "kernels": kernels})
    ids = tokens(1, 200)
    run(pair.compiled, pair.cache(), [ids[:, :190], *ids[:, 190:].split(1, 1)])
    report = hga_compile.report()
    assert report.totals("decode").attended_fraction < 0.3
    assert not report.fallbacks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budgett": 0.1}, ["budgett", "unknown option", "did you mean 'budget'"]),
        ({"routing.group_sise": 4}, ["routing.group_sise", "did you mean 'routing.group_size'"]),
        ({"routing": {"sink": 4}}, ["routing.sink", "sinks"]),
        ({"budget": 0}, ["budget", "got 0"]),
        ({"budget": "3%"}, ["budget", 'got "3%"']),
        ({"routing.group_size": 24}, ["group_size must divide chunk_size", "16 or 32"]),
        ({"inner": "inductr"}, ["inner", "inductr"]),
        ({"strict": "yes"}, ["strict", "yes"]),
        ({"tier": "disk"}, ["tier", "disk"]),
        ({"offload.hot_cache": 0.5, "tier": "gpu"}, ["offload.hot_cache", "host RAM", "'gpu'"]),
        ({"offload.hot_cache": 0.5, "tier": "nvme"}, ["offload.hot_cache", "'nvme'"]),
        ({"offload.nvme_page": "16KiB"}, ["offload.nvme_page", "16KiB"]),
        ({"profile": "papr"}, ["papr", "did you mean 'paper'"]),
        ({"profile": "./absent.yaml"}, ["absent.yaml"]),
        ({"profile": 3}, ["profile", "int"]),
        ({"budget": 0.1, "routing.budget": {"tokens": 5}}, ["routing.budget", "budget", "same field"]),
        ({"routing.dense_layers": [7]}, ["dense_layers", "7", "1 layers"]),
    ],
)
def test_a_wrong_option_is_one_clear_line(options, words):
    error = refusal({"inner": "eager"} | options)
    assert isinstance(error, ProfileError), error
    text = str(error)
    assert "\n" not in text and len(text) < 400
    assert [word for word in words if word not in text] == [], text


def test_the_line_stands_in_what_torch_raises():
    with pytest.raises(Exception, match="option budgett: unknown option; did you mean 'budget'"):
        compiled({"budgett": 0.1})(X)


def test_strict_refuses_a_site_that_stays_dense():
    class Encoder(torch.nn.Module):
        def forward(self, x):
            x = x.unflatten(-1, (2, 8)).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    error = refusal({"inner": "eager", "strict": True}, Encoder())
    assert isinstance(error, StrictError)
    assert "not causal self-attention" in str(error) and "\n" not in str(error)
    assert compiled({"inner": "eager"}, Encoder())(X).shape == (1, 2, 48, 8)


def attended(options):
    """Share of the visible tokens that an attention over 48 tokens reads."""
    hga_compile.reset_report(sites=True)
    compiled(options)(X)
    return hga_compile.report().totals("prefill").attended_fraction


SMALL = {
    "inner": "eager",
    "routing.dense_below": 0,
    "routing.centre_tokens": 1,
    "routing.window": {"fraction": None, "tokens": 4},
}


def test_the_budget_is_what_is_attended_to():
    shares = [attended(SMALL | {"budget": budget}) for budget in (8, 16, 32, 1.0)]
    assert shares == sorted(shares) and shares[0] < 0.45 and shares[-1] == 1.0


def test_a_profile_by_path_name_object_and_mapping(tmp_path):
    profile = Profile(
        name="mine",
        routing=Routing(budget=Budget(tokens=16), dense_below=0, centre_tokens=1, window={"tokens": 4}),
        compile=CompileSettings(inner="eager"),
    )
    path = tmp_path / "mine.yaml"
    save_profile(profile, path)
    document = profile.model_dump(mode="json")
    expected = attended(SMALL | {"budget": 16})
    for given in (profile, path, str(path), document):
        assert attended({"profile": given}) == expected
    assert load_profile(path) == profile
    assert attended({"profile": "paper", "inner": "eager"}) == 1.0  # 48 tokens are fewer than its dense_below


def test_a_call_option_beats_the_environment_which_beats_the_profile(monkeypatch):
    monkeypatch.setenv("HGA_BUDGET", "8")
    from_environment = attended(SMALL)
    assert from_environment == attended(SMALL | {"budget": 8})
    assert attended(SMALL | {"budget": 32}) > from_environment
    monkeypatch.setenv("HGA_BUDGET", "a lot")
    assert "HGA_BUDGET" in str(refusal(SMALL))


def test_dense_layers_and_overrides_show_in_the_report(recompile):
    options = TIGHT | {
        "routing.dense_layers": [-1],
        "routing.overrides": [{"layers": [0], "budget": {"tokens": 48}}],
    }
    pair = Pair(make_model("llama"), options)
    run(pair.compiled, pair.cache(), list(tokens(1, 130).split([128, 1, 1], 1)))
    report = hga_compile.report()
    assert {(site.layer, site.reason) for site in report.sites} == {
        (0, Reason.ROUTED),
        (1, Reason.CONFIGURED),
    }
    # Only what is routed is counted; its budget is 48 of some 130 tokens.
    assert {use.layer for use in report.layers} == {0}
    assert 0.3 < report.totals("decode").attended_fraction < 0.4


def test_two_models_with_two_profiles_do_not_mix(recompile):
    few, all_of_them = Pair(make_model("llama", num_hidden_layers=1), TIGHT), Pair(make_model("llama"), FULL)
    ids = tokens(1, 100)
    for pair, low, high in ((few, 0.0, 0.6), (all_of_them, 1.0, 1.0), (few, 0.0, 0.6)):
        hga_compile.reset_report()
        run(pair.compiled, pair.cache(), [ids])
        assert low <= hga_compile.report().totals("prefill").attended_fraction <= high


def test_one_model_compiled_twice_follows_each_profile(recompile):
    model, ids = make_model("llama", num_hidden_layers=1), tokens(1, 100)
    few, all_of_them = Pair(model, TIGHT), Pair(model, FULL)
    shares = []
    for pair in (few, all_of_them, few):
        hga_compile.reset_report()
        run(pair.compiled, pair.cache(), [ids])
        shares.append(hga_compile.report().totals("prefill").attended_fraction)
    assert shares[0] == shares[2] < 0.6 and shares[1] == 1.0


def test_a_dense_prefill_leaves_decoding_routed(recompile):
    pair = Pair(make_model("llama", num_hidden_layers=1), TIGHT | {"prefill": "dense"})
    ids = tokens(1, 102)
    got = run(pair.compiled, pair.cache(), list(ids.split([100, 1, 1], 1)))
    torch.testing.assert_close(got[0], pair.plain(ids[:, :100]).logits, atol=1e-4, rtol=0)
    report = hga_compile.report()
    assert report.totals("prefill").attended_fraction == 1.0
    assert report.totals("decode").attended_fraction < 0.3


def test_a_mode_is_accepted_and_left_to_the_inner_compiler():
    torch._dynamo.reset()
    from hga_compile.backend import hga

    seen = []

    def backend(graph, example_inputs):
        seen.append(hga(graph, example_inputs, mode="max-autotune-no-cudagraphs", options={"inner": "eager"}))
        return seen[-1]

    expected = Attention()(X)
    torch.testing.assert_close(torch.compile(Attention(), backend=backend)(X), expected, atol=1e-5, rtol=0)
    assert len(seen) == 1
