"""Queries that share a routed set, in plain torch: what must hold whatever is chosen, and what is chosen."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import attended, inputs, left_padding, recorded_groups, routing, run_steps, run_whole
from torch import Tensor

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels.coarse import (
    Coarse,
    average,
    bases_of,
    levels_of,
    to_eight_bits,
    votes_by_means,
    votes_by_tokens,
)
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.levels import decode_levels
from hga_compile.kernels.lowbit import decode_keys, encode_keys
from hga_compile.kernels.prefill import _record_tiles
from hga_compile.kernels.rotation import rotation
from hga_compile.kernels.tiles import plan_tiles

SHARED = routing(prefill_tile=16, prefill_budget=Budget(fraction=0.2, tokens=32))


def naive_set(setting: Routing, given, tile: int, row: tuple[int, int]) -> set[int]:
    """Groups that a tile of one unpadded row attends to, by loops over tokens."""
    batch, head = row
    size, group = setting.prefill_tile, setting.group_size
    first, last = tile * size, min((tile + 1) * size, given.tokens) - 1
    shared = setting.shared()
    visible = first + 1
    budget = min(shared.budget.tokens_for(visible), visible)
    if budget >= visible or visible <= max(setting.dense_below, setting.centre_tokens):
        return set(range(last // group + 1))
    window = max(0, visible - shared.window.tokens_for(budget)) // group
    sinks = min(-(-setting.sinks // group), window)
    keys = given.key[batch, head].double()
    heads = given.query.shape[1] // given.key.shape[1]
    asked = given.query[batch, head * heads : (head + 1) * heads, first : last + 1].double().flatten(0, 1)
    asked = asked * given.scale
    taken = min((budget - (visible - window * group) - sinks * group) // group, window - sinks)
    between = naive_kept(setting, keys, asked, budget, window, visible, range(sinks, window))
    if setting.summary == "mean":
        means = keys[: window * group].unflatten(0, (window, group)).mean(1).bfloat16().double()
        votes = torch.softmax(asked @ means.T, -1).sum(0)
        if setting.vote == "mass_max":
            votes = torch.softmax(asked @ means.T, -1).amax(0)
        best = sorted(between, key=lambda number: -votes[number])[: max(0, taken)]
        return {*range(sinks), *best, *range(window, last // group + 1)}
    rotate = rotation(keys.shape[1], keys.device).double()
    centred = (keys - keys[: setting.centre_tokens].mean(0)) @ rotate
    moved = torch.zeros_like(centred)
    if setting.centre == "block":
        for begin in range(128, len(keys), 128):
            moved[begin : begin + 128] = centred[begin - 128 : begin].mean(0).bfloat16()
    codes, scales = encode_keys((centred - moved)[None].float(), setting.bits)
    low = decode_keys(codes, scales, setting.bits, keys.shape[1])[0] + moved.float()
    ends = [t for t in range(1, 17) if t <= window * group]
    ends += [t for t in range(48, window * group + 1, 32)]
    anchors = [(t - 1 if t <= 16 else t - 32, t) for t in ends]

    def score(query: Coarse, vectors: Tensor) -> float:
        mean = to_eight_bits(vectors.mean(0))
        return float(query.values @ mean.values * query.steps * mean.steps)

    queries, bases = [], []
    for query_head in range(head * heads, (head + 1) * heads):
        for position in range(first, last + 1):
            query = given.query[batch, query_head, position].double() @ rotate * given.scale
            queries.append(to_eight_bits(query.float()))
            parts = [(end - begin) * math.exp(score(queries[-1], low[begin:end])) for begin, end in anchors]
            bases.append(math.log(sum(parts)))
    votes, finer = np.zeros(window), np.zeros(window)
    for query, base in zip(queries, bases, strict=True):
        for number in range(window):
            tokens = low[number * group : (number + 1) * group]
            votes[number] += math.exp(score(query, tokens) - base)
            best = max(float(query.values @ token * query.steps) for token in tokens)
            finer[number] += math.exp(best - base)
    candidates = sorted(between, key=lambda number: -votes[number])[: max(0, 4 * taken)]
    best = sorted(sorted(candidates), key=lambda number: -finer[number])[: max(0, taken)]
    return {*range(sinks), *best, *range(window, last // group + 1)}


def naive_kept(
    setting: Routing, keys: Tensor, asked: Tensor, budget: int, window: int, visible: int, between: range
) -> list[int]:
    """Those of the groups that lie in a chunk that is kept, or in that which the window begins in."""
    size, per_chunk = setting.chunk_size, setting.chunk_size // setting.group_size
    if not setting.uses_chunks(visible):
        return list(between)
    chunks = window // per_chunk
    scores = []
    for begin in range(0, chunks * size, size):
        parts = keys[begin : begin + size].unflatten(0, (setting.chunk_parts, -1)).mean(1).bfloat16().double()
        scores.append(asked @ parts.T)
    kept = set(range(chunks))
    if chunks:
        every = torch.stack(scores)
        best = (every.amax(-1) - every.transpose(0, 1).flatten(1).logsumexp(-1)).exp()
        votes = best.amax(1) if setting.vote == "mass_max" else best.sum(1)
        most = -(-max(setting.chunk_budget.tokens_for(visible), budget) // size)
        kept = set(votes.argsort(descending=True)[:most].tolist())
    return [number for number in between if number // per_chunk in kept or number // per_chunk >= chunks]


CHUNKED = {"chunk_stage": "on", "chunk_budget": Budget(tokens=48)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"summary": "mean"},
        pytest.param(CHUNKED, marks=pytest.mark.slow),
        {"summary": "mean", **CHUNKED},
        {"summary": "mean", **CHUNKED, "vote": "mass_max", "chunk_parts": 1},
        {"summary": "mean", **CHUNKED, "chunk_stage": "auto"},
        {"centre": "block"},
    ],
)
def test_a_tile_attends_to_the_groups_with_the_most_votes_of_all_its_queries(changes):
    setting = SHARED.model_copy(update=changes)
    # Some tokens of a second block, where centres move.
    given = inputs(tokens=170 if setting.centre == "block" else 130, batch=2, heads=3)
    with LEDGER.recording() as records:
        out = run_whole(setting, given)
    groups = recorded_groups(records, given, setting.group_size)
    assert 0 < attended()[0] < attended()[1]
    for batch in range(2):
        for head in range(2):
            for tile in range(-(-given.tokens // 16)):
                wanted = naive_set(setting, given, tile, (batch, head))
                for position in range(tile * 16, min(tile * 16 + 16, given.tokens)):
                    seen = {number for number in wanted if number * 4 <= position}
                    assert set(groups[batch, head, position].nonzero()[:, 0].tolist()) == seen
    allowed = groups.repeat_interleave(4, -1)[..., : given.tokens].repeat_interleave(3, 1)
    allowed &= torch.ones(given.tokens, given.tokens, dtype=torch.bool).tril()
    assert int(allowed.sum()) == 3 * attended()[0]
    want = torch.nn.functional.scaled_dot_product_attention(
        given.query.double(), given.key.double(), given.value.double(), allowed, scale=given.scale,
        enable_gqa=True,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("summary", ["lowbit", "mean"])
@pytest.mark.parametrize("size", [16, 32, 128])
def test_a_full_budget_is_dense_attention(summary, size):
    setting = routing(prefill_tile=size, summary=summary, prefill_budget=Budget(fraction=1.0))
    given = inputs(tokens=150)
    torch.testing.assert_close(
        run_whole(setting, given),
        torch.nn.functional.scaled_dot_product_attention(
            given.query, given.key, given.value, is_causal=True, scale=given.scale, enable_gqa=True
        ),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_result_does_not_depend_on_steps_that_end_with_a_tile():
    given = inputs(tokens=160)
    whole = run_whole(SHARED, given)
    torch.testing.assert_close(run_steps(SHARED, given, [64, 48, 48]), whole, rtol=1e-5, atol=1e-6)
    # One that ends within a tile leaves the votes of its other queries out, and no token.
    torch.testing.assert_close(
        run_steps(SHARED, given, [73, 87])[:, :, :64], whole[:, :, :64], rtol=1e-5, atol=1e-6
    )


def test_later_tiles_change_nothing():
    given = inputs(tokens=160)
    other = inputs(tokens=160, seed=1)
    mixed = [torch.cat([a[:, :, :96], b[:, :, 96:]], 2) for a, b in zip(
        (given.query, given.key, given.value), (other.query, other.key, other.value), strict=True
    )]  # fmt: skip
    changed = type(given)(*mixed, given.scale)
    torch.testing.assert_close(run_whole(SHARED, changed)[:, :, :96], run_whole(SHARED, given)[:, :, :96])


@pytest.mark.parametrize("summary", ["lowbit", "mean"])
def test_left_padding_changes_what_is_attended_to_and_not_what_is_real(summary):
    setting = routing(prefill_tile=16, summary=summary, prefill_budget=Budget(fraction=0.2, tokens=32))
    alone = inputs(tokens=128)
    pad = 32  # whole tiles: each begins with the same token
    filler = inputs(tokens=pad, seed=3)
    joined = [torch.cat([b, a], 2) for a, b in zip(
        (alone.query, alone.key, alone.value), (filler.query, filler.key, filler.value), strict=True
    )]  # fmt: skip
    padded = type(alone)(*joined, alone.scale, left_padding([128], 160))
    torch.testing.assert_close(
        run_whole(setting, padded)[:, :, pad:], run_whole(setting, alone), rtol=1e-5, atol=1e-5
    )


def test_padding_with_gaps_is_never_attended_to():
    given = inputs(tokens=150, batch=2)
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(0)) > 0.2
    mask[:, :30] = True
    gaps = type(given)(given.query, given.key, given.value, given.scale, mask)
    out = run_whole(SHARED, gaps)
    poisoned = given.value.masked_fill(~mask[:, None, :, None], math.nan)
    again = run_whole(
        SHARED, type(given)(given.query, given.key, poisoned.nan_to_num(1e9), given.scale, mask)
    )
    torch.testing.assert_close(out, again)


def test_planned_tokens_are_those_attended_to():
    for first, queries, pads in ((0, 130, None), (37, 93, None), (37, 93, [0, 40, 61])):
        starts = None if pads is None else torch.tensor(pads)[:, None]
        mask = None if starts is None else torch.arange(130) >= starts
        tiles = plan_tiles(SHARED, first, queries, mask, 16)
        total = 0
        for line in range(len(tiles.last)):
            for position in range(first, first + queries):
                tile = position // 16 - tiles.first
                start = 0 if starts is None else int(starts[line])
                plan = tiles.plan
                sinks = range(int(plan.sink_start[line, tile]) * 4, int(plan.sink_end[line, tile]) * 4)
                window = range(int(plan.window[line, tile]) * 4, position + 1)
                fixed = [token for part in (sinks, window) for token in part if start <= token <= position]
                total += 0 if position < start else len(fixed) + 4 * int(plan.taken[line, tile])
        assert tiles.attended(first, queries, starts) == total


def vote_case(broken_key: float | None = None, broken_query: float | None = None) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 40, 8, generator=random)
    query = torch.randn(1, 2, 5, 8, generator=random)
    if broken_key is not None:
        keys[0, 13, 2] = broken_key
    if broken_query is not None:
        query[0, 1, 3, 4] = broken_query
    means, asked = average(keys, 4), to_eight_bits(query)
    bases = bases_of(asked, means, torch.ones(1, 10, dtype=torch.bool), torch.ones(10))
    codes, scales = encode_keys(keys, 4)
    levels = levels_of(decode_levels(codes, 4, 8), 4).transpose(1, 2).unflatten(1, (10, 4))
    finer = votes_by_tokens(asked, levels, scales.float().unflatten(1, (10, 4)), bases, "mass_sum")
    return votes_by_means(asked, means, bases, "mass_sum"), finer


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_key_is_attended_to_and_a_broken_query_has_no_vote(value):
    votes, finer = vote_case()
    assert votes.sum() == pytest.approx(10, rel=1e-5) and bool(torch.isfinite(finer).all())
    votes, finer = vote_case(broken_key=value)
    assert math.isinf(votes[0, 3]) and math.isinf(finer[0, 3])
    rest = [0, 1, 2, *range(4, 10)]
    assert votes[0, rest].sum() == pytest.approx(10, rel=1e-5) and bool(torch.isfinite(finer[0, rest]).all())
    votes, finer = vote_case(broken_query=value)
    assert votes.sum() == pytest.approx(9, rel=1e-5) and bool(torch.isfinite(finer).all())


def test_eight_bits_keep_the_direction_of_vectors_of_any_length():
    vectors = torch.randn(100, 64) * torch.logspace(-30, 30, 100)[:, None]
    vectors[0] = 0
    made = to_eight_bits(vectors)
    assert bool(torch.isfinite(made.values).all()) and float(made.values.abs().max()) == 256
    error = (made.values * made.steps[:, None] - vectors).norm(dim=1)
    assert bool((error <= 0.04 * vectors.norm(dim=1)).all())


def test_a_budget_of_a_shared_set_is_never_smaller_than_that_of_a_query():
    wide = Routing(budget=Budget(fraction=0.2, tokens=100)).shared().budget
    assert (wide.fraction, wide.tokens) == (0.2, 512)
    assert Routing(prefill_budget=Budget(tokens=64)).shared().budget == Budget(fraction=0.03, tokens=256)


def test_lists_of_a_kernel_are_recorded_for_all_rows_alike():
    """Rows without padding have lists of one length: what stands behind it counts for none of them."""
    setting = Routing(
        budget=Budget(tokens=24), prefill_budget=Budget(tokens=24), prefill_tile=16, dense_below=0
    )
    tokens, rows, kept = 320, 3, {}
    tiles = plan_tiles(setting, 0, tokens, None, 16)
    width = int(tiles.listed.max()) + 5
    lists = torch.full((tiles.number, rows, width), 79, dtype=torch.int32)
    for tile in range(tiles.number):
        many = int(tiles.listed[0, tile])
        lists[tile, :, :many] = torch.arange(many, dtype=torch.int32)
    call = SimpleNamespace(
        routing=setting, first=0, length=tokens, padding=None,
        record=lambda first, groups: kept.__setitem__(first, groups),
    )  # fmt: skip
    _record_tiles(call, tiles, 0, lists)
    assert sorted(kept) == list(range(0, tokens, 16))
    for first, groups in kept.items():
        many = int(tiles.listed[0, first // 16])
        assert groups.shape == (rows, 16, tokens // 4)
        want = [group < many and group * 4 <= first + 15 for group in range(tokens // 4)]
        assert all(groups[row, -1].tolist() == want for row in range(rows))


@pytest.mark.parametrize("changes", [{}, {"summary": "mean", "chunk_stage": "on"}])
def test_a_tail_of_equal_keys_is_exact(changes):
    given = inputs(tokens=160)
    equal = type(given)(given.query, given.key[:, :, :1].expand_as(given.key), given.value, given.scale)
    dropped, made = (
        run_whole(SHARED.model_copy(update={**changes, "tail": tail}), equal) for tail in ("drop", "estimate")
    )
    number = torch.arange(1, 161)[:, None]
    mean = (given.value.cumsum(2) / number).repeat_interleave(2, 1)
    torch.testing.assert_close(made, mean, rtol=1e-4, atol=1e-5)
    assert float((dropped - mean).abs().max()) > 0.1
