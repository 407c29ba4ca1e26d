import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hga_compile.kernels.attend import (
    attend_full,
    attend_gathered,
    attend_masked,
    attend_window,
    routed_mask,
)

SCALE = 0.3


def case(tokens: int, queries: int, device: torch.device, v_dim: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Q ``[batch, kv_heads, heads, queries, dim]``, K and V: 2 sequences, 2 KV heads, 3 query heads each."""
    query = torch.randn(2, 2, 3, queries, 20)
    return (
        query.to(device),
        torch.randn(2, 2, tokens, 20).to(device),
        torch.randn(2, 2, tokens, v_dim).to(device),
    )


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend in float64 under a mask ``[batch, kv_heads, queries, tokens]``; 0 for queries without a key."""
    scores = torch.einsum("bkhqd,bktd->bkhqt", query.double(), key.double()) * SCALE
    weight = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bkhqt,bktd->bkhqd", weight, value.double()).float()


def causal(tokens: int, queries: int, device: torch.device, window: int = 10**6) -> Tensor:
    position = torch.arange(tokens - queries, tokens)[:, None]
    number = torch.arange(tokens)
    mask = (number <= position) & (number > position - window)
    return mask.expand(2, 2, queries, tokens).to(device)


@pytest.mark.parametrize(("tokens", "queries"), [(9, 9), (9, 4), (9, 1), (1, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_full_attention_is_causal(tokens: int, queries: int, padded: bool, device: torch.device) -> None:
    query, key, value = case(tokens, queries, device)
    mask = causal(tokens, queries, device)
    key_mask = None
    if padded:
        key_mask = torch.rand(2, tokens, device=device) < 0.5
        mask = mask & key_mask[:, None, None]
    got = attend_full(query, key, value, key_mask, SCALE)
    torch.testing.assert_close(got, reference(query, key, value, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "queries", "window"),
    [(9, 9, 1), (9, 9, 4), (9, 9, 100), (30, 1, 5), (30, 6, 5), (600, 600, 7), (700, 520, 300), (4, 4, 4)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_window_attention_reaches_back_as_far_as_the_window(
    tokens: int, queries: int, window: int, padded: bool, device: torch.device
) -> None:
    query, key, value = case(tokens, queries, device)
    mask = causal(tokens, queries, device, window)
    key_mask = None
    if padded:
        key_mask = torch.rand(2, tokens, device=device) < 0.5
        mask = mask & key_mask[:, None, None]
    want = reference(query, key, value, mask)
    got = attend_window(query, key, value, key_mask, SCALE, window)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    # Tokens that no query reaches need not be there.
    spare = max(0, tokens - queries - window + 1)
    if spare:
        short = None if key_mask is None else key_mask[:, spare:]
        got = attend_window(query, key[:, :, spare:], value[:, :, spare:], short, SCALE, window)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_masked_and_gathered_attention_agree(device: torch.device) -> None:
    query, key, value = case(25, 1, device)
    mask = (torch.rand(2, 2, 1, 25) < 0.3).to(device)
    mask[1, 0] = False
    want = reference(query, key, value, mask)
    got = attend_masked(query, key, value, mask, SCALE)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    rows = (part.flatten(0, 1) for part in (query[:, :, :, 0], key, value, mask[:, :, 0]))
    one = attend_gathered(*rows, SCALE)
    torch.testing.assert_close(one, want[:, :, :, 0].flatten(0, 1), rtol=0, atol=1e-5)


def test_gathered_attention_without_a_mask_takes_all(device: torch.device) -> None:
    query, key, value = case(25, 1, device, v_dim=20)
    rows = (part.flatten(0, 1) for part in (query[:, :, :, 0], key, value))
    got = attend_gathered(*rows, None, SCALE)
    want = scaled_dot_product_attention(query[:, :, :, 0], key, value, scale=SCALE)
    torch.testing.assert_close(got, want.flatten(0, 1), rtol=0, atol=1e-5)


def test_groups_are_spread_over_tokens() -> None:
    groups = torch.tensor([[[2, 0], [1, 2]]])
    kept = torch.tensor([[[True, False], [True, True]]])
    fixed = torch.zeros(1, 2, 4, dtype=torch.bool)
    fixed[0, 0, 3] = True
    dense = torch.tensor([[[False], [False]]])
    mask = routed_mask(groups, kept, fixed, dense, 3, 10)
    assert mask.int().tolist() == [[[0, 0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1, 0]]]
    dense[0, 1] = True
    assert routed_mask(groups, kept, fixed, dense, 3, 10)[0, 1].all()
