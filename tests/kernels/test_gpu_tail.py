"""Triton: attention to the routed tokens with an estimate of all others, against the reference."""

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from cases import left_padding, routing
from gpu_cases import CUDA, DTYPES, INTERPRETED, converse, interpret, large, pages_of, token_marks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels import gpu
from hga_compile.kernels.plan import plan_queries
from hga_compile.kernels.tail import TailSummary

SETTINGS: dict[str, dict[str, Any]] = {
    "low-bit keys": {},
    "means": {"summary": "mean", "group_size": 8},
    "chunks first": {"chunk_stage": "on"},
    "chunks of two groups": {"chunk_size": 8, "chunk_parts": 1},
}


def estimated(
    query: Tensor, key: Tensor, value: Tensor, marks: Tensor, tail: TailSummary, starts: Tensor
) -> Tensor:
    """What the estimate means, token by token in float64; `query` has the softmax scale applied."""
    size, tokens = tail.chunk_size, key.shape[1]
    mean, number = tail.mean_query.double(), torch.arange(tokens, device=key.device)
    covered = tokens // size * size
    base = mean @ key[:, :covered].transpose(1, 2)
    of_chunk = base.unflatten(-1, (-1, size))
    weight = torch.softmax(of_chunk, -1)
    keys = torch.einsum("rhct,rctd->rhcd", weight, key[:, :covered].unflatten(1, (-1, size)))
    shift = torch.einsum("rhd,rhcd->rhc", query - mean, keys)
    scores = torch.full((*query.shape[:2], tokens), -math.inf, dtype=torch.float64, device=key.device)
    scores[..., :covered] = base + shift.repeat_interleave(size, -1)
    counted = number // size * size >= starts
    scores = scores.masked_fill(~counted[:, None], -math.inf)
    scores = torch.where(marks[:, None], query @ key.transpose(1, 2), scores)
    return torch.softmax(scores, -1).nan_to_num() @ value


def check(
    place: torch.device,
    rows: int = 2,
    heads: int = 3,
    dim: int = 16,
    v_dim: int = 16,
    tokens: int = 500,
    dtype: torch.dtype = torch.float32,
    chunk: int = 16,
    fraction: float = 0.1,
    pads: list[int] | None = None,
) -> None:
    setting = Routing(
        summary="mean", group_size=4, chunk_size=chunk, chunk_parts=1, tail="estimate", dense_below=0,
        budget=Budget(fraction=fraction, tokens=24), centre_tokens=8,
    )  # fmt: skip
    key = (torch.randn(rows, tokens, dim, device=place) / 2).to(dtype)
    value = torch.randn(rows, tokens, v_dim, device=place).to(dtype)
    query = (2 * torch.randn(rows, heads, dim, device=place)).to(dtype)
    scale = dim**-0.5
    tail = TailSummary(chunk, torch.randn(rows, heads, dim, device=place) * scale, v_dim)
    tail.append(key[:, : tokens // chunk * chunk], value[:, : tokens // chunk * chunk])
    starts = torch.tensor(pads or [0])[:, None]
    plan = plan_queries(setting, tokens - 1, 1, torch.arange(tokens) >= starts if pads else None)
    spans = gpu.spans_of(setting, plan, starts if pads else None, place)
    means = key.float()[:, : tokens // 4 * 4].unflatten(1, (-1, 4)).mean(2)
    given: dict[str, Any] = {
        "length": tokens, "routing": setting, "scale": scale, "kv_heads": rows // len(plan.window),
    }  # fmt: skip
    pages = pages_of(key, value, 4).buffer
    out, groups = gpu.decode_step(pages, means, None, query, spans, tail=tail, **given)
    exact, _ = gpu.decode_step(pages, means, None, query, spans, **given)
    assert out.dtype == dtype and out.shape == (rows, heads, v_dim)
    first = spans.starts(rows)
    marks = token_marks(groups, spans.listed(rows), 4, tokens, first)
    want = estimated(query.double() * scale, key.double(), value.double(), marks, tail, first)
    bound = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * float(value.abs().max())
    assert float((out.double() - want).abs().max()) <= bound
    if fraction < 0.5 and not pads:
        assert float((exact - out).abs().max()) > (20 if dtype == torch.float32 else 2) * bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "v_dim"), [(1, 64, 64), (4, 80, 80), (8, 128, 64), (3, 20, 12)])
def test_chunks_stand_for_their_tokens_that_are_not_routed(place, dtype, heads, dim, v_dim):
    check(place, dtype=dtype, heads=heads, dim=dim, v_dim=v_dim)


@pytest.mark.parametrize("chunk", [4, 24, 64])
def test_every_chunk_size(place, chunk):
    check(place, chunk=chunk)


@pytest.mark.parametrize("fraction", [0.9, 0.99])
def test_little_or_nothing_is_left_of_chunks_that_are_routed(place, fraction):
    check(place, fraction=fraction, tokens=300)


def test_chunks_with_padding_do_not_count(place):
    check(place, rows=6, pads=[0, 137, 451])


def test_chunks_are_summed_in_many_splits(place):
    check(place, rows=1, heads=2, tokens=3000, chunk=8)


@settings(
    max_examples=5 if not CUDA else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    rows=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 5, 9]),
    tokens=st.integers(60, 700),
    chunk=st.sampled_from([4, 16, 48]),
    fraction=st.sampled_from([0.05, 0.3]),
)
def test_any_shape(place, rows, heads, tokens, chunk, fraction):
    check(place, rows=rows, heads=heads, tokens=tokens, chunk=chunk, fraction=fraction)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_chunk_breaks_its_row_alone(place, value):
    setting = Routing(summary="mean", group_size=4, chunk_size=16, dense_below=0, budget=Budget(tokens=32))
    key, data = torch.randn(2, 2, 400, 16, device=place).unbind()
    key[1, 200] = value
    tail = TailSummary(16, torch.randn(2, 2, 16, device=place), 16)
    tail.append(key, data)
    spans = gpu.spans_of(setting, plan_queries(setting, 399, 1, None), None, place)
    out, _ = gpu.decode_step(
        pages_of(key, data, 4).buffer, torch.randn(2, 100, 16, device=place), None,
        torch.randn(2, 2, 16, device=place), spans, length=400, routing=setting, scale=1.0, kv_heads=2,
        tail=tail,
    )  # fmt: skip
    assert bool(torch.isfinite(out[0]).all()) and not bool(torch.isfinite(out[1]).any())


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_conversation_is_the_references(place, monkeypatch, setting):
    taken = converse(place, monkeypatch, routing(**({"tail": "estimate"} | setting)), tokens=200)
    assert len(taken) == 2 and all(step["tail"] is not None for step in taken)


def test_a_conversation_with_padding_is_the_references(place, monkeypatch):
    mask = left_padding([130, 20, 97], 130)
    taken = converse(place, monkeypatch, routing(tail="estimate"), batch=3, kv_heads=1, mask=mask)
    assert len(taken) == 2 and all(step["tail"] is not None for step in taken)


@pytest.mark.gpu
@large
@pytest.mark.parametrize("dim", [64, 128])
def test_many_tokens(place, dim):
    check(
        place,
        rows=8,
        heads=4,
        dim=dim,
        v_dim=dim,
        tokens=30_001,
        chunk=64,
        dtype=torch.bfloat16,
        fraction=0.03,
    )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_small_set_in_the_interpreter():
    interpret(__file__, "stand_for or padding or broken or conversation")
