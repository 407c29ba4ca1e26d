"""The C++ decode kernels against their plain-torch references, and what happens without a compiler."""

import math
from pathlib import Path

import pytest
import torch
from cases import inputs, routing, run_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hga_compile.kernels import native
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.lowbit import decode_keys, encode_keys
from hga_compile.kernels.route import merge_votes
from hga_compile.store.pages import Pages

BITS = [1, 2, 4, 8]
pytestmark = pytest.mark.skipif(native._library() is None, reason="needs a C++ compiler")


def coded(rows: int, tokens: int, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes with slack behind them as an index has it, scales, and the keys they stand for."""
    codes, scales = encode_keys(torch.randn(rows, tokens, dim), bits)
    larger = torch.full((rows, codes.shape[1], tokens + 37), 255, dtype=torch.uint8)
    larger[:, :, :tokens] = codes
    return larger[:, :, :tokens], scales.float(), decode_keys(codes, scales, bits, dim).double()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 9, 16])
def test_scores_are_the_products_with_the_coded_keys(bits: int, heads: int) -> None:
    codes, scales, keys = coded(2, 200, 20, bits)
    query = torch.randn(2, heads, 20)
    got = native.scan_scores(codes, scales, query, bits)
    want = query.double() @ keys.transpose(1, 2)
    eager = torch.bmm(query, keys.float().transpose(1, 2))
    assert got is not None and got.shape == (2, heads, 200)
    # Levels are centred by a subtraction: as good as float32 sums of that size are.
    bound = 1e-6 * 20 * (2**bits) * float(scales.max()) * float(query.abs().max())
    assert (got.double() - want).abs().max() <= max(bound, float((eager.double() - want).abs().max()))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 400),
    dim=st.sampled_from([1, 3, 8, 17, 64, 80, 128]),
    bits=st.sampled_from(BITS),
    threads=st.integers(1, 3),
)
def test_any_shape_is_scored(rows: int, tokens: int, dim: int, bits: int, threads: int) -> None:
    codes, scales, keys = coded(rows, tokens, dim, bits)
    query = torch.randn(rows, 3, dim)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = native.scan_scores(codes, scales, query, bits)
    finally:
        torch.set_num_threads(before)
    want = query.double() @ keys.transpose(1, 2)
    assert got is not None
    torch.testing.assert_close(got.double(), want, atol=1e-4 * 2**bits / 4, rtol=1e-4)


def test_threads_do_not_change_a_bit() -> None:
    codes, scales, _ = coded(3, 9000, 128, 2)
    query, results = torch.randn(3, 8, 128), []
    before = torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(native.scan_scores(codes, scales, query, 2))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "scale"])
def test_a_score_that_is_not_finite_is_left_to_the_reference(value: float, where: str) -> None:
    codes, scales, _ = coded(2, 90, 16, 2)
    query = torch.randn(2, 3, 16)
    (query if where == "query" else scales)[1, 2] = value
    assert native.scan_scores(codes, scales, query, 2) is None


@pytest.mark.parametrize("vote", ["mass_sum", "mass_max"])
@pytest.mark.parametrize("size", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("spread", [0.0, 1.0, 100.0])
def test_votes_are_those_of_the_reference(vote: str, size: int, spread: float) -> None:
    scores = torch.randn(2, 3, 50 * size) * spread
    want = merge_votes(scores.view(2, 3, 1, 50, size).clone(), None, vote)[:, 0]
    torch.testing.assert_close(native.scan_votes(scores, size, vote), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (20, 12), (64, 64), (7, 33)])
@pytest.mark.parametrize("missing", [0, 1, 3])
def test_attention_over_pages_is_softmax_attention(dim: int, v_dim: int, missing: int) -> None:
    rows, size, length = 3, 4, 80 - missing
    pages = Pages(rows, dim, v_dim, size, torch.float32, torch.device("cpu"), torch.device("cpu"))
    key, value = torch.randn(rows, length, dim), torch.randn(rows, length, v_dim)
    pages.write(key, value, 0)
    groups = torch.stack([torch.tensor([0, 5 + row, 11, 19]) for row in range(rows)])
    query, tokens = torch.randn(rows, 3, dim), 16 - missing
    got = pages.attend(groups, query, tokens, 0.3)
    token = (groups[..., None] * size + torch.arange(size)).flatten(1)[:, :tokens]
    own = torch.arange(rows)[:, None]
    weights = torch.softmax(query.double() @ key.double()[own, token].transpose(1, 2) * 0.3, -1)
    assert got is not None
    torch.testing.assert_close(got.double(), weights @ value.double()[own, token], atol=2e-6, rtol=1e-5)


def test_a_broken_key_breaks_its_own_row_alone() -> None:
    pages = Pages(2, 8, 8, 4, torch.float32, torch.device("cpu"), torch.device("cpu"))
    key = torch.randn(2, 16, 8)
    key[1, 2, 3] = math.nan
    pages.write(key, torch.randn(2, 16, 8), 0)
    got = pages.attend(torch.tensor([[0, 3]] * 2), torch.randn(2, 2, 8), 8, 1.0)
    assert got is not None and torch.isfinite(got[0]).all() and torch.isnan(got[1]).all()


def test_other_dtypes_take_the_plain_way() -> None:
    pages = Pages(1, 8, 8, 4, torch.bfloat16, torch.device("cpu"), torch.device("cpu"))
    pages.write(torch.randn(1, 8, 8).bfloat16(), torch.randn(1, 8, 8).bfloat16(), 0)
    assert pages.attend(torch.tensor([[0]]), torch.randn(1, 2, 8).bfloat16(), 4, 1.0) is None


def test_without_a_compiler_decoding_goes_on_in_plain_torch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = inputs()
    steps = (100, *[1] * 30)
    want = run_steps(routing(), given, steps)
    LEDGER.reset()
    monkeypatch.setattr(native, "user_cache_dir", lambda name: str(tmp_path))
    native._library.cache_clear()
    for variable, value in (("CXX", ""), ("PATH", str(tmp_path))):
        monkeypatch.setenv(variable, value)
    try:
        got = run_steps(routing(), given, steps)
        assert LEDGER.fallbacks() == {"no C++ compiler: the index is scanned in plain torch": 1}
    finally:
        native._library.cache_clear()
    assert "slower" in caplog.text and not list(tmp_path.iterdir())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such flag" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setattr(native, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(RuntimeError, match="no such flag"):
        native._built()
    assert not list((tmp_path / "cache" / "native").iterdir())
