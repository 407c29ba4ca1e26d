import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hga_compile.kernels.tail import TailSummary, attend_gathered_with_tail, attend_masked_with_tail

SIZE = 8


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, unrouted: Tensor, mean_query: Tensor
) -> Tensor:
    """Give every unrouted token the score ``m.k + (q - m).kt``, in float64."""
    query, key, value, mean_query = (part.double() for part in (query, key, value, mean_query))
    rows, heads, queries, _ = query.shape
    out = torch.zeros(rows, heads, queries, value.shape[2], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            about = key[row] @ mean_query[row, head]
            for q in range(queries):
                scores = torch.full((key.shape[1],), -torch.inf, dtype=torch.float64)
                for token in range(key.shape[1]):
                    if mask[row, q, token]:
                        scores[token] = query[row, head, q] @ key[row, token]
                    elif unrouted[row, q, token]:
                        chunk = slice(token // SIZE * SIZE, (token // SIZE + 1) * SIZE)
                        mean_key = about[chunk].softmax(0) @ key[row, chunk]
                        scores[token] = (
                            about[token] + (query[row, head, q] - mean_query[row, head]) @ mean_key
                        )
                if torch.isfinite(scores).any():
                    out[row, head, q] = scores.softmax(0) @ value[row]
    return out


def summary_of(key: Tensor, value: Tensor, mean_query: Tensor) -> TailSummary:
    tail = TailSummary(SIZE, mean_query, value.shape[2])
    whole = key.shape[1] // SIZE * SIZE
    tail.append(key[:, :whole], value[:, :whole])
    return tail


def gathered(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, counted: Tensor, tail: TailSummary
) -> Tensor:
    """Run `attend_gathered_with_tail` on routed tokens out of order, with some rows that are none."""
    rows, tokens = mask.shape
    order = torch.randperm(tokens + 3) % tokens
    meant = mask[:, order]
    meant[:, [number for number, token in enumerate(order) if token in order[:number]]] = False
    key, value = (part[:, order].masked_fill(~meant[..., None], 0.0) for part in (key, value))
    chunk = (order // SIZE).expand(rows, -1)
    return attend_gathered_with_tail(query, key, value, meant, chunk, counted, tail)


def case(
    tokens: int = 30,
    rows: int = 2,
    heads: int = 3,
    queries: int = 4,
    dim: int = 8,
    v_dim: int = 5,
    size: float = 1.0,
):
    query = torch.randn(rows, heads, queries, dim) * size
    mean_query = torch.randn(rows, heads, dim) * size
    key, value = torch.randn(rows, tokens, dim), torch.randn(rows, tokens, v_dim)
    mask = torch.rand(rows, queries, tokens) < 0.4
    return query, key, value, mask, mean_query


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 30),
    size=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_both_ways_follow_the_definition(seed: int, tokens: int, size: float, share: float) -> None:
    torch.manual_seed(seed)
    query, key, value, _, mean_query = case(tokens, queries=2, size=size)
    mask = torch.rand(2, 2, tokens) < share
    chunks = tokens // SIZE
    counted = torch.rand(2, 2, chunks) < 0.8
    unrouted = torch.zeros(2, 2, tokens, dtype=torch.bool)
    unrouted[..., : chunks * SIZE] = counted.repeat_interleave(SIZE, -1)
    unrouted &= ~mask
    want = by_definition(query, key, value, mask, unrouted, mean_query)
    tail = summary_of(key, value, mean_query)
    got = attend_masked_with_tail(query, key, value, mask, unrouted, tail)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-5)
    if chunks == 0:
        return
    for number in range(2):
        one = gathered(query[:, :, number], key, value, mask[:, number], counted[:, number], tail)
        torch.testing.assert_close(one.double(), want[:, :, number], rtol=0, atol=3e-5)


def test_is_exact_for_the_mean_query_itself(device: torch.device) -> None:
    _, key, value, mask, mean_query = (part.to(device) for part in case(32))
    query = mean_query[:, :, None].expand(-1, -1, 4, -1).contiguous()
    tail = summary_of(key, value, mean_query)
    dense = torch.einsum("rhqt,rtd->rhqd", torch.einsum("rhqd,rtd->rhqt", query, key).softmax(-1), value)
    got = attend_masked_with_tail(query, key, value, mask, ~mask, tail)
    torch.testing.assert_close(got, dense, rtol=0, atol=1e-5)


def test_routing_everything_is_exact(device: torch.device) -> None:
    query, key, value, mask, mean_query = (part.to(device) for part in case(32, size=10.0))
    tail = summary_of(key, value, mean_query)
    everything = torch.ones_like(mask)
    dense = torch.einsum("rhqt,rtd->rhqd", torch.einsum("rhqd,rtd->rhqt", query, key).softmax(-1), value)
    got = attend_masked_with_tail(query, key, value, everything, ~everything, tail)
    torch.testing.assert_close(got, dense, rtol=0, atol=1e-5)
    chunk = (torch.arange(32, device=device) // SIZE).expand(2, -1)
    counted = torch.ones(2, 4, dtype=torch.bool, device=device)
    one = attend_gathered_with_tail(query[:, :, 0], key, value, everything[:, 0], chunk, counted, tail)
    torch.testing.assert_close(one, dense[:, :, 0], rtol=0, atol=1e-4)


def test_nothing_at_all_gives_zero() -> None:
    query, key, value, mask, mean_query = case(16)
    tail, none = summary_of(key, value, mean_query), torch.zeros_like(mask)
    assert not attend_masked_with_tail(query, key, value, none, none, tail).any()
    counted = torch.zeros(2, 2, dtype=torch.bool)
    chunk = (torch.arange(16) // SIZE).expand(2, -1)
    assert not attend_gathered_with_tail(query[:, :, 0], key, value, none[:, 0], chunk, counted, tail).any()


def test_tiles_may_end_before_the_last_summary() -> None:
    query, key, value, mask, mean_query = case(30)
    tail = summary_of(key, value, mean_query)
    for tokens in (4, 8, 13, 16, 29):
        routed = mask[..., :tokens]
        got = attend_masked_with_tail(
            query, key[:, :tokens], value[:, :tokens], routed, torch.zeros_like(routed), tail
        )
        scores = torch.einsum("rhqd,rtd->rhqt", query, key[:, :tokens]).masked_fill(
            ~routed[:, None], -torch.inf
        )
        want = torch.einsum("rhqt,rtd->rhqd", scores.softmax(-1).nan_to_num(0.0), value[:, :tokens])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_broken_key_shows_wherever_it_counts() -> None:
    query, key, value, mask, mean_query = case(16)
    key[0, 3, 2] = torch.nan
    tail = summary_of(key, value, mean_query)
    chunk = (torch.arange(16) // SIZE).expand(2, -1)
    counted = torch.ones(2, 2, dtype=torch.bool)
    for routed in (torch.zeros_like(mask), torch.ones_like(mask), mask):
        got = attend_masked_with_tail(query, key, value, routed, ~routed, tail)
        assert torch.isnan(got[0]).all() and torch.isfinite(got[1]).all()
        meant = routed[:, 0]
        rows = (part.masked_fill(~meant[..., None], 0.0) for part in (key, value))
        one = attend_gathered_with_tail(query[:, :, 0], *rows, meant, chunk, counted, tail)
        assert torch.isnan(one[0]).all() and torch.isfinite(one[1]).all()


def test_pieces_truncation_and_rows() -> None:
    query, key, value, mask, mean_query = case(32, rows=3)
    want = attend_masked_with_tail(query, key, value, mask, ~mask, summary_of(key, value, mean_query))
    tail = TailSummary(SIZE, mean_query, value.shape[2])
    tail.append(key[:, :8], value[:, :8])
    tail.append(torch.randn(3, 800, 8), torch.randn(3, 800, 5))
    tail.truncate(1)
    assert tail.chunks == 1
    tail.append(key[:, 8:], value[:, 8:])
    torch.testing.assert_close(attend_masked_with_tail(query, key, value, mask, ~mask, tail), want)
    rows = torch.tensor([2, 0, 0])
    tail.select_rows(rows)
    got = attend_masked_with_tail(query[rows], key[rows], value[rows], mask[rows], ~mask[rows], tail)
    torch.testing.assert_close(got, want[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rows_are_summed_in_float32(dtype: torch.dtype) -> None:
    query, key, value, mask, mean_query = case(32)
    key, value = key.to(dtype), value.to(dtype)
    tail = summary_of(key, value, mean_query)
    want = by_definition(query, key, value, mask, ~mask, mean_query)
    got = attend_masked_with_tail(query, key, value, mask, ~mask, tail)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_counts_its_bytes() -> None:
    _, key, value, _, mean_query = case(32)
    tail = summary_of(key, value, mean_query)
    # Of each chunk and query head: a log mass, a key and a value in float32.
    assert tail.bytes_per_token() == 3 * (1 + 8 + 5) * 4 / SIZE
    assert tail.nbytes() >= 2 * 3 * (4 * (1 + 8 + 5) + 8) * 4
