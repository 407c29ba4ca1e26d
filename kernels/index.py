"""The index of one layer: every summary that its routing needs, kept up to date as tokens arrive."""

from collections.abc import Callable

from torch import Tensor

# Importing a kind's module registers it.
from hga_compile.configs.routing import Routing
from hga_compile.kernels import lowbit as _lowbit
from hga_compile.kernels import mean as _mean
from hga_compile.kernels.chunks import ChunkSummary
from hga_compile.kernels.summaries import Summary, make_summary
from hga_compile.kernels.tail import TailSummary

__all__ = ["KeyValueReader", "LayerIndex"]

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
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.groups: Summary | None = None
        self.chunks: ChunkSummary | None = None
        self.tail: TailSummary | None = None
        self._mean_query: Tensor | None = None

    def note_queries(self, query: Tensor, first: int) -> None:
        """Fix the mean query that the tail is expanded about, from the first queries ever seen.

        Parameters
        ----------
        query : Tensor
            ``[rows, heads, queries, dim]`` float32, softmax scale applied.
        first : int
            Position of the first of them.
        """
        if self.routing.tail == "drop" or self._mean_query is not None:
            return
        # Queries before `centre_tokens` are dense, so their mean tells no routed query about a later one.
        early = query[:, :, : self.routing.centre_tokens] if first == 0 else query[:, :, :1]
        self._mean_query = early.mean(2)

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
        if self.groups is None:
            if length < routing.centre_tokens:
                return
            self.groups = make_summary(routing, self._centre(length, read, key_mask))
        done = self.groups.groups * routing.group_size
        end = length - length % routing.group_size
        if end > done:
            self.groups.append(read(done, end)[0])
        end = length - length % routing.chunk_size
        if routing.uses_chunks(length):
            self._extend_chunks(end, read)
        if routing.tail == "estimate":
            self._extend_tail(end, read)

    def truncate(self, length: int) -> None:
        """Forget what was made of tokens from number `length` on."""
        if self.groups is not None:
            self.groups.truncate(length // self.routing.group_size)
            if length < self.routing.centre_tokens:
                self.groups = self.chunks = self.tail = self._mean_query = None
        for part in (self.chunks, self.tail):
            if part is not None:
                part.truncate(length // self.routing.chunk_size)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows` (int64 indices)."""
        for part in (self.groups, self.chunks, self.tail):
            if part is not None:
                part.select_rows(rows)
        if self._mean_query is not None:
            self._mean_query = self._mean_query[rows.to(self._mean_query.device)]

    def nbytes(self) -> int:
        """Return the bytes that the summaries take."""
        return sum(part.nbytes() for part in (self.groups, self.chunks, self.tail) if part is not None)

    def bytes_per_token(self) -> float:
        """Return the bytes of summaries that routing one query reads for each token, in one row."""
        parts = (self.groups, self.chunks, self.tail)
        return sum(part.bytes_per_token() for part in parts if part is not None)

    def _centre(self, length: int, read: KeyValueReader, key_mask: Tensor | None) -> Tensor:
        """Mean of the first `centre_tokens` keys that are not padding, ``[rows, dim]`` float32."""
        wanted = self.routing.centre_tokens
        if key_mask is None:
            return read(0, wanted)[0].float().mean(1)
        keys = read(0, length)[0].float()
        real = key_mask[:, :length]
        weight = (real & (real.cumsum(1) <= wanted)).float()[..., None]
        return (keys * weight).sum(1) / weight.sum(1).clamp(min=1.0)

    def _extend_chunks(self, end: int, read: KeyValueReader) -> None:
        size = self.routing.chunk_size
        done = 0 if self.chunks is None else self.chunks.chunks * size
        if end <= done:
            return
        keys = read(done, end)[0]
        if self.chunks is None:
            self.chunks = ChunkSummary(
                size, self.routing.chunk_parts, keys.shape[0], keys.shape[2], keys.device
            )
        self.chunks.append(keys)

    def _extend_tail(self, end: int, read: KeyValueReader) -> None:
        size = self.routing.chunk_size
        done = 0 if self.tail is None else self.tail.chunks * size
        if end <= done or self._mean_query is None:
            return
        keys, values = read(done, end)
        if self.tail is None:
            self.tail = TailSummary(size, self._mean_query, values.shape[2])
        self.tail.append(keys, values)
