import pytest
import torch
from candidates import NothingRouted, RoutedCandidate
from quality import CONTROL, make_rows
from study import dense_reference, measure

SMALL = {"inner": "eager", "routing.dense_below": 32, "routing.centre_tokens": 16}
FEW = {**SMALL, "budget": 24}


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
    rows = make_rows(["default", "paper"], {"inner": "eager"}, control=True)
    assert [row.name for row in rows] == [CONTROL, "default", "paper"]
    assert len({row.identity for row in rows}) == 3
    assert rows[0].options["routing.window.fraction"] == 1.0
    assert [row.name for row in make_rows(["default"], {}, control=False)] == ["default"]
