"""A prefill: many queries, each routed by itself or in tiles that share a routed set."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hga_compile.kernels.attend import attend_masked, routed_mask
from hga_compile.kernels.call import Call
from hga_compile.kernels.gpu_tiles import Rows, prefill_tiles, tile_spans
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.plan import per_row
from hga_compile.kernels.steps import PIECE, native_steps, pieces
from hga_compile.kernels.tail import attend_masked_with_tail
from hga_compile.kernels.tiles import Tiles, plan_tiles, shared_groups

__all__ = ["prefill"]


# Bytes of the largest score tile of a prefill; bounds its memory whatever the context.
_TILE_BYTES = 2**26
# Queries that share a routed set, unless the profile says otherwise.
_SHARED = 64


def prefill(call: Call) -> Tensor:
    """Many queries: route each one, read all K/V once, attend under a mask, a tile of queries at a time."""
    kv, group = call.kv, call.routing.group_size
    batch, kv_heads, heads, queries, _ = call.query.shape
    device = call.query.device
    call.extend()
    size = _tile_size(call)
    if size > 1:
        return _shared_tiles(call, size)
    out = native_steps(call)
    if out is not None:
        for first, count in pieces(call):
            call.count_visible(call.plan(first, count))
        folded: Tensor = out.unflatten(0, (batch, kv_heads))
        return folded
    score = call.scorer(call.groups)
    key, value = kv.read(0, call.length)
    step = min(PIECE, max(16, _TILE_BYTES // (4 * kv.rows * heads * call.length)))
    parts = []
    # From the longest tile down: each then fits where the one before it was, and the heap does not grow.
    for begin in reversed(range(0, queries, step)):
        stop = min(begin + step, queries)
        first, tokens = call.first + begin, call.first + stop
        plan = call.plan(first, stop - begin)
        call.count_visible(plan)
        window, start, end, dense = (
            per_row(part, kv.rows, device)
            for part in (plan.window, plan.sink_start, plan.sink_end, plan.dense)
        )
        number = torch.arange(-(-tokens // group), device=device)
        fixed = (number >= window) | ((number >= start) & (number < end))
        scaled = call.scaled[:, :, begin:stop]
        chosen = call.choose(plan, scaled, min(plan.last_window, call.groups), score)
        allowed = routed_mask(chosen.groups, chosen.kept, fixed, dense, group, tokens)
        parts.append(_attend_allowed(call, key, value, allowed, begin, stop))
    return torch.cat(parts[::-1], 3)


def _attend_allowed(call: Call, key: Tensor, value: Tensor, allowed: Tensor, begin: int, stop: int) -> Tensor:
    """Attend from queries `begin` to `stop` to those of the allowed tokens that they see."""
    (batch, kv_heads), rows, group = call.query.shape[:2], call.kv.rows, call.routing.group_size
    first, tokens, device, tail = call.first + begin, call.first + stop, call.query.device, call.index.tail
    position = torch.arange(first, tokens, device=device)[:, None]
    visible = (torch.arange(tokens, device=device) <= position)[None]
    if call.padding is not None:
        visible = visible & call.padding.rows(rows)[:, None, :tokens]
    allowed = allowed & visible
    call.use.add_attended(torch.count_nonzero(allowed))
    if LEDGER.wants(call.layer):
        padded = torch.nn.functional.pad(allowed, (0, -tokens % group))
        call.record(first, padded.unflatten(-1, (-1, group)).any(-1))
    if tail is None:
        return attend_masked(
            call.query[:, :, :, begin:stop],
            key[:, :tokens].unflatten(0, (batch, kv_heads)),
            value[:, :tokens].unflatten(0, (batch, kv_heads)),
            allowed.unflatten(0, (batch, kv_heads)),
            call.scale,
            call.scoring,
        )
    ends = torch.arange(first + 1, tokens + 1, device=device)[None]
    counted = call.counted_chunks(tail.chunks, ends).repeat_interleave(tail.chunk_size, -1)
    counted = torch.nn.functional.pad(counted, (0, max(0, tokens - counted.shape[-1])))[..., :tokens]
    scaled = call.scaled[:, :, begin:stop]
    part = attend_masked_with_tail(
        scaled, key[:, :tokens], value[:, :tokens], allowed, counted & visible & ~allowed, tail
    )
    out: Tensor = part.unflatten(0, (batch, kv_heads)).to(call.query.dtype)
    return out


def _tile_size(call: Call) -> int:
    """Say how many queries of a prefill share a routed set."""
    size = call.routing.prefill_tile
    if size != "auto":
        return int(size)
    return _SHARED if call.way == "triton" else 1


def _shared_tiles(call: Call, size: int) -> Tensor:
    """Many queries in tiles: route each tile once, attend exactly from each of its queries."""
    routing, summary, padding = call.routing, call.index.groups, call.padding
    rows, queries = call.kv.rows, call.query.shape[3]
    tiles = plan_tiles(routing, call.first, queries, None if padding is None else padding.host, size)
    for first, count in pieces(call):
        call.count_visible(call.plan(first, count))
    needed = tiles.plan.last_window
    starts = None if padding is None else padding.starts
    keys = None
    if summary is not None and 0 < needed <= summary.groups:
        begun = None
        if starts is not None:
            # An index into groups that are there: a row of nothing but padding has no vote.
            begun = (starts // routing.group_size).clamp(max=needed - 1) * routing.group_size
            begun = begun[:, 0].repeat_interleave(rows // len(begun)).to(call.query.device)
        keys = summary.tile_keys(needed, begun, call.way == "triton")
        if tiles.chunks is not None and call.index.chunks is not None:
            parts = call.index.chunks.tile_parts(int(tiles.chunks.chunks.max()), call.way == "triton")
            keys = replace(keys, chunks=parts)
    if keys is not None:
        call.count_scored(int(tiles.plan.window.sum()) * (rows // len(tiles.plan.window)) // rows)
    if keys is not None and call.way == "triton":
        call.use.add_attended(
            tiles.attended(call.first, queries, starts) * (rows // (1 if starts is None else len(starts)))
        )
        record = partial(_record_tiles, call, tiles) if LEDGER.wants(call.layer) else None
        spans = tile_spans(tiles, keys.refined, starts, call.query.device)
        kv = Rows(partial(_read_rows, call), call.rows_at_once, call.kv.v_dim)
        return prefill_tiles(
            kv, keys, call.query, spans, tiles, first=call.first, routing=routing, scale=call.scale,
            scoring=call.scoring, tail=call.index.tail, listed=record,
        )  # fmt: skip
    key, value = call.kv.read(0, call.length)
    real = None
    if padding is not None:
        whole = call.length // routing.group_size
        real = padding.rows(rows)[:, : whole * routing.group_size].unflatten(-1, (whole, -1)).any(-1)
    turned = call.scaled if summary is None else summary.turned(call.scaled)
    out = []
    for number in range(tiles.number):
        begin = max(0, (tiles.first + number) * size - call.first)
        stop = min(queries, (tiles.first + number + 1) * size - call.first)
        tokens = call.first + stop
        marks = shared_groups(
            turned[:, :, begin:stop], keys, tiles, number, routing.vote, real, call.scaled[:, :, begin:stop]
        )
        allowed = marks.repeat_interleave(routing.group_size, -1)[:, None, :tokens].expand(rows, -1, -1)
        out.append(_attend_allowed(call, key, value, allowed, begin, stop))
    return torch.cat(out, 3)


def _read_rows(call: Call, rows: slice) -> tuple[Tensor, Tensor]:
    """Read all K/V of some rows, channels contiguous."""
    whole = rows == slice(0, call.kv.rows)
    key, value = call.kv.read(0, call.length, None if whole else rows)
    return tuple(part if part.stride(-1) == 1 else part.contiguous() for part in (key, value))  # type: ignore[return-value]  # two


def _record_tiles(call: Call, tiles: Tiles, number: int, groups: Tensor) -> None:
    """Record which groups the queries of a run of tiles attended to."""
    size, rows = call.routing.group_size, groups.shape[1]
    starts = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    starts = (starts if call.padding is None else call.padding.starts).to(groups.device)
    for place, listed in enumerate(groups.unbind(0)):
        tile = number + place
        many = per_row(tiles.listed[:, tile : tile + 1], rows, groups.device)[:, 0]
        inside = (torch.arange(listed.shape[1], device=listed.device) < many).expand(rows, -1)
        marks = torch.zeros(rows, -(-call.length // size), dtype=torch.int32, device=listed.device)
        marks.scatter_add_(-1, listed.long().masked_fill(~inside, 0), inside.int())
        first = max(call.first, (tiles.first + tile) * tiles.size)
        stop = min(call.length, (tiles.first + tile + 1) * tiles.size)
        token = torch.arange(marks.shape[1] * size, device=listed.device)
        position = torch.arange(first, stop, device=listed.device)[:, None]
        visible = (token <= position)[None] & (token >= starts[..., None])
        visible = visible.unflatten(-1, (-1, size)).any(-1).repeat_interleave(rows // len(starts), 0)
        call.record(first, (marks > 0)[:, None] & visible)
