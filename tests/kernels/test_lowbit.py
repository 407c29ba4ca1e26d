import numpy as np
import pytest
import torch
from cases import routing
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import hadamard
from torch import Tensor

from hga_compile.kernels.lowbit import LowBitSummary, decode_keys, encode_keys

BITS = [1, 2, 4, 8]


def unpacked(codes: Tensor, bits: int, dim: int) -> np.ndarray:
    """Level numbers ``[rows, tokens, dim]``, by the documented layout of the bytes."""
    rows, _, tokens = codes.shape
    out = np.zeros((rows, tokens, dim), int)
    for channel in range(dim):
        byte = codes[:, channel * bits // 8].numpy().astype(int)
        out[:, :, channel] = byte >> (channel * bits % 8) & (2**bits - 1)
    return out


def summary_of(keys: Tensor, bits: int = 2, group_size: int = 4) -> LowBitSummary:
    summary = LowBitSummary(routing(bits=bits, group_size=group_size), keys.float().mean(1))
    summary.append(keys)
    return summary


def reference_scores(summary: LowBitSummary, query: Tensor) -> np.ndarray:
    """Scores of every token by its decoded key, in float64."""
    tokens = summary.groups * summary.group_size
    codes, scales = summary.codes[:, :, :tokens], summary.scales[:, :tokens]
    decoded = decode_keys(codes, scales, summary.bits, summary.dim).double().numpy()
    return np.einsum("rhqd,rtd->rhqt", query.double().numpy() @ hadamard(summary.dim), decoded)


@pytest.mark.parametrize("dim", [1, 7, 8, 20, 64])
@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_as_documented(bits: int, dim: int) -> None:
    keys = torch.randn(2, 5, dim)
    codes, scales = encode_keys(keys, bits)
    assert codes.shape == (2, -(-dim * bits // 8), 5) and codes.dtype == torch.uint8
    assert scales.shape == (2, 5) and scales.dtype == torch.float16
    levels = unpacked(codes, bits, dim) - (2**bits - 1) / 2
    np.testing.assert_array_equal(
        decode_keys(codes, scales, bits, dim).numpy(), levels * scales.float().numpy()[..., None]
    )


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_is_the_least_squares_fit(bits: int) -> None:
    keys = torch.randn(3, 6, 20) * torch.tensor([0.01, 1.0, 300.0])[:, None, None]
    codes, scales = encode_keys(keys, bits)
    levels = unpacked(codes, bits, 20) - (2**bits - 1) / 2
    fit = (keys.numpy() * levels).sum(-1) / (levels**2).sum(-1)
    np.testing.assert_allclose(scales.float().numpy(), fit, rtol=1e-3)
    assert (scales > 0).all()


@pytest.mark.parametrize(("bits", "error"), [(1, 0.61), (2, 0.36), (4, 0.12), (8, 0.012)])
def test_more_bits_round_finer(bits: int, error: float) -> None:
    # The root of Max's least distortions for a normal variable: 0.603, 0.343, 0.107, 0.009.
    keys = torch.randn(1, 500, 64)
    decoded = decode_keys(*encode_keys(keys, bits), bits, 64)
    assert float((decoded - keys).square().mean().sqrt()) < error


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_key_decodes_to_zero(bits: int) -> None:
    decoded = decode_keys(*encode_keys(torch.zeros(1, 3, 16), bits), bits, 16)
    assert torch.equal(decoded, torch.zeros(1, 3, 16))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", BITS)
def test_a_broken_key_has_a_broken_scale_and_no_other_has(bits: int, broken: float) -> None:
    keys = torch.randn(1, 3, 16)
    sound = encode_keys(keys, bits)
    keys[0, 1, 5] = broken
    codes, scales = encode_keys(keys, bits)
    assert torch.isfinite(scales).tolist() == [[True, False, True]]
    assert torch.equal(codes[..., ::2], sound[0][..., ::2]) and torch.equal(scales[:, ::2], sound[1][:, ::2])


@pytest.mark.parametrize("size", [1e4, 1e6, 1e15])
@pytest.mark.parametrize("bits", BITS)
def test_a_huge_key_keeps_its_direction(bits: int, size: float) -> None:
    key = torch.randn(1, 1, 64) * size
    codes, scales = encode_keys(key, bits)
    assert torch.isfinite(scales).all()
    decoded = decode_keys(codes, scales, bits, 64)
    assert torch.cosine_similarity(decoded, key, -1) > 0.75


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(BITS),
    dim=st.integers(1, 40),
    group_size=st.sampled_from([1, 3, 4]),
    heads=st.integers(1, 5),
    queries=st.sampled_from([1, 2, 9]),
    seed=st.integers(0, 100),
)
def test_scores_are_those_of_the_decoded_keys(
    bits: int, dim: int, group_size: int, heads: int, queries: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 6 * group_size, dim, generator=random).mul(32).round() / 32
    query = torch.randn(2, heads, queries, dim, generator=random)
    summary = LowBitSummary(
        routing(bits=bits, group_size=group_size, chunk_size=12, chunk_parts=1), keys[:, :1].mean(1)
    )
    summary.append(keys)
    want = reference_scores(summary, query)
    scorer = summary.scorer(6)
    for limit in (6, 4, 1):
        got = scorer(query, limit)
        assert got.shape == (2, heads, queries, limit, group_size) and got.dtype == torch.float32
        np.testing.assert_allclose(
            got.flatten(3).numpy(),
            want[..., : limit * group_size],
            rtol=0,
            atol=2e-3 * max(1, np.abs(want).max()),
        )


def test_a_broken_query_has_broken_scores() -> None:
    summary = summary_of(torch.randn(1, 8, 16))
    query = torch.randn(1, 2, 1, 16)
    query[0, 0, 0, 3] = torch.nan
    scores = summary.scorer(2)(query, 2)
    assert torch.isnan(scores[0, 0]).all() and torch.isfinite(scores[0, 1]).all()


def test_the_caller_may_overwrite_scores() -> None:
    summary = summary_of(torch.randn(1, 16, 16))
    query, many = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 30, 16)
    scorer = summary.scorer(4)
    for asked in (query, many):
        first = scorer(asked, 4)
        kept = first.clone()
        first.fill_(torch.nan)
        assert torch.equal(scorer(asked, 4), kept)


@pytest.mark.parametrize("bits", BITS)
def test_appending_in_pieces_is_appending_at_once(bits: int, device: torch.device) -> None:
    keys = torch.randn(3, 400, 20).to(device)
    whole = summary_of(keys, bits)
    pieces = LowBitSummary(routing(bits=bits), whole.centre)
    for begin, end in ((0, 4), (4, 120), (120, 124), (124, 400)):
        pieces.append(keys[:, begin:end])
    query = torch.randn(3, 2, 1, 20).to(device)
    assert pieces.groups == whole.groups == 100
    torch.testing.assert_close(pieces.scorer(100)(query, 100), whole.scorer(100)(query, 100))


@pytest.mark.parametrize("bits", BITS)
def test_keys_are_centred_and_turned_before_they_are_coded(bits: int) -> None:
    keys = torch.randn(2, 8, 16).mul(32).round() / 32
    summary = LowBitSummary(routing(bits=bits), keys[:, 3])
    summary.append(keys)
    turned = (keys - keys[:, 3:4]).double().numpy() @ hadamard(16)
    codes, scales = encode_keys(torch.from_numpy(turned).float(), bits)
    assert torch.equal(summary.codes[:, :, :8], codes) and torch.equal(summary.scales[:, :8], scales)


def test_truncating_makes_room_for_other_keys(device: torch.device) -> None:
    keys, others = torch.randn(2, 40, 16).to(device), torch.randn(2, 24, 16).to(device)
    summary = summary_of(keys)
    summary.truncate(4)
    summary.truncate(9)  # more than there are left
    assert summary.groups == 4
    summary.append(others)
    fresh = LowBitSummary(routing(), summary.centre)
    fresh.append(torch.cat([keys[:, :16], others], 1))
    query = torch.randn(2, 2, 1, 16).to(device)
    torch.testing.assert_close(summary.scorer(10)(query, 10), fresh.scorer(10)(query, 10))


def test_rows_are_selected_with_their_centre(device: torch.device) -> None:
    keys = (torch.randn(3, 16, 16) + 5 * torch.randn(3, 1, 16)).to(device)
    summary, query = summary_of(keys), torch.randn(3, 2, 1, 16).to(device)
    want = summary.scorer(4)(query, 4)
    rows = torch.tensor([2, 0, 0, 1])
    summary.select_rows(rows)
    torch.testing.assert_close(summary.scorer(4)(query[rows], 4), want[rows])
    # The rows are independent from then on, and keys that follow are coded about each row's own centre.
    summary.append(keys[rows][:, :4])
    torch.testing.assert_close(summary.scorer(5)(query[rows], 5)[:, :, :, 4], want[rows][:, :, :, 0])


def test_counts_its_bytes() -> None:
    summary = summary_of(torch.randn(3, 40, 20))
    assert summary.bytes_per_token() == 5 + 2
    assert summary.nbytes() >= 3 * 40 * 7
    assert summary.nbytes() == summary.codes.nbytes + summary.scales.nbytes + 3 * 20 * 4
