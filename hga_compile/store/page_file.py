"""One file of equal pages: set aside before it is written, read and written whole, around the page cache."""

import errno
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from hga_compile.kernels.ledger import LEDGER
from hga_compile.store.errors import CorruptPageError, StoreFullError, StoreIOError
from hga_compile.store.folder import open_nameless
from hga_compile.store.storage_io import StorageIO

__all__ = ["ALIGNMENT", "PageFile"]

log = logging.getLogger(__name__)

ALIGNMENT = 4096
"""Of offsets, lengths and memory, for O_DIRECT on every common device."""

_KNOB = "offload.nvme_folder"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Calls without progress, in a row, after which a file counts as broken.
_STALLS = 100


class PageFile:
    """A nameless file of pages, numbered from 0; threads may read and write it at once.

    Parameters
    ----------
    folder : str or None
        Where it is made; None: the system's temporary folder.
    page_bytes : int
        Size of a page, a multiple of `ALIGNMENT`.
    io : StorageIO
        The file system.

    Raises
    ------
    StoreFolderError, StoreBusyError, StoreIOError
        It cannot be made there (see `folder.open_nameless`).
    """

    def __init__(self, folder: str | None, page_bytes: int, io: StorageIO) -> None:
        self.page_bytes, self._io = page_bytes, io
        self.pages = 0
        """Pages set aside."""
        self._plain, self._direct = open_nameless(folder, io)
        self._buffered = self._direct is None
        if self._buffered:
            LEDGER.count_fallback("the nvme tier's file system refuses O_DIRECT: through the page cache")

    def reserve(self, pages: int) -> None:
        """Have the file system set aside `pages` pages, and a quarter more where there is room.

        Raises
        ------
        StoreFullError
            The file system has no room for them.
        """
        if pages <= self.pages:
            return
        for wanted in (max(pages, self.pages + self.pages // 4), pages):
            if self._allocate(wanted * self.page_bytes):
                self.pages = wanted
                return
        need, free = (pages - self.pages) * self.page_bytes, self._free()
        raise StoreFullError("the file system of the nvme tier is full", need, free, _KNOB)

    def read(self, first: int, views: Sequence[memoryview]) -> None:
        """Fill views, a page each, with the pages from number `first` on.

        Raises
        ------
        CorruptPageError
            The file ends before them.
        StoreIOError
            The file system failed.
        """
        self._transfer(self._io.read, "read", first, views)

    def write(self, first: int, views: Sequence[memoryview]) -> None:
        """Write pages from number `first` on.

        Raises
        ------
        StoreFullError
            The file system is full after all.
        StoreIOError
            The file system failed.
        """
        self._transfer(self._io.write, "write", first, views)

    def close(self) -> None:
        """Give the file up, and with it what is in it; a second time does nothing."""
        fds, self._plain, self._direct = (self._plain, self._direct), -1, None
        for fd in fds:
            if fd is not None and fd >= 0:
                with suppress(OSError):
                    self._io.close(fd)

    def _allocate(self, size: int) -> bool:
        stalls = 0
        while True:
            try:
                self._io.allocate(self._plain, self.pages * self.page_bytes, size)
                return True
            except InterruptedError as error:
                stalls = self._stalled(stalls, "allocate", error)
            except OSError as error:
                if error.errno in _FULL:
                    return False
                if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    return self._extend(size)
                raise self._failed("allocate", error) from error

    def _extend(self, size: int) -> bool:
        """Lengthen a file on a file system that sets nothing aside."""
        LEDGER.count_fallback("the nvme tier's file system sets no room aside: a write may find it full")
        try:
            self._io.resize(self._plain, size)
        except OSError as error:
            if error.errno in _FULL:
                return False
            raise self._failed("resize", error) from error
        return True

    def _transfer(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        what: str,
        first: int,
        views: Sequence[memoryview],
    ) -> None:
        offset, total = first * self.page_bytes, len(views) * self.page_bytes
        done = stalls = 0
        while done < total:
            # The rest of a short transfer is not aligned any more.
            direct = self._direct if not self._buffered and done % ALIGNMENT == 0 else None
            fd = self._plain if direct is None else direct
            try:
                moved = call(fd, _after(views, done, self.page_bytes), offset + done)
            except InterruptedError as error:
                stalls = self._stalled(stalls, what, error)
                continue
            except OSError as error:
                if error.errno == errno.EINVAL and direct is not None:
                    self._go_buffered(what)
                    continue
                if error.errno in _FULL:
                    text = "the file system of the nvme tier is full"
                    raise StoreFullError(text, total - done, self._free(), _KNOB) from error
                raise self._failed(what, error) from error
            if moved <= 0:
                if what == "read":
                    raise CorruptPageError(
                        f"the file of the nvme tier ends at byte {offset + done}, expected "
                        f"{total - done} more: it was cut short ({_KNOB})"
                    )
                stalls = self._stalled(stalls, what, None)
                continue
            done, stalls = done + moved, 0

    def _go_buffered(self, what: str) -> None:
        if not self._buffered:
            # Its descriptor stays open: another thread may be using it.
            self._buffered = True
            LEDGER.count_fallback("the nvme tier's file system refuses O_DIRECT: through the page cache")
            log.warning("a direct %s was refused: the nvme tier goes on through the page cache", what)

    def _stalled(self, stalls: int, what: str, error: OSError | None) -> int:
        if stalls >= _STALLS:
            raise self._failed(what, error or OSError(errno.EIO, os.strerror(errno.EIO))) from error
        return stalls + 1

    def _failed(self, what: str, error: OSError) -> StoreIOError:
        return StoreIOError(
            f"the file system of the nvme tier failed to {what}: got {error.strerror or error}, expected its "
            f"folder's device to work ({_KNOB})"
        )

    def _free(self) -> int:
        try:
            return self._io.free_bytes(self._plain)
        except OSError:
            return 0


def _after(views: Sequence[memoryview], done: int, page_bytes: int) -> list[memoryview]:
    """Return what is left of views of equal size after `done` bytes."""
    number, inside = divmod(done, page_bytes)
    return [views[number][inside:], *views[number + 1 :]]
