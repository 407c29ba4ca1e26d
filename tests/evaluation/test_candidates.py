import pytest
import torch

from hga_compile.evaluation.candidates import NothingRouted, RoutedCandidate
from hga_compile.evaluation.nll import scores_in
from hga_compile.evaluation.reference import dense_reference, run_mode
from hga_compile.evaluation.rows import CONTROL, make_rows

SMALL = {"inner": "eager", "routing.dense_below": 32, "routing.centre_tokens": 16}
FEW = {**SMALL, "budget": 24}


def measure(candidate, mode, reference):
    outcome = run_mode(candidate, mode, reference)
    return {**scores_in([(120, 160)])(reference, outcome), **vars(outcome.use)}


@pytest.fixture
def reference(tiny_model):
    torch.manual_seed(3)
    torch.compiler.reset()
    with torch.no_grad():
        yield dense_reference(tiny_model, torch.randint(97, (1, 160)), 40)


@pytest.mark.parametrize("mode", ["decode", "all"])
def test_full_budget_is_dense(tiny_model, reference, mode):
    candidate = RoutedCandidate(tiny_model, {**SMALL, "profile": "default", "budget": 1.0})
    result = measure(candidate, mode, reference)
    assert abs(result["kl"]) < 1e-5
    assert result["top1"] == 1.0
    assert result["attended"] == pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["decode", "all"])
def test_a_small_budget_is_routed_and_counted(tiny_model, reference, mode):
    result = measure(RoutedCandidate(tiny_model, {"profile": "default", **FEW}), mode, reference)
    assert 0.1 < result["attended"] < 0.6
    assert 0 < result["kv_bytes"] < 1
    assert 0 < result["summary_bytes"] < 1
    assert result["kl"] > 0


def test_decode_leaves_the_reference_for_the_next_row(tiny_model, reference):
    candidate = RoutedCandidate(tiny_model, {"profile": "default", **FEW})
    first = measure(candidate, "decode", reference)
    again = measure(candidate, "decode", reference)
    assert (first["kl"], first["attended"]) == (again["kl"], again["attended"])
    assert reference.cache.get_seq_length() == 159


def test_decoding_token_by_token_is_the_same_as_in_one_pass(tiny_model, reference):
    candidate = RoutedCandidate(tiny_model, {"profile": "default", **FEW}, dynamic=True)
    assert candidate.piece > 40  # Triton's interpreter apart, a CPU's kernels take many queries
    whole = run_mode(candidate, "decode", reference)
    told = []
    candidate.piece, candidate.advance = 1, told.append
    single = run_mode(candidate, "decode", reference)
    torch.testing.assert_close(single.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert single.use.attended == whole.use.attended
    assert told == [1] * 40


def test_rows_of_one_model_keep_their_own_profiles(tiny_model, reference):
    options = ({**SMALL, "budget": 16}, {**SMALL, "budget": 64})
    few, many = (RoutedCandidate(tiny_model, {"profile": "default", **o}) for o in options)
    shares = [measure(candidate, "decode", reference)["attended"] for candidate in (few, many, few)]
    assert shares[0] == shares[2] < shares[1]


def test_a_model_that_stays_dense_gives_no_numbers(tiny_model, reference):
    candidate = RoutedCandidate(tiny_model, {"profile": "default", **FEW})
    with torch.enable_grad(), pytest.raises(NothingRouted, match=r"no attention was routed: .*grad"):
        measure(candidate, "all", reference)


def test_control_differs_from_the_first_profile_only_in_its_window():
    rows = make_rows(["default", "paper"], {"inner": "eager"})
    assert [row.name for row in rows] == [CONTROL, "default", "paper"]
    assert len({row.identity for row in rows}) == 3
    assert rows[0].options["routing.window.fraction"] == 1.0
    assert [row.name for row in make_rows(["default"], {}, control=False)] == ["default"]


@pytest.mark.parametrize("steps", [16, pytest.param(1024, marks=pytest.mark.slow)])
def test_steps_of_a_prefill_change_nothing(tiny_model, reference, steps, monkeypatch):
    monkeypatch.setattr("hga_compile.evaluation.candidates.STEP", steps)
    told = []
    candidate = RoutedCandidate(tiny_model, {"profile": "default", **FEW}, told.append, dynamic=True)
    result = measure(candidate, "all", reference)
    monkeypatch.setattr("hga_compile.evaluation.candidates.STEP", 1024)
    plain = measure(RoutedCandidate(tiny_model, {"profile": "default", **FEW}), "all", reference)
    assert result["kl"] == pytest.approx(plain["kl"], abs=1e-5)
    assert result["attended"] == plain["attended"]
    assert sum(told) == 159


def test_a_decoded_query_is_routed_by_itself_whatever_the_profile_does_in_prefill():
    row = make_rows(["default"], {"routing.prefill": "dense", "routing.prefill_tile": 64}, control=False)[0]
    from hga_compile.configs.loader import resolve_profile

    routing = resolve_profile(row.in_mode("decode")).routing
    assert (routing.prefill, routing.prefill_tile) == ("routed", 1)
    routing = resolve_profile(row.in_mode("all")).routing
    assert (routing.prefill, routing.prefill_tile) == ("routed", 64)


def test_two_rows_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"must differ in their names, got default, default \(--profile\)"):
        make_rows(["default", "default"], {})


@pytest.mark.parametrize("mode", ["decode", pytest.param("all", marks=pytest.mark.slow)])
def test_a_model_with_sliding_layers_is_dense_at_full_budget(mode):
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    torch.compiler.reset()
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=3, vocab_size=97, max_position_embeddings=512, sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        reference = dense_reference(model, torch.randint(97, (1, 160)), 40)
        told = []
        candidate = RoutedCandidate(
            model, {**SMALL, "profile": "default", "budget": 1.0}, told.append, dynamic=True
        )
        result = measure(candidate, mode, reference)
    assert abs(result["kl"]) < 1e-5
    assert result["attended"] == pytest.approx(1.0)
    assert sum(told) == (40 if mode == "decode" else 159)
