import itertools

import pytest
import torch

from hga_compile.configs.budget import Budget
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import LayerOverride, Routing
from hga_compile.evaluation import sensitivity
from hga_compile.evaluation.metrics import compare
from hga_compile.evaluation.reference import dense_reference
from hga_compile.evaluation.sensitivity import allocate, layer_rows, scaled, suggest, with_overrides
from hga_compile.evaluation.single_layer import LayersError, OneLayer

ROUTING = Routing(budget=Budget(tokens=48), dense_below=64, centre_tokens=32, prefill_tile=1)


ROWS = layer_rows(Profile(name="p", routing=ROUTING), range(4), 4, [0.5, 1.0, 2.0])


def runs_of(texts: dict[str, dict[int, tuple[float, ...]]]) -> list[dict[str, object]]:
    """Return the runs of a study of `ROWS` at two lengths whose mean is as given."""
    found: list[dict[str, object]] = [{"row": "dense", "text": text, "kl": 0.0} for text in texts]
    for text, costs in texts.items():
        for row in ROWS:
            kl = costs[row.options["layer"]][(0.5, 1.0, 2.0).index(row.options["factor"])]
            found += [{"row": row.name, "text": text, "kl": kl * share} for share in (0.8, 1.2)]
    return found


def test_what_a_suggestion_is_worth_is_told_by_texts_it_was_not_made_on() -> None:
    first = {0: (0.1, 0.1, 0.1), 1: (1.0, 0.5, 0.2), 2: (0.1, 0.1, 0.1), 3: (0.1, 0.1, 0.1)}
    second = {0: (4.0, 2.0, 0.8), 1: (0.4, 0.4, 0.4), 2: (0.4, 0.4, 0.4), 3: (0.4, 0.4, 0.4)}
    found = suggest(runs_of({"a": first, "b": second}), ROWS, ROUTING, 4)
    assert found["sum_of_kl"] < found["sum_of_kl_now"]
    # Each was given the other's layers: at half the budget the one that counts costs more.
    assert found["held_out"]["sum_of_kl"] == pytest.approx((1.0 + 0.3 + 4.0 + 1.2) / 2)
    assert suggest(runs_of({"a": first}), ROWS, ROUTING, 4)["held_out"] is None


