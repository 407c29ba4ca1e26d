"""Routed attention over one layer's K/V: plan, route, attend, in plain torch, for prefill and decode."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.attend import attend_full, attend_gathered, attend_masked, routed_mask
from hga_compile.kernels.index import LayerIndex
from hga_compile.kernels.ledger import LEDGER, RouteRecord, Use
from hga_compile.kernels.plan import QueryPlan, plan_queries
from hga_compile.kernels.route import Chosen, choose_groups, per_row
from hga_compile.kernels.summaries import Scorer
from hga_compile.kernels.tail import attend_gathered_with_tail, attend_masked_with_tail

__all__ = ["KeyValues", "Padding", "routed_attention"]

# Bytes of the largest score tile of a prefill; bounds its memory whatever the context.
_TILE_BYTES = 2**26


class KeyValues(Protocol):
    """K/V of one layer, wherever they live. A row is one KV head of one sequence, batch-major."""

    @property
    def rows(self) -> int:
        """KV heads times batch."""

    def read(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, end - begin, dim]`` and values, on the compute device."""

    def gather(self, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, n * group_size, dim]`` and values of ``[rows, n]`` groups.

        Tokens past the end of the sequence may hold anything finite or not; the caller masks them.
        """


@dataclass(frozen=True)
class Padding:
    """Which tokens are real.

    `mask` is ``[batch, tokens]`` bool. With `left`, each row is padding followed by real tokens only.
    """

    mask: Tensor
    left: bool
    host: Tensor
    """The mask on the CPU, where budgets are planned."""

    @staticmethod
    def of(key_mask: Tensor | None, length: int) -> "Padding | None":
        """Classify a key mask; None when every token is real. Reads the mask: a wait on a GPU."""
        if key_mask is None:
            return None
        if key_mask.shape[1] < length:
            raise ValueError(
                f"key_mask must cover every key, got {key_mask.shape[1]} columns and {length} tokens "
                "(pass the attention_mask of the whole sequence)"
            )
        mask = key_mask[:, :length].bool()
        host = mask.cpu()
        if bool(host.all()):
            return None
        return Padding(mask, bool((host[:, 1:] >= host[:, :-1]).all()), host)

    def rows(self, rows: int) -> Tensor:
        """Return the mask per row, ``[rows, tokens]``."""
        return self.mask.repeat_interleave(rows // self.mask.shape[0], 0)


@dataclass(frozen=True)
class _Call:
    """What stays the same through one call of `routed_attention`."""

    query: Tensor  # [batch, kv_heads, heads, queries, dim]
    scaled: Tensor  # [rows, heads, queries, dim] float32, times the softmax scale
    kv: KeyValues
    index: LayerIndex
    length: int
    padding: Padding | None
    scale: float
    routing: Routing
    layer: int
    use: Use

    @property
    def first(self) -> int:
        return self.length - self.query.shape[3]


def routed_attention(
    query: Tensor,
    kv: KeyValues,
    index: LayerIndex,
    length: int,
    key_mask: Tensor | None,
    scale: float,
    routing: Routing,
    layer: int,
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

    Returns
    -------
    Tensor
        ``[batch, query_heads, queries, v_dim]``, dtype of the query.

    Raises
    ------
    ValueError
        Query heads that are no multiple of the KV heads, or a mask that is too short.
    """
    batch, query_heads, queries, dim = query.shape
    kv_heads = kv.rows // batch
    if kv_heads * batch != kv.rows or query_heads % kv_heads:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {query_heads} query heads and {kv.rows} K/V rows "
            f"for a batch of {batch}"
        )
    grouped = query.reshape(batch, kv_heads, query_heads // kv_heads, queries, dim)
    scaled = (query.float() * scale).reshape(kv.rows, -1, queries, dim)
    padding = Padding.of(key_mask, length)
    use = LEDGER.use(layer, "decode" if queries == 1 else "prefill")
    call = _Call(grouped, scaled, kv, index, length, padding, scale, routing, layer, use)
    index.note_queries(scaled, call.first)
    all_dense = (
        length <= max(routing.dense_below, routing.centre_tokens)
        or routing.budget.tokens_for(length) >= length
        or (queries > 1 and routing.prefill == "dense")
    )
    if all_dense:
        out = _dense(call)
    elif queries == 1 and (padding is None or padding.left):
        out = _decode(call)
    else:
        if queries == 1:
            LEDGER.count_fallback("padding with gaps: a decode step read all K/V under a mask")
        out = _tiles(call)
    use.calls += 1
    use.queries += queries * batch
    return out.reshape(batch, query_heads, queries, -1)


def _dense(call: _Call) -> Tensor:
    batch, kv_heads = call.query.shape[:2]
    key, value = call.kv.read(0, call.length)
    key, value = (part.unflatten(0, (batch, kv_heads)) for part in (key, value))
    mask = None if call.padding is None else call.padding.mask
    plan = _plan(call, call.first, call.query.shape[3])
    call.use.add_attended(_count_visible(call, plan))
    _note_rows(call, key, value)
    if LEDGER.wants(call.layer):
        number = torch.arange(-(-call.length // call.routing.group_size))
        end = torch.arange(call.first, call.length)[:, None] // call.routing.group_size
        _record(call, call.first, (number <= end).expand(batch * kv_heads, -1, -1))
    return attend_full(call.query, key, value, mask, call.scale)


def _decode(call: _Call) -> Tensor:
    """One query a row: gather the routed groups, attend to nothing else."""
    kv, length, rows = call.kv, call.length, call.kv.rows
    kv_heads, device = call.query.shape[1], call.query.device
    group = call.routing.group_size
    _extend(call)
    plan = _plan(call, call.first, 1)
    groups = min(int(plan.window.max()), _groups(call))
    chosen = _choose(call, plan, call.scaled, groups, _scorer(call, groups))
    window, start, end, dense = (
        part if len(part) == 1 else part.repeat_interleave(kv_heads, 0)
        for part in (plan.window, plan.sink_start, plan.sink_end, plan.dense)
    )
    if bool(plan.dense.any()):
        # Rows whose real tokens are few attend to all of them: everything between sinks and window.
        between = torch.arange(int((window - end).clamp(min=0)[dense].max()))
        extra = end + between
        extra_kept = dense & (extra < window)
        chosen = Chosen(
            torch.cat([chosen.groups, extra[:, None].to(device).expand(rows, -1, -1)], -1),
            torch.cat(
                [
                    chosen.kept & ~dense[:, None].to(device),
                    extra_kept[:, None].to(device).expand(rows, -1, -1),
                ],
                -1,
            ),
        )
    last = -(-length // group)
    sinks = start + torch.arange(int((end - start).max()))
    recent = window + torch.arange(int(last - window.min()))
    fixed = torch.cat([sinks, recent], -1)
    fixed_kept = torch.cat([sinks < end, recent < last], -1)
    groups = torch.cat([chosen.groups[:, 0], fixed.to(device).expand(rows, -1)], -1)
    kept = torch.cat([chosen.kept[:, 0], fixed_kept.to(device).expand(rows, -1)], -1)
    groups = groups.masked_fill(~kept, 0)
    key, value = kv.gather(groups, group)
    token = (groups[..., None] * group + torch.arange(group, device=device)).flatten(1)
    real = kept.repeat_interleave(group, 1) & (token < length)
    if call.padding is not None:
        real &= call.padding.rows(rows).gather(1, token.clamp(max=length - 1))
    _count_visible(call, plan)
    call.use.add_attended(real.sum())
    _note_rows(call, key, value)
    if LEDGER.wants(call.layer):
        marks = torch.zeros(rows, 1, last, dtype=torch.bool, device=device)
        _record(call, call.first, marks.scatter_(-1, groups[:, None], kept[:, None]))
    # Rows that are not tokens may hold anything; 0 * NaN would still be NaN.
    key, value = (part.masked_fill(~real[..., None], 0.0) for part in (key, value))
    tail = call.index.tail
    if tail is None:
        return attend_gathered(call.query.flatten(0, 1)[:, :, 0], key, value, real, call.scale)
    counted = _counted_chunks(call, tail.chunks, torch.tensor([[length]], device=device))[:, 0]
    out = attend_gathered_with_tail(
        call.scaled[:, :, 0], key, value, real, token // tail.chunk_size, counted.expand(rows, -1), tail
    )
    return out.to(call.query.dtype)


def _tiles(call: _Call) -> Tensor:
    """Many queries: route each one, read all K/V once, attend under a mask, a tile of queries at a time."""
    kv, group = call.kv, call.routing.group_size
    batch, kv_heads, heads, queries, _ = call.query.shape
    device = call.query.device
    _extend(call)
    tail, score = call.index.tail, _scorer(call, _groups(call))
    key, value = kv.read(0, call.length)
    _note_rows(call, key, value)
    step = min(256, max(16, _TILE_BYTES // (4 * kv.rows * heads * call.length)))
    parts = []
    for begin in range(0, queries, step):
        stop = min(begin + step, queries)
        first, tokens = call.first + begin, call.first + stop
        plan = _plan(call, first, stop - begin)
        _count_visible(call, plan)
        window, start, end, dense = (
            per_row(part, kv.rows, device)
            for part in (plan.window, plan.sink_start, plan.sink_end, plan.dense)
        )
        number = torch.arange(-(-tokens // group), device=device)
        fixed = (number >= window) | ((number >= start) & (number < end))
        scaled = call.scaled[:, :, begin:stop]
        chosen = _choose(call, plan, scaled, min(int(plan.window.max()), _groups(call)), score)
        allowed = routed_mask(chosen.groups, chosen.kept, fixed, dense, group, tokens)
        position = torch.arange(first, tokens, device=device)[:, None]
        visible = (torch.arange(tokens, device=device) <= position)[None]
        if call.padding is not None:
            visible = visible & call.padding.rows(kv.rows)[:, None, :tokens]
        allowed &= visible
        call.use.add_attended(allowed.sum())
        if LEDGER.wants(call.layer):
            padded = torch.nn.functional.pad(allowed, (0, -tokens % group))
            _record(call, first, padded.unflatten(-1, (-1, group)).any(-1))
        if tail is None:
            part = attend_masked(
                call.query[:, :, :, begin:stop],
                key[:, :tokens].unflatten(0, (batch, kv_heads)),
                value[:, :tokens].unflatten(0, (batch, kv_heads)),
                allowed.unflatten(0, (batch, kv_heads)),
                call.scale,
            )
        else:
            ends = torch.arange(first + 1, tokens + 1, device=device)[None]
            counted = _counted_chunks(call, tail.chunks, ends).repeat_interleave(tail.chunk_size, -1)
            counted = torch.nn.functional.pad(counted, (0, max(0, tokens - counted.shape[-1])))[..., :tokens]
            part = attend_masked_with_tail(
                scaled, key[:, :tokens], value[:, :tokens], allowed, counted & visible & ~allowed, tail
            )
            part = part.unflatten(0, (batch, kv_heads)).to(call.query.dtype)
        parts.append(part)
    return torch.cat(parts, 3)


def _plan(call: _Call, first: int, queries: int) -> QueryPlan:
    mask = None if call.padding is None else call.padding.host[:, : first + queries]
    return plan_queries(call.routing, first, queries, mask)


def _extend(call: _Call) -> None:
    rows = None if call.padding is None else call.padding.rows(call.kv.rows)
    call.index.extend(call.length, call.kv.read, rows)


def _scorer(call: _Call, groups: int) -> Scorer | None:
    return None if groups == 0 or call.index.groups is None else call.index.groups.scorer(groups)


def _groups(call: _Call) -> int:
    return 0 if call.index.groups is None else call.index.groups.groups


def _choose(call: _Call, plan: QueryPlan, scaled: Tensor, groups: int, score: Scorer | None) -> Chosen:
    """Route the queries of `plan`, unless they all are dense."""
    if groups == 0 or score is None or bool(plan.dense.all()):
        none = torch.zeros(call.kv.rows, scaled.shape[2], 0, dtype=torch.int64, device=scaled.device)
        return Chosen(none, none.bool())
    real = None
    if call.padding is not None:
        size = call.routing.group_size
        real = call.padding.rows(call.kv.rows)[:, : groups * size].unflatten(-1, (-1, size)).any(-1)
    chunks = call.index.chunks if call.routing.uses_chunks(call.length) else None
    scored = call.kv.rows * scaled.shape[2] * groups * call.routing.group_size
    call.use.scored += scored
    call.use.summary_bytes += scored * call.index.bytes_per_token()
    return choose_groups(call.routing, plan, scaled, score, groups, chunks, real)


def _counted_chunks(call: _Call, chunks: int, ends: Tensor) -> Tensor:
    """Chunks whose tail is estimated: complete for the query and free of padding.

    ``[rows or 1, queries, chunks]`` bool.
    """
    size = call.routing.chunk_size
    number = torch.arange(chunks, device=ends.device)
    complete = (number + 1) * size <= ends[..., None]
    if call.padding is not None:
        mask = call.padding.rows(call.kv.rows)[:, : chunks * size]
        complete = complete & mask.unflatten(-1, (chunks, size)).all(-1)[:, None]
    return complete


def _count_visible(call: _Call, plan: QueryPlan) -> int:
    visible = int(plan.visible.sum()) * (call.kv.rows // len(plan.visible))
    call.use.visible += visible
    return visible


def _note_rows(call: _Call, key: Tensor, value: Tensor) -> None:
    call.use.row_bytes = (key.shape[-1] + value.shape[-1]) * key.element_size()


def _record(call: _Call, first: int, groups: Tensor) -> None:
    batch, kv_heads = call.query.shape[:2]
    LEDGER.record(
        RouteRecord(
            call.layer, first, call.routing.group_size, groups.unflatten(0, (batch, kv_heads)).cpu().clone()
        )
    )
