import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hga_compile.kernels.route import merge_votes, per_row

INF = torch.inf


def slowly(scores: torch.Tensor, seen: torch.Tensor, rule: str) -> np.ndarray:
    """Votes of one row and query: ``[heads, groups, members]`` to ``[groups]``."""
    table = scores.double().numpy()
    votes = np.zeros((table.shape[0], table.shape[1]))
    infinite = np.zeros(table.shape[1], bool)
    for head, members in enumerate(table):
        good = np.ones(len(members), bool)
        for group, row in enumerate(members):
            if seen[group] and any(np.isnan(value) or value == np.inf for value in row):
                infinite[group], good[group] = True, False
        use = [
            group
            for group in range(len(members))
            if seen[group] and good[group] and np.isfinite(members[group]).any()
        ]
        if use:
            peak = members[use].max()
            mass = np.exp(members[use] - peak).sum(1)
            votes[head, use] = mass / mass.sum()
    merged = votes.sum(0) if rule == "mass_sum" else votes.max(0)
    merged[infinite] = np.inf
    return merged


special = st.sampled_from([0.0, 1.0, -1.0, 5.0, 90.0, -90.0, 1e30, -1e30, -INF, INF, torch.nan])
values = st.one_of(st.floats(-20, 20, width=32), special)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    data=st.data(),
    heads=st.integers(1, 3),
    groups=st.integers(1, 6),
    members=st.integers(1, 5),
    rule=st.sampled_from(["mass_sum", "mass_max"]),
)
def test_votes_are_softmax_masses_of_the_seen_groups(
    data: st.DataObject, heads: int, groups: int, members: int, rule: str
) -> None:
    plain = data.draw(st.booleans())
    source = st.floats(-20, 20, width=32) if plain else values
    count = heads * groups * members
    scores = torch.tensor(data.draw(st.lists(source, min_size=count, max_size=count))).view(
        1, heads, 1, groups, members
    )
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=groups, max_size=groups)))
    want = slowly(scores[0, :, 0], seen, rule)
    got = merge_votes(scores.clone(), seen.view(1, 1, groups), rule)
    assert got.shape == (1, 1, groups)
    np.testing.assert_allclose(got[0, 0].numpy(), want, rtol=1e-5, atol=1e-6)
    # Groups known to be seen need no mask.
    certain = next((number for number, each in enumerate(seen.tolist()) if not each), groups)
    assert torch.equal(merge_votes(scores.clone(), seen.view(1, 1, groups), rule, certain), got)
    if certain == groups:
        assert torch.equal(merge_votes(scores.clone(), None, rule), got)


@pytest.mark.parametrize("rule", ["mass_sum", "mass_max"])
def test_queries_and_rows_do_not_meet(rule: str, device: torch.device) -> None:
    scores = torch.randn(3, 2, 4, 5, 2).to(device)
    scores[1, 0, 2, 3, 1] = torch.nan
    scores[2, 1, 0, 0, 0] = INF
    seen = (torch.rand(3, 4, 5) < 0.6).to(device)
    seen[0, 1] = False
    together = merge_votes(scores.clone(), seen, rule)
    for row in range(3):
        for query in range(4):
            alone = merge_votes(
                scores[row : row + 1, :, query : query + 1].clone(),
                seen[row : row + 1, query : query + 1],
                rule,
            )
            torch.testing.assert_close(together[row, query], alone[0, 0])
    assert not together[0, 1].any()


def test_no_groups_make_no_votes() -> None:
    empty = merge_votes(torch.zeros(2, 3, 1, 0, 4), torch.zeros(2, 1, 0, dtype=torch.bool), "mass_sum")
    assert empty.shape == (2, 1, 0)


def test_a_field_of_a_plan_is_spread_over_kv_heads(device: torch.device) -> None:
    part = torch.tensor([[1, 2], [3, 4]])
    assert per_row(part, 4, device).tolist() == [[[1], [2]], [[1], [2]], [[3], [4]], [[3], [4]]]
    assert per_row(part[:1], 4, device).shape == (1, 2, 1)