def test_every_text_weighs_the_same() -> None:
    quiet = {0: (0.02, 0.01, 0.001), 1: (0.0, 0.0, 0.0), 2: (0.0, 0.0, 0.0), 3: (0.0, 0.0, 0.0)}
    loud = {0: (0.0, 0.0, 0.0), 1: (9.0, 8.9, 8.8), 2: (0.0, 0.0, 0.0), 3: (0.0, 0.0, 0.0)}
    assert suggest(runs_of({"quiet": quiet, "loud": loud}), ROWS, ROUTING, 4)["factors"]["0"] == 2.0


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(97, (1, 301), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("seed", range(5))
def test_an_allocation_is_the_best_one_where_savings_shrink(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(5, generator=draw).tolist()
    costs = {layer: {f: weight / f for f in (0.5, 1.0, 1.5)} for layer, weight in enumerate(weights)}
    found = allocate(costs)
    best = min(
        sum(costs[layer][factor] for layer, factor in enumerate(factors))
        for factors in itertools.product((0.5, 1.0, 1.5), repeat=5)
        if sum(factors) <= 5
    )
    assert sum(found.values()) <= 5
    assert sum(costs[layer][factor] for layer, factor in found.items()) == pytest.approx(best)


def test_tokens_go_where_they_save_and_nowhere_else() -> None:
    flat, steep = {0.5: 0.1, 1.0: 0.1, 2.0: 0.1}, {0.5: 1.0, 1.0: 0.5, 2.0: 0.2}
    assert allocate({0: flat, 1: steep, 2: flat}) == {0: 0.5, 1: 2.0, 2: 0.5}
    # A noisy middle does not hide what lies behind it.
    assert allocate({0: flat, 1: {0.5: 1.0, 1.0: 1.1, 2.0: 0.2}, 2: flat})[1] == 2.0


def test_least_factors_above_the_mean_are_refused() -> None:
    with pytest.raises(ValueError, match="least factor must be at most the mean"):
        allocate({0: {1.0: 0.1}, 1: {2.0: 0.1}})


def test_a_budget_is_scaled_in_share_and_tokens() -> None:
    assert scaled(Budget(fraction=0.03, tokens=256), 2) == Budget(fraction=0.06, tokens=512)
    assert scaled(Budget(fraction=0.6), 2) == Budget(fraction=1.0)
    assert scaled(Budget(tokens=1), 0.25) == Budget(tokens=1)


def test_rows_keep_a_layers_own_settings_and_leave_dense_layers_out() -> None:
    override = LayerOverride(layers=(-1,), budget=Budget(tokens=100), sinks=8)
    profile = Profile(
        name="p", routing=ROUTING.model_copy(update={"overrides": (override,), "dense_layers": (0,)})
    )
    rows = layer_rows(profile, [0, 1, 2], 3, [0.5, 1.0])
    made = [(row.options["layer"], row.routing["budget"]["tokens"], row.routing["sinks"]) for row in rows]
    assert made == [(1, 24, 4), (1, 48, 4), (2, 50, 8), (2, 100, 8)]
    assert len({row.identity for row in rows}) == 4


def test_a_suggestion_is_an_override_that_a_profile_takes() -> None:
    override = LayerOverride(layers=(0,), sinks=8)
    routing = ROUTING.model_copy(update={"overrides": (override,)})
    costs = {0: (0.1, 0.1, 0.1), 1: (1.0, 0.5, 0.2), 2: (0.1, 0.1, 0.1), 3: (0.9, 0.4, 0.39)}
    suggested = suggest(runs_of({"a": costs, "b": costs}), ROWS, routing, 4)
    assert suggested["factors"] == {"0": 0.5, "1": 2.0, "2": 0.5, "3": 1.0}
    assert suggested["ranking"] == [1, 3, 0, 2]
    assert suggested["sum_of_kl"] == pytest.approx(0.8)
    assert suggested["sum_of_kl_now"] == pytest.approx(1.1)
    assert suggested["held_out"] == pytest.approx({"sum_of_kl": 0.8, "sum_of_kl_now": 1.1})
    profile = with_overrides(Profile(name="p", routing=routing), suggested["overrides"])
    budgets = [profile.routing.for_layer(layer, 4).budget.tokens for layer in range(4)]
    assert budgets == [24, 96, 24, 48]
    assert profile.routing.for_layer(0, 4).sinks == 8
    assert profile.name == "p-layers"


def test_one_layer_at_full_budget_is_dense_and_the_models_attention_is_put_back(
    tiny_model: torch.nn.Module, text: torch.Tensor
) -> None:
    one = OneLayer(tiny_model)
    with torch.no_grad(), one.installed():
        assert one.layers() == [0, 1]
        reference = dense_reference(tiny_model, text, 40)
        full = ROUTING.model_copy(update={"budget": Budget(tokens=300)})
        for layer in (0, 1):
            found = one.candidate(layer, full).decode(reference.cache, 260, text[:, 260:-1])
            assert float(compare(reference.logits, found.logits, reference.targets).kl.max()) < 1e-5
            assert found.use.attended == 1.0
    assert tiny_model.config._attn_implementation == "sdpa"


def test_one_layer_alone_is_routed_and_counted(tiny_model: torch.nn.Module, text: torch.Tensor) -> None:
    import hga_compile

    one = OneLayer(tiny_model)
    with torch.no_grad(), one.installed():
        reference = dense_reference(tiny_model, text, 40)
        kl = {}
        for layer, tokens in itertools.product((0, 1), (24, 96)):
            routing = ROUTING.model_copy(update={"budget": Budget(tokens=tokens)})
            found = one.candidate(layer, routing).decode(reference.cache, 260, text[:, 260:-1])
            kl[layer, tokens] = float(compare(reference.logits, found.logits, reference.targets).kl.mean())
            assert [use.layer for use in hga_compile.report().layers] == [layer]
            assert found.use.attended == pytest.approx(tokens / 280, rel=0.1)
            assert found.use.summary_bytes > 0
    for layer in (0, 1):
        assert kl[layer, 24] > kl[layer, 96] > 0


def test_the_models_attention_is_put_back_after_an_error(tiny_model: torch.nn.Module) -> None:
    with pytest.raises(RuntimeError, match="stop"), OneLayer(tiny_model).installed():
        raise RuntimeError("stop")
    assert tiny_model.config._attn_implementation == "sdpa"


def test_another_attention_is_refused(tiny_model: torch.nn.Module) -> None:
    tiny_model.set_attn_implementation("eager")
    try:
        with pytest.raises(LayersError, match="must be sdpa, got 'eager'"), OneLayer(tiny_model).installed():
            pass
    finally:
        tiny_model.set_attn_implementation("sdpa")


def test_layers_with_a_sliding_window_stay_dense() -> None:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=8,
        num_hidden_layers=3, vocab_size=97, sliding_window=32, max_position_embeddings=512,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    text = torch.randint(97, (1, 201), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        own = dense_reference(model, text, 40)
        one = OneLayer(model)
        with one.installed():
            assert one.layers() == [1]
            reference = dense_reference(model, text, 40)
            torch.testing.assert_close(reference.logits, own.logits)


def test_curves_and_csv_name_layer_and_factor() -> None:
    rows = layer_rows(Profile(name="p", routing=ROUTING), [3], 4, [1.0, 2.0])
    interval = {"mean": 0.1, "error": None, "low": None, "high": None}
    entry = {"length": 64, "documents": 2, **dict.fromkeys(("kl", "delta_nll", "top1", "attended"), interval)}
    summary = [{"row": "dense", **entry}, *({"row": row.name, **entry} for row in rows)]
    found = sensitivity.curves(summary, rows)
    assert [(e["layer"], e["factor"]) for e in found] == [(3, 1.0), (3, 2.0)]
    assert sensitivity.flat(found)[1] == {
        "layer": 3, "factor": 2.0, "length": 64, "documents": 2, "kl": 0.1, "kl_low": None, "kl_high": None,
        "delta_nll": 0.1, "delta_nll_low": None, "delta_nll_high": None, "top1": 0.1, "top1_low": None,
        "top1_high": None, "attended": 0.1, "attended_low": None, "attended_high": None,
    }  # fmt: skip
