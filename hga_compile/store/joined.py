"""K/V of a layer as attention reads them: what is stored, and new rows that are still at hand."""

from torch import Tensor

from hga_compile.kernels.hot import HotCache
from hga_compile.store.fp8_pages import Fp8Pages
from hga_compile.store.tier import Tier, room_for

__all__ = ["Joined"]


class Joined:
    """Pages whose last tokens are still at hand on the compute device (a `kernels.call.KeyValues`)."""

    def __init__(self, pages: Tier, key: Tensor, value: Tensor, length: int) -> None:
        self.pages, self.key, self.value = pages, key, value
        # What is attended to is what is stored, so that a cache that was saved goes on as this one would.
        self.begin = length - (0 if isinstance(pages, Fp8Pages) else key.shape[1])
        self.rows, self.dtype, self.v_dim, self.paged = pages.rows, pages.dtype, pages.v_dim, True

    @property
    def apart(self) -> bool:
        """Whether some of the rows are read without the others being read too."""
        return self.pages.apart

    def read(self, begin: int, end: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Return tokens ``begin <= token < end``, ``[rows, n, dim]`` and ``[rows, n, v_dim]``."""
        if end <= self.begin:
            return self.pages.read(begin, end, rows=rows)
        new, own = slice(max(0, begin - self.begin), end - self.begin), rows or slice(0, self.rows)
        if begin >= self.begin:
            return self.key[own, new], self.value[own, new]
        key, value = room_for(self.pages, end - begin, rows)
        known = self.begin - begin
        # Read to where they stay: a long history is there once.
        self.pages.read(begin, self.begin, (key[:, :known], value[:, :known]), rows)
        key[:, known:], value[:, known:] = self.key[own, new], self.value[own, new]
        return key, value

    def gather(self, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of ``[rows, n]`` groups, ``[rows, n * group_size, dim]`` and ``[..., v_dim]``."""
        return self.pages.gather(groups, group_size)

    def fetch(self, groups: Tensor) -> Tensor:
        """Return the pages of ``[rows, n]`` groups, ``[n, rows, page]``."""
        return self.pages.fetch(groups)

    @property
    def host_pages(self) -> Tensor | None:
        """Pages that kernels of the CPU read in place."""
        return self.pages.host_pages

    @property
    def gpu_pages(self) -> Tensor | None:
        """Pages that kernels of the GPU read in place."""
        return self.pages.gpu_pages

    @property
    def hot(self) -> HotCache | None:
        """Slots on the GPU; None without."""
        return self.pages.hot

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one row."""
        return self.pages.row_bytes
