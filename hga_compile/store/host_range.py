"""Host RAM that grows where it is: addresses are set aside first, memory behind them as it is needed."""

import mmap
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import psutil
import torch
from torch import Tensor

from hga_compile.store.aligned import NO_RESERVE
from hga_compile.store.errors import StoreFullError
from hga_compile.store.host_memory import available_bytes
from hga_compile.store.host_pins import Pins

__all__ = ["HostRange"]

# Addresses of one range: more than a layer will need, and few enough for thousands of ranges.
_SPAN = 2**36


class HostRange:
    """Bytes from one address on, which stays the same as they grow.

    Only a range that outgrows its addresses moves: the system moves pages that are not pinned, pinned ones
    are copied.

    Parameters
    ----------
    pins : Pins or None
        Pins them for a GPU; None: the CPU alone reads them.
    """

    def __init__(self, pins: Pins | None = None) -> None:
        self.pins = pins
        self._memory: mmap.mmap | None = None
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        """All of them."""

    @property
    def committed(self) -> int:
        """Bytes of RAM that it takes: pinned pieces are given up as a whole."""
        return len(self.bytes) if self.pins is None else self.pins.size

    @property
    def here(self) -> bool:
        """Whether its bytes can be read: those that a GPU reads are not there in a forked process."""
        return self.pins is None or self.pins.here

    def need(self, size: int) -> int:
        """Return the bytes of RAM that there are at once as it is made `size` bytes long."""
        if self.pins is None:
            return size
        whole = size + -size % mmap.PAGESIZE
        return whole + self.pins.size if self.moves(size) else max(whole, self.pins.size)

    def moves(self, size: int) -> bool:
        """Say whether it goes to other addresses as it is made `size` bytes long."""
        return self._memory is not None and size > len(self._memory)

    def resized(self, size: int, kept: int) -> Tensor:
        """Return ``[size]`` bytes of which the first `kept` are what they were.

        Raises
        ------
        StoreFullError
            The system has no such range, or does not pin it; the bytes are as they were.
        """
        if size == 0:
            self.close()
            return self.bytes
        if self._memory is None or size > len(self._memory):
            self._move(size, kept)
        else:
            self._commit(self._memory, self.pins, size)
            self._give_back(size)
            self.bytes = _over(self._memory, size)
        return self.bytes

    def parts(self, begin: int, end: int) -> Iterator[slice]:
        """Cut ``begin <= byte < end`` into what one call of a copy engine may move."""
        borders = [] if self.pins is None else self.pins.borders()
        for border in (*(border for border in borders if begin < border < end), end):
            yield slice(begin, border)
            begin = border

    def close(self) -> None:
        """Give all of it up."""
        if self.pins is not None:
            self.pins.shrink(0)
        self._memory, self.bytes = None, self.bytes[:0].clone()

    def _move(self, size: int, kept: int) -> None:
        """Go on at other addresses."""
        if self._memory is not None and self.pins is None:
            former, self.bytes = self.bytes, self.bytes[:0].clone()
            held = len(former)
            del former
            # Somebody may still hold a view of it; not every system can move a range.
            with suppress(BufferError, OSError, ValueError, SystemError):
                self._memory.resize(size)
                self.bytes = _over(self._memory, size)
                return
            self.bytes = _over(self._memory, held)
        memory = _reserved(size)
        pins = None if self.pins is None else self.pins.another()
        if pins is not None:
            _advise(memory)
        self._commit(memory, pins, size)
        larger = _over(memory, size)
        larger[:kept] = self.bytes[:kept]
        if self.pins is not None:
            self.pins.shrink(0)
        self._memory, self.bytes, self.pins = memory, larger, pins

    def _commit(self, memory: mmap.mmap, pins: Pins | None, size: int) -> None:
        if pins is None:
            return
        whole, before = min(len(memory), size + -size % mmap.PAGESIZE), pins.size
        if before < whole:
            # The system makes pages as they are touched: all cores do that several times faster than pinning.
            _over(memory, whole)[before:].zero_()
        try:
            pins.extend(_over(memory, 1).data_ptr(), whole)
        except StoreFullError:
            if hasattr(mmap, "MADV_DONTNEED"):
                memory.madvise(mmap.MADV_DONTNEED, before, whole - before)
            raise

    def _give_back(self, size: int) -> None:
        """Let the system have the memory behind the first `size` bytes, if they were more."""
        assert self._memory is not None  # resized made it
        used = len(self.bytes)
        first = self.pins.shrink(size) if self.pins is not None else size + -size % mmap.PAGESIZE
        used += -used % mmap.PAGESIZE
        if first < used and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, first, min(used, len(self._memory)) - first)


def _advise(memory: mmap.mmap) -> None:
    """Tell the system how a range that will be pinned is used."""
    if hasattr(mmap, "MADV_DONTFORK"):
        # A child's copy-on-write would leave the GPU with the page that this process no longer has.
        memory.madvise(mmap.MADV_DONTFORK)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Larger pages are made, and pinned, in fewer steps; a kernel without them says so.
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)


def _reserved(size: int) -> mmap.mmap:
    """Set addresses for `size` bytes aside, and as many more as there are."""
    least = size + -size % mmap.PAGESIZE
    span = max(least, min(_SPAN, psutil.virtual_memory().total))
    while True:
        try:
            return mmap.mmap(-1, span, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        except (OSError, OverflowError) as error:
            if span == least:
                raise StoreFullError(
                    "host RAM is full", size, available_bytes(), "offload.host_budget"
                ) from error
            # Systems that count addresses as memory have fewer.
            span = max(least, span // 2 // mmap.PAGESIZE * mmap.PAGESIZE)


def _over(memory: mmap.mmap, size: int) -> Tensor:
    # By way of NumPy, whose array keeps the range from being moved; torch.frombuffer does not.
    return torch.from_numpy(np.frombuffer(memory, np.uint8, size))
