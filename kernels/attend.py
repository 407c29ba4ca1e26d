"""Exact attention over a routed set, in plain torch.

Two executions of one definition: `attend_masked` reads all K/V under a mask (prefill tiles) and
`attend_gathered` only the routed rows (decode). Both return softmax attention over the routed tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hga_compile.kernels.scoring import PLAIN, Scoring

__all__ = ["attend_full", "attend_gathered", "attend_masked", "attend_window", "routed_mask"]


def routed_mask(
    groups: Tensor, kept: Tensor, fixed: Tensor, dense: Tensor, group_size: int, tokens: int
) -> Tensor:
    """Spread chosen groups and fixed groups over tokens.

    Parameters
    ----------
    groups, kept : Tensor
        ``[rows, queries, most]``: a `route.Chosen`.
    fixed : Tensor
        ``[rows or 1, queries, ceil(tokens / group_size)]`` bool: groups of sinks and window.
    dense : Tensor
        ``[rows or 1, queries, 1]`` bool: queries that attend to everything.
    group_size, tokens : int
        Tokens of a group; tokens in all.

    Returns
    -------
    Tensor
        ``[rows, queries, tokens]`` bool; causality and padding are not applied yet.
    """
    rows, queries = groups.shape[:2]
    chosen = torch.zeros(rows, queries, fixed.shape[-1], dtype=torch.bool, device=groups.device)
    chosen.scatter_(-1, groups, kept)
    chosen |= fixed | dense
    return chosen.repeat_interleave(group_size, -1)[..., :tokens]


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, scoring: Scoring = PLAIN
) -> Tensor:
    """Softmax attention under a mask that the query heads of a KV head share.

    Parameters
    ----------
    query : Tensor
        ``[batch, kv_heads, heads, queries, dim]``.
    key, value : Tensor
        ``[batch, kv_heads, tokens, dim]`` and ``[..., v_dim]``.
    mask : Tensor
        ``[batch, kv_heads, queries, tokens]`` bool; at least one True a query, else the output is 0.
    scale : float
        Softmax scale.
    scoring : Scoring
        Soft-cap and sinks.

    Returns
    -------
    Tensor
        ``[batch, kv_heads, heads, queries, v_dim]``.
    """
    if not scoring.plain:
        logits = scoring.logits(query.shape[1])
        heads = [
            scoring.attend(
                query[:, :, head],
                key,
                value,
                mask,
                scale,
                None if logits is None else logits[None, :, head, None, None],
            )
            for head in range(query.shape[2])
        ]
        return torch.stack(heads, 2)
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    # One head at a time: no copy of K, V or the bias for each query head of the group.
    out = torch.stack(
        [
            scaled_dot_product_attention(query[:, :, head], key, value, attn_mask=bias, scale=scale)
            for head in range(query.shape[2])
        ],
        2,
    )
    return out.masked_fill_(~mask.any(-1)[:, :, None, :, None], 0.0)


def attend_gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    scoring: Scoring = PLAIN,
    kv_heads: int = 1,
) -> Tensor:
    """Softmax attention of one query a row over gathered tokens.

    Parameters
    ----------
    query : Tensor
        ``[rows, heads, dim]``.
    key, value : Tensor
        ``[rows, gathered, dim]`` and ``[rows, gathered, v_dim]``.
    mask : Tensor or None
        ``[rows, gathered]`` bool; None: all are meant.
    scale : float
        Softmax scale.
    scoring : Scoring
        Soft-cap and sinks.
    kv_heads : int
        Rows of one sequence.

    Returns
    -------
    Tensor
        ``[rows, heads, v_dim]``; 0 for a row without a token.
    """
    if not scoring.plain:
        logits = scoring.logits(kv_heads)
        if logits is not None:
            logits = logits.repeat(len(query) // kv_heads, 1)[..., None]
        return scoring.attend(query, key, value, None if mask is None else mask[:, None], scale, logits)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        bias = bias[:, None, None]
    out = scaled_dot_product_attention(
        query[:, None], key[:, None], value[:, None], attn_mask=bias, scale=scale
    )[:, 0]
    return out if mask is None else out.masked_fill_(~mask.any(-1)[:, None, None], 0.0)


def attend_full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    scoring: Scoring = PLAIN,
) -> Tensor:
    """Dense causal attention of the last `queries` tokens.

    Parameters
    ----------
    query : Tensor
        ``[batch, kv_heads, heads, queries, dim]``, the last queries of the sequence.
    key, value : Tensor
        ``[batch, kv_heads, tokens, dim]`` and ``[..., v_dim]``.
    key_mask : Tensor or None
        ``[batch, tokens]`` bool.
    scale : float
        Softmax scale.
    scoring : Scoring
        Soft-cap and sinks.

    Returns
    -------
    Tensor
        ``[batch, kv_heads, heads, queries, v_dim]``.
    """
    batch, kv_heads, heads, queries, dim = query.shape
    tokens = key.shape[2]
    flat = query.reshape(batch, kv_heads * heads, queries, dim)
    if scoring.plain and key_mask is None and (queries == tokens or queries == 1):
        out = scaled_dot_product_attention(
            flat, key, value, is_causal=queries > 1, scale=scale, enable_gqa=heads > 1
        )
        return out.view(batch, kv_heads, heads, queries, -1)
    parts = []
    number = torch.arange(tokens, device=key.device)
    # Tiles bound the mask: never [tokens, tokens].
    step = max(1, min(queries, 2**24 // tokens))
    for begin in range(0, queries, step):
        end = min(begin + step, queries)
        position = torch.arange(tokens - queries + begin, tokens - queries + end, device=key.device)
        mask = (number <= position[:, None])[None, None]
        if key_mask is not None:
            mask = mask & key_mask[:, None, None]
        mask = mask.expand(batch, kv_heads, end - begin, tokens)
        parts.append(attend_masked(query[:, :, :, begin:end], key, value, mask, scale, scoring))
    return torch.cat(parts, 3)


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    window: int,
    scoring: Scoring = PLAIN,
) -> Tensor:
    """Exact attention within a sliding window, in tiles that read only the keys in reach.

    Parameters
    ----------
    query, key, value, key_mask, scale
        As for `attend_full`; `key` may lack tokens that no query reaches.
    window : int
        A query sees itself and ``window - 1`` tokens before it.
    scoring : Scoring
        Soft-cap and sinks.

    Returns
    -------
    Tensor
        ``[batch, kv_heads, heads, queries, v_dim]``.
    """
    batch, kv_heads, _, queries, _ = query.shape
    tokens = key.shape[2]
    parts = []
    step = max(1, min(queries, max(window, 256)))
    for begin in range(0, queries, step):
        end = min(begin + step, queries)
        first, stop = tokens - queries + begin, tokens - queries + end
        low = max(0, first - window + 1)
        position = torch.arange(first, stop, device=key.device)[:, None]
        number = torch.arange(low, stop, device=key.device)
        mask = ((number <= position) & (number > position - window))[None, None]
        if key_mask is not None:
            mask = mask & key_mask[:, None, None, low:stop]
        mask = mask.expand(batch, kv_heads, end - begin, stop - low)
        part = attend_masked(
            query[:, :, :, begin:end], key[:, :, low:stop], value[:, :, low:stop], mask, scale, scoring
        )
        parts.append(part)
    return torch.cat(parts, 3)
