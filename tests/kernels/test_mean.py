import pytest
import torch
from cases import routing
from torch import Tensor

from hga_compile.kernels.mean import MeanSummary
from hga_compile.kernels.summaries import make_summary, register_summary


def summary_of(keys: Tensor, group_size: int = 4, dtype: torch.dtype = torch.float32) -> MeanSummary:
    summary = MeanSummary(group_size, keys.shape[0], keys.shape[2], dtype, keys.device)
    summary.append(keys)
    return summary


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_scores_are_those_of_the_mean_keys(group_size: int, device: torch.device) -> None:
    keys, query = torch.randn(2, 48, 20).to(device), torch.randn(2, 3, 5, 20).to(device)
    groups = 48 // group_size
    scorer = summary_of(keys, group_size).scorer(groups)
    want = torch.stack([query @ part.mean(1)[:, None, :, None] for part in keys.split(group_size, 1)], 3)
    for limit in (groups, 1):
        got = scorer(query, limit)
        assert got.shape == (2, 3, 5, limit, 1)
        torch.testing.assert_close(got, want[:, :, :, :limit])


def test_means_are_of_full_precision_keys_and_kept_as_bfloat16() -> None:
    keys = (1 + torch.randn(1, 64, 8) / 100).bfloat16()
    summary = make_summary(routing(summary="mean", group_size=16), torch.zeros(1, 8))
    summary.append(keys)
    got = summary.scorer(4)(torch.eye(8)[None, None], 4)[0, 0, :, :, 0].T
    want = keys.float().view(4, 16, 8).mean(1).bfloat16().float()
    assert torch.equal(got, want)
    assert summary.bytes_per_token() == 8 * 2 / 16


def test_appending_in_pieces_is_appending_at_once() -> None:
    keys, query = torch.randn(3, 400, 20), torch.randn(3, 2, 1, 20)
    whole = summary_of(keys)
    pieces = summary_of(keys[:, :4])
    for begin, end in ((4, 120), (120, 124), (124, 400)):
        pieces.append(keys[:, begin:end])
    assert pieces.groups == 100
    torch.testing.assert_close(pieces.scorer(100)(query, 100), whole.scorer(100)(query, 100))


def test_truncating_makes_room_for_other_keys() -> None:
    keys, others, query = torch.randn(2, 40, 16), torch.randn(2, 24, 16), torch.randn(2, 2, 1, 16)
    summary = summary_of(keys)
    summary.truncate(4)
    summary.append(others)
    fresh = summary_of(torch.cat([keys[:, :16], others], 1))
    torch.testing.assert_close(summary.scorer(10)(query, 10), fresh.scorer(10)(query, 10))


def test_rows_are_selected() -> None:
    keys, query = torch.randn(3, 16, 16), torch.randn(3, 2, 1, 16)
    summary, rows = summary_of(keys), torch.tensor([2, 2, 0])
    want = summary.scorer(4)(query, 4)
    summary.select_rows(rows)
    torch.testing.assert_close(summary.scorer(4)(query[rows], 4), want[rows])


def test_a_broken_key_breaks_its_group_only() -> None:
    keys = torch.randn(1, 16, 16)
    keys[0, 6, 3] = torch.nan
    scores = summary_of(keys).scorer(4)(torch.randn(1, 2, 1, 16), 4)
    assert torch.isnan(scores)[0, :, 0, :, 0].tolist() == [[False, True, False, False]] * 2


def test_counts_its_bytes() -> None:
    summary = summary_of(torch.randn(3, 40, 20))
    assert summary.bytes_per_token() == 20 * 4 / 4
    assert summary.nbytes() >= 3 * 10 * 20 * 4


def test_a_kind_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from hga_compile.kernels import summaries

    monkeypatch.setattr(summaries, "_KINDS", dict(summaries._KINDS))
    made = object()
    register_summary("mean")(lambda routing, centre, kernels: made)  # type: ignore[arg-type]
    assert make_summary(routing(summary="mean"), torch.zeros(1, 8)) is made
    del summaries._KINDS["mean"]
    with pytest.raises(ValueError, match=r"got 'mean', expected one of .*'lowbit'.* \(routing.summary\)"):
        make_summary(routing(summary="mean"), torch.zeros(1, 8))
