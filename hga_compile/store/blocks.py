"""Blocks on a file: a run of groups of all rows, a page for each row; only what was written can be read."""

import os
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from hga_compile.store.aligned import AlignedPages
from hga_compile.store.errors import StoreForkedError
from hga_compile.store.page_file import PageFile
from hga_compile.store.page_format import PageFormat
from hga_compile.store.storage_io import StorageIO
from hga_compile.store.workers import finish, start

__all__ = ["BlockFile"]

Numbers = NDArray[np.int64]

# Bytes that one call moves at most.
_CALL = 2**20


class BlockFile:
    """A nameless file of blocks, each page of which is checked when it is read.

    Page ``block * rows + row`` is that of a row, so that a block is one run, and the file grows at its end.

    Parameters
    ----------
    folder : str or None
        Where the file is made.
    rows : int
        Pages of a block.
    page_bytes, payload : int
        Size of a page, and bytes of K and V in it.
    layer : int
        Number of the layer, for the pages' headers.
    threads : int
        Calls under way at once.
    io : StorageIO
        The file system.
    """

    def __init__(
        self,
        folder: str | None,
        rows: int,
        page_bytes: int,
        payload: int,
        layer: int,
        threads: int,
        io: StorageIO,
    ) -> None:
        self.rows, self.threads = rows, threads
        self.format = PageFormat(os.urandom(16), layer, payload)
        self.watermark = 0
        """Blocks that are written: no other is ever read."""
        self._generations = np.zeros(0, np.int64)
        self._generation = 0
        self._process = os.getpid()
        self._run = max(1, min(_CALL // page_bytes, 512))
        self._file: PageFile | None = PageFile(folder, page_bytes, io)

    @property
    def nbytes(self) -> int:
        """Bytes that the file system has set aside."""
        return 0 if self._file is None else self._file.pages * self._file.page_bytes

    def reserve(self, blocks: int) -> None:
        """Set room aside for `blocks` blocks (see `PageFile.reserve`)."""
        self._own().reserve(blocks * self.rows)

    def write(self, first: int, pages: AlignedPages, blocks: int) -> None:
        """Write the first pages of `pages` as `blocks` blocks; those behind them are forgotten.

        Only once all are on the file does the watermark move.

        Raises
        ------
        StoreFullError, StoreIOError
            The file system has no room, or failed; the blocks before `first` are as they were.
        """
        file = self._own()
        self.reserve(first + blocks)
        self.watermark = min(self.watermark, first)
        # A number of its own for every attempt: what a failed one leaves behind is never taken for this.
        self._generation += 1
        for number in range(blocks * self.rows):
            block, row = divmod(number, self.rows)
            self.format.seal(pages.array[number], row, first + block, self._generation)
        total, begin = blocks * self.rows, first * self.rows

        def write(at: int) -> None:
            views = [pages.view(number) for number in range(at, min(at + self._run, total))]
            file.write(begin + at, views)

        finish(start([lambda at=at: write(at) for at in range(0, total, self._run)], self.threads))  # type: ignore[misc] # a default binds
        if len(self._generations) < first + blocks:
            more = max(first + blocks, 2 * len(self._generations)) - len(self._generations)
            self._generations = np.concatenate([self._generations, np.zeros(more, np.int64)])
        self._generations[first : first + blocks] = self._generation
        self.watermark = first + blocks

    def load(self, pages: Numbers, memory: AlignedPages, slots: Numbers) -> list[Future[None]]:
        """Begin to read pages, ascending, into slots of `memory`; each is checked.

        The futures raise CorruptPageError and StoreIOError.
        """
        file = self._own()
        if len(pages) and int(pages[-1]) >= self.watermark * self.rows:
            raise AssertionError(f"page {int(pages[-1])} was never written")  # callers have checked

        def read(part: slice) -> None:
            views = [memory.view(slot) for slot in slots[part]]
            file.read(int(pages[part.start]), views)
            for page, slot in zip(pages[part].tolist(), slots[part].tolist(), strict=True):
                block, row = divmod(page, self.rows)
                self.format.check(memory.array[slot], row, block, int(self._generations[block]))

        return start([lambda part=part: read(part) for part in self._runs(pages)], self.threads)  # type: ignore[misc] # a default binds

    def close(self) -> None:
        """Give the file up; a second time does nothing."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    @property
    def here(self) -> bool:
        """Whether this is the process that made it, and not one forked from that."""
        return self._process == os.getpid()

    def check_process(self) -> None:
        """Refuse to go on in a forked process.

        Raises
        ------
        StoreForkedError
            Its writes would reach the file of the process that made it.
        """
        if not self.here:
            raise StoreForkedError(
                f"K/V of the nvme tier belong to the process that made them, got process {os.getpid()}, "
                f"expected {self._process}: start with a new cache after a fork"
            )

    def _own(self) -> PageFile:
        self.check_process()
        assert self._file is not None  # nothing is asked of it once it is closed
        return self._file

    def _runs(self, pages: Numbers) -> Iterator[slice]:
        """Cut ascending page numbers into runs without a gap, none longer than a call."""
        ends = [*(np.flatnonzero(np.diff(pages) != 1) + 1).tolist(), len(pages)]
        begin = 0
        for end in ends:
            for at in range(begin, end, self._run):
                yield slice(at, min(at + self._run, end))
            begin = end
