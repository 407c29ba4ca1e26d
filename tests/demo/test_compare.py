import pytest
import torch

from hga_compile.demo.compare import Comparison


def test_nll_and_divergence_are_those_of_the_whole_text() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 30, 50)
    targets = torch.randint(50, (30,))
    comparison = Comparison()
    nll = [0.0, 0.0]
    for piece in (slice(0, 12), slice(12, 30)):
        nll[0] += comparison.keep(first[piece], targets[piece])
    for piece in (slice(0, 12), slice(12, 30)):
        nll[1] += comparison.compare(second[piece], targets[piece])
    cross = torch.nn.functional.cross_entropy
    assert nll[0] == pytest.approx(float(cross(first, targets, reduction="sum")), rel=1e-5)
    assert nll[1] == pytest.approx(float(cross(second, targets, reduction="sum")), rel=1e-5)
    expected = torch.nn.functional.kl_div(
        second.log_softmax(-1), first.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert comparison.divergence == pytest.approx(float(expected), rel=1e-5)
    assert comparison.agreement == int((first.argmax(-1) == second.argmax(-1)).sum()) / 30


def test_equal_models_have_no_distance() -> None:
    logits, targets = torch.randn(5, 20), torch.arange(5)
    comparison = Comparison()
    assert comparison.keep(logits, targets) == comparison.compare(logits, targets)
    assert comparison.divergence == 0.0
    assert comparison.agreement == 1.0


def test_bfloat16_logits_are_compared_in_float32() -> None:
    logits, targets = torch.randn(5, 20).bfloat16(), torch.arange(5)
    comparison = Comparison()
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    assert comparison.keep(logits, targets) == pytest.approx(float(expected), rel=1e-5)
