"""A Hugging Face model that attends to what a router chooses: plain torch, without the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from hga_compile.configs.routing import Routing
from hga_compile.evaluation.candidates import Outcome, Use, fill_cache
from routers.choice import attended
from routers.router import BYTES, Layer, Router

NAME = "hga_routers"
AT_ONCE = 64  # queries: their scores against 8K tokens are 19 MB in a layer of SmolLM2
FOLLOWING = 256  # queries after a key that say how much it is attended to


class RoutedModel:
    """A model whose attention is dense, or goes by a router while one is measured.

    Parameters
    ----------
    model
        Loaded, on the CPU. Its attention function is replaced; layers with a sliding window stay as they are.
    advance
        Told the tokens of each run.
    """

    def __init__(self, model: PreTrainedModel, advance: Callable[[int], None] = lambda _: None) -> None:
        self.model, self.advance = model, advance
        self.measured: _Measured | None = None
        self.query_sums: dict[int, Tensor] = {}
        """Sums of the queries up to each position, of the last sequence that was read from its start."""
        AttentionInterface.register(NAME, self._attend)
        model.set_attn_implementation(NAME)

    def candidate(self, router: Router, routing: Routing, bonus: float = 0.0) -> RouterCandidate:
        """Return what a study measures."""
        return RouterCandidate(self, router, routing, bonus)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, sliding_window: int | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if attention_mask is not None or len(query) != 1:
            raise ValueError(
                f"one sequence without padding expected, got {len(query)} and "
                f"{'no mask' if attention_mask is None else 'a mask'}"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if sliding_window is None and self.measured is not None:
            out = self.measured.attend(module.layer_idx, query[0], key[0], value[0], scale)[None]
        else:
            if sliding_window is None and query.shape[2] == key.shape[2]:
                heads = query[0].unflatten(0, (key.shape[1], -1)).float().mean(1)
                self.query_sums[module.layer_idx] = heads.mul(scale).cumsum(1)
            out = _dense(query, key, value, scale, sliding_window)
        return out.transpose(1, 2).contiguous(), None


class RouterCandidate:
    """One router at one budget, as `hga_compile.evaluation` measures candidates."""

    def __init__(self, routed: RoutedModel, router: Router, routing: Routing, bonus: float) -> None:
        self.routed, self.router, self.routing, self.bonus = routed, router, routing, bonus

    def decode(self, dense: DynamicCache, prefix: int, queries: Tensor) -> Outcome:
        """Every query is routed by itself over the tokens before it, on the dense model's K/V."""
        cache = fill_cache(DynamicCache(), dense, prefix)
        measured = self.routed.measured = _Measured(self, prefix)
        try:
            output = self.routed.model(input_ids=queries, past_key_values=cache, use_cache=True)
        finally:
            self.routed.measured = None
        self.routed.advance(queries.shape[1])
        return Outcome(output.logits[0], measured.use())

    def whole(self, ids: Tensor, scored: int) -> Outcome:
        """Not measured: a prefill in plain torch takes hours."""
        raise NotImplementedError("routers are compared in mode decode")


class _Measured:
    """One run of a candidate: attends, and counts."""

    def __init__(self, candidate: RouterCandidate, prefix: int) -> None:
        self.candidate, self.prefix = candidate, prefix
        self.visible = self.attended = 0
        self.index_bytes = self.dense_bytes = 0.0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rows, tokens, dim = key.shape
        first = tokens - query.shape[1]
        grouped = query.unflatten(0, (rows, -1))
        scaled = grouped.float() * scale
        following = received(key.float(), self.candidate.routed.query_sums[layer], self.prefix)
        index = self.candidate.router.index(Layer(key.float(), following))
        parts = []
        for begin in range(0, query.shape[1], AT_ONCE):
            here = scaled[:, :, begin : begin + AT_ONCE]
            mask = attended(
                self.candidate.router, index, self.candidate.routing, here, first + begin, tokens,
                self.candidate.bonus,
            )  # fmt: skip
            self._count(mask, first + begin, index.bytes_per_token, (dim + value.shape[-1]) * BYTES)
            scores = (here @ key.float()[:, None].mT).masked_fill_(~mask[:, None], -torch.inf)
            parts.append(scores.softmax(-1) @ value.float()[:, None])
        return torch.cat(parts, 2).flatten(0, 1).to(query.dtype)

    def _count(self, mask: Tensor, first: int, index_bytes: float, row_bytes: int) -> None:
        rows, queries = mask.shape[:2]
        seen = rows * sum(range(first + 1, first + queries + 1))
        self.visible += seen
        self.attended += int(mask.sum())
        self.index_bytes += seen * index_bytes
        self.dense_bytes += seen * row_bytes

    def use(self) -> Use:
        """Shares of what dense attention attends to and reads."""
        share = self.attended / self.visible
        return Use(share, share, self.index_bytes / self.dense_bytes, {})


def received(keys: Tensor, query_sums: Tensor, prefix: int) -> Tensor:
    """Return the mean score of each key against the next `FOLLOWING` queries of the prefix.

    Parameters
    ----------
    keys : Tensor
        ``[rows, tokens, dim]``.
    query_sums : Tensor
        ``[rows, >= prefix, dim]``: sums of the queries (means over the heads of a row) up to each position.
    prefix : int
        Queries from here on are the measured ones: nothing may be learnt from them.

    Returns
    -------
    Tensor
        ``[rows, tokens]``; 0 where no query of the prefix follows.
    """
    position = torch.arange(keys.shape[1])
    last = (position + FOLLOWING).clamp(max=prefix - 1)
    here = position.clamp(max=prefix - 1)
    count = (last - here).clamp(min=1)
    return ((query_sums[:, last] - query_sums[:, here]) * keys).sum(-1) / count


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    queries, tokens = query.shape[2], key.shape[2]
    if queries == tokens and (window is None or window >= tokens):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    ahead = torch.arange(tokens) - torch.arange(tokens - queries, tokens)[:, None]
    mask = (ahead <= 0) & (ahead > -(window or tokens))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
