"""The index of one layer: every summary that its routing needs, kept up to date as tokens arrive."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Importing a kind's module registers it.
from hga_compile.configs.profile import Kernels
from hga_compile.configs.routing import Routing
from hga_compile.kernels import lowbit as _lowbit
from hga_compile.kernels import mean as _mean
from hga_compile.kernels.chunks import ChunkSummary
from hga_compile.kernels.summaries import Summary, make_summary
from hga_compile.kernels.tail import TailSummary

__all__ = ["KeyValueReader", "LayerIndex", "MeanQuery"]

del _lowbit, _mean

KeyValueReader = Callable[[int, int], tuple[Tensor, Tensor]]
"""Returns keys ``[rows, end - begin, dim]`` and values of the tokens ``begin <= token < end``."""


class LayerIndex:
    """Group summaries, chunk summaries and tail of one layer.

    Summaries are made of complete groups and chunks only, in order, so that their content does not depend on
    how the sequence was cut into steps.

    Parameters
    ----------
    routing : Routing
        Settings of the layer.
    kernels : {"auto", "triton", "native", "reference"}
        What summarises and scores (`compile.kernels`).
    room : int
        Tokens that are known to come: the summaries of their groups do not grow by copies.
    """

    def __init__(self, routing: Routing, kernels: Kernels = "auto", room: int = 0) -> None:
        self.routing, self.kernels, self.room = routing, kernels, room
        self.groups: Summary | None = None
        self.chunks: ChunkSummary | None = None
        self.tail: TailSummary | None = None
        self.queries: MeanQuery | None = None
        """Mean of the first queries, which a tail is expanded about; None before there are any."""
        self._centre_end = 0
        """Position past the last key that the centre is made of."""
        self._centred: Tensor | None = None
        """``[rows]`` bool: rows that had all keys of their centre; None: all of them."""

    def note_queries(self, query: Tensor, first: int, key_mask: Tensor | None) -> None:
        """Add to the mean query that the tail is expanded about: of the first `centre_tokens` queries.

        Parameters
        ----------
        query : Tensor
            ``[rows, heads, queries, dim]`` float32, softmax scale applied.
        first : int
            Position of the first of them.
        key_mask : Tensor or None
            ``[rows, tokens]`` bool; padding does not count.
        """
        # Once the tail is made its mean query is fixed.
        if self.tail is not None and self._centred is None:
            return
        if self.queries is None:
            rows, heads, _, dim = query.shape
            zeros = query.new_zeros
            self.queries = MeanQuery(zeros(rows, heads, dim), zeros(rows, dtype=torch.int64))
        self.queries.add(query, first, key_mask, self.routing.centre_tokens)

    def extend(self, length: int, read: KeyValueReader, key_mask: Tensor | None) -> None:
        """Summarise every complete group and chunk of the first `length` tokens.

        Parameters
        ----------
        length : int
            Tokens stored.
        read : KeyValueReader
            Source of the keys and values.
        key_mask : Tensor or None
            ``[rows, tokens]`` bool; padding does not count for the centre.
        """
        routing = self.routing
        if self._centred is not None and self._more_centred(length, key_mask):
            # Queries of rows that were short of keys have been dense: nothing depends on their codes yet.
            self.groups = self.tail = None
        if self.groups is None:
            if length < routing.centre_tokens:
                return
            self.groups = make_summary(routing, self._centre(length, read, key_mask), self.kernels)
            self.groups.expect(self.room)
        done = self.groups.groups * routing.group_size
        end = length - length % routing.group_size
        if end > done:
            self.groups.append(self._keys(self.groups, done, end, read, key_mask))
        end = length - length % routing.chunk_size
        if routing.uses_chunks(length):
            self._extend_chunks(end, read)
        if routing.tail == "estimate":
            self._extend_tail(end, read)

    def truncate(self, length: int) -> None:
        """Forget what was made of tokens from number `length` on."""
        if self.groups is not None:
            self.groups.truncate(length // self.routing.group_size)
            if length < self._centre_end:
                self.groups = self.tail = self._centred = None
        if length == 0:
            self.queries = None
        if length < self.routing.chunk_size:
            self.chunks = self.tail = None
        for part in (self.chunks, self.tail):
            if part is not None:
                part.truncate(length // self.routing.chunk_size)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows` (int64 indices)."""
        for part in (self.groups, self.chunks, self.tail):
            if part is not None:
                part.select_rows(rows)
        if self.queries is not None:
            self.queries = self.queries.select_rows(rows)
        if self._centred is not None:
            self._centred = self._centred[rows.to(self._centred.device)]

    def emptied(self) -> "LayerIndex":
        """Return an index without summaries that makes the same ones again from the same K/V."""
        other = LayerIndex(self.routing, self.kernels, self.room)
        # What was noted is replaced, never written to: both may hold it.
        other.queries = None if self.queries is None else replace(self.queries)
        return other

    def nbytes(self) -> int:
        """Return the bytes that the summaries take."""
        return sum(part.nbytes() for part in (self.groups, self.chunks, self.tail) if part is not None)

    def bytes_per_token(self) -> float:
        """Return the bytes of summaries that routing one query reads for each token, in one row."""
        parts = (self.groups, self.chunks, self.tail)
        return sum(part.bytes_per_token() for part in parts if part is not None)

    def _keys(
        self, groups: Summary, done: int, end: int, read: KeyValueReader, key_mask: Tensor | None
    ) -> Tensor:
        """Read the keys to summarise, and make the centres that they are coded about first."""
        centres = groups.centres
        first, last = (done, done) if centres is None else centres.missing(end)
        if centres is None or first >= last:
            return read(done, end)[0]
        begin = min(first, done)
        keys = read(begin, end)[0]
        counted = None if key_mask is None else key_mask[:, first:last]
        centres.append(keys[:, first - begin : last - begin], counted)
        return keys[:, done - begin :]

    def _more_centred(self, length: int, key_mask: Tensor | None) -> bool:
        """Say whether a row that was short of keys for its centre has them by now."""
        if key_mask is None or self._centred is None:
            return True
        enough = key_mask[:, :length].sum(1) >= self.routing.centre_tokens
        return bool((enough & ~self._centred).any())

    def _centre(self, length: int, read: KeyValueReader, key_mask: Tensor | None) -> Tensor:
        """Mean of the first `centre_tokens` keys that are not padding, ``[rows, dim]`` float32."""
        end = wanted = self.routing.centre_tokens
        self._centre_end, self._centred = wanted, None
        if key_mask is not None:
            count = key_mask[:, :length].cumsum(1)
            enough = count[:, -1] >= wanted
            ends = (count < wanted).sum(1) + 1
            self._centre_end = int((ends * enough).max())
            self._centred = None if bool(enough.all()) else enough
            end = min(length, int(ends.max()))
        keys = read(0, end)[0].float()
        # A broken key would break the codes of all keys and could not be told from them any more.
        counted = torch.isfinite(keys).all(-1)
        if key_mask is not None:
            counted &= key_mask[:, :end] & (count[:, :end] <= wanted)
        total = keys.masked_fill(~counted[..., None], 0.0).sum(1)
        return total / counted.sum(1, keepdim=True).clamp(min=1)

    def _extend_chunks(self, end: int, read: KeyValueReader) -> None:
        size = self.routing.chunk_size
        done = 0 if self.chunks is None else self.chunks.chunks * size
        if end <= done:
            return
        keys = read(done, end)[0]
        if self.chunks is None:
            self.chunks = ChunkSummary(
                size, self.routing.chunk_parts, keys.shape[0], keys.shape[2], keys.device, self.kernels
            )
        self.chunks.append(keys)

    def _extend_tail(self, end: int, read: KeyValueReader) -> None:
        size = self.routing.chunk_size
        done = 0 if self.tail is None else self.tail.chunks * size
        if end <= done or self.queries is None:
            return
        keys, values = read(done, end)
        if self.tail is None:
            self.tail = TailSummary(size, self.queries.mean(), values.shape[2])
        self.tail.append(keys, values)


