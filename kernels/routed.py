"""Routed attention over one layer's K/V: plan, route, attend, in plain torch, for prefill and decode."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Literal, Protocol
from weakref import ref

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.configs.routing import Routing
from hga_compile.kernels.attend import attend_full, attend_gathered, attend_masked, routed_mask
from hga_compile.kernels.dispatch import Need, Way, choose, give_up, preferred
from hga_compile.kernels.gpu import chunks_suffice, decode_step, spans_of
from hga_compile.kernels.gpu_tiles import prefill_tiles, tile_spans
from hga_compile.kernels.index import LayerIndex
from hga_compile.kernels.ledger import LEDGER, RouteRecord, Use
from hga_compile.kernels.lowbit import LowBitSummary
from hga_compile.kernels.mean import MeanSummary
from hga_compile.kernels.native import attend_pages
from hga_compile.kernels.plan import QueryPlan, per_row, plan_queries
from hga_compile.kernels.route import Chosen, choose_groups
from hga_compile.kernels.scoring import PLAIN, Scoring
from hga_compile.kernels.summaries import Scorer
from hga_compile.kernels.tail import attend_gathered_with_tail, attend_masked_with_tail
from hga_compile.kernels.tiles import Tiles, plan_tiles, shared_groups

__all__ = ["KeyValues", "Padding", "routed_attention"]

# Bytes of the largest score tile of a prefill; bounds its memory whatever the context.
_TILE_BYTES = 2**26
# Queries that share a routed set, unless the profile says otherwise.
_SHARED = 64
# Queries that are planned together.
_PIECE = 256
_NO_CHOICE = "a window with nothing to choose from before it"


class KeyValues(Protocol):
    """K/V of one layer, wherever they live. A row is one KV head of one sequence, batch-major."""

    @property
    def rows(self) -> int:
        """KV heads times batch."""

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token in one row."""

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""

    @property
    def v_dim(self) -> int:
        """Channels of a value."""

    @property
    def paged(self) -> bool:
        """Whether they lie in pages, which kernels may read in place."""

    def read(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, end - begin, dim]`` and values, on the compute device."""

    def gather(self, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, n * group_size, dim]`` and values of ``[rows, n]`` groups.

        Tokens past the end of the sequence may hold anything finite or not; the caller masks them.
        """

    @property
    def host_pages(self) -> Tensor | None:
        """Pages ``[groups, rows, page]`` that kernels for the CPU can read in place; None without."""

    @property
    def gpu_pages(self) -> Tensor | None:
        """Pages ``[groups, rows, page]`` that kernels for the GPU can read in place; None without."""


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
        if key_mask.is_inference():  # has no version
            return Padding._of(key_mask, length)
        # All layers of a model ask for the same one: it is read once.
        global _last_padding
        mask, version, tokens, found = _last_padding
        if mask() is not key_mask or (version, tokens) != (key_mask._version, length):
            found = Padding._of(key_mask, length)
            _last_padding = (ref(key_mask), key_mask._version, length, found)
        return found

    @staticmethod
    def _of(key_mask: Tensor, length: int) -> "Padding | None":
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

    def starts(self, length: int) -> Tensor:
        """Return the first real token of each sequence, `length` without one: ``[batch, 1]`` on the CPU."""
        first = self.host.to(torch.int8).argmax(1, keepdim=True)
        return first.masked_fill(~self.host.any(1, keepdim=True), length)

    def rows(self, rows: int) -> Tensor:
        """Return the mask per row, ``[rows, tokens]``."""
        return self.mask.repeat_interleave(rows // self.mask.shape[0], 0)


_last_padding: tuple[Callable[[], Tensor | None], int, int, Padding | None] = (lambda: None, 0, 0, None)


@dataclass(frozen=True)
class _Call:
    """What stays the same through one call of `routed_attention`."""

    query: Tensor  # [batch, kv_heads, heads, queries, dim]
    kv: KeyValues
    index: LayerIndex
    length: int
    padding: Padding | None
    scale: float
    routing: Routing
    layer: int
    use: Use
    scoring: Scoring
    kernels: Kernels

    @cached_property
    def way(self) -> Way:
        """What runs its routed part; asked for once, as a call in plain torch may be counted."""
        return choose(self.kernels, self.need("decode" if self.query.shape[3] == 1 else "prefill"))

    @property
    def first(self) -> int:
        return self.length - self.query.shape[3]

    @cached_property
    def scaled(self) -> Tensor:
        """The query times the softmax scale, ``[rows, heads, queries, dim]`` float32."""
        return (self.query.float() * self.scale).flatten(0, 1)

    @property
    def _shared(self) -> bool:
        """Whether queries of a prefill share routed sets."""
        if self.routing.prefill_tile != "auto":
            return self.routing.prefill_tile > 1
        # The chunk stage and the tail are those of single queries.
        single = self.routing.chunk_stage == "on" or self.index.tail is not None
        return preferred(self.kernels, self.query.device) == "triton" and not single

    def need(self, phase: Literal["dense", "decode", "prefill"]) -> Need:
        """Return what the call asks of kernels; its index is up to date."""
        kv, padding = self.kv, self.padding
        return Need(
            device=self.query.device,
            dtype=kv.dtype,
            query_dtype=self.query.dtype,
            channels=max(self.query.shape[4], kv.v_dim),
            heads=self.query.shape[2],
            group_size=self.routing.group_size,
            phase=phase,
            paged=kv.paged,
            summary=self.routing.summary,
            chunks=self.routing.uses_chunks(self.length),
            shared=self._shared,
            tail=self.index.tail is not None,
            padding="" if padding is None else "left" if padding.left else "gaps",
            sinks=self.routing.sinks > 0,
            plain=self.scoring.plain,
            recorded=LEDGER.wants(self.layer),
        )


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
    call = _Call(grouped, kv, index, length, padding, scale, routing, layer, use, scoring, kernels)
    use.row_bytes = kv.row_bytes
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
    if LEDGER.wants(call.layer):
        _record(call, call.first, _visible_groups(call))
    return attend_full(call.query, key, value, mask, call.scale, call.scoring)


def _visible_groups(call: _Call) -> Tensor:
    """Mark the groups with a token that each query sees, ``[rows, queries, groups]`` bool on the CPU."""
    group, length = call.routing.group_size, call.length
    token = torch.arange(length, device="cpu")[None]
    if call.padding is not None:
        token = token.masked_fill(~call.padding.host, length)
    token = torch.nn.functional.pad(token, (0, -length % group), value=length)
    first = token.unflatten(-1, (-1, group)).amin(-1).repeat_interleave(call.kv.rows // len(token), 0)
    begun: Tensor = first[:, None] <= torch.arange(call.first, length, device="cpu")[:, None]
    return begun


def _decode(call: _Call) -> Tensor:
    """One query a row: gather the routed groups, attend to nothing else."""
    routing, length, device = call.routing, call.length, call.query.device
    _extend(call)
    plan = _plan(call, call.first, 1)
    _count_visible(call, plan)
    known = min(plan.last_window, _groups(call))
    out = _gpu_step(call, plan)
    out = _steps(call) if out is None else out
    if out is not None:
        return out
    chosen = _choose(call, plan, call.scaled, known, _scorer(call, known))
    if call.padding is None:
        fixed = _fixed_groups(routing, call.first).to(device)
        groups = torch.cat([chosen.groups[:, 0], fixed.expand(call.kv.rows, -1)], -1)
        kept = None if bool(chosen.kept.all()) else _with_fixed(chosen.kept[:, 0], len(fixed))
    else:
        groups, kept = _padded_groups(call, plan, chosen)
    # Only the last group can be incomplete, and it comes last.
    tokens = groups.shape[1] * routing.group_size - -length % routing.group_size
    pages = _native_pages(call)
    if kept is None and pages is not None:
        query = call.query.flatten(0, 1)[:, :, 0]
        out = attend_pages(pages, groups, query, tokens, routing.group_size, call.scale)
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
        _record(call, call.first, marks.scatter_add_(-1, groups, marked.int())[:, None] > 0)
    tail = call.index.tail
    if tail is None:
        query, kv_heads = call.query.flatten(0, 1)[:, :, 0], call.query.shape[1]
        return attend_gathered(query, key, value, real, call.scale, call.scoring, kv_heads)
    token = _tokens(groups, routing.group_size)[:, : key.shape[1]]
    real = torch.ones_like(token, dtype=torch.bool) if real is None else real
    counted = _counted_chunks(call, tail.chunks, torch.tensor([[length]], device=device))[:, 0]
    counted = counted.expand(call.kv.rows, -1)
    out = attend_gathered_with_tail(
        call.scaled[:, :, 0], key, value, real, token // tail.chunk_size, counted, tail
    )
    return out.to(call.query.dtype)


def _native_pages(call: _Call) -> Tensor | None:
    """Return the pages if the C++ kernels can attend to them: float32 on a CPU, nothing but a softmax."""
    plain = call.index.tail is None and call.scoring.plain and not LEDGER.wants(call.layer)
    native = preferred(call.kernels, call.query.device) == "native"
    return call.kv.host_pages if native and plain and call.query.dtype == torch.float32 else None


def _gpu_step(call: _Call, plan: QueryPlan) -> Tensor | None:
    """Route and attend in Triton kernels on a GPU; None where that is not possible."""
    if call.way != "triton":
        return None
    routing, summary, pages, padding = call.routing, call.index.groups, call.kv.gpu_pages, call.padding
    assert pages is not None and isinstance(summary, LowBitSummary | MeanSummary)  # covered
    if not 0 < plan.last_window <= summary.groups:
        give_up(call.kernels, call.way, _NO_CHOICE)
        return None
    chunks = call.index.chunks if routing.uses_chunks(call.length) else None
    starts = None
    if padding is not None:
        starts = padding.starts(call.length)
        # Their groups could not be counted without a wait.
        if chunks is not None and not chunks_suffice(routing, plan):
            give_up(call.kernels, call.way, "chunks of a padded row that may hold too few groups")
            return None
    spans = spans_of(routing, plan, starts, call.query.device)
    query = call.query.flatten(0, 1)[:, :, 0].to(pages.dtype)
    codes, scales = summary.stored
    out, groups = decode_step(
        pages, codes, scales, query, spans, length=call.length, routing=routing, scale=call.scale,
        scoring=call.scoring, kv_heads=call.query.shape[1], parts=None if chunks is None else chunks.means,
        tail=call.index.tail,
    )  # fmt: skip
    _count_scored(call, plan.last_window)
    call.use.add_attended(spans.attended * (call.kv.rows // len(plan.visible)))
    if LEDGER.wants(call.layer):
        listed = torch.arange(groups.shape[1], device=groups.device) < spans.listed(len(groups))
        # Groups of nothing but padding, and those of a sequence that has not begun.
        starts = spans.starts(len(groups))
        listed &= ((groups + 1) * routing.group_size > starts) & (starts < call.length)
        shape = (len(groups), -(-call.length // routing.group_size))
        marks = torch.zeros(shape, dtype=torch.int32, device=groups.device)
        marks.scatter_add_(1, groups.long().masked_fill(~listed, 0), listed.int())
        _record(call, call.first, marks[:, None] > 0)
    return out.to(call.query.dtype)


def _steps(call: _Call) -> Tensor | None:
    """Route and attend query by query, in one call on a CPU; None where that is not possible."""
    if call.way != "native":
        return None
    pages, summary = call.kv.host_pages, call.index.groups
    assert pages is not None and isinstance(summary, LowBitSummary)  # covered
    pieces = [_spans(call.routing, first, count) for first, count in _pieces(call)]
    spans, vote = torch.cat([piece[0] for piece in pieces]), call.routing.vote
    if not 0 < int(spans[:, 2].max()) <= summary.groups:
        give_up(call.kernels, call.way, _NO_CHOICE)
        return None
    out = summary.steps(pages, call.scaled, call.query.flatten(0, 1), spans, vote, call.scale)
    if out is None:
        give_up(call.kernels, call.way, "a score that is not finite")
        return None
    _count_scored(call, sum(piece[1] for piece in pieces))
    call.use.add_attended(call.kv.rows * sum(piece[2] for piece in pieces))
    return out


def _pieces(call: _Call) -> list[tuple[int, int]]:
    """Cut the queries into runs (first, number) whose plans are small enough to be kept."""
    starts = range(call.first, call.length, _PIECE)
    return [(first, min(_PIECE, call.length - first)) for first in starts]


# All layers of a model take the same steps.
@lru_cache(maxsize=64)
def _spans(routing: Routing, first: int, queries: int) -> tuple[Tensor, int, int]:
    """Return the `Span` of each unpadded query, the groups scored, and the tokens attended to, in one row."""
    plan, size = plan_queries(routing, first, queries, None), routing.group_size
    between, chosen = plan.window - plan.sink_end, plan.taken
    parts = (plan.sink_start, plan.sink_end, plan.window, chosen, plan.visible)
    scored = plan.window * ((chosen > 0) & (chosen < between))
    attended = (plan.sink_end - plan.sink_start + chosen - plan.window) * size + plan.visible
    return torch.stack([part[0] for part in parts], 1), int(scored.sum()), int(attended.sum())


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


def _padded_groups(call: _Call, plan: QueryPlan, chosen: Chosen) -> tuple[Tensor, Tensor]:
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


def _tiles(call: _Call) -> Tensor:
    """Many queries: route each one, read all K/V once, attend under a mask, a tile of queries at a time."""
    kv, group = call.kv, call.routing.group_size
    batch, kv_heads, heads, queries, _ = call.query.shape
    device = call.query.device
    _extend(call)
    size = _tile_size(call)
    if size > 1:
        return _shared_tiles(call, size)
    out = _steps(call)
    if out is not None:
        for first, count in _pieces(call):
            _count_visible(call, _plan(call, first, count))
        folded: Tensor = out.unflatten(0, (batch, kv_heads))
        return folded
    score = _scorer(call, _groups(call))
    key, value = kv.read(0, call.length)
    step = min(_PIECE, max(16, _TILE_BYTES // (4 * kv.rows * heads * call.length)))
    parts = []
    # From the longest tile down: each then fits where the one before it was, and the heap does not grow.
    for begin in reversed(range(0, queries, step)):
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
        chosen = _choose(call, plan, scaled, min(plan.last_window, _groups(call)), score)
        allowed = routed_mask(chosen.groups, chosen.kept, fixed, dense, group, tokens)
        parts.append(_attend_allowed(call, key, value, allowed, begin, stop))
    return torch.cat(parts[::-1], 3)


def _attend_allowed(
    call: _Call, key: Tensor, value: Tensor, allowed: Tensor, begin: int, stop: int
) -> Tensor:
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
        _record(call, first, padded.unflatten(-1, (-1, group)).any(-1))
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
    counted = _counted_chunks(call, tail.chunks, ends).repeat_interleave(tail.chunk_size, -1)
    counted = torch.nn.functional.pad(counted, (0, max(0, tokens - counted.shape[-1])))[..., :tokens]
    scaled = call.scaled[:, :, begin:stop]
    part = attend_masked_with_tail(
        scaled, key[:, :tokens], value[:, :tokens], allowed, counted & visible & ~allowed, tail
    )
    out: Tensor = part.unflatten(0, (batch, kv_heads)).to(call.query.dtype)
    return out


def _tile_size(call: _Call) -> int:
    """Say how many queries of a prefill share a routed set."""
    size = call.routing.prefill_tile
    if size != "auto":
        return int(size)
    return _SHARED if call.way == "triton" else 1


def _shared_tiles(call: _Call, size: int) -> Tensor:
    """Many queries in tiles: route each tile once, attend exactly from each of its queries."""
    routing, summary, padding = call.routing, call.index.groups, call.padding
    rows, queries = call.kv.rows, call.query.shape[3]
    tiles = plan_tiles(routing, call.first, queries, None if padding is None else padding.host, size)
    for first, count in _pieces(call):
        _count_visible(call, _plan(call, first, count))
    needed = tiles.plan.last_window
    starts = None if padding is None else padding.starts(call.length)
    keys = None
    if summary is not None and 0 < needed <= summary.groups:
        begun = None
        if starts is not None:
            # An index into groups that are there: a row of nothing but padding has no vote.
            begun = (starts // routing.group_size).clamp(max=needed - 1) * routing.group_size
            begun = begun[:, 0].repeat_interleave(rows // len(begun)).to(call.query.device)
        keys = summary.tile_keys(needed, begun, call.way == "triton")
    if keys is not None:
        _count_scored(call, int(tiles.plan.window.sum()) * (rows // len(tiles.plan.window)) // rows)
    key, value = call.kv.read(0, call.length)
    if keys is not None and call.way == "triton":
        call.use.add_attended(
            tiles.attended(call.first, queries, starts) * (rows // (1 if starts is None else len(starts)))
        )
        record = partial(_record_tiles, call, tiles) if LEDGER.wants(call.layer) else None
        key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (key, value))
        spans = tile_spans(tiles, keys.refined, starts, call.query.device)
        return prefill_tiles(
            key, value, keys, call.query, spans, tiles, first=call.first, routing=routing,
            scale=call.scale, scoring=call.scoring, listed=record,
        )  # fmt: skip
    real = None
    if padding is not None:
        whole = call.length // routing.group_size
        real = padding.rows(rows)[:, : whole * routing.group_size].unflatten(-1, (whole, -1)).any(-1)
    turned = call.scaled if summary is None else summary.turned(call.scaled)
    parts = []
    for number in range(tiles.number):
        begin = max(0, (tiles.first + number) * size - call.first)
        stop = min(queries, (tiles.first + number + 1) * size - call.first)
        tokens = call.first + stop
        marks = shared_groups(turned[:, :, begin:stop], keys, tiles, number, routing.vote, real)
        allowed = marks.repeat_interleave(routing.group_size, -1)[:, None, :tokens].expand(rows, -1, -1)
        parts.append(_attend_allowed(call, key, value, allowed, begin, stop))
    return torch.cat(parts, 3)


def _record_tiles(call: _Call, tiles: Tiles, number: int, groups: Tensor) -> None:
    """Record which groups the queries of a run of tiles attended to."""
    size, rows = call.routing.group_size, groups.shape[1]
    starts = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    starts = (starts if call.padding is None else call.padding.starts(call.length)).to(groups.device)
    for place, listed in enumerate(groups.unbind(0)):
        tile = number + place
        many = per_row(tiles.listed[:, tile : tile + 1], rows, groups.device)[:, 0]
        inside = torch.arange(listed.shape[1], device=listed.device) < many
        marks = torch.zeros(rows, -(-call.length // size), dtype=torch.int32, device=listed.device)
        marks.scatter_add_(-1, listed.long().masked_fill(~inside, 0), inside.int())
        first = max(call.first, (tiles.first + tile) * tiles.size)
        stop = min(call.length, (tiles.first + tile + 1) * tiles.size)
        token = torch.arange(marks.shape[1] * size, device=listed.device)
        position = torch.arange(first, stop, device=listed.device)[:, None]
        visible = (token <= position)[None] & (token >= starts[..., None])
        visible = visible.unflatten(-1, (-1, size)).any(-1).repeat_interleave(rows // len(starts), 0)
        _record(call, first, (marks > 0)[:, None] & visible)


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
    _count_scored(call, scaled.shape[2] * groups)
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


def _count_scored(call: _Call, groups: int) -> None:
    scored = call.kv.rows * groups * call.routing.group_size
    call.use.scored += scored
    call.use.summary_bytes += scored * call.index.bytes_per_token()


def _record(call: _Call, first: int, groups: Tensor) -> None:
    batch, kv_heads = call.query.shape[:2]
    LEDGER.record(
        RouteRecord(
            call.layer, first, call.routing.group_size, groups.unflatten(0, (batch, kv_heads)).cpu().clone()
        )
    )
