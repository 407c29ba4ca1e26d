"""Triton: means of keys, and routing by them, against the reference."""

import math
from importlib.util import find_spec

import pytest
import torch
from cases import left_padding, routing
from gpu_cases import CUDA, DTYPES, INTERPRETED, converse, interpret, large
from torch import Tensor

from hga_compile.kernels import gpu
from hga_compile.kernels.route import merge_votes

BROKEN = [math.nan, math.inf, -math.inf]


def reference_means(keys: Tensor, size: int) -> Tensor:
    return keys.double().unflatten(1, (-1, size)).mean(2)


def votes_by(
    place: torch.device, means: Tensor, query: Tensor, end: int, *, vote: str = "mass_sum", parts: int = 1
) -> Tensor:
    """Votes of the groups from number 1 to `end`; group 0 is a sink."""
    from hga_compile.kernels.triton_mean import mean_masses
    from hga_compile.kernels.triton_select import votes_of

    table = torch.tensor([[0, 1, end, 0, end, 0]], dtype=torch.int32, device=place)
    masses = mean_masses(
        means, query, table, groups=means.shape[1] // parts, scale=0.3, rows_of_span=len(means), parts=parts
    )
    return votes_of(masses, table, query.shape[1], vote == "mass_max", len(means)).votes


def reference_votes(
    means: Tensor, query: Tensor, end: int, *, vote: str = "mass_sum", parts: int = 1
) -> Tensor:
    scores = (query.double() * 0.3) @ means.double().transpose(1, 2)
    scores = scores.unflatten(-1, (-1, parts)).amax(-1)[:, :, None, :, None]
    number = torch.arange(scores.shape[3], device=means.device)
    votes = merge_votes(scores, (number < end)[None, None], vote)[:, 0]
    return votes.masked_fill_((number == 0) | (number >= end), -1.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16] if not CUDA else DTYPES)
@pytest.mark.parametrize("dim", [20, 64, 80, 128])
@pytest.mark.parametrize("size", [1, 4, 12, 64])
def test_means_are_those_of_the_reference(place, size, dim, dtype):
    keys = (torch.randn(2, 9 * size, dim, device=place) + 1).to(dtype)
    means = torch.full((2, 20, dim), 7.0, dtype=dtype, device=place)
    gpu.store_means(keys, means, 5, size)
    want = reference_means(keys, size)
    # The interpreter cuts where a GPU rounds.
    error = torch.finfo(dtype).eps * (1 if INTERPRETED else 0.5) + 4 * torch.finfo(torch.float32).eps
    assert bool(((means[:, 5:14] - want).abs() <= error * want.abs() + 1e-6).all())
    assert bool((means[:, :5] == 7).all()) and bool((means[:, 14:] == 7).all())


@pytest.mark.parametrize("new", [1, 200])
def test_keys_are_read_as_they_lie(place, new):
    keys = torch.randn(new * 8, 3, 20, device=place).transpose(0, 1)
    odd = torch.randn(3, 20, new * 8, device=place).transpose(1, 2)
    for given in (keys, odd):
        means = torch.empty(3, new, 20, device=place)
        gpu.store_means(given, means, 0, 8)
        torch.testing.assert_close(means.double(), reference_means(given, 8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_key_breaks_its_mean_alone(place, value):
    keys, means = torch.randn(2, 40, 16, device=place), torch.empty(2, 10, 16, device=place)
    keys[1, 21, 3] = value
    gpu.store_means(keys, means, 0, 4)
    whole = torch.isfinite(means)
    assert not bool(whole[1, 5, 3])
    whole[1, 5, 3] = True
    assert bool(whole.all())


@pytest.mark.parametrize("vote", ["mass_sum", "mass_max"])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 80), (4, 128), (8, 64), (3, 20), (5, 256), (16, 16)])
def test_votes_are_those_of_the_reference(place, heads, dim, vote):
    means = torch.randn(2, 150, dim, device=place).bfloat16()
    query = torch.randn(2, heads, dim, device=place)
    got = votes_by(place, means, query, 141, vote=vote)
    want = reference_votes(means, query, 141, vote=vote)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_a_chunk_has_the_votes_of_its_best_part(place, parts):
    means, query = (
        torch.randn(2, 40 * parts, 32, device=place).bfloat16(),
        torch.randn(2, 3, 32, device=place),
    )
    got = votes_by(place, means, query, 33, parts=parts)
    want = reference_votes(means, query, 33, parts=parts)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_mean_has_the_votes_that_the_reference_gives_it(place, value, parts):
    means, query = torch.randn(2, 80 * parts, 64, device=place), torch.randn(2, 2, 64, device=place)
    means[0, 30 * parts + parts // 2, 7] = value
    query[:, :, 7] = 1 / 3  # in one piece it is no tf32: the rest of it times infinity is another infinity
    got = votes_by(place, means, query, 77, parts=parts)
    want = reference_votes(means, query, 77, parts=parts)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-12)
    assert bool(torch.isinf(got).any()) == (not value < 0)


def test_a_query_that_sees_nothing_has_no_votes(place):
    means, query = torch.randn(1, 9, 16, device=place), torch.randn(1, 2, 16, device=place)
    assert bool((votes_by(place, means, query, 0) == -1).all())


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("padded", [False, True])
def test_a_conversation_is_the_references(place, monkeypatch, padded, size):
    mask = left_padding([130, 20, 97], 130) if padded else None
    setting = routing(summary="mean", group_size=size, chunk_size=64, dense_below=70 if size == 16 else 40)
    assert len(converse(place, monkeypatch, setting, batch=3 if padded else 1, kv_heads=1, mask=mask)) == 2


@pytest.mark.gpu
@large
@pytest.mark.parametrize("groups", [20_000, 70_000])
def test_many_groups(place, groups):
    means, query = torch.randn(4, groups, 128, device=place).bfloat16(), torch.randn(4, 8, 128, device=place)
    got = votes_by(place, means, query, groups - 5)
    want = reference_votes(means, query, groups - 5)
    torch.testing.assert_close(got.double(), want, rtol=5e-5, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_small_set_in_the_interpreter():
    interpret(__file__, "reference or alone or conversation")
