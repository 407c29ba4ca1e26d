"""Triton: chunks are kept first, then groups of theirs are chosen, as the reference does both."""

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from cases import left_padding, routing
from gpu_cases import CUDA, INTERPRETED, converse, interpret, large
from hypothesis import HealthCheck, assume, given, settings
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
    setting: Routing,
    summary: Summary,
    chunks: ChunkSummary,
    query: Tensor,
    tokens: int,
    pads: list[int] | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of each row by the kernels, and by the reference; each row may be a sequence with padding."""
    from hga_compile.kernels.triton_route import route

    size, rows = setting.group_size, len(query)
    starts = torch.tensor(pads)[:, None] if pads else None
    mask = None if starts is None else torch.arange(tokens) >= starts
    plan = plan_queries(setting, tokens - 1, 1, mask)
    if starts is not None:
        assume(gpu.chunks_suffice(setting, plan))
    spans = gpu.spans_of(setting, plan, starts, query.device)
    scale = query.shape[2] ** -0.5
    assert isinstance(summary, MeanSummary)
    got = route(
        *summary.stored, query, spans, routing=setting, scale=scale, rows_of_span=1 if pads else rows,
        parts=chunks.means,
    )  # fmt: skip
    known, last = plan.last_window, -(-tokens // size)
    real = None if mask is None else mask[:, : known * size].unflatten(1, (-1, size)).any(2).to(query.device)
    best = choose_groups(setting, plan, query[:, :, None] * scale, summary.scorer(known), known, chunks, real)
    want, counts = [], spans.listed(rows).flatten().tolist()
    for row in range(rows):
        line = row if pads else 0
        begin, end, window = (int(part[line]) for part in (plan.sink_start, plan.sink_end, plan.window))
        chosen = best.groups[row, 0][best.kept[row, 0]].tolist()
        chosen = range(end, window) if bool(plan.dense[line]) else sorted(chosen)
        want.append([*range(begin, end), *chosen, *range(window, last)])
    lists = [row[: counts[number if pads else 0]] for number, row in enumerate(got.tolist())]
    return lists, want


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_conversation_is_the_references(place, monkeypatch, setting):
    taken = converse(place, monkeypatch, routing(**({"chunk_stage": "on"} | setting)), tokens=200)
    assert len(taken) == 2 and all(step["spans"].chunks is not None for step in taken)


PADDED: dict[str, dict[str, Any]] = {
    "low-bit keys": {},
    "auto": {"chunk_stage": "auto", "summary": "mean"},
    "few chunks": {"chunk_budget": Budget(tokens=1), "summary": "mean", "chunk_size": 8},
    "a tail": {"tail": "estimate"},
}


@pytest.mark.parametrize("setting", PADDED.values(), ids=PADDED)
def test_a_conversation_with_padding_is_the_references(place, monkeypatch, setting):
    mask = left_padding([200, 70, 153, 125, 20], 200)
    setting = routing(**({"chunk_stage": "on"} | setting))
    taken = converse(place, monkeypatch, setting, tokens=200, batch=5, kv_heads=1, mask=mask)
    assert len(taken) == 2 and all(step["spans"].chunks is not None for step in taken)


def test_chunks_that_may_not_hold_enough_groups_take_the_plain_path(place, monkeypatch):
    mask = left_padding([200, 188], 200)
    setting = routing(
        chunk_stage="on", chunk_budget=Budget(tokens=1), chunk_size=64, budget=Budget(tokens=64), sinks=1
    )
    assert not converse(place, monkeypatch, setting, tokens=200, batch=2, kv_heads=1, mask=mask)


def random_case(
    place: torch.device, setting: Routing, tokens: int = 500, rows: int = 2, heads: int = 3, dim: int = 32
) -> tuple[Summary, ChunkSummary, Tensor]:
    keys = torch.randn(rows, tokens, dim, device=place) + torch.randn(rows, 1, dim, device=place)
    return *summaries(setting, keys), torch.randn(rows, heads, dim, device=place)


@settings(
    max_examples=10 if not CUDA else 60,
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
    padded=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(place, rows, heads, tokens, fraction, chunk, sinks, padded, seed):
    torch.manual_seed(seed)
    setting = routing(
        summary="mean", chunk_stage="on", chunk_size=chunk[0], group_size=chunk[1], chunk_parts=chunk[2],
        sinks=sinks, budget=Budget(tokens=48), chunk_budget=Budget(fraction=fraction),
    )  # fmt: skip
    pads = torch.randint(tokens, (rows,)).tolist() if padded else None
    got, want = routes(setting, *random_case(place, setting, tokens, rows, heads), tokens, pads)
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
        query[:] = 3 * keys[:, None, 300_001].float()
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
