"""Triton: chunks are kept first, then groups of theirs are chosen, as the reference does both."""

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from cases import left_padding, routing
from gpu_cases import CUDA, INTERPRETED, converse, interpret, large
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.routing import Routing
from hga_compile.kernels import gpu
from hga_compile.kernels.chunks import ChunkSummary
from hga_compile.kernels.mean import MeanSummary
from hga_compile.kernels.plan import plan_queries
from hga_compile.kernels.route import choose_groups
from hga_compile.kernels.summaries import Summary, make_summary

SETTINGS: dict[str, dict[str, Any]] = {
    "low-bit keys": {},
    "means": {"summary": "mean", "group_size": 8},
    "auto": {"chunk_stage": "auto"},
    "chunks of two parts": {"chunk_parts": 2, "chunk_budget": Budget(tokens=1)},
    "chunks of three groups": {
        "chunk_size": 48,
        "group_size": 16,
        "chunk_parts": 3,
        "budget": Budget(tokens=40),
    },
    "groups of a whole chunk": {"group_size": 16, "budget": Budget(tokens=48)},
    "votes by maximum": {"vote": "mass_max", "summary": "mean"},
    "no sinks": {"sinks": 0},
    "sinks of two chunks": {"sinks": 30, "budget": Budget(tokens=60), "chunk_budget": Budget(tokens=1)},
    "a window inside of a chunk": {"window": Window(tokens=23), "budget": Budget(tokens=40)},
}


