import pytest
import torch
from torch import Tensor

from hga_compile.kernels.chunks import ChunkSummary


def summary_of(keys: Tensor, size: int = 16, parts: int = 4) -> ChunkSummary:
    summary = ChunkSummary(size, parts, keys.shape[0], keys.shape[2], keys.device)
    summary.append(keys)
    return summary


@pytest.mark.parametrize("parts", [1, 2, 16])
def test_a_chunk_scores_as_its_best_part(parts: int, device: torch.device) -> None:
    keys, query = torch.randn(2, 64, 20).to(device), torch.randn(2, 3, 5, 20).to(device)
    summary = summary_of(keys, 16, parts)
    assert summary.chunks == 4
    means = keys.view(2, 4, parts, 16 // parts, 20).mean(3).bfloat16().float()
    want = torch.einsum("rhqd,rcpd->rhqcp", query, means).amax(-1)
    for limit in (4, 1):
        got = summary.scores(query, limit)
        assert got.shape == (2, 3, 5, limit, 1)
        torch.testing.assert_close(got[..., 0], want[..., :limit])


def test_one_strong_key_is_not_washed_out_by_parts() -> None:
    keys, query = torch.zeros(1, 128, 8), torch.zeros(1, 1, 1, 8)
    keys[0, 70, 0] = query[0, 0, 0, 0] = 4.0
    keys[0, :64, 0] = 0.25  # a chunk of lukewarm ones
    assert summary_of(keys, 64, 1).scores(query, 2)[0, 0, 0].argmax() == 0
    assert summary_of(keys, 64, 16).scores(query, 2)[0, 0, 0].argmax() == 1


def test_pieces_truncation_and_rows() -> None:
    keys, query = torch.randn(3, 320, 20), torch.randn(3, 2, 1, 20)
    whole = summary_of(keys).scores(query, 20)
    pieces = summary_of(keys[:, :16])
    pieces.append(keys[:, 16:160])
    pieces.append(torch.randn(3, 32, 20))
    pieces.truncate(10)
    assert pieces.chunks == 10
    pieces.append(keys[:, 160:])
    torch.testing.assert_close(pieces.scores(query, 20), whole)
    rows = torch.tensor([1, 1, 0, 2])
    pieces.select_rows(rows)
    torch.testing.assert_close(pieces.scores(query[rows], 20), whole[rows])


def test_a_broken_key_breaks_its_chunk_only() -> None:
    keys = torch.randn(1, 64, 8)
    keys[0, 20, 3] = torch.nan
    scores = summary_of(keys).scores(torch.randn(1, 1, 1, 8), 4)
    assert torch.isnan(scores).flatten().tolist() == [False, True, False, False]


def test_counts_its_bytes() -> None:
    summary = summary_of(torch.randn(3, 64, 20))
    # Four bfloat16 means of 20 channels for 16 tokens.
    assert summary.bytes_per_token() == 4 * 20 * 2 / 16
    assert summary.nbytes() >= 3 * 16 * 20 * 2
