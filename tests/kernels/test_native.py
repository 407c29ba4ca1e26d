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
)
def test_any_shape_is_scored(rows: int, tokens: int, dim: int, bits: int) -> None:
    codes, scales, keys = coded(rows, tokens, dim, bits)
    query = torch.randn(rows, 3, dim)
    got = native.scan_scores(codes, scales, query, bits)
    want = query.double() @ keys.transpose(1, 2)
    assert got is not None
    torch.testing.assert_close(got.double(), want, atol=1e-4 * 2**bits / 4, rtol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "scale"])
def test_a_score_that_is_not_finite_is_left_to_the_reference(value: float, where: str) -> None:
    codes, scales, _ = coded(2, 90, 16, 2)
    query = torch.randn(2, 3, 16)
    (query if where == "query" else scales)[1, 2] = value
    assert native.scan_scores(codes, scales, query, 2) is None


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.sampled_from([1, 3, 5]),
    shape=st.sampled_from([(16, 16), (20, 12), (64, 64), (7, 33)]),
    known=st.integers(1, 150),
    size=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 64]),
    bits=st.sampled_from(BITS),
    vote=st.sampled_from(["mass_sum", "mass_max"]),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_a_step_attends_to_the_groups_with_the_most_votes(
    rows: int, heads: int, shape: tuple[int, int], known: int, size: int, bits: int, vote: str, spread: float,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    (dim, v_dim), length = shape, known * size + seed % size + 1
    pages = Pages(rows, dim, v_dim, size, torch.float32, torch.device("cpu"), torch.device("cpu"))
    key, value = torch.randn(rows, length, dim), torch.randn(rows, length, v_dim)
    pages.write(key, value, 0)
    codes, scales, keys = coded(rows, known * size, dim, bits)
    query, turned = torch.randn(rows, heads, dim), torch.randn(rows, heads, dim) * spread
    span = native.Span(0, seed % 2, known, seed % 7, length)
    got = native.routed_steps(
        pages.buffer, codes, scales, turned[:, None], query[:, None], torch.tensor([span]),
        bits=bits, group_size=size, vote=vote, scale=0.3,
    )  # fmt: skip
    scores = (turned.double() @ keys.transpose(1, 2)).view(rows, heads, 1, known, size)
    votes = merge_votes(scores, None, vote)[:, 0, span.sink_end : span.window]
    best = votes.topk(min(span.chosen, votes.shape[1])).indices.sort().values + span.sink_end
    fixed = torch.cat([torch.arange(span.sink_end), torch.arange(span.window, -(-length // size))])
    token = (torch.cat([best, fixed.expand(rows, -1)], 1)[..., None] * size + torch.arange(size)).flatten(1)
    token = token.masked_fill(token >= length, 0)[:, : token.shape[1] - -length % size]
    own = torch.arange(rows)[:, None]
    weights = torch.softmax(query.double() @ key.double()[own, token].transpose(1, 2) * 0.3, -1)
    assert got is not None
    assert torch.isfinite(got).all()
    ranked = torch.nn.functional.pad(votes.sort(descending=True).values, (1, 1), value=-1.0)
    last, next_one = ranked[:, best.shape[1]], ranked[:, best.shape[1] + 1]
    # Which one of groups with equal votes is taken does not matter here.
    if best.shape[1] == 0 or bool((last > 1.0001 * next_one + 1e-30).all()):
        torch.testing.assert_close(
            got[:, 0].double(), weights @ value.double()[own, token], atol=5e-6, rtol=1e-4
        )


@pytest.mark.parametrize("threads", [1, 3])
def test_every_query_of_many_has_its_own_span(threads: int) -> None:
    rows, heads, dim, size, queries = 2, 3, 16, 4, 11
    pages = Pages(rows, dim, dim, size, torch.float32, torch.device("cpu"), torch.device("cpu"))
    pages.write(torch.randn(rows, 200, dim), torch.randn(rows, 200, dim), 0)
    codes, scales, _ = coded(rows, 160, dim, 2)
    query, turned = torch.randn(2, rows, queries, heads, dim).unbind()
    spans = torch.tensor([native.Span(0, 1, 20 + number, number, 120 + number) for number in range(queries)])
    settings = {"bits": 2, "group_size": size, "vote": "mass_sum", "scale": 0.3}
    torch.set_num_threads(threads)
    got = native.routed_steps(pages.buffer, codes, scales, turned, query, spans, **settings)
    assert got is not None
    for number in range(queries):
        one = slice(number, number + 1)
        alone = native.routed_steps(
            pages.buffer, codes, scales, turned[:, one], query[:, one], spans[one], **settings
        )
        assert alone is not None and torch.equal(got[:, one], alone)


def test_of_equal_groups_a_step_takes_the_first() -> None:
    pages = Pages(1, 4, 4, 4, torch.float32, torch.device("cpu"), torch.device("cpu"))
    value = torch.arange(40.0)[None, :, None].expand(1, 40, 4)
    pages.write(torch.zeros(1, 40, 4), value, 0)
    codes, scales, _ = coded(1, 36, 4, 2)
    query, spans = torch.zeros(1, 1, 1, 4), torch.tensor([native.Span(0, 1, 9, 3, 40)])
    got = native.routed_steps(
        pages.buffer, codes, scales, query, query, spans, bits=2, group_size=4, vote="mass_sum", scale=1.0
    )
    assert got is not None
    torch.testing.assert_close(got[:, 0], value[:, [*range(16), *range(36, 40)]].mean(1, keepdim=True))


@pytest.mark.parametrize("where", ["turned", "scale"])
def test_a_step_with_a_score_that_is_not_finite_is_left_to_the_reference(where: str) -> None:
    pages = Pages(2, 16, 16, 4, torch.float32, torch.device("cpu"), torch.device("cpu"))
    pages.write(torch.randn(2, 90, 16), torch.randn(2, 90, 16), 0)
    codes, scales, _ = coded(2, 80, 16, 2)
    query, turned = torch.randn(2, 1, 3, 16), torch.randn(2, 1, 3, 16)
    (turned[:, 0] if where == "turned" else scales)[1, 2] = torch.nan
    spans = torch.tensor([native.Span(0, 1, 20, 5, 90)])
    got = native.routed_steps(
        pages.buffer, codes, scales, turned, query, spans, bits=2, group_size=4, vote="mass_sum", scale=1.0
    )
    assert got is None


@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (20, 12), (64, 64), (7, 33)])
@pytest.mark.parametrize("missing", [0, 1, 3])
def test_attention_over_pages_is_softmax_attention(dim: int, v_dim: int, missing: int) -> None:
    rows, size, length = 3, 4, 80 - missing
    pages = Pages(rows, dim, v_dim, size, torch.float32, torch.device("cpu"), torch.device("cpu"))
    key, value = torch.randn(rows, length, dim), torch.randn(rows, length, v_dim)
    pages.write(key, value, 0)
    groups = torch.stack([torch.tensor([0, 5 + row, 11, 19]) for row in range(rows)])
    query, tokens = torch.randn(rows, 3, dim), 16 - missing
    got = native.attend_pages(pages.buffer, groups, query, tokens, size, 0.3)
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
    groups, query = torch.tensor([[0, 3]] * 2), torch.randn(2, 2, 8)
    got = native.attend_pages(pages.buffer, groups, query, 8, 4, 1.0)
    assert got is not None and torch.isfinite(got[0]).all() and torch.isnan(got[1]).all()


def test_only_float32_pages_are_read_in_place() -> None:
    cpu = torch.device("cpu")
    assert Pages(1, 8, 8, 4, torch.float32, cpu, cpu).host_pages is not None
    assert Pages(1, 8, 8, 4, torch.bfloat16, cpu, cpu).host_pages is None


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
        said = "C++ kernels do not cover a machine without a C++ compiler (set CXX): plain torch"
        assert LEDGER.fallbacks() == {said: 31}
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