def summaries(setting: Routing, keys: Tensor) -> tuple[Summary, ChunkSummary]:
    whole = keys[:, : keys.shape[1] // setting.group_size * setting.group_size]
    groups = make_summary(setting, keys[:, : setting.centre_tokens].mean(1))
    groups.append(whole)
    chunks = ChunkSummary(setting.chunk_size, setting.chunk_parts, len(keys), keys.shape[2], keys.device)
    chunks.append(keys[:, : keys.shape[1] // setting.chunk_size * setting.chunk_size])
    return groups, chunks


def routes(
    setting: Routing, summary: Summary, chunks: ChunkSummary, query: Tensor, tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of each row by the kernels, and by the reference."""
    from hga_compile.kernels.triton_route import route

    plan = plan_queries(setting, tokens - 1, 1, None)
    spans = gpu.spans_of(setting, plan, None, query.device)
    scale = query.shape[2] ** -0.5
    assert isinstance(summary, MeanSummary)
    got = route(
        *summary.stored,
        query,
        spans,
        routing=setting,
        scale=scale,
        rows_of_span=len(query),
        parts=chunks.means,
    )
    known = plan.last_window
    best = choose_groups(setting, plan, query[:, :, None] * scale, summary.scorer(known), known, chunks)
    last = -(-tokens // setting.group_size)
    fixed = [*range(int(plan.sink_end)), *range(int(plan.window), last)]
    want = [
        sorted(fixed + groups[kept].tolist())
        for groups, kept in zip(best.groups[:, 0], best.kept[:, 0], strict=True)
    ]
    return got.tolist(), want


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_conversation_is_the_references(place, monkeypatch, setting):
    taken = converse(place, monkeypatch, routing(**({"chunk_stage": "on"} | setting)), tokens=200)
    assert len(taken) == 2 and all(step["spans"].chunks is not None for step in taken)


def test_padding_takes_the_plain_path(place, monkeypatch):
    mask = left_padding([130, 97], 130)
    assert not converse(place, monkeypatch, routing(chunk_stage="on"), batch=2, kv_heads=1, mask=mask)


def random_case(
    place: torch.device, setting: Routing, tokens: int = 500, rows: int = 2, heads: int = 3, dim: int = 32
) -> tuple[Summary, ChunkSummary, Tensor]:
    keys = torch.randn(rows, tokens, dim, device=place) + torch.randn(rows, 1, dim, device=place)
    return *summaries(setting, keys), torch.randn(rows, heads, dim, device=place)


@settings(
    max_examples=6 if not CUDA else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    rows=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 5, 8]),
    tokens=st.integers(130, 900),
    fraction=st.sampled_from([0.05, 0.2, 0.6]),
    chunk=st.sampled_from([(16, 4, 4), (24, 8, 3), (64, 16, 1), (8, 2, 8)]),
    sinks=st.sampled_from([0, 1, 20]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(place, rows, heads, tokens, fraction, chunk, sinks, seed):
    torch.manual_seed(seed)
    setting = routing(
        summary="mean", chunk_stage="on", chunk_size=chunk[0], group_size=chunk[1], chunk_parts=chunk[2],
        sinks=sinks, budget=Budget(tokens=48), chunk_budget=Budget(fraction=fraction),
    )  # fmt: skip
    got, want = routes(setting, *random_case(place, setting, tokens, rows, heads), tokens)
    assert got == want


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (4, 80), (8, 128)])
def test_any_head(place, heads, dim):
    setting = routing(summary="mean", chunk_stage="on")
    got, want = routes(setting, *random_case(place, setting, heads=heads, dim=dim), 500)
    assert got == want


def test_only_kept_chunks_are_read(place):
    setting = routing(summary="mean", chunk_stage="on")
    summary, chunks, query = random_case(place, setting, rows=1)
    _, want = routes(setting, summary, chunks, query, 500)
    per_chunk = setting.chunk_size // setting.group_size
    # What is chosen shows which chunks are kept for certain; broken groups of others would be chosen.
    kept = {group // per_chunk for group in want[0]} | {500 // setting.chunk_size}
    plan = gpu.spans_of(setting, plan_queries(setting, 499, 1, None), None, place).chunks
    assert plan is not None and plan.width <= len(kept) + 2 < plan.chunks // 2
    assert isinstance(summary, MeanSummary)
    full = chunks.scores(query[:, :, None] * query.shape[2] ** -0.5, plan.chunks)[0, :, 0, :, 0]
    best = torch.softmax(full, -1).sum(0).topk(plan.width - 1).indices.tolist()
    for chunk in set(range(plan.chunks)) - set(best):
        summary.means[:, chunk * per_chunk : (chunk + 1) * per_chunk] = math.nan
    got, _ = routes(setting, summary, chunks, query, 500)
    assert got == want


def test_of_equal_votes_the_first_chunks_and_groups_are_taken(place):
    setting = routing(summary="mean", chunk_stage="on", budget=Budget(tokens=32))
    summary, chunks = summaries(setting, torch.ones(1, 400, 16, device=place))
    got, _ = routes(setting, summary, chunks, torch.ones(1, 2, 16, device=place), 400)
    plan = plan_queries(setting, 399, 1, None)
    chosen, window = int(plan.taken), int(plan.window)
    assert chosen > 2 and got[0] == [*range(1 + chosen), *range(window, 100)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_chunk_with_a_broken_key_is_kept_and_its_group_is_chosen(place, value):
    setting = routing(summary="mean", chunk_stage="on", budget=Budget(tokens=32))
    keys = torch.randn(2, 400, 16, device=place)
    keys[1, 201] = value
    summary, chunks = summaries(setting, keys)
    got, want = routes(setting, summary, chunks, torch.randn(2, 2, 16, device=place).abs(), 400)
    assert got == want and 50 in got[1] and 50 not in got[0]


def test_chunks_are_left_out_where_all_would_be_kept(place):
    setting = routing(chunk_stage="on", chunk_budget=Budget(fraction=1.0))
    assert gpu.spans_of(setting, plan_queries(setting, 499, 1, None), None, place).chunks is None


@pytest.mark.gpu
@large
@pytest.mark.parametrize("summary", ["mean", "lowbit"])
def test_half_a_million_tokens(place, summary):
    setting = Routing(summary=summary, group_size=16 if summary == "mean" else 4)
    keys = torch.randn(4, 500_003, 128, device=place, dtype=torch.bfloat16)
    made, chunks = summaries(setting, keys)
    query = torch.randn(4, 8, 128, device=place)
    if summary == "lowbit":
        # One key that a query looks for, in a chunk and a group of their own.
        query[:, 0] = 3 * keys[:, 300_001].float()
        from hga_compile.kernels.triton_route import route

        spans = gpu.spans_of(setting, plan_queries(setting, 500_002, 1, None), None, place)
        got = route(
            *made.stored, query, spans, routing=setting, scale=1.0, rows_of_span=4, parts=chunks.means
        )
        assert bool((got == 300_001 // 4).any(1).all())
        return
    got, want = routes(setting, made, chunks, query, 500_003)
    # Which of nearly equal groups is taken may differ.
    for one, other in zip(got, want, strict=True):
        assert len(one) == len(other) and len(set(one) ^ set(other)) <= 4


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_small_set_in_the_interpreter():
    interpret(__file__, "conversation or shape or equal or broken")
