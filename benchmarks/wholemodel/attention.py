"""Dense attention for the peers: the fastest that PyTorch has for each call, and never a mask in memory.

What transformers would do in its place, for prefill in steps or a static cache, is to build a mask of queries
by tokens and to copy the K/V of every group of query heads. The peers are spared both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

__all__ = ["NAME", "static_cache"]

NAME = "wholemodel"
# cuDNN is the faster one, but builds a plan for every length: not for a cache that grows with each token.
_GROWING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_FIXED = [SDPBackend.CUDNN_ATTENTION, *_GROWING]


@dataclass
class _Reads:
    """How the K/V that attention is given are to be read."""

    tokens: int | None = None
    fixed: bool = False
    starts: tuple[int, ...] = ()


_reads = _Reads()

torch.library.define("wholemodel::attend", "(Tensor query, Tensor key, Tensor value, float scale) -> Tensor")


@contextmanager
def static_cache(tokens: int | None, starts: tuple[int, ...] = ()) -> Iterator[None]:
    """Have attention read the first `tokens` of a static cache; None: all of it, whatever its length.

    With `starts`, a number for each sequence, what is ahead of it there is padding, which is not read.
    """
    before = (_reads.tokens, _reads.fixed, _reads.starts)
    _reads.tokens, _reads.fixed, _reads.starts = tokens, tokens is None, starts
    try:
        yield
    finally:
        _reads.tokens, _reads.fixed, _reads.starts = before


@torch.library.register_fake("wholemodel::attend")
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.impl("wholemodel::attend", ("CPU", "CUDA"))
def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    # The op is opaque to the compiler: a length that changes with every step is no reason to compile again.
    if _reads.tokens is not None:
        key, value = key[:, :, : _reads.tokens], value[:, :, : _reads.tokens]
    if not _reads.starts:
        return _dense(query, key, value, scale)
    # One after the other: of PyTorch's kernels the fast ones take no mask, and read no padding so.
    own = [slice(number, number + 1) for number in range(len(query))]
    parts = [
        _dense(query[one], key[one, :, start:], value[one, :, start:], scale)
        for one, start in zip(own, _reads.starts, strict=True)
    ]
    return torch.cat(parts)


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    new, tokens = query.shape[2], key.shape[2]
    bias = causal_lower_right(new, tokens) if 1 < new < tokens else None
    given: dict[str, Any] = {"attn_mask": bias, "scale": scale, "enable_gqa": True}
    with sdpa_kernel(_FIXED if _reads.fixed or new == tokens else _GROWING, set_priority=True):
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=new == tokens > 1, **given)
    return out.contiguous()


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend, as transformers calls it: ``[batch, tokens, heads, dim]`` out."""
    out: Tensor = torch.ops.wholemodel.attend(query, key, value, scaling)
    return out.transpose(1, 2), None


# Without a mask function of the same name transformers makes no mask.
AttentionInterface.register(NAME, _forward)
