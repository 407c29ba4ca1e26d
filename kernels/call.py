"""One call of routed attention: what it is given, and what decode and prefill both do with it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol
from weakref import ref

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.configs.routing import Routing
from hga_compile.kernels.dispatch import Need, Way, choose, preferred
from hga_compile.kernels.hot import HotCache
from hga_compile.kernels.index import LayerIndex
from hga_compile.kernels.ledger import LEDGER, RouteRecord, Use
from hga_compile.kernels.plan import QueryPlan, plan_left_padded, plan_queries
from hga_compile.kernels.route import Chosen, choose_groups
from hga_compile.kernels.scoring import Scoring
from hga_compile.kernels.staging import rows_at_once
from hga_compile.kernels.summaries import Scorer

__all__ = ["Call", "KeyValues", "Padding"]


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
        """Whether they lie in pages, which kernels may read in place or from what is fetched."""

    @property
    def apart(self) -> bool:
        """Whether some of the rows are read without the others being read too."""

    def read(self, begin: int, end: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, end - begin, dim]`` and values, on the compute device.

        With `rows`, of those rows alone.
        """

    def gather(self, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, n * group_size, dim]`` and values of ``[rows, n]`` groups.

        Tokens past the end of the sequence may hold anything finite or not; the caller masks them.
        """

    @property
    def hot(self) -> HotCache | None:
        """Slots on the GPU for pages in pinned host memory; None without."""

    def fetch(self, groups: Tensor) -> Tensor:
        """Return copies of the ``[rows, n]`` groups: pages ``[n, rows, page]`` on the compute device."""

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

    @cached_property
    def starts(self) -> Tensor:
        """First real token of each sequence, the number of tokens without one: ``[batch, 1]`` on the CPU."""
        first = self.host.to(torch.int8).argmax(1, keepdim=True)
        return first.masked_fill(~self.host.any(1, keepdim=True), self.host.shape[1])

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """`starts` as numbers."""
        return tuple(self.starts.flatten().tolist())

    def rows(self, rows: int) -> Tensor:
        """Return the mask per row, ``[rows, tokens]``."""
        return self.mask.repeat_interleave(rows // self.mask.shape[0], 0)


_last_padding: tuple[Callable[[], Tensor | None], int, int, Padding | None] = (lambda: None, 0, 0, None)


@dataclass(frozen=True)
class Call:
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
    def hot(self) -> HotCache | None:
        """Slots on the GPU for its pages, whose hits and misses count as this layer's; None without."""
        hot = self.kv.hot
        if hot is not None:
            hot.report_as(self.layer)
        return hot

    @property
    def first(self) -> int:
        """Position of the first query."""
        return self.length - self.query.shape[3]

    @cached_property
    def scaled(self) -> Tensor:
        """The query times the softmax scale, ``[rows, heads, queries, dim]`` float32."""
        return (self.query.float() * self.scale).flatten(0, 1)

    @property
    def rows_at_once(self) -> int:
        """Of how many rows all K/V are read at a time, so that a long history does not fill the GPU."""
        kv = self.kv
        width = (self.query.shape[4] + kv.v_dim) * kv.dtype.itemsize
        # Codes of 8 bits are there beside what they are decoded to.
        width += kv.row_bytes if kv.row_bytes != width else 0
        return rows_at_once(kv.rows, self.length * width, kv.apart)

    @property
    def _shared(self) -> bool:
        """Whether queries of a prefill share routed sets."""
        if self.routing.prefill_tile != "auto":
            return self.routing.prefill_tile > 1
        return preferred(self.kernels, self.query.device) == "triton"

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
            parts=self.routing.chunk_parts,
            shared=self._shared,
            tail=self.index.tail is not None,
            padding="" if padding is None else "left" if padding.left else "gaps",
            sinks=self.routing.sinks > 0,
            plain=self.scoring.plain,
            recorded=LEDGER.wants(self.layer),
        )

    def plan(self, first: int, queries: int) -> QueryPlan:
        """Plan a run of its queries, the first of them at position `first`."""
        if self.padding is None:
            return plan_queries(self.routing, first, queries, None)
        if self.padding.left:
            return plan_left_padded(self.routing, first, queries, self.padding.lead)
        return plan_queries(self.routing, first, queries, self.padding.host[:, : first + queries])

    def extend(self) -> None:
        """Bring the index up to date."""
        rows = None if self.padding is None else self.padding.rows(self.kv.rows)
        self.index.extend(self.length, self.kv.read, rows)

    def scorer(self, groups: int) -> Scorer | None:
        """Return what scores the first `groups` groups; None if there are none."""
        return None if groups == 0 or self.index.groups is None else self.index.groups.scorer(groups)

    @property
    def groups(self) -> int:
        """Groups summarised."""
        return 0 if self.index.groups is None else self.index.groups.groups

    def choose(self, plan: QueryPlan, scaled: Tensor, groups: int, score: Scorer | None) -> Chosen:
        """Route the queries of `plan`, unless they all are dense."""
        if groups == 0 or score is None or bool(plan.dense.all()):
            none = torch.zeros(self.kv.rows, scaled.shape[2], 0, dtype=torch.int64, device=scaled.device)
            return Chosen(none, none.bool())
        real = None
        if self.padding is not None:
            size = self.routing.group_size
            real = self.padding.rows(self.kv.rows)[:, : groups * size].unflatten(-1, (-1, size)).any(-1)
        chunks = self.index.chunks if self.routing.uses_chunks(self.length) else None
        self.count_scored(scaled.shape[2] * groups)
        return choose_groups(self.routing, plan, scaled, score, groups, chunks, real)

    def counted_chunks(self, chunks: int, ends: Tensor) -> Tensor:
        """Chunks whose tail is estimated: complete for the query and free of padding.

        ``[rows or 1, queries, chunks]`` bool.
        """
        size = self.routing.chunk_size
        number = torch.arange(chunks, device=ends.device)
        complete = (number + 1) * size <= ends[..., None]
        if self.padding is not None:
            mask = self.padding.rows(self.kv.rows)[:, : chunks * size]
            complete = complete & mask.unflatten(-1, (chunks, size)).all(-1)[:, None]
        return complete

    def count_visible(self, plan: QueryPlan) -> int:
        """Count the tokens that the queries of `plan` see; return how many."""
        visible = int(plan.visible.sum()) * (self.kv.rows // len(plan.visible))
        self.use.visible += visible
        return visible

    def count_scored(self, groups: int) -> None:
        """Count `groups` scored groups in every row."""
        scored = self.kv.rows * groups * self.routing.group_size
        self.use.scored += scored
        self.use.summary_bytes += scored * self.index.bytes_per_token()

    def record(self, first: int, groups: Tensor) -> None:
        """Record the groups that queries from position `first` on attend to, ``[rows, queries, groups]``."""
        batch, kv_heads = self.query.shape[:2]
        LEDGER.record(
            RouteRecord(
                self.layer,
                first,
                self.routing.group_size,
                groups.unflatten(0, (batch, kv_heads)).cpu().clone(),
            )
        )