@dataclass
class MeanQuery:
    """Mean over the first queries of each row; sums are replaced, never written to."""

    total: Tensor
    """Sum, ``[rows, heads, dim]`` float32."""
    count: Tensor
    """Queries in it, ``[rows]`` int64."""
    end: int = 0
    """Position past the last query that was looked at."""

    def add(self, query: Tensor, first: int, key_mask: Tensor | None, most: int) -> None:
        """Add queries at positions not looked at yet, until `most` of a row are in."""
        skip = max(0, self.end - first)
        query, first = query[:, :, skip:], first + skip
        self.end = max(self.end, first + query.shape[2])
        counted = torch.isfinite(query).all(-1).all(1)
        if key_mask is not None:
            counted &= key_mask[:, first : first + query.shape[2]]
        counted &= self.count[:, None] + counted.cumsum(1) <= most
        self.total = self.total + query.masked_fill(~counted[:, None, :, None], 0.0).sum(2)
        self.count = self.count + counted.sum(1)

    def mean(self) -> Tensor:
        """Return the mean, ``[rows, heads, dim]``."""
        return self.total / self.count.clamp(min=1)[:, None, None]

    def select_rows(self, rows: Tensor) -> "MeanQuery":
        """Return that of other rows (int64 indices)."""
        rows = rows.to(self.total.device)
        return MeanQuery(self.total[rows], self.count[rows], self.end)
