"""Routed attention over one layer's K/V: dense, decode or prefill."""

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.configs.routing import Routing
from hga_compile.kernels.attend import attend_full
from hga_compile.kernels.call import Call, KeyValues, Padding
from hga_compile.kernels.decode import decode
from hga_compile.kernels.dispatch import choose
from hga_compile.kernels.index import LayerIndex
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.prefill import prefill
from hga_compile.kernels.scoring import PLAIN, Scoring

__all__ = ["routed_attention"]


def routed_attention(
    query: Tensor,
    kv: KeyValues,
    index: LayerIndex,
    length: int,
    key_mask: Tensor | None,
    scale: float,
    routing: Routing,
    layer: int,
    scoring: Scoring = PLAIN,
    kernels: Kernels = "auto",
) -> Tensor:
    """Attend from the last queries of a sequence to what they are routed to.

    At full budget this is dense causal attention.

    Parameters
    ----------
    query : Tensor
        ``[batch, query_heads, queries, dim]``: the last `queries` positions of `length` tokens.
    kv : KeyValues
        The K/V of all `length` tokens.
    index : LayerIndex
        Summaries of the layer; extended here as far as routing needs them.
    length : int
        Tokens stored, these queries' own included.
    key_mask : Tensor or None
        ``[batch, >= length]`` bool, False for padding.
    scale : float
        Softmax scale.
    routing : Routing
        Settings of the layer.
    layer : int
        Number of the layer, for the ledger.
    scoring : Scoring
        Soft-cap and sinks. Routing goes by scores without them: a soft-cap keeps their order.
    kernels : {"auto", "triton", "native", "reference"}
        What runs it (see `dispatch`).

    Returns
    -------
    Tensor
        ``[batch, query_heads, queries, v_dim]``, dtype of the query.

    Raises
    ------
    ValueError
        Query heads that are no multiple of the KV heads, more queries than tokens, a mask that does not fit,
        a tail estimate with a soft-cap or sinks.
    KernelError
        Kernels that were asked for by name do not cover the call.
    """
    batch, query_heads, queries, dim = query.shape
    kv_heads = kv.rows // batch
    if kv_heads * batch != kv.rows or query_heads % kv_heads:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {query_heads} query heads and {kv.rows} "
            f"K/V rows for a batch of {batch}"
        )
    if queries > length:
        raise ValueError(f"queries must be the last of the tokens, got {queries} queries and {length} tokens")
    if key_mask is not None:
        if key_mask.shape[0] != 1 and key_mask.shape[0] < batch:
            raise ValueError(
                f"key_mask must have a row a sequence, got {key_mask.shape[0]} rows, expected {batch}"
            )
        key_mask = key_mask[:batch] if key_mask.shape[0] > batch else key_mask
    if not scoring.plain and routing.tail == "estimate":
        raise ValueError(
            "a tail estimate does not cover soft-cap or attention sinks, got tail estimate, expected drop "
            "(routing.tail)"
        )
    grouped = query.reshape(batch, kv_heads, query_heads // kv_heads, queries, dim)
    padding = Padding.of(key_mask, length)
    use = LEDGER.use(layer, "decode" if queries == 1 else "prefill")
    call = Call(grouped, kv, index, length, padding, scale, routing, layer, use, scoring, kernels)
    use.row_bytes, use.dense_row_bytes = kv.row_bytes, (dim + kv.v_dim) * kv.dtype.itemsize
    if routing.tail == "estimate":
        index.note_queries(call.scaled, call.first, None if padding is None else padding.rows(kv.rows))
    all_dense = (
        length <= max(routing.dense_below, routing.centre_tokens)
        or routing.budget.tokens_for(length) >= length
        or (queries > 1 and routing.prefill == "dense")
    )
    if all_dense:
        if kernels != "auto":
            choose(kernels, call.need("dense"))  # better refused now than once the sequence is long
        out = _dense(call)
    elif queries == 1 and (padding is None or padding.left):
        out = decode(call)
    else:
        if queries == 1:
            LEDGER.count_fallback("padding with gaps: a decode step read all K/V under a mask")
        out = prefill(call)
    use.calls += 1
    use.queries += queries * batch
    return out.reshape(batch, query_heads, queries, -1)


def _dense(call: Call) -> Tensor:
    batch, kv_heads = call.query.shape[:2]
    mask = None if call.padding is None else call.padding.mask
    plan = call.plan(call.first, call.query.shape[3])
    call.use.add_attended(call.count_visible(plan))
    if LEDGER.wants(call.layer):
        call.record(call.first, _visible_groups(call))
    at_once = call.rows_at_once
    if at_once == call.kv.rows or call.scoring.sinks is not None:
        key, value = (part.unflatten(0, (batch, kv_heads)) for part in call.kv.read(0, call.length))
        return attend_full(call.query, key, value, mask, call.scale, call.scoring)
    # Rows as sequences of one KV head each.
    query, parts = call.query.flatten(0, 1)[:, None], []
    mask = None if call.padding is None else call.padding.rows(call.kv.rows)
    for begin in range(0, call.kv.rows, at_once):
        rows = slice(begin, min(call.kv.rows, begin + at_once))
        key, value = call.kv.read(0, call.length, rows)
        real = None if mask is None else mask[rows]
        parts.append(attend_full(query[rows], key[:, None], value[:, None], real, call.scale, call.scoring))
        del key, value  # before those of other rows are read
    return torch.cat(parts).view(batch, kv_heads, *call.query.shape[2:4], -1)


def _visible_groups(call: Call) -> Tensor:
    """Mark the groups with a token that each query sees, ``[rows, queries, groups]`` bool on the CPU."""
    group, length = call.routing.group_size, call.length
    token = torch.arange(length, device="cpu")[None]
    if call.padding is not None:
        token = token.masked_fill(~call.padding.host, length)
    token = torch.nn.functional.pad(token, (0, -length % group), value=length)
    first = token.unflatten(-1, (-1, group)).amin(-1).repeat_interleave(call.kv.rows // len(token), 0)
    begun: Tensor = first[:, None] <= torch.arange(call.first, length, device="cpu")[:, None]
    return begun
