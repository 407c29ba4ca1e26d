"""Recorded routes in the place of a model's own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholemodel.replay import Replay, fitted

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels.plan import plan_queries

ROUTING = Routing(budget=Budget(fraction=0.1, tokens=64), dense_below=0, centre_tokens=8)
TOKENS, STEPS, HEADS = 2048, 5, 6


def parts(length):
    plan = plan_queries(ROUTING, length - 1, 1, None)
    numbers = (plan.sink_start, plan.sink_end, plan.window, plan.taken)
    return (*(int(number) for number in numbers), -(-length // ROUTING.group_size))


def recorded():
    """What a model had: as many groups as the plan says, most of them the ones of the step before."""
    random = np.random.default_rng(3)
    groups = np.zeros((STEPS, HEADS, TOKENS // ROUTING.group_size), bool)
    for step in range(STEPS):
        start, end, window, taken, last = parts(TOKENS - STEPS + 1 + step)
        groups[step, :, start:end] = groups[step, :, window:last] = True
        for head in range(HEADS):
            groups[step, head, random.permutation(np.arange(end, window))[:taken]] = True
    return SimpleNamespace(groups=groups, tokens=TOKENS, routing=ROUTING)


def replay(length, layers=3, rows=2, source=None):
    return Replay(source or recorded(), layers, rows, length, ROUTING, torch.device("cpu"))


@pytest.mark.parametrize("length", [1500, TOKENS, 3 * TOKENS])
@pytest.mark.parametrize("step", [0, 4, 6, 100])
def test_a_list_has_sinks_window_and_as_many_groups_as_the_plan_says(length, step):
    made = replay(length + 7)
    made.load(step, length)
    start, end, window, taken, last = parts(length)
    lists = made.current[:, :, : end - start + taken + last - window]
    assert bool((lists.diff(dim=-1) > 0).all())
    assert torch.equal(lists[0, 0, : end - start], torch.arange(start, end, dtype=torch.int32))
    assert torch.equal(lists[2, 1, end - start + taken :], torch.arange(window, last, dtype=torch.int32))
    assert bool((lists[..., end - start : end - start + taken] >= end).all())
    assert bool((lists[..., end - start : end - start + taken] < window).all())


def test_at_the_recorded_length_lists_are_the_recorded_ones():
    source = recorded()
    made = replay(TOKENS, layers=1, rows=HEADS, source=source)
    for step in range(STEPS):
        made.load(step, TOKENS - STEPS + 1 + step)
        lists = made.current[0]
        rows = sorted(tuple(np.flatnonzero(own)) for own in source.groups[step])
        width = len(rows[0])
        assert sorted(tuple(own[:width].tolist()) for own in lists) == rows


def test_lists_that_were_worked_out_before_are_the_same():
    one, other, lengths = replay(TOKENS + 7), replay(TOKENS + 7), [TOKENS + step for step in range(7)]
    other.prepare(lengths)
    for step, length in enumerate(lengths):
        for made in (one, other):
            made.load(step, length)
        assert torch.equal(one.current, other.current)


def test_past_the_last_step_they_go_back_and_forth():
    made = replay(TOKENS)
    seen = []
    for step in range(2 * STEPS + 2):
        made.load(step, TOKENS)
        seen.append(made.current.clone())
    period = 2 * STEPS - 2
    assert all(torch.equal(seen[step], seen[period - step]) for step in range(1, STEPS))
    assert torch.equal(seen[0], seen[period]) and not torch.equal(seen[0], seen[1])


def test_in_a_longer_context_every_stretch_is_read():
    made = replay(4 * TOKENS)
    made.load(2, 4 * TOKENS)
    each = TOKENS // ROUTING.group_size
    stretch = made.current[made.current > 0].long() // each
    assert (torch.bincount(stretch.flatten(), minlength=4) > 20).all()


@given(
    st.lists(st.integers(0, 99), max_size=60), st.integers(0, 40), st.integers(0, 20), st.integers(60, 100)
)
def test_fitted_lists_have_the_wanted_length_and_keep_what_they_can(groups, count, low, high):
    own = fitted(np.array(groups, dtype=np.int64), count, low, high)
    inside = {group for group in groups if low <= group < high}
    assert len(own) == count and (np.diff(own) > 0).all()
    assert count == 0 or (own[0] >= low and own[-1] < high)
    assert len(inside & set(own.tolist())) == min(count, len(inside))


def test_more_groups_than_there_are_is_refused():
    with pytest.raises(ValueError, match="12 groups do not lie between 3 and 10"):
        fitted(np.arange(5), 12, 3, 10)


def test_groups_of_another_size_are_refused():
    other = Routing(group_size=8)
    with pytest.raises(ValueError, match="groups of 4 tokens cannot stand for groups of 8"):
        Replay(recorded(), 1, 1, TOKENS, other, torch.device("cpu"))


def test_what_the_kernels_route_to_is_overwritten_layer_after_layer(monkeypatch):
    triton_route = pytest.importorskip("hga_compile.kernels.triton_route")
    own = torch.full((2, 400), 7, dtype=torch.int32)
    monkeypatch.setattr(triton_route, "route", lambda *given, **named: own.clone())
    made = replay(TOKENS)
    made.load(1, TOKENS)
    width = made.current.shape[2]
    with made.replacing():
        # As `gpu.decode_step` finds it.
        from hga_compile.kernels.triton_route import route

        for layer in (0, 1, 2, 0):
            assert torch.equal(route()[:, :width], made.current[layer])
    assert made.calls == 4
    assert torch.equal(triton_route.route(), own)
