"""Which model families are routed, and that none of them ever gives another answer than it should."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from families import BUDGET, FAMILIES, Family, Observed, observe, row, table, table_of
from packaging.version import Version

from hga_compile.passes.decision import Reason

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"
NEWEST = Version(transformers.__version__) >= Version("5.23")
DECODERS = [family.name for family in FAMILIES.values() if family.kind == "decoder"]
REMEDY = "python tests/backend/families.py --write docs/coverage.md"


@pytest.fixture(scope="module")
def recompile():
    """Have these tests run after those that share compiled models: each family forgets what is compiled."""


@pytest.fixture(scope="module")
def seen(request, recompile) -> tuple[Family, Observed]:
    """A family and what it did; all tests of a family judge the same runs."""
    family = FAMILIES[request.param]
    return family, observe(family)


# A family for each form of a causal decoder's attention and cache that is routed; the others are slow.
FORMS = {"Llama", "Mistral", "Gemma 2", "GPT-2", "gpt-oss"}
assert FAMILIES.keys() >= FORMS


def each(names):
    marked = [pytest.param(name, marks=[] if name in FORMS else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("seen", marked, indirect=True)


def graphs_of(family: Family, newest: bool = NEWEST) -> int:
    """Return how many graphs a family is compiled to; in transformers 5.17 caches of two parts break them."""
    return {"encoder": 1, "decoder": 3, "encoder-decoder": 3 if newest else 6}[family.kind]


every_family, every_decoder = each(FAMILIES), each(DECODERS)


@every_family
def test_logits_equal_those_of_the_uncompiled_model(seen):
    """Prefill, a second chunk and steps, with and without padding, at a budget that all of it fits into."""
    family, observed = seen
    runs = {"padded", "unpadded"} if family.kind == "decoder" else {"forward"}
    assert runs <= observed.errors.keys()
    assert {name: observed.errors[name] for name in runs if not observed.errors[name] < 1e-4} == {}


@every_decoder
def test_generated_tokens_are_those_of_the_uncompiled_model(seen):
    got, expected = seen[1].generated
    assert torch.equal(got, expected)
    assert expected.unique().numel() > 3  # else it shows nothing


@every_family
def test_decisions_are_the_expected_ones(seen):
    family, observed = seen
    assert observed.prefill == family.prefill
    assert observed.decode == family.decode
    assert observed.sliding == family.sliding


@every_family
def test_what_is_routed_attends_to_everything_that_fits_into_the_budget(seen):
    family, observed = seen
    assert observed.short_fraction == float(Reason.ROUTED in family.prefill)


@every_family
def test_nothing_is_compiled_after_the_first_conversation(seen):
    """The graphs of the first steps serve further ones, other padding, a longer chunk and `generate`."""
    family, observed = seen
    assert observed.graphs == graphs_of(family)
    assert observed.recompiles == 0


@every_decoder
def test_over_budget_logits_equal_dense_attention_to_the_routed_tokens(seen):
    """What is computed at a tight budget is exact attention over what was routed to, and nothing else.

    The uncompiled model runs with a mask for each layer, made of the routes that the compiled one recorded.
    Which routes are chosen is judged by the tests of the kernels; here only how many tokens they hold.
    """
    family, observed = seen
    assert observed.errors["over budget, padded"] < 1e-4
    assert observed.errors["over budget, unpadded"] < 1e-4
    if Reason.ROUTED in family.prefill:
        assert observed.dense_gap > 0.05  # what was not routed to would have made a difference
    if family.prefill == family.decode == {Reason.ROUTED}:
        assert 0 < observed.most_attended <= BUDGET


@every_family
def test_the_coverage_page_says_what_was_seen(seen):
    family, observed = seen
    lines = table_of(PAGE.read_text()).splitlines()
    assert observed.graphs == graphs_of(family)
    newest = replace(observed, graphs=graphs_of(family, newest=True))
    assert row(family, newest) in lines, f"out of date: {REMEDY}"


def test_the_coverage_page_has_one_line_for_every_family_in_order():
    lines = table_of(PAGE.read_text()).splitlines()
    head = table([]).splitlines()
    assert lines[: len(head)] == head, f"out of date: {REMEDY}"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[len(head) :]] == list(FAMILIES)
