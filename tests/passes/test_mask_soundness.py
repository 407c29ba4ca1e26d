"""Whatever a proof claims about a mask is what the mask is: masks put together at random."""

import torch
from attention_graphs import BATCH, assert_claim_holds, masked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

KEYS = 6
TABLE = torch.tensor([[0, 1, 1, 2, 1, 1, 0, 1], [1, 1, 0, 1, 3, 1, 1, 0]])

rarely_shifted = st.sampled_from([0, 0, 0, 0, 0, -1, 1, 2])


def rows_of(queries: int) -> Tensor:
    return (torch.arange(queries) + (KEYS - queries))[None, None, :, None]


def columns() -> Tensor:
    return torch.arange(KEYS)[None, None, None, :]


def sequences() -> Tensor:
    return torch.arange(BATCH)[:, None, None, None]


def causal(queries: int, shift: int) -> Tensor:
    return columns() <= rows_of(queries) + shift


def window(queries: int, shift: int) -> Tensor:
    return columns() > rows_of(queries) - 3 - shift


# Terms of a mask: of the number of queries, a table, and a shift that is 0 in the form that models use.
BASES = {
    "causal": lambda queries, table, shift: causal(queries, shift),
    "sliding": lambda queries, table, shift: causal(queries, 0) & window(queries, shift),
    "scaled": lambda queries, table, shift: columns() * 2 <= rows_of(queries) * 2 + shift,
    "mirrored": lambda queries, table, shift: rows_of(queries) + shift >= columns(),
    "last row": lambda queries, table, shift: columns() <= KEYS - 1 + shift,
    "from the front": lambda queries, table, shift: (
        columns() <= torch.arange(queries)[None, None, :, None] + shift
    ),
    "narrow": lambda queries, table, shift: (
        (columns().to(torch.uint8) - rows_of(queries).to(torch.uint8)) <= shift
    ),
}
TABLES = {
    "none": lambda queries, table, shift: torch.ones((), dtype=torch.bool),
    "bool": lambda queries, table, shift: table.bool()[:, None, None, max(shift, 0) :][..., :KEYS],
    "integer": lambda queries, table, shift: table[:, None, None, :KEYS],
    "one row": lambda queries, table, shift: table[max(shift, 0)][None, None, None, :KEYS].bool(),
    "first rows": lambda queries, table, shift: table[:1, None, None, :KEYS].bool(),
    "by index": lambda queries, table, shift: table[sequences(), columns() + max(shift, 0)].bool(),
    "backwards": lambda queries, table, shift: table[
        sequences(), columns() - table.shape[1] + shift % 2
    ].bool(),
    "by query": lambda queries, table, shift: table[sequences(), rows_of(queries)].bool(),
    "second causal": lambda queries, table, shift: causal(queries, shift),
}


def _fill(part: Tensor) -> Tensor:
    changed = part.clone()
    changed[..., 0].fill_(1)
    return changed


CHANGES = {
    "none": lambda part: part,
    "first row": lambda part: part[:, :, :1] if part.dim() == 4 else part,
    "last row": lambda part: part[:, :, -1:] if part.dim() == 4 else part,
    "column": lambda part: part[..., 2:3] if part.dim() == 4 and part.shape[3] > 1 else part,
    "through integers": lambda part: part.to(torch.int64).to(torch.bool),
    "reshaped": lambda part: part.reshape(part.shape),
    "not": lambda part: part.logical_not(),
    "flipped": lambda part: part.flip(-1) if part.dim() else part,
    "filled": lambda part: _fill(part) if part.dim() else part,
    "a dimension dropped and added": lambda part: part.squeeze(1).unsqueeze(1) if part.dim() == 4 else part,
}
JOINS = {"and": torch.bitwise_and, "logical and": torch.logical_and, "or": torch.bitwise_or}
mostly_none = st.one_of(st.just("none"), st.just("none"), st.sampled_from(list(CHANGES)))
mostly_and = st.one_of(st.just("and"), st.just("and"), st.sampled_from(list(JOINS)))

CLAIMS = []


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    base=st.sampled_from(list(BASES)),
    table=st.sampled_from(list(TABLES)),
    shifts=st.tuples(rarely_shifted, rarely_shifted),
    changes=st.tuples(mostly_none, mostly_none, mostly_none),
    join=mostly_and,
    queries=st.sampled_from([1, 4, KEYS]),
    cached=st.booleans(),
)
def test_a_claim_about_a_mask_holds(base, table, shifts, changes, join, queries, cached):
    def build(given):
        first = CHANGES[changes[0]](BASES[base](queries, given, shifts[0]))
        other = CHANGES[changes[1]](TABLES[table](queries, given, shifts[1]))
        return CHANGES[changes[2]](JOINS[join](first, other).bool())

    plan, graph, inputs = masked(build, queries, KEYS, TABLE, cached=cached)
    if plan.decision.routed or plan.window is not None:
        CLAIMS.append(plan)
        assert_claim_holds(plan, graph, inputs)


def test_that_a_good_share_of_the_random_masks_was_claimed():
    assert len(CLAIMS) > 15
