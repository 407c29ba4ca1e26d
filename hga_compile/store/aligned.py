"""Host memory aligned as O_DIRECT wants it; the system backs it when it is touched."""

import mmap
import platform
import sys
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hga_compile.store.errors import StoreFullError
from hga_compile.store.host_memory import available_bytes

__all__ = ["NO_RESERVE", "AlignedPages"]


NO_RESERVE = (
    0x4000 if (sys.platform, platform.machine()) in (("linux", "x86_64"), ("linux", "aarch64")) else 0
)
"""Whoever makes room for much of which little is used counts what is used."""


class AlignedPages:
    """Room for equal pages at one address range.

    Parameters
    ----------
    count, page_bytes : int
        Number and size of the pages.

    Raises
    ------
    StoreFullError
        The system has no such range.
    """

    def __init__(self, count: int, page_bytes: int) -> None:
        self.count, self.page_bytes = count, page_bytes
        size = max(1, count * page_bytes)
        try:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        except OSError as error:
            raise StoreFullError("host RAM is full", size, available_bytes(), "offload.nvme_cache") from error
        self._view = memoryview(self._memory)

    def view(self, number: int) -> memoryview:
        """Return the bytes of one page."""
        return self._view[number * self.page_bytes : (number + 1) * self.page_bytes]

    @cached_property
    def array(self) -> NDArray[np.uint8]:
        """All of it, ``[count, page_bytes]``."""
        flat = np.frombuffer(self._memory, np.uint8, self.count * self.page_bytes)
        return flat.reshape(self.count, self.page_bytes)

    def tensor(self, dtype: torch.dtype, offset: int, shape: tuple[int, ...]) -> Tensor:
        """Return ``[count, *shape]`` values of every page, from byte `offset` of it on."""
        size = dtype.itemsize
        strides = [1]
        for extent in shape[:0:-1]:
            strides.insert(0, strides[0] * extent)
        flat = torch.frombuffer(self._memory, dtype=dtype, count=self.count * self.page_bytes // size)
        return flat.as_strided((self.count, *shape), (self.page_bytes // size, *strides), offset // size)
