"""Pins host memory for a GPU piece by piece, as it is committed, and unpins it piece by piece."""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch

from hga_compile.store.errors import StoreFullError
from hga_compile.store.host_memory import available_bytes

__all__ = ["PIECE", "Pins"]

log = logging.getLogger(__name__)

PIECE = 2**28
"""Most bytes that are pinned by one call: drivers refuse very large ones."""

# cudaHostRegisterPortable | cudaHostRegisterMapped: any GPU of the process reads it in place.
_FLAGS = 1 | 2


class Pins:
    """Which bytes of one address range are pinned: from its start on, without a gap.

    Kernels see pieces that lie side by side as one range. One call of the copy engine must not cross from a
    piece into the next.

    Parameters
    ----------
    device : torch.device
        The GPU that reads them.
    cudart : callable or None
        Returns what has `cudaHostRegister` and `cudaHostUnregister`; None: `torch.cuda.cudart`.
    """

    def __init__(self, device: torch.device, cudart: Callable[[], Any] | None = None) -> None:
        self._device = device
        self._cudart = cudart
        self._process = os.getpid()
        self._pieces: list[tuple[int, int]] = []

    def another(self) -> "Pins":
        """Return one for another range, of which nothing is pinned yet."""
        return Pins(self._device, self._cudart)

    @property
    def here(self) -> bool:
        """Whether this is the process that pinned them."""
        return self._process == os.getpid()

    @property
    def size(self) -> int:
        """Bytes that are pinned."""
        return sum(size for _, size in self._pieces)

    def borders(self) -> list[int]:
        """Return where pieces end, in bytes from the range's start, ascending."""
        return list(accumulate(size for _, size in self._pieces))

    def extend(self, start: int, size: int) -> None:
        """Pin up to `size` bytes of the range at address `start`, a multiple of a page.

        Raises
        ------
        StoreFullError
            The system refused; what was pinned before is, and nothing else.
        """
        before = len(self._pieces)
        missing = size - self.size
        while (end := self.size) < size:
            piece = min(PIECE, size - end)
            error = self._call("cudaHostRegister", start + end, piece, _FLAGS)
            if error:
                self._drop(before)
                self._clear_error()
                # What CUDA reports is worded as if GPU memory had run out.
                raise StoreFullError(
                    f"host RAM could not be pinned (RAM, not GPU memory, is short; {error})",
                    missing,
                    available_bytes(),
                    "offload.host_budget",
                )
            self._pieces.append((start + end, piece))

    def shrink(self, size: int) -> int:
        """Unpin pieces that begin at `size` or later; return the bytes that stay pinned."""
        start = self._pieces[0][0] if self._pieces else 0
        kept = sum(address < start + size for address, _ in self._pieces)
        if kept < len(self._pieces):
            self._wait()
            self._drop(kept)
        return self.size

    def _drop(self, kept: int) -> None:
        """Unpin all but the first `kept` pieces."""
        while len(self._pieces) > kept:
            address, size = self._pieces.pop()
            # In a forked process they are the parent's.
            error = self._call("cudaHostUnregister", address) if self.here else None
            if error:
                log.warning("%d bytes of host RAM stay pinned: %s", size, error)

    def _call(self, name: str, *given: int) -> str | None:
        """Call the CUDA runtime; return what went wrong."""
        try:
            cudart = torch.cuda.cudart() if self._cudart is None else self._cudart()
            found = getattr(cudart, name)(*given)
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        return None if int(found) == 0 else f"{name}: CUDA error {int(found)}"

    def _wait(self) -> None:
        """Wait for kernels that may still read what is unpinned."""
        if self._device.type == "cuda" and self.here:
            torch.cuda.synchronize(self._device)

    def _clear_error(self) -> None:
        """Have the next launch not find the error of the call that failed."""
        if self._device.type == "cuda":
            with suppress(RuntimeError):
                torch.empty(1, device=self._device).zero_()
