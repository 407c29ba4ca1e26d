"""Reads pages of a block file by way of the RAM that keeps them, and ahead of being asked."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hga_compile.store.aligned import AlignedPages
from hga_compile.store.blocks import BlockFile
from hga_compile.store.pool import PagePool
from hga_compile.store.workers import finish

__all__ = ["BATCH_BYTES", "PageReader", "Traffic"]

Numbers = NDArray[np.int64]

BATCH_BYTES = 2**23
"""Bytes of pages that are put together, or read past the pool, at once."""


@dataclass
class Traffic:
    """Pages that were asked for, by where they were found."""

    hits: int = 0
    """In RAM."""
    reads: int = 0
    """On the file."""
    prefetched: int = 0
    """On the file, read before they were asked for."""


class PageReader:
    """Pages of one file, and which of them a pool keeps.

    Parameters
    ----------
    file : BlockFile
        Where the pages are.
    pool : PagePool
        RAM that keeps some of them.
    poison : bool
        Whether to overwrite what is given up.
    """

    def __init__(self, file: BlockFile, pool: PagePool, poison: bool) -> None:
        self._file, self._pool, self._poison = file, pool, poison
        self._residents = pool.open()
        self.traffic = Traffic()
        self.asked = np.zeros(0, np.int64)
        """Pages that were looked up last."""
        self._ahead: tuple[Numbers, Numbers, list[Future[None]]] | None = None
        """Pages that are being read before they are asked for, and the slots that they go to."""

    def close(self) -> None:
        """Give the slots up; nothing is being read into them then."""
        self.wait()
        self._pool.close(self._residents, self._poison)

    def held(self) -> int:
        """Return the bytes of pages in RAM."""
        return self._pool.held(self._residents)

    def drop(self, first: int) -> None:
        """Forget pages from number `first` on: they are replaced, or given up."""
        self.wait()
        self._pool.drop(self._residents, first, self._poison)

    def keep(self, pages: Numbers, memory: AlignedPages, places: Numbers) -> None:
        """Keep pages that have just been written, as many as there are slots for."""
        slots = self._pool.take(len(pages))
        self._pool.memory.array[slots] = memory.array[places[: len(slots)]]
        self._pool.publish(self._residents, pages[: len(slots)], slots)
        self._pool.unpin(slots)

    def parts(self, pages: Numbers) -> Iterator[tuple[AlignedPages, Numbers]]:
        """Yield memory that holds some of the pages, and where: the place of each page in it, -1 for others.

        Every page is yielded once. What is yielded holds until the next step of the iteration.

        Parameters
        ----------
        pages : array
            Page numbers, ascending, all on the file.

        Raises
        ------
        CorruptPageError, StoreIOError
            A page is not what was written, or cannot be read.
        """
        self.asked = pages
        slots = self._find(pages)
        try:
            missing = np.flatnonzero(slots < 0)
            self.traffic.hits += len(pages) - len(missing)
            self.traffic.reads += len(missing)
            # More than all slots hold would only drive out what they have.
            taken = self._pool.take(len(missing) if len(missing) <= self._pool.memory.count else 0)
            self._load(pages[missing[: len(taken)]], taken)
            slots[missing[: len(taken)]] = taken
            yield self._pool.memory, slots
            rest = missing[len(taken) :]
        finally:
            self._pool.unpin(slots)
        step = max(1, BATCH_BYTES // self._pool.memory.page_bytes)
        for begin in range(0, len(rest), step):
            part = rest[begin : begin + step]
            places = np.full(len(pages), -1, np.int64)
            places[part] = np.arange(len(part))
            yield self.past_pool(pages[part]), places

    def past_pool(self, pages: Numbers) -> AlignedPages:
        """Read pages into memory of their own."""
        memory = AlignedPages(len(pages), self._pool.memory.page_bytes)
        finish(self._file.load(pages, memory, np.arange(len(pages), dtype=np.int64)))
        return memory

    def read_ahead(self, pages: Numbers) -> None:
        """Begin to read those of the pages that RAM does not keep."""
        pages = pages[pages < self._file.watermark * self._file.rows]
        slots = self._pool.find(self._residents, pages)
        self._pool.unpin(slots)
        gone = pages[slots < 0]
        if len(gone):
            slots = self._pool.take(len(gone))
            gone = gone[: len(slots)]
            self._ahead = (gone, slots, self._file.load(gone, self._pool.memory, slots))

    def wait(self) -> None:
        """Wait for what is read ahead."""
        if self._ahead is None:
            return
        (pages, slots, futures), self._ahead = self._ahead, None
        # A page that could not be read is read again when it is asked for; that raises.
        with suppress(Exception):
            finish(futures)
            self._pool.publish(self._residents, pages, slots)
            self.traffic.prefetched += len(pages)
        self._pool.unpin(slots)

    def _find(self, pages: Numbers) -> Numbers:
        slots = self._pool.find(self._residents, pages)
        if self._ahead is not None and np.isin(pages[slots < 0], self._ahead[0]).any():
            self._pool.unpin(slots)
            self.wait()
            slots = self._pool.find(self._residents, pages)
        return slots

    def _load(self, pages: Numbers, slots: Numbers) -> None:
        """Read pages into slots that were taken for them, and say that they are there."""
        try:
            finish(self._file.load(pages, self._pool.memory, slots))
        except BaseException:
            self._pool.unpin(slots)
            raise
        self._pool.publish(self._residents, pages, slots)
