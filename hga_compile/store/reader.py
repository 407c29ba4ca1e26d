"""Reads groups of a block file by way of the RAM that keeps them, and ahead of being asked."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hga_compile.store.aligned import AlignedPages
from hga_compile.store.blocks import BlockFile
from hga_compile.store.page_format import HEADER_BYTES
from hga_compile.store.pool import PagePool
from hga_compile.store.workers import finish

__all__ = ["BATCH_BYTES", "GroupReader", "Traffic"]

Numbers = NDArray[np.int64]
Bytes = NDArray[np.uint8]

BATCH_BYTES = 2**23
"""Bytes of pages that are put together, or read, at once."""


@dataclass
class Traffic:
    """What was asked for, by where it was found."""

    hits: int = 0
    """Groups that were in RAM."""
    misses: int = 0
    """Groups that were not."""
    reads: int = 0
    """Pages read from the file for them."""
    prefetched: int = 0
    """Pages read before they were asked for."""


@dataclass
class _Ahead:
    """What is being read before it is asked for."""

    numbers: Numbers
    """Groups."""
    pages: Numbers
    """Those that they are in, ascending."""
    memory: AlignedPages
    futures: list[Future[None]]


class GroupReader:
    """Groups of one file, and which of them a pool keeps.

    Group ``g`` of row ``r`` is number ``g * rows + r``. The file is read by whole pages, which are checked;
    what is kept of them are the groups that were asked for: those around them seldom are.

    Parameters
    ----------
    file : BlockFile
        Where the pages are.
    pool : PagePool
        RAM that keeps some of the groups; its slots have their size.
    groups : int
        Groups of a page.
    page_bytes : int
        Size of a page.
    poison : bool
        Whether to overwrite what is given up.
    """

    def __init__(self, file: BlockFile, pool: PagePool, groups: int, page_bytes: int, poison: bool) -> None:
        self._file, self._pool, self._poison = file, pool, poison
        self._groups, self._page_bytes = groups, page_bytes
        self._residents = pool.open()
        self.traffic = Traffic()
        self.asked = np.zeros(0, np.int64)
        """Groups that were looked up last."""
        self._ahead: _Ahead | None = None

    def close(self) -> None:
        """Give the slots up; nothing is being read into them then."""
        self.wait()
        self._pool.close(self._residents, self._poison)

    def held(self) -> int:
        """Return the bytes of groups in RAM."""
        return self._pool.held(self._residents)

    def drop(self, block: int) -> None:
        """Forget blocks from number `block` on: they are replaced, or given up."""
        self.wait()
        self._pool.drop(self._residents, block * self._groups * self._file.rows, self._poison)

    def keep(self, block: int, memory: AlignedPages, places: Numbers) -> None:
        """Keep the groups of a block that has just been written, as many as there are slots for.

        Parameters
        ----------
        block : int
            Its number.
        memory : AlignedPages
            Holds its pages.
        places : array
            Where in it the page of each row is.
        """
        group, row = np.arange(self._groups)[:, None], np.arange(self._file.rows)
        numbers = (block * self._groups + group) * self._file.rows + row
        self._put(numbers.ravel(), self._parts(memory)[places].swapaxes(0, 1).reshape(numbers.size, -1))

    def copy(self, numbers: Numbers, out: Bytes, places: Numbers) -> None:
        """Copy groups to rows of `out`.

        Parameters
        ----------
        numbers : array
            Groups, ascending, all on the file.
        out : array
            ``[n, bytes of a group]`` uint8.
        places : array
            The row of each group in it.

        Raises
        ------
        CorruptPageError, StoreIOError
            A page is not what was written, or cannot be read.
        """
        self.asked = numbers
        slots = self._find(numbers)
        try:
            there = np.flatnonzero(slots >= 0)
            out[places[there]] = self._pool.memory.array[slots[there]]
        finally:
            self._pool.unpin(slots)
        missing = np.flatnonzero(slots < 0)
        self.traffic.hits += len(there)
        self.traffic.misses += len(missing)
        # More than all slots hold would only drive out what they have.
        kept = len(missing) <= self._pool.memory.count
        page, inside = self._where(numbers[missing])
        pages, which = np.unique(page, return_inverse=True)
        step = max(1, BATCH_BYTES // self._page_bytes)
        for begin in range(0, len(pages), step):
            part = pages[begin : begin + step]
            own = np.flatnonzero((which >= begin) & (which < begin + step))
            with self._read(part) as memory:
                found = self._parts(memory)[which[own] - begin, inside[own]]
            out[places[missing[own]]] = found
            if kept:
                self._put(numbers[missing[own]], found)

    def past_pool(self, pages: Numbers) -> AlignedPages:
        """Read pages, ascending, into memory of their own."""
        memory, futures = self._begin(pages)
        finish(futures)
        return memory

    def read_ahead(self, numbers: Numbers) -> None:
        """Begin to read those of the groups that RAM does not keep, up to a batch of pages."""
        numbers = numbers[numbers < self._file.watermark * self._groups * self._file.rows]
        slots = self._pool.find(self._residents, numbers)
        self._pool.unpin(slots)
        gone = numbers[slots < 0]
        if 0 < len(gone) <= self._pool.memory.count:
            page, _ = self._where(gone)
            pages = np.unique(page)[: max(1, BATCH_BYTES // self._page_bytes)]
            self._ahead = _Ahead(gone[page <= pages[-1]], pages, *self._begin(pages))

    def wait(self) -> None:
        """Wait for what is read ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        # A page that could not be read is read again when it is asked for; that raises.
        with suppress(Exception):
            finish(ahead.futures)
            page, inside = self._where(ahead.numbers)
            self._put(ahead.numbers, self._parts(ahead.memory)[np.searchsorted(ahead.pages, page), inside])
            self.traffic.prefetched += len(ahead.pages)
        self._forget(ahead.memory)

    @contextmanager
    def _read(self, pages: Numbers) -> Iterator[AlignedPages]:
        memory = self.past_pool(pages)
        self.traffic.reads += len(pages)
        try:
            yield memory
        finally:
            self._forget(memory)

    def _begin(self, pages: Numbers) -> tuple[AlignedPages, list[Future[None]]]:
        """Begin to read pages, ascending, into memory of their own."""
        memory = AlignedPages(len(pages), self._page_bytes)
        return memory, self._file.load(pages, memory, np.arange(len(pages), dtype=np.int64))

    def _forget(self, memory: AlignedPages) -> None:
        if self._poison:
            memory.array[:] = 0xFF

    def _where(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """Return the pages that groups are in, and which of a page's groups they are."""
        group, row = np.divmod(numbers, self._file.rows)
        block, inside = np.divmod(group, self._groups)
        return block * self._file.rows + row, inside

    def _parts(self, memory: AlignedPages) -> Bytes:
        """Return the groups of pages in memory, ``[pages, groups, bytes of a group]``."""
        each = self._pool.memory.page_bytes
        found: Bytes = memory.tensor(torch.uint8, HEADER_BYTES, (self._groups, each)).numpy()
        return found

    def _put(self, numbers: Numbers, found: Bytes) -> None:
        """Keep groups, as many as there are slots for."""
        slots = self._pool.take(len(numbers))
        self._pool.memory.array[slots] = found[: len(slots)]
        self._pool.publish(self._residents, numbers[: len(slots)], slots)
        self._pool.unpin(slots)

    def _find(self, numbers: Numbers) -> Numbers:
        slots = self._pool.find(self._residents, numbers)
        if self._ahead is not None and np.isin(numbers[slots < 0], self._ahead.numbers).any():
            self._pool.unpin(slots)
            self.wait()
            slots = self._pool.find(self._residents, numbers)
        return slots
