"""Host RAM that grows in place: the system moves its pages to a larger range, nothing is copied."""

import mmap
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from hga_compile.store.errors import StoreFullError
from hga_compile.store.host_memory import available_bytes

__all__ = ["HostRange"]


class HostRange:
    """Bytes at one address range that changes as it grows."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        """All of them."""

    def resized(self, size: int, kept: int) -> Tensor:
        """Return ``[size]`` bytes of which the first `kept` are what they were.

        Whatever pointed to the former range must be gone; else its bytes are copied.

        Raises
        ------
        StoreFullError
            The system has no such range; the bytes are as they were.
        """
        if size == 0:
            self._memory, self.bytes = None, self.bytes[:0].clone()
            return self.bytes
        if self._memory is not None:
            former, self.bytes = self.bytes, self.bytes[:0].clone()
            del former
            # Somebody may still hold a view of it; not every system can move a range.
            with suppress(BufferError, OSError, ValueError, SystemError):
                self._memory.resize(size)
                self.bytes = _over(self._memory, size)
                return self.bytes
            self.bytes = _over(self._memory, len(self._memory))
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise StoreFullError(
                "host RAM is full", size, available_bytes(), "offload.host_budget"
            ) from error
        larger = _over(memory, size)
        larger[:kept] = self.bytes[:kept]
        self._memory, self.bytes = memory, larger
        return larger


def _over(memory: mmap.mmap, size: int) -> Tensor:
    # By way of NumPy, whose array keeps the range from being moved; torch.frombuffer does not.
    return torch.from_numpy(np.frombuffer(memory, np.uint8, size))
