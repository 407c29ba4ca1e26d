import numpy as np
import torch

from hga_compile.demo.density import density, fact_share, pooled
from hga_compile.kernels.ledger import RouteRecord


def record(layer: int, first: int, queries: int, groups: list[list[int]], size: int = 4) -> RouteRecord:
    """Routes of as many KV heads as there are lists, the same for every query."""
    total = -(-(first + queries) // size)
    marks = torch.zeros(1, len(groups), queries, total, dtype=torch.bool)
    for head, chosen in enumerate(groups):
        marks[0, head, :, chosen] = True
    return RouteRecord(layer, first, size, marks)


def test_density_is_the_share_of_layers_and_heads_that_read_a_cell() -> None:
    records = [record(0, 16, 8, [[0, 3], [3]]), record(1, 16, 8, [[1], [3]])]
    found = density(records, first=16, end=24, cell=8)
    assert found.shape == (8, 3)
    np.testing.assert_allclose(found, np.tile([0.5, 0.75, 0.0], (8, 1)))


def test_density_takes_the_queries_asked_for_out_of_several_runs() -> None:
    records = [record(0, 0, 8, [[0]]), record(0, 8, 8, [[1]]), record(0, 16, 8, [[2]])]
    found = density(records, first=6, end=12, cell=4)
    np.testing.assert_allclose(found[:2], [[1, 0, 0]] * 2)
    np.testing.assert_allclose(found[2:], [[0, 1, 0]] * 4)


def test_cells_need_not_match_groups() -> None:
    found = density([record(0, 15, 1, [[1]])], first=15, end=16, cell=3)
    np.testing.assert_allclose(found, [[0, 1, 1, 0, 0, 0]])


def test_queries_without_a_record_read_nothing() -> None:
    assert density([], first=0, end=5, cell=2).sum() == 0


def test_pooled_is_the_mean_of_runs_also_of_a_short_last_one() -> None:
    grid = np.arange(10, dtype=np.float32).reshape(5, 2)
    np.testing.assert_allclose(pooled(grid, 2), [[1, 2], [5, 6], [8, 9]])
    np.testing.assert_allclose(pooled(grid, 1), grid)


def test_fact_share_counts_queries_from_the_first_on() -> None:
    records = [record(0, 16, 8, [[2], [0]]), record(3, 16, 8, [[0], [0]]), record(3, 24, 1, [[3], [2]])]
    assert fact_share(records, 16, 8, 13) == {0: 0.5, 3: 1 / 9}
    assert fact_share(records, 24, 8, 13) == {3: 1.0}
