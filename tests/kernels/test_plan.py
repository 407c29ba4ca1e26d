import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.routing import Routing
from hga_compile.kernels.plan import QueryPlan, plan_left_padded, plan_queries, tokens_for

fractions = st.one_of(st.none(), st.floats(1e-3, 1.0), st.sampled_from([0.07, 0.03, 0.1, 1 / 3, 1.0]))
tokens = st.one_of(st.none(), st.integers(1, 300))
shares = st.tuples(fractions, tokens).filter(lambda pair: pair != (None, None))


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    group = draw(st.sampled_from([1, 2, 3, 4, 16]))
    budget = Budget(**dict(zip(("fraction", "tokens"), draw(shares), strict=True)))
    sinks = draw(st.integers(0, 9))
    if budget.fraction is None:
        sinks = min(sinks, budget.tokens or 0)
    return Routing(
        group_size=group,
        chunk_size=group * draw(st.integers(1, 6)),
        chunk_parts=1,
        budget=budget,
        window=Window(**dict(zip(("fraction", "tokens"), draw(shares), strict=True))),
        chunk_budget=Budget(**dict(zip(("fraction", "tokens"), draw(shares), strict=True))),
        sinks=sinks,
        centre_tokens=draw(st.integers(1, 40)),
        dense_below=draw(st.integers(0, 60)),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pair=shares, whole=st.lists(st.integers(0, 2**21), min_size=1, max_size=20))
def test_counts_are_those_of_the_configuration(pair: tuple, whole: list[int]) -> None:
    for share in (Budget(fraction=pair[0], tokens=pair[1]), Window(fraction=pair[0], tokens=pair[1])):
        got = tokens_for(share, torch.tensor(whole))
        assert got.dtype == torch.int64
        assert got.tolist() == [share.tokens_for(number) for number in whole]


def test_shares_that_float_arithmetic_rounds_up_are_guarded() -> None:
    whole = torch.arange(1, 3000)
    for percent in range(1, 101):
        want = [
            math.ceil(percent * number / 100) if percent * number % 100 else percent * number // 100
            for number in whole.tolist()
        ]
        assert tokens_for(Budget(fraction=percent / 100), whole).tolist() == want


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    setting=routings(),
    first=st.one_of(st.integers(0, 70), st.integers(0, 400)),
    queries=st.integers(1, 9),
    data=st.data(),
)
def test_every_query_is_planned_as_the_scalar_rules_say(
    setting: Routing, first: int, queries: int, data: st.DataObject
) -> None:
    mask = None
    rows = 1
    if data.draw(st.booleans()):
        rows = data.draw(st.integers(1, 3))
        random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        mask = torch.rand(rows, first + queries, generator=random) < data.draw(
            st.sampled_from([0.0, 0.1, 0.9, 1.0])
        )
    plan = plan_queries(setting, first, queries, mask)
    group = setting.group_size
    for row in range(rows):
        real = [True] * (first + queries) if mask is None else mask[row].tolist()
        start = real.index(True) if True in real else 0
        for query in range(queries):
            got = {name: int(getattr(plan, name)[row, query]) for name in (
                "visible", "dense", "sink_start", "sink_end", "window", "chosen", "chunks")}  # fmt: skip
            end = first + query + 1
            visible = sum(real[:end])
            budget = min(setting.budget.tokens_for(visible), visible)
            window = max(0, end - setting.window.tokens_for(budget)) // group
            sinks = [
                number
                for number in range(start // group, math.ceil((start + setting.sinks) / group))
                if number < window
            ]
            if setting.sinks == 0:
                sinks = []
            fixed = end - window * group + len(sinks) * group
            assert got["visible"] == visible
            assert got["window"] == window
            assert list(range(got["sink_start"], got["sink_end"])) == sinks
            assert got["chosen"] == max(0, budget - fixed) // group <= plan.most_chosen
            assert bool(got["dense"]) == (
                visible <= setting.dense_below or visible <= setting.centre_tokens or budget >= visible
            )
            if not got["dense"]:
                assert got["chunks"] == math.ceil(setting.chunk_tokens_for(visible) / setting.chunk_size)
                assert got["chunks"] <= plan.most_chunks
            # Nothing of the window is in a summary, and the query itself always is in it.
            if visible:
                assert window * group < end
            assert window <= plan.last_window
            if mask is None:
                assert plan.certain <= window


def test_a_plan_does_not_depend_on_how_queries_are_cut() -> None:
    setting = Routing(budget=Budget(fraction=0.1), window=Window(fraction=0.3), dense_below=20)
    whole = plan_queries(setting, 0, 300, None)
    for first, queries in ((0, 1), (17, 60), (299, 1)):
        part = plan_queries(setting, first, queries, None)
        for name in ("visible", "dense", "sink_start", "sink_end", "window", "chosen", "chunks"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, first : first + queries]), name


@pytest.mark.parametrize(("first", "queries"), [(0, 90), (40, 50), (89, 1)])
def test_padding_on_the_left_is_planned_by_its_lengths_as_by_its_mask(first: int, queries: int) -> None:
    setting = Routing(
        budget=Budget(fraction=0.2, tokens=8), window=Window(fraction=0.3), dense_below=10, centre_tokens=4,
        sinks=6, chunk_stage="on",
    )  # fmt: skip
    starts = (0, 7, 64, 89, 90)
    mask = torch.arange(90) >= torch.tensor(starts)[:, None]
    want, got = plan_queries(setting, first, queries, mask), plan_left_padded(setting, first, queries, starts)
    for field in fields(QueryPlan):
        one, other = getattr(want, field.name), getattr(got, field.name)
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), field.name
    # All layers of a model get the same one.
    assert plan_left_padded(setting, first, queries, starts) is got


def test_a_mask_of_ones_plans_as_no_mask() -> None:
    setting = Routing(budget=Budget(fraction=0.1))
    masked = plan_queries(setting, 90, 10, torch.ones(2, 100, dtype=torch.bool))
    plain = plan_queries(setting, 90, 10, None)
    for name in ("visible", "dense", "sink_start", "sink_end", "window", "chosen", "chunks"):
        assert torch.equal(getattr(masked, name), getattr(plain, name).expand(2, -1)) or torch.equal(
            getattr(masked, name), getattr(plain, name)
        ), name
