"""Capturing, the cheap stage and the full-model stage, on a tiny random model: shapes and identities."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import LayerOverride, Routing
from hga_compile.evaluation.candidates import NothingRouted
from hga_compile.tuning.capture import capture
from hga_compile.tuning.measure import measure
from hga_compile.tuning.screen import Screen, layer_change, spread

LENGTH, SCORED = 320, 24
# A budget that bites on a short text.
TIGHT = Routing(budget=Budget(tokens=48), window=Window(tokens=16), dense_below=0, centre_tokens=32, sinks=4)
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_hidden_layers": 3, "vocab_size": 97, "max_position_embeddings": 512,
}  # fmt: skip


def make(kind=LlamaConfig, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SHAPE, **more)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.mul_(12)  # attention of a random model is nearly even: nothing would depend on routing
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(97, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(model, ids):
    return capture(model, ids, SCORED)


def test_what_is_captured_is_attention(run):
    reference, captured = run
    assert [one.layer for one in captured] == [0, 1, 2]
    for one in captured:
        assert one.query.shape == (1, 4, SCORED, 16)
        assert one.key.shape == one.value.shape == (1, 2, LENGTH - 1, 16)
        rows = torch.arange(LENGTH - 1 - SCORED, LENGTH - 1)
        mask = torch.arange(LENGTH - 1)[None] <= rows[:, None]
        dense = torch.nn.functional.scaled_dot_product_attention(
            one.query, one.key, one.value, mask, scale=one.scale, enable_gqa=True
        )
        torch.testing.assert_close(one.dense, dense)
        assert one.residual > 0
        assert one.output.shape == (32, 64)
    assert reference.scored == SCORED


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_own_attention_is_back_afterwards(implementation, ids):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = make(attn_implementation=implementation)
    known, before = set(ALL_ATTENTION_FUNCTIONS), own(ids[:, :40]).logits
    capture(own, ids, SCORED)
    assert own.config._attn_implementation == implementation
    assert set(ALL_ATTENTION_FUNCTIONS) == known
    torch.testing.assert_close(own(ids[:, :40]).logits, before)


def test_sliding_layers_are_left_out(ids):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    own = make(
        Qwen3Config, layer_types=kinds, use_sliding_window=True, sliding_window=64, max_window_layers=0
    )
    _, captured = capture(own, ids, SCORED)
    assert [one.layer for one in captured] == [1]


def test_a_full_budget_changes_nothing_and_a_small_one_more_than_a_large_one(run):
    _, captured = run
    whole, wide, tight = (
        layer_change(captured[1], TIGHT.model_copy(update={"budget": budget}), SCORED)
        for budget in (Budget(fraction=1.0), Budget(tokens=160), Budget(tokens=32))
    )
    assert whole == pytest.approx(0, abs=1e-9)
    assert 0 < wide < tight


def test_the_screen_adds_up_layers_and_leaves_dense_ones_out(run):
    _, captured = run
    screen = Screen([captured, captured], layers=3, queries=SCORED)
    each = [layer_change(one, TIGHT, SCORED) for one in captured]
    assert screen.change(TIGHT) == pytest.approx(sum(each))
    assert screen.change(TIGHT.model_copy(update={"dense_layers": (1,)})) == pytest.approx(each[0] + each[2])
    assert screen.sensitivities(TIGHT, SCORED) == pytest.approx(dict(enumerate(each)))
    some = Screen([captured], layers=2, queries=SCORED)
    assert some.layers == {0, 2}
    assert some.change(TIGHT) == pytest.approx((each[0] + each[2]) * 3 / 2)


def test_layers_are_spread_over_the_depth():
    assert spread(list(range(30)), 4) == [0, 10, 19, 29]
    assert spread([1, 3], 6) == [1, 3]
    assert spread([1, 3, 5], 1) == [3]


def profile(routing):
    return Profile(name="x", routing=routing)


def test_the_full_model_gives_what_the_compiled_one_gives(model, run):
    reference, _ = run
    override = LayerOverride(layers=(0,), budget=Budget(tokens=96))
    routing = TIGHT.model_copy(update={"overrides": (override,), "dense_layers": (2,)})
    texts = [("one@320", reference)]
    direct = measure(model, profile(routing), texts)
    compiled = measure(model, profile(routing), texts, compiled=True)
    assert direct.kl > 1e-5
    for name, value in direct.numbers().items():
        assert getattr(compiled, name) == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_at_full_budget_it_is_the_dense_model(model, run):
    reference, _ = run
    whole = TIGHT.model_copy(update={"budget": Budget(fraction=1.0)})
    found = measure(model, profile(whole), [("a@320", reference), ("b@320", reference)])
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.attended == 1.0
    assert set(found.by_text) == {"a@320", "b@320"}


def test_a_profile_that_routes_nothing_is_no_result(model, run):
    dense = TIGHT.model_copy(update={"dense_layers": (0, 1, 2)})
    with pytest.raises(NothingRouted, match="keeps all of them dense"):
        measure(model, profile(dense), [("a@320", run[0])])
