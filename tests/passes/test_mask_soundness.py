"""Whatever a proof claims about a mask is what the mask is: masks with a defect, and masks put together at random."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
from attention_graphs import BATCH, assert_claim_holds, check_claims, masked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

KEYS = 6
TABLE = torch.tensor([[0, 1, 1, 2, 1, 1, 0, 1], [1, 1, 0, 1, 3, 1, 1, 0]])


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


def at_rows(table: Tensor, queries: int, shift: int) -> Tensor:
    return table[sequences(), rows_of(queries) + max(shift, 0)]


def at_columns(table: Tensor) -> Tensor:
    return table[sequences(), columns()]


def chunked(queries: int, start: Tensor, shift: int) -> Tensor:
    return causal(queries, 0) & ((rows_of(queries) - start - shift) // 4 == (columns() - start) // 4)


def packed(queries: int, positions: Tensor, shift: int) -> Tensor:
    """As transformers does it: positions are compared, and documents are told apart by their breaks."""
    breaks = torch.diff(positions, prepend=positions[:, :1] - 1) != 1 + shift
    documents = breaks.cumsum(-1)
    same = at_rows(documents, queries, 0) == at_columns(documents)
    return same & (at_columns(positions) <= at_rows(positions, queries, 0))


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
    "chunked": lambda queries, table, shift: (
        causal(queries, 0) & ((rows_of(queries) + shift) // 4 == columns() // 4)
    ),
    "chunked from a token": lambda queries, table, shift: chunked(
        queries, table.amax(1)[:, None, None, None], shift
    ),
    "packed": lambda queries, table, shift: packed(queries, table, shift),
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
    "documents": lambda queries, table, shift: at_rows(table, queries, shift) == at_columns(table),
    "blocks": lambda queries, table, shift: (
        (at_rows(table, queries, 0) == at_columns(table)) & (at_rows(table, queries, 0) >= 1 - shift)
    ),
    "first keys": lambda queries, table, shift: columns() < 3 + shift,
    "last keys": lambda queries, table, shift: columns() > 2 + shift,
    "as many keys": lambda queries, table, shift: columns() < table.amax(1)[:, None, None, None] + shift,
    "chunks": lambda queries, table, shift: (rows_of(queries) + shift) // 4 == columns() // 4,
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


@dataclass(frozen=True)
class Recipe:
    """A mask as models build it, with at most a defect or two."""

    base: str
    table: str = "none"
    shifts: tuple[int, int] = (0, 0)
    changes: tuple[str, str, str] = ("none", "none", "none")
    join: str = "and"

    def build(self, queries: int, table: Tensor) -> Tensor:
        first = CHANGES[self.changes[0]](BASES[self.base](queries, table, self.shifts[0]))
        other = CHANGES[self.changes[1]](TABLES[self.table](queries, table, self.shifts[1]))
        return CHANGES[self.changes[2]](JOINS[self.join](first, other).bool())


def shifted() -> list[Recipe]:
    return [
        *(Recipe(base, table) for base, table in product(BASES, TABLES)),
        *(Recipe(base, table, (by, 0)) for base, table, by in product(BASES, ["none", "bool"], [1, -1])),
        *(Recipe(base, table, (0, 1)) for base, table in product(["causal", "sliding", "last row"], TABLES)),
    ]


def changed() -> list[Recipe]:
    pairs = product(["causal", "sliding", "last row"], ["none", "bool", "by index"], CHANGES, range(3))
    none = ["none"] * 3
    return [
        Recipe(base, table, changes=tuple([*none[:place], change, *none[place + 1 :]]))
        for base, table, change, place in pairs
        if change != "none"
    ]


def joined() -> list[Recipe]:
    return [
        *(Recipe(base, table, join="or") for base, table in product(BASES, TABLES)),
        *(Recipe("causal", table, join="logical and") for table in TABLES),
        *(Recipe("causal", table, (0, 1), join="or") for table in TABLES),
    ]


KNOWN = [
    Recipe("causal"),
    Recipe("sliding"),
    Recipe("chunked"),
    Recipe("chunked from a token"),
    Recipe("packed"),
    Recipe("causal", "documents"),
    Recipe("causal", "first keys", join="or"),
    Recipe("causal", "as many keys", join="or"),
    Recipe("causal", "blocks", join="or"),
    Recipe("sliding", "bool", join="or"),
]


@pytest.mark.parametrize(
    "recipes", [shifted, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (changed, joined))]
)
def test_a_claim_about_a_mask_with_one_defect_holds(recipes):
    made = recipes()
    claims = check_claims([partial(recipe.build, 4) for recipe in made], 4, KEYS, TABLE)
    assert sum(claims) >= len(made) // 20
    assert all(claims[place] for place, recipe in enumerate(made) if recipe in KNOWN)


def any_of(names: Iterable[str]) -> st.SearchStrategy[str]:
    return st.sampled_from(list(names))


recipes = st.builds(
    Recipe,
    any_of(BASES),
    any_of(TABLES),
    st.tuples(st.sampled_from([0, 0, 0, -1, 1, 2]), st.sampled_from([0, 0, 1])),
    st.tuples(*[any_of(["none", *CHANGES]) | st.just("none")] * 3),
    any_of(["and", *JOINS]),
)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(recipes, min_size=30, max_size=30, unique=True), st.sampled_from([4, KEYS]))
def test_a_claim_about_any_mask_holds(made, queries):
    check_claims([partial(recipe.build, queries) for recipe in made], queries, KEYS, TABLE)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes)
def test_a_claim_about_the_mask_of_one_query_holds(recipe):
    plan, graph, inputs = masked(partial(recipe.build, 1), 1, KEYS, TABLE, cached=True)
    assert_claim_holds(plan, graph, inputs)
