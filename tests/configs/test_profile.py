"""Models: defaults, cross-field rules, budgets, per-layer routing, identity."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hga_compile.configs.profile import (
    Budget,
    CompileSettings,
    LayerOverride,
    ModelMatch,
    Offload,
    Profile,
    Routing,
    Window,
)


def test_defaults_are_the_documented_ones():
    routing = Profile(name="x").routing
    assert (routing.summary, routing.bits, routing.group_size, routing.chunk_size) == ("lowbit", 2, 4, 64)
    assert (routing.chunk_stage, routing.auto_chunk_tokens, routing.chunk_parts) == ("auto", 262144, 4)
    assert routing.chunk_budget == Budget(fraction=0.25, tokens=4096)
    assert routing.budget == Budget(fraction=0.03, tokens=256)
    assert routing.window == Window(fraction=0.1, tokens=16)
    assert (routing.sinks, routing.centre_tokens, routing.dense_below) == (4, 256, 1024)
    assert (routing.vote, routing.tail, routing.prefill) == ("mass_sum", "drop", "routed")
    assert (routing.dense_layers, routing.overrides) == ((), ())
    assert Profile(name="x").offload == Offload(tier="auto", hot_cache=None, host_budget=None)
    assert Profile(name="x").compile == CompileSettings(inner="inductor", strict=False)


def test_profiles_are_frozen_and_hashable():
    profile = Profile(name="x")
    with pytest.raises(ValidationError, match="frozen"):
        profile.routing.sinks = 8
    assert {profile: 1}[Profile(name="x")] == 1
    assert hash(profile) != hash(Profile(name="x", routing=Routing(sinks=8)))


def test_digest_follows_the_content_only():
    assert Profile(name="x").digest() == Profile(name="x", routing=Routing()).digest()
    assert Profile(name="x").digest() != Profile(name="x", routing=Routing(sinks=8)).digest()
    assert len(Profile(name="x").digest()) == 16
    assert int(Profile(name="é\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")).digest(), 16)


@pytest.mark.parametrize(
    ("budget", "visible", "tokens"),
    [
        (Budget(fraction=0.03, tokens=256), 2048, 256),
        (Budget(fraction=0.03, tokens=256), 65536, 1967),
        (Budget(fraction=0.07), 100, 7),
        (Budget(fraction=0.07), 101, 8),
        (Budget(fraction=1e-9), 10, 1),
        (Budget(fraction=1.0), 1_000_001, 1_000_001),
        (Budget(tokens=5), 3, 5),
        (Budget(fraction=0.5), 0, 0),
    ],
)
def test_budget_is_the_larger_of_share_and_count(budget, visible, tokens):
    assert budget.tokens_for(visible) == tokens


@given(st.integers(1, 1000), st.integers(0, 2**31))
def test_share_rounds_up_exactly(thousandths, visible):
    assert Budget(fraction=thousandths / 1000).tokens_for(visible) == -(-thousandths * visible // 1000)
    assert Window(fraction=thousandths / 1000, tokens=3).tokens_for(visible) == max(
        3, math.ceil(-(-thousandths * visible // 1000))
    )


@pytest.mark.parametrize("model", [Budget, Window])
def test_an_empty_budget_is_refused(model):
    with pytest.raises(ValidationError, match="at least one of fraction and tokens"):
        model()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"group_size": 24},
            "group_size must divide chunk_size, got 24 and 64; try 16 or 32 (routing.group_size)",
        ),
        (
            {"group_size": 16, "chunk_size": 8, "chunk_parts": 1},
            "group_size must not exceed chunk_size, got 16 and 8",
        ),
        (
            {"chunk_parts": 5},
            "chunk_parts must divide chunk_size, got 5 and 64; try 4 or 8 (routing.chunk_parts)",
        ),
        ({"budget": Budget(tokens=2)}, "got 4 sinks and a budget of 2 tokens"),
        (
            {"overrides": [LayerOverride(layers=[0], sinks=300)], "budget": Budget(tokens=256)},
            "got 300 sinks",
        ),
        (
            {"summary": "mean", "centre": "block"},
            "centre block needs summary lowbit, got summary mean, which has no codes to centre; expected "
            "centre first or summary lowbit (routing.centre)",
        ),
        (
            {"centre": "block", "overrides": [LayerOverride(layers=[0], summary="mean")]},
            "centre block needs summary lowbit, got summary mean",
        ),
        (
            {"summary": "mean", "overrides": [LayerOverride(layers=[0], centre="block")]},
            "centre block needs summary lowbit, got summary mean",
        ),
    ],
)
def test_contradictions_name_both_numbers_and_the_knob(fields, message):
    with pytest.raises(ValidationError) as caught:
        Routing(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Routing(group_size="4"),
        lambda: Routing(group_size=True),
        lambda: Routing(group_size=4.0),
        lambda: Routing(bits=True),
        lambda: Routing(bits=2.0),
        lambda: Routing(bits=3),
        lambda: Routing(centre="blocks"),
        lambda: Routing(dense_layers=[0.5]),
        lambda: Routing(unknown=1),
        lambda: Budget(fraction=math.nan),
        lambda: Budget(fraction=math.inf),
        lambda: Budget(fraction=0.0),
        lambda: Budget(fraction=1.01),
        lambda: Budget(tokens=0),
        lambda: LayerOverride(layers=[]),
        lambda: LayerOverride(layers=[1]),
        lambda: Offload(host_budget=0),
        lambda: Offload(hot_cache=0.0),
        lambda: Offload(nvme_folder="a\0b"),
        lambda: ModelMatch(sha256="abc"),
        lambda: Profile(name=""),
        lambda: Profile(name="x", schema_version=2),
        lambda: Profile(name="x", schema_version=True),
    ],
)
def test_wrong_values_are_refused_in_python_too(build):
    with pytest.raises(ValidationError):
        build()


@pytest.mark.parametrize(
    ("text", "size"),
    [("64GiB", 64 * 2**30), ("1.5 GB", 1_500_000_000), ("512MB", 512_000_000), ("10B", 10), (4096, 4096)],
)
def test_host_budget_reads_sizes(text, size):
    assert Offload(host_budget=text).host_budget == size


@pytest.mark.parametrize("text", ["64", "64 gigs", "-1GiB", "GiB", "1e3GiB", "64GiB\n", "0.1B", ""])
def test_host_budget_refuses_other_text(text):
    with pytest.raises(ValidationError):
        Offload(host_budget=text)


def test_overrides_hold_for_their_layers_from_both_ends():
    routing = Routing(
        overrides=[
            LayerOverride(layers=[0, -1], budget=Budget(fraction=0.1)),
            LayerOverride(layers=[-1], sinks=8, summary="mean", chunk_stage="off"),
        ]
    )
    first, middle, last = (routing.for_layer(index, 30) for index in (0, 7, 29))
    assert (first.budget, first.sinks) == (Budget(fraction=0.1), 4)
    assert middle == Routing()
    assert (last.budget, last.sinks, last.summary, last.chunk_stage) == (
        Budget(fraction=0.1),
        8,
        "mean",
        "off",
    )
    assert first.overrides == last.overrides == ()


def test_of_two_overrides_the_last_wins():
    routing = Routing(overrides=[LayerOverride(layers=[1], sinks=5), LayerOverride(layers=[1], sinks=6)])
    assert routing.for_layer(1).sinks == 6


def test_overrides_without_negative_layers_need_no_layer_count():
    routing = Routing(overrides=[LayerOverride(layers=[2], bits=8)], dense_layers=[3])
    assert routing.for_layer(2).bits == 8
    assert routing.for_layer(3).bits == 2
    assert routing.is_dense(3) and not routing.is_dense(2)


def test_dense_layers_count_from_both_ends():
    routing = Routing(dense_layers=[0, -2])
    assert [index for index in range(6) if routing.is_dense(index, 6)] == [0, 4]


@pytest.mark.parametrize(
    ("entry", "index", "layers", "message"),
    [
        (-1, 0, None, "the number of layers is needed"),
        (30, 0, 30, "the model has 30 layers"),
        (-31, 0, 30, "the model has 30 layers"),
        (0, 30, 30, "got 30 of 30 layers"),
        (0, -1, 30, "got -1 of 30 layers"),
    ],
)
def test_layers_the_model_lacks_are_refused(entry, index, layers, message):
    with pytest.raises(ValueError, match=message):
        Routing(overrides=[LayerOverride(layers=[entry], sinks=1)]).for_layer(index, layers)
    with pytest.raises(ValueError, match=message):
        Routing(dense_layers=[entry]).is_dense(index, layers)


def test_a_layer_of_two_overrides_is_checked_as_a_whole():
    routing = Routing(
        overrides=[LayerOverride(layers=[0], sinks=300), LayerOverride(layers=[0], budget=Budget(tokens=64))]
    )
    with pytest.raises(ValueError, match="got 300 sinks and a budget of 64 tokens"):
        routing.for_layer(0)


def test_layers_may_have_centres_of_their_own():
    means = LayerOverride(layers=[0], summary="mean", centre="first")
    routing = Routing(centre="block", overrides=[means, LayerOverride(layers=[1], centre="first")])
    assert [routing.for_layer(layer).centre for layer in range(3)] == ["first", "first", "block"]
    assert Routing().centre == "first"


def test_level_one_keeps_at_least_the_budget():
    routing = Routing(budget=Budget(fraction=1.0))
    assert routing.chunk_tokens_for(1_000_000) == 1_000_000
    assert Routing().chunk_tokens_for(100_000) == 25_000


def test_chunk_stage_auto_starts_above_its_threshold():
    assert not Routing().uses_chunks(262144)
    assert Routing().uses_chunks(262145)
    assert Routing(chunk_stage="on").uses_chunks(1)
    assert not Routing(chunk_stage="off").uses_chunks(10**9)
