import pytest
import torch

from hga_compile.evaluation.metrics import CHUNK, NotFinite, compare, over_documents, token_error


def test_compare_equals_the_definitions_across_chunks():
    torch.manual_seed(1)
    tokens, vocabulary = CHUNK + 7, 50
    dense, routed = torch.randn(tokens, vocabulary), torch.randn(tokens, vocabulary)
    targets = torch.randint(vocabulary, (tokens,))
    scores = compare(dense, routed, targets)
    p, q = dense.double().softmax(-1), routed.double().softmax(-1)
    rows = torch.arange(tokens)
    torch.testing.assert_close(scores.dense_nll, -p[rows, targets].log().float())
    torch.testing.assert_close(scores.nll, -q[rows, targets].log().float())
    torch.testing.assert_close(scores.kl, (p * (p / q).log()).sum(-1).float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(scores.agree, (p.argmax(-1) == q.argmax(-1)).float())


def test_equal_logits_have_no_distance():
    logits = torch.randn(5, 11)
    scores = compare(logits, logits + 3.0, torch.zeros(5, dtype=torch.long))
    assert scores.kl.abs().max() < 1e-6
    assert (scores.nll - scores.dense_nll).abs().max() < 1e-6
    assert scores.agree.all()


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"logits \[tokens, vocabulary\] twice"):
        compare(torch.zeros(4, 9), torch.zeros(4, 9), torch.zeros(3, dtype=torch.long))


def test_interval_holds_the_mean_and_is_reproducible():
    interval = over_documents([0.01, 0.02, 0.05, 0.03])
    assert interval == over_documents([0.01, 0.02, 0.05, 0.03])
    assert interval.mean == pytest.approx(0.0275)
    assert interval.error == pytest.approx(0.0170783 / 2, rel=1e-4)
    assert 0.01 <= interval.low < interval.mean < interval.high <= 0.05


def test_one_document_has_no_interval():
    interval = over_documents([0.3])
    assert (interval.mean, interval.error, interval.low, interval.high) == (0.3, None, None, None)
    assert token_error(torch.tensor([0.3])) == 0.0


@pytest.mark.parametrize(("side", "name"), [(0, "dense"), (1, "routed")])
def test_numbers_that_are_not_finite_are_an_error(side: int, name: str) -> None:
    logits = [torch.zeros(4, 8), torch.zeros(4, 8)]
    logits[side][2] = torch.nan
    with pytest.raises(NotFinite, match=f"the {name} model's logits give 1 of 4 tokens"):
        compare(*logits, torch.arange(4))
