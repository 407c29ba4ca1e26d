"""A decode step: one query a sequence, which reads the routed groups and nothing else."""

from functools import lru_cache

import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.attend import attend_gathered
from hga_compile.kernels.call import Call
from hga_compile.kernels.dispatch import give_up
from hga_compile.kernels.gpu import chunks_suffice, decode_step, spans_of
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.lowbit import LowBitSummary
from hga_compile.kernels.mean import MeanSummary
from hga_compile.kernels.plan import QueryPlan, plan_queries
from hga_compile.kernels.route import Chosen
from hga_compile.kernels.steps import NO_CHOICE, attend_native, native_steps
from hga_compile.kernels.tail import attend_gathered_with_tail

__all__ = ["decode"]


def decode(call: Call) -> Tensor:
    """One query a row: gather the routed groups, attend to nothing else."""
    routing, length, device = call.routing, call.length, call.query.device
    call.extend()
    plan = call.plan(call.first, 1)
    call.count_visible(plan)
    known = min(plan.last_window, call.groups)
    out = _gpu_step(call, plan)
    out = native_steps(call) if out is None else out
    if out is not None:
        return out
    chosen = call.choose(plan, call.scaled, known, call.scorer(known))
    if call.padding is None:
        fixed = _fixed_groups(routing, call.first).to(device)
        groups = torch.cat([chosen.groups[:, 0], fixed.expand(call.kv.rows, -1)], -1)
        kept = None if bool(chosen.kept.all()) else _with_fixed(chosen.kept[:, 0], len(fixed))
    else:
        groups, kept = _padded_groups(call, plan, chosen)
    # Only the last group can be incomplete, and it comes last.
    tokens = groups.shape[1] * routing.group_size - -length % routing.group_size
    out = attend_native(call, groups, tokens) if kept is None else None
    if out is not None:
        call.use.add_attended(call.kv.rows * tokens)
        return out
    key, value = call.kv.gather(groups, routing.group_size)
    if kept is None:
        key, value, real = key[:, :tokens], value[:, :tokens], None
        call.use.add_attended(call.kv.rows * tokens)
    else:
        token = _tokens(groups, routing.group_size)
        real = kept.repeat_interleave(routing.group_size, 1) & (token < length)
        if call.padding is not None:
            real &= call.padding.rows(call.kv.rows).gather(1, token.clamp(max=length - 1))
        call.use.add_attended(real.sum())
        # Rows that are not tokens may hold anything; 0 * NaN would still be NaN.
        key, value = (part.masked_fill(~real[..., None], 0.0) for part in (key, value))
    if LEDGER.wants(call.layer):
        shape = (call.kv.rows, -(-length // routing.group_size))
        marks = torch.zeros(shape, dtype=torch.int32, device=device)
        marked = torch.ones_like(groups, dtype=torch.bool)
        if real is not None:
            marked = real.unflatten(-1, (-1, routing.group_size)).any(-1)
        # Groups that are not meant all have number 0, which may be meant too.
        call.record(call.first, marks.scatter_add_(-1, groups, marked.int())[:, None] > 0)
    tail = call.index.tail
    if tail is None:
        query, kv_heads = call.query.flatten(0, 1)[:, :, 0], call.query.shape[1]
        return attend_gathered(query, key, value, real, call.scale, call.scoring, kv_heads)
    token = _tokens(groups, routing.group_size)[:, : key.shape[1]]
    real = torch.ones_like(token, dtype=torch.bool) if real is None else real
    counted = call.counted_chunks(tail.chunks, torch.tensor([[length]], device=device))[:, 0]
    counted = counted.expand(call.kv.rows, -1)
    out = attend_gathered_with_tail(
        call.scaled[:, :, 0], key, value, real, token // tail.chunk_size, counted, tail
    )
    return out.to(call.query.dtype)


def _gpu_step(call: Call, plan: QueryPlan) -> Tensor | None:
    """Route and attend in Triton kernels on a GPU; None where that is not possible."""
    if call.way != "triton":
        return None
    routing, summary, pages, padding = call.routing, call.index.groups, call.kv.gpu_pages, call.padding
    assert isinstance(summary, LowBitSummary | MeanSummary)  # covered
    if not 0 < plan.last_window <= summary.groups:
        give_up(call.kernels, call.way, NO_CHOICE)
        return None
    chunks = call.index.chunks if routing.uses_chunks(call.length) else None
    starts = None
    if padding is not None:
        starts = padding.starts
        # Their groups could not be counted without a wait.
        if chunks is not None and not chunks_suffice(routing, plan):
            give_up(call.kernels, call.way, "chunks of a padded row that may hold too few groups")
            return None
    spans = spans_of(routing, plan, starts, call.query.device)
    query = call.query.flatten(0, 1)[:, :, 0].to(call.kv.dtype)
    codes, scales = summary.stored
    centres = None if summary.centres is None else summary.centres.values
    out, groups = decode_step(
        pages, codes, scales, query, spans, length=call.length, routing=routing, scale=call.scale,
        scoring=call.scoring, kv_heads=call.query.shape[1], parts=None if chunks is None else chunks.means,
        tail=call.index.tail, fetch=call.kv.fetch, hot=call.hot, centres=centres,
    )  # fmt: skip
    call.count_scored(plan.last_window)
    call.use.add_attended(spans.attended * (call.kv.rows // len(plan.visible)))
    if LEDGER.wants(call.layer):
        listed = torch.arange(groups.shape[1], device=groups.device) < spans.listed(len(groups))
        # Groups of nothing but padding, and those of a sequence that has not begun.
        starts = spans.starts(len(groups))
        listed &= ((groups + 1) * routing.group_size > starts) & (starts < call.length)
        shape = (len(groups), -(-call.length // routing.group_size))
        marks = torch.zeros(shape, dtype=torch.int32, device=groups.device)
        marks.scatter_add_(1, groups.long().masked_fill(~listed, 0), listed.int())
        call.record(call.first, marks[:, None] > 0)
    return out.to(call.query.dtype)


# All layers of a model take the same step.
@lru_cache(maxsize=64)
def _fixed_groups(routing: Routing, position: int) -> Tensor:
    """List the groups of sinks and window of one unpadded query, ascending, int64 on the CPU."""
    plan = plan_queries(routing, position, 1, None)
    sinks = torch.arange(int(plan.sink_start), int(plan.sink_end), device="cpu")
    last = position // routing.group_size
    return torch.cat([sinks, torch.arange(int(plan.window), last + 1, device="cpu")])


def _with_fixed(kept: Tensor, fixed: int) -> Tensor:
    return torch.cat([kept, torch.ones(len(kept), fixed, dtype=torch.bool, device=kept.device)], -1)


def _tokens(groups: Tensor, group_size: int) -> Tensor:
    """Positions of the tokens of groups: ``[rows, n]`` to ``[rows, n * group_size]``."""
    return (groups[..., None] * group_size + torch.arange(group_size, device=groups.device)).flatten(1)


def _padded_groups(call: Call, plan: QueryPlan, chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Join chosen and fixed groups of one query a row where rows differ in padding; mark those meant."""
    rows, device = call.kv.rows, call.query.device
    kv_heads, last = call.query.shape[1], -(-call.length // call.routing.group_size)
    window, start, end, dense = (
        (part if len(part) > 1 else part.expand(rows // kv_heads, -1)).repeat_interleave(kv_heads, 0)
        for part in (plan.window, plan.sink_start, plan.sink_end, plan.dense)
    )
    sinks = start + torch.arange(int((end - start).max()), device="cpu")
    recent = window + torch.arange(int(last - window.min()), device="cpu")
    groups, kept = [sinks, recent], [sinks < end, recent < last]
    if bool(dense.any()):
        # Rows whose real tokens are few attend to all of them: to everything between sinks and window.
        between = end + torch.arange(int((window - end).clamp(min=0)[dense].max()), device="cpu")
        groups.append(between)
        kept.append(dense & (between < window))
    best, best_kept = chosen.groups[:, 0], chosen.kept[:, 0] & ~dense.to(device)
    all_groups = torch.cat([best, *(part.to(device) for part in groups)], -1)
    all_kept = torch.cat([best_kept, *(part.to(device) for part in kept)], -1)
    return all_groups.masked_fill(~all_kept, 0), all_kept
