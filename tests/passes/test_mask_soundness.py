"""Whatever a proof claims about a mask is what the mask is: masks put together at random."""

import torch
from attention_graphs import BATCH, assert_claim_holds, masked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

KEYS = 6
TABLE = torch.tensor([[0, 1, 1, 2, 1, 1], [1, 1, 0, 1, 3, 1]])

shifts = st.sampled_from([0, 0, 0, -1, 1, 2])
queries_of = st.sampled_from([1, 4, KEYS])
comparisons = st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"])


def rows_of(queries: int) -> Tensor:
    return (torch.arange(queries) + (KEYS - queries))[None, None, :, None]


def columns() -> Tensor:
    return torch.arange(KEYS)[None, None, None, :]


@st.composite
def positions(draw):
    """A tensor of positions: of queries, of keys, or of one of them."""
    which, shift, factor = draw(st.sampled_from("qqkkc")), draw(shifts), draw(st.sampled_from([1, 1, 1, 2, -1]))
    narrow = draw(st.sampled_from([torch.int64, torch.int64, torch.int64, torch.uint8]))

    def build(queries, table):
        base = {"q": rows_of(queries), "k": columns(), "c": torch.arange(KEYS)[None, None, None, 3:4]}[which]
        return (base * factor + shift).to(narrow)

    return build


@st.composite
def inequalities(draw):
    left, right, name = draw(positions()), draw(positions()), draw(comparisons)
    return lambda queries, table: getattr(torch, name)(left(queries, table), right(queries, table))


@st.composite
def causal(draw):
    """Right most of the time, so that what is around it decides."""
    shift = draw(shifts)
    return lambda queries, table: columns() <= rows_of(queries) + shift


@st.composite
def windows(draw):
    width = draw(st.integers(-1, 7))
    return lambda queries, table: columns() > rows_of(queries) - width


@st.composite
def tables(draw):
    form, shift = draw(st.sampled_from(["bool", "int", "row", "index", "query", "one", "narrow"])), draw(shifts)
    shift = max(shift, 0)

    def build(queries, table):
        if form == "bool":
            return table.bool()[:, None, None, :KEYS]
        if form == "int":
            return table[:, None, None, :]
        if form == "row":
            return table[shift % 2][None, None, None, :].bool()
        if form == "one":
            return table[:1][:, None, None, :].bool()
        if form == "narrow":
            return table.to(torch.uint8)[:, None, None, :].to(torch.bool)
        sequence = torch.arange(BATCH)[:, None, None, None]
        place = columns() if form == "index" else rows_of(queries)
        return table[sequence, (place + shift).clamp(max=KEYS - 1) if shift else place].bool()

    return build


def _spread(part, name, queries):
    """Change a mask by an op of the kinds that models use, or misuse."""
    if name == "slice row":
        return part[:, :, :1]
    if name == "slice column":
        return part[..., 2:3] if part.shape[3] > 1 else part
    if name == "expand":
        return part.expand(BATCH, 1, queries, KEYS) if part.dtype is torch.bool else part
    if name == "not":
        return ~part
    if name == "through int":
        return part.to(torch.int64).to(torch.bool)
    if name == "squeeze":
        return part.squeeze(1).unsqueeze(1)
    if name == "view":
        return part.reshape(part.shape)
    if name == "flip":
        return part.flip(3)
    if name == "fill":
        changed = part.clone()
        changed[..., 0].fill_(1)
        return changed
    return part


CHANGES = ["none"] * 8 + [
    "slice row", "slice column", "expand", "not", "through int", "squeeze", "view", "flip", "fill",
]  # fmt: skip


@st.composite
def masks(draw):
    first = draw(causal())
    more = draw(st.lists(st.one_of(inequalities(), causal(), windows(), tables(), tables()), max_size=2))
    joins = draw(st.lists(st.sampled_from(["and"] * 6 + ["or", "logical_and"]), min_size=2, max_size=2))
    changes = draw(st.lists(st.sampled_from(CHANGES), min_size=4, max_size=4))

    def build(queries, table):
        whole = _spread(first(queries, table), changes[0], queries)
        for term, join, change in zip(more, joins, changes[1:], strict=False):
            part = _spread(term(queries, table), change, queries)
            ops = {"and": torch.bitwise_and, "or": torch.bitwise_or, "logical_and": torch.logical_and}
            whole = ops[join](whole, part)
        return _spread(whole.bool(), changes[3], queries)

    return build


PROVEN = []


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(masks(), queries_of, st.booleans())
def test_a_claim_about_a_mask_holds(build, queries, cached):
    plan, graph, inputs = masked(lambda table: build(queries, table), queries, KEYS, TABLE, cached=cached)
    if plan.decision.routed or plan.window is not None:
        PROVEN.append(plan)
        assert_claim_holds(plan, graph, inputs)


def test_that_a_good_share_of_the_random_masks_was_claimed():
    assert len(PROVEN) > 10
