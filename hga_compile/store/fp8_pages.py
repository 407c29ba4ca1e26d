"""K/V in 8 bits in any tier (`offload.kv_dtype: fp8`): coded as they come, decoded as they are read."""

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.kernels.fp8 import EXTRA, decode_pages, decode_pair, encode_pair
from hga_compile.kernels.hot import HotCache
from hga_compile.store.tier import Held, Pair, Tier

__all__ = ["Fp8Pages"]


class Fp8Pages:
    """A tier of bytes seen as one of the K/V that they stand for (a `store.tier.Tier`; see `kernels.fp8`).

    Parameters
    ----------
    coded : Tier
        Of uint8; its values are `EXTRA` bytes longer.
    dtype : torch.dtype
        Of the K/V.
    """

    def __init__(self, coded: Tier, dtype: torch.dtype) -> None:
        self.coded, self.dtype = coded, dtype

    @property
    def rows(self) -> int:
        """KV heads times batch."""
        return self.coded.rows

    @property
    def dim(self) -> int:
        """Channels of a key."""
        return self.coded.dim

    @property
    def v_dim(self) -> int:
        """Channels of a value."""
        return self.coded.v_dim - EXTRA

    @property
    def group_size(self) -> int:
        """Tokens of a group."""
        return self.coded.group_size

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one row."""
        return self.coded.row_bytes

    @property
    def compute(self) -> torch.device:
        """Where K/V come from and go to."""
        return self.coded.compute

    @property
    def kernels(self) -> Kernels:
        """What moves rows."""
        return self.coded.kernels

    def use(self, kernels: Kernels) -> None:
        """Move rows by what a profile asks for (`compile.kernels`)."""
        self.coded.use(kernels)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens; StoreFullError if there is none."""
        self.coded.reserve(tokens)

    def write(self, key: Tensor, value: Tensor, begin: int) -> None:
        """Store ``[rows, n, dim]`` keys and values as tokens ``begin, begin + 1, ...``, the last ones."""
        self.coded.write(*encode_pair(key, value), begin)

    def truncate(self, length: int) -> None:
        """Give up tokens from number `length` on."""
        self.coded.truncate(length)

    @property
    def apart(self) -> bool:
        """Whether some of the rows are read without the others being read too."""
        return self.coded.apart

    def read(self, begin: int, end: int, into: Pair | None = None, rows: slice | None = None) -> Pair:
        """Return keys ``[rows, end - begin, dim]`` and values, on the compute device."""
        found = decode_pair(*self.coded.read(begin, end, rows=rows), self.dtype)
        if into is None:
            return found
        for there, part in zip(into, found, strict=True):
            there.copy_(part)
        return into

    def fetch(self, groups: Tensor) -> Tensor:
        """Return the ``[rows, n]`` groups, decoded: pages ``[n, rows, page]`` on the compute device."""
        return decode_pages(self.coded.fetch(groups), self.group_size, self.dim, self.dtype)

    def gather(self, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, n * group_size, dim]`` and values of the ``[rows, n]`` groups."""
        return decode_pair(*self.coded.gather(groups, group_size), self.dtype)

    @property
    def host_pages(self) -> None:
        """None: pages are decoded before a kernel of the CPU reads them."""

    @property
    def gpu_pages(self) -> Tensor | None:
        """Coded pages ``[groups, rows, page]``, uint8, that kernels for the GPU read in place."""
        return self.coded.gpu_pages

    @property
    def hot(self) -> HotCache | None:
        """Slots on the GPU for coded pages (`offload.hot_cache`); None without."""
        return self.coded.hot

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows` (int64 indices)."""
        self.coded.select_rows(rows)

    def clone(self) -> "Fp8Pages":
        """Return an independent copy."""
        return Fp8Pages(self.coded.clone(), self.dtype)

    def held(self) -> Held:
        """Return the bytes allocated, by place."""
        return self.coded.held()

    def close(self) -> None:
        """Give everything up; nothing may be asked afterwards."""
        self.coded.close()
