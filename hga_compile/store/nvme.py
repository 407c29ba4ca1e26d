"""The tier `nvme`: complete blocks of groups on a file, the last one in RAM, and RAM as the cache of both."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hga_compile.configs.profile import Kernels, Offload
from hga_compile.kernels.fp8 import blank
from hga_compile.store.aligned import AlignedPages
from hga_compile.store.blocks import BlockFile
from hga_compile.store.errors import StoreError
from hga_compile.store.page_file import ALIGNMENT
from hga_compile.store.page_format import HEADER_BYTES
from hga_compile.store.pool import shared_pool
from hga_compile.store.reader import BATCH_BYTES, GroupReader, Traffic
from hga_compile.store.storage_io import StorageIO
from hga_compile.store.tier import Held, Pair, room_for

__all__ = ["NvmePages"]

Numbers = NDArray[np.int64]

# Blocks of a range up to which it is read through the pool, which may have them.
_FEW = 2
# New tokens of a step up to which the next one is likely to read what the last one did.
_STEP = 8


class NvmePages:
    """K/V of one layer on a file (a `store.tier.Tier`).

    A block is as many groups as fit into a page; block ``b`` of row ``r`` is page ``b * rows + r``. A block
    is written once it is complete, and never again unless its tokens are replaced.

    Parameters
    ----------
    rows, dim, v_dim, group_size, dtype, compute, kernels
        As for `pages.Pages`.
    place : Offload
        Folder, page size, threads, and RAM for pages.
    layer : int
        Number of the layer, for the headers of pages.
    io : StorageIO or None
        The file system; None: the operating system's.

    Raises
    ------
    StoreFolderError, StoreBusyError, StoreIOError, StoreFullError
        The file cannot be made.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        v_dim: int,
        group_size: int,
        dtype: torch.dtype,
        compute: torch.device,
        kernels: Kernels = "auto",
        place: Offload | None = None,
        layer: int = 0,
        io: StorageIO | None = None,
    ) -> None:
        self.rows, self.dim, self.v_dim, self.group_size = rows, dim, v_dim, group_size
        self.dtype, self.compute, self.kernels = dtype, compute, kernels
        self.place, self.layer = Offload(tier="nvme") if place is None else place, layer
        self.io = StorageIO() if io is None else io
        self._page = group_size * (dim + v_dim)
        group = self._page * dtype.itemsize
        size = max(self.place.nvme_page, HEADER_BYTES + group)
        size += -size % ALIGNMENT
        self._groups = (size - HEADER_BYTES) // group
        """Groups of a block."""
        self._file = BlockFile(
            self.place.nvme_folder, rows, size, self._groups * group, layer, self.place.nvme_threads, self.io
        )
        self._page_bytes = size
        pool = shared_pool(group, self.place.nvme_cache, self.place.host_budget)
        self._reader = GroupReader(self._file, pool, self._groups, size, self.place.poison)
        self._tail = self._empty_tail()
        self._tokens = 0
        """Past the last token that was written."""
        self._last: Numbers = np.zeros(0, np.int64)
        """The last routed set, as `GroupReader` numbers groups."""
        if self.place.reserve_tokens:
            self.reserve(self.place.reserve_tokens)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - names of this module are gone when the interpreter ends
            self.close()
        except Exception:
            pass

    def close(self) -> None:
        """Give the file and its pages in RAM up; with `offload.poison` overwrite the latter."""
        file = self.__dict__.get("_file")  # none, if it could not be made
        # In a forked child the pool, and whatever lock it had, is the parent's.
        if file is not None and file.here and "_tail" in self.__dict__:
            self._reader.close()
            if self.place.poison:
                self._tail.fill_(blank(self.dtype))
        if file is not None:
            file.close()

    def use(self, kernels: Kernels) -> None:
        """Note what a profile asks for; the rows of this tier are moved by the CPU."""
        self.kernels = kernels

    @property
    def traffic(self) -> Traffic:
        """Pages that were asked for so far."""
        return self._reader.traffic

    @property
    def host_pages(self) -> None:
        """None: pages are fetched before a kernel reads them."""

    @property
    def gpu_pages(self) -> None:
        """None: pages are fetched before a kernel reads them."""

    @property
    def hot(self) -> None:
        """None: pages are kept in host RAM instead."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one row."""
        return (self.dim + self.v_dim) * self.dtype.itemsize

    def reserve(self, tokens: int) -> None:
        """Set room on the file aside for `tokens` tokens.

        Raises
        ------
        StoreFullError
            The file system has none.
        """
        self._file.reserve(tokens // self._span)

    def write(self, key: Tensor, value: Tensor, begin: int) -> None:
        """Store ``[rows, n, dim]`` keys and values as tokens ``begin, begin + 1, ...``, the last ones.

        Raises
        ------
        StoreFullError, StoreIOError, CorruptPageError
            The tokens before `begin` are as they were; those from there on are not stored.
        """
        self._file.check_process()
        self._reader.wait()
        end, first = begin + key.shape[1], begin // self._span
        if end == begin:
            return
        if first < self._file.watermark:
            self._reopen(begin)
        self._tokens = begin
        key, value = key.to("cpu"), value.to("cpu")
        stop = min(end, (first + 1) * self._span)
        self._into_tail(key[:, : stop - begin], value[:, : stop - begin], begin - first * self._span)
        last = end // self._span
        for block, count in self._batches(first, last):
            self._write_blocks(block, count, key, value, begin)
        if last > first:
            self._tail = self._empty_tail()
            rest = last * self._span - begin
            self._into_tail(key[:, rest:], value[:, rest:], 0)
        self._tokens = end
        if key.shape[1] <= _STEP:
            self._reader.read_ahead(self._last)

    def truncate(self, length: int) -> None:
        """Give up tokens from number `length` on."""
        self._reader.wait()
        self._tokens = min(self._tokens, length)
        kept = -(-length // self._span)
        if kept <= self._file.watermark:
            # The block that `length` lies in stays on the file until its tokens are replaced.
            self._file.watermark = kept
            self._reader.drop(kept)
            if self.place.poison:
                self._tail.fill_(blank(self.dtype))
        elif self.place.poison:
            self._into_tail_nan(length - self._file.watermark * self._span)

    @property
    def apart(self) -> bool:
        """False: a block of all rows is read from the file at once."""
        return False

    def read(self, begin: int, end: int, into: Pair | None = None, rows: slice | None = None) -> Pair:
        """Return copies of keys ``[rows, end - begin, dim]`` and values, on the compute device.

        Raises
        ------
        CorruptPageError, StoreIOError
            A page is not what was written, or cannot be read.
        """
        if rows is not None:
            raise ValueError("rows on files are read together (`apart`)")
        tokens = end - begin
        key, value = into or room_for(self, tokens)
        first, last = begin // self._span, -(-end // self._span)
        on_file = min(last, self._file.watermark)
        if tokens and last - first <= _FEW:
            groups = torch.arange(begin // self.group_size, -(-end // self.group_size), device="cpu")
            pages = self._fetched(groups.expand(self.rows, -1)).unsqueeze(2)
            self._copy_out(pages, groups.tolist()[0], 1, begin, end, key, value)
        elif tokens:
            for block, count in self._batches(first, on_file):
                self._copy_out(self._streamed(block, count), block, self._groups, begin, end, key, value)
            if last > on_file:
                self._copy_out(self._tail[None], on_file, self._groups, begin, end, key, value)
        return key, value

    def fetch(self, groups: Tensor) -> Tensor:
        """Return copies of the ``[rows, n]`` groups: pages ``[n, rows, page]`` on the compute device.

        Raises
        ------
        CorruptPageError, StoreIOError
            A page is not what was written, or cannot be read.
        StoreError
            A group that was never written.
        """
        found = self._fetched(groups)
        self._last = self._reader.asked
        if self.compute.type == "cuda":
            return found.pin_memory().to(self.compute, non_blocking=True)
        return found

    def gather(self, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, n * group_size, dim]`` and values of the ``[rows, n]`` groups."""
        if group_size != self.group_size:
            raise ValueError(f"pages hold groups of {self.group_size} tokens, got a request for {group_size}")
        found = self.fetch(groups).transpose(0, 1)
        split = self.group_size * self.dim
        key = found[..., :split].reshape(self.rows, -1, self.dim)
        return key, found[..., split:].reshape(self.rows, -1, self.v_dim)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows` (int64 indices): all is written to another file."""
        other = self._copied(rows.to("cpu"))
        self.__dict__, other.__dict__ = other.__dict__, self.__dict__
        other.close()

    def clone(self) -> "NvmePages":
        """Return an independent copy, on a file of its own."""
        return self._copied(torch.arange(self.rows, device="cpu"))

    def held(self) -> Held:
        """Return the bytes allocated, by place."""
        return Held(host=self._tail.nbytes + self._reader.held(), nvme=self._file.nbytes)

    # --- blocks ---

    @property
    def _span(self) -> int:
        """Tokens of a block."""
        return self._groups * self.group_size

    def _batches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Cut blocks into batches of bounded size: first block and number of each."""
        step = max(1, BATCH_BYTES // (self.rows * self._page_bytes))
        for block in range(first, last, step):
            yield block, min(step, last - block)

    def _empty_tail(self) -> Tensor:
        tail = torch.empty(self.rows, self._groups, self._page, dtype=self.dtype, device="cpu")
        return tail.fill_(blank(self.dtype)) if self.place.poison else tail

    def _split(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of pages ``[..., page]`` as ``[..., group_size, dim]``."""
        split = self.group_size * self.dim
        return (
            pages[..., :split].unflatten(-1, (self.group_size, self.dim)),
            pages[..., split:].unflatten(-1, (self.group_size, self.v_dim)),
        )

    def _into_tail(self, key: Tensor, value: Tensor, offset: int) -> None:
        if key.shape[1]:
            token = torch.arange(offset, offset + key.shape[1], device="cpu")
            for view, part in zip(self._split(self._tail), (key, value), strict=True):
                view[:, token // self.group_size, token % self.group_size] = part

    def _into_tail_nan(self, offset: int) -> None:
        token = torch.arange(offset, self._span, device="cpu")
        for view in self._split(self._tail):
            view[:, token // self.group_size, token % self.group_size] = blank(self.dtype)

    def _reopen(self, begin: int) -> None:
        """Take the block of token `begin` back into RAM, as those behind it will be replaced."""
        block = begin // self._span
        tail = self._empty_tail()
        if begin % self._span:
            groups = torch.arange(block * self._groups, (block + 1) * self._groups, device="cpu")
            tail.copy_(self._fetched(groups.expand(self.rows, -1), whole=True).transpose(0, 1))
        self._tail = tail
        self._file.watermark = block
        self._reader.drop(block)

    def _write_blocks(self, block: int, count: int, key: Tensor, value: Tensor, begin: int) -> None:
        """Write complete blocks of tokens in the tail, and in `key` and `value` from `begin` on."""
        pages = AlignedPages(count * self.rows, self._page_bytes)
        typed = pages.tensor(self.dtype, HEADER_BYTES, (self._groups, self._page))
        typed = typed.view(count, self.rows, self._groups, self._page)
        skip = 0
        if block * self._span <= begin:
            typed[0].copy_(self._tail)
            skip = 1
        start = (block + skip) * self._span - begin
        tokens = slice(start, start + (count - skip) * self._span)
        for view, part in zip(self._split(typed[skip:]), (key, value), strict=True):
            cut = part[:, tokens].unflatten(1, (count - skip, self._groups, self.group_size))
            view.copy_(cut.transpose(0, 1))
        self._reader.drop(block)
        self._file.write(block, pages, count)
        # The index and the window are about to read what came last.
        last = np.arange(self.rows, dtype=np.int64) + (count - 1) * self.rows
        self._reader.keep(block + count - 1, pages, last)

    def _copied(self, rows: Tensor) -> "NvmePages":
        shape = (len(rows), self.dim, self.v_dim, self.group_size)
        other = NvmePages(
            *shape, self.dtype, torch.device("cpu"), self.kernels, self.place, self.layer, self.io
        )
        try:
            step = max(1, BATCH_BYTES // (self.rows * self._page_bytes)) * self._span
            home, self.compute = self.compute, torch.device("cpu")
            try:
                for begin in range(0, self._tokens, step):
                    key, value = self.read(begin, min(self._tokens, begin + step))
                    other.write(key[rows], value[rows], begin)
            finally:
                self.compute = home
        except BaseException:
            other.close()
            raise
        other.compute = self.compute
        return other

    # --- reading ---

    def _streamed(self, block: int, count: int) -> Tensor:
        """Read blocks that are on the file past the pool: ``[count, rows, groups, page]``."""
        numbers = np.arange(count * self.rows, dtype=np.int64) + block * self.rows
        pages = self._reader.past_pool(numbers)
        self.traffic.reads += len(numbers)
        typed = pages.tensor(self.dtype, HEADER_BYTES, (self._groups, self._page))
        return typed.view(count, self.rows, self._groups, self._page)

    def _copy_out(
        self, pages: Tensor, first: int, groups: int, begin: int, end: int, key: Tensor, value: Tensor
    ) -> None:
        """Copy tokens ``begin <= token < end`` out of ``[n, rows, groups, page]``, blocks from `first` on."""
        span = groups * self.group_size
        start, stop = max(begin, first * span), min(end, (first + len(pages)) * span)
        for view, out in zip(self._split(pages), (key, value), strict=True):
            # [n, rows, groups, group_size, dim] -> [rows, tokens, dim]
            rows = view.permute(1, 0, 2, 3, 4).reshape(self.rows, -1, out.shape[2])
            rows = rows[:, start - first * span : stop - first * span]
            # A batch at a time is pinned, never the history.
            rows = rows.pin_memory() if self.compute.type == "cuda" else rows
            out[:, start - begin : stop - begin].copy_(rows, non_blocking=True)

    def _fetched(self, groups: Tensor, whole: bool = False) -> Tensor:
        """Copy ``[rows, n]`` groups to RAM, ``[n, rows, page]``; with `whole`, of any block on the file."""
        self._file.check_process()
        self._reader.asked = np.zeros(0, np.int64)
        wanted = groups.to("cpu", torch.int64).T.numpy()
        out = torch.empty(*wanted.shape, self._page, dtype=self.dtype, device="cpu")
        if wanted.size == 0:
            return out
        if int(wanted.min()) < 0 or (int(wanted.max()) * self.group_size >= self._tokens and not whole):
            raise StoreError(
                f"groups must have been written, got {int(wanted.min())} to {int(wanted.max())}, expected "
                f"tokens up to {self._tokens} (groups of {self.group_size})"
            )
        block, inside = np.divmod(wanted, self._groups)
        row = np.broadcast_to(np.arange(self.rows), wanted.shape)
        flat = out.view(-1, self._page)
        in_tail = (block >= self._file.watermark).ravel()
        if in_tail.any():
            where = torch.from_numpy(row.ravel()[in_tail]), torch.from_numpy(inside.ravel()[in_tail])
            flat[torch.from_numpy(np.flatnonzero(in_tail))] = self._tail[where]
        at = np.flatnonzero(~in_tail)
        numbers, first, same = np.unique(
            (wanted * self.rows + row).ravel()[at], return_index=True, return_inverse=True
        )
        if len(numbers):
            self._reader.copy(numbers, flat.view(torch.uint8).numpy(), at[first])
        if len(numbers) < len(at):
            flat[torch.from_numpy(at)] = flat[torch.from_numpy(at[first][same])]
        return out
