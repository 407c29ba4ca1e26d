"""What every tier is to the layer that keeps its K/V there: three homes, one interface."""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.kernels.hot import HotCache

__all__ = ["Held", "Home", "Pair", "Tier", "room_for"]

Pair = tuple[Tensor, Tensor]
"""Keys and values."""

Home = Literal["gpu", "host", "nvme"]

_STEP = 2**22
"""Numbers that room for many is a multiple of."""


class Held(NamedTuple):
    """Bytes that a tier or a layer holds, by place."""

    accelerator: int = 0
    """K/V on the compute device."""
    summaries: int = 0
    """The index."""
    host: int = 0
    """K/V in host RAM."""
    nvme: int = 0
    """K/V on files."""


class Tier(Protocol):
    """Token K/V of one layer in groups; a row is one KV head of one sequence.

    The same groups give the same bits from every tier. A call that raises leaves what was stored before it.
    """

    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """KV heads times batch."""

    @property
    def dim(self) -> int:
        """Channels of a key."""

    @property
    def v_dim(self) -> int:
        """Channels of a value."""

    @property
    def group_size(self) -> int:
        """Tokens of a group."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one row, as they are stored."""

    @property
    def compute(self) -> torch.device:
        """Where K/V come from and go to."""

    @property
    def kernels(self) -> Kernels:
        """What moves rows."""

    def use(self, kernels: Kernels) -> None:
        """Move rows by what a profile asks for (`compile.kernels`)."""

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens; StoreFullError if there is none."""

    def write(self, key: Tensor, value: Tensor, begin: int) -> None:
        """Store ``[rows, n, dim]`` keys and values as tokens ``begin, begin + 1, ...``, the last ones."""

    def truncate(self, length: int) -> None:
        """Give up tokens from number `length` on."""

    @property
    def apart(self) -> bool:
        """Whether some of the rows are read without the others being read too."""

    def read(self, begin: int, end: int, into: Pair | None = None, rows: slice | None = None) -> Pair:
        """Return copies of keys ``[rows, end - begin, dim]`` and values, on the compute device.

        With `into`, they are written there; with `rows`, they are those rows alone.
        """

    def fetch(self, groups: Tensor) -> Tensor:
        """Return copies of the ``[rows, n]`` groups: pages ``[n, rows, page]`` on the compute device."""

    def gather(self, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, n * group_size, dim]`` and values of the ``[rows, n]`` groups."""

    @property
    def host_pages(self) -> Tensor | None:
        """Pages ``[groups, rows, page]`` that kernels for the CPU can read in place; None without."""

    @property
    def gpu_pages(self) -> Tensor | None:
        """Pages ``[groups, rows, page]`` that kernels for the GPU can read in place; None without."""

    @property
    def hot(self) -> HotCache | None:
        """Slots on the GPU for pages in pinned host memory (`offload.hot_cache`); None without."""

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows` (int64 indices)."""

    def clone(self) -> "Tier":
        """Return an independent copy."""

    def held(self) -> Held:
        """Return the bytes allocated, by place."""

    def close(self) -> None:
        """Give everything up; nothing may be asked afterwards."""


def room_for(tier: Tier, tokens: int, rows: slice | None = None) -> Pair:
    """Return ``[rows, tokens, dim]`` and ``[rows, tokens, v_dim]`` on the compute device, to be written."""
    count = tier.rows if rows is None else rows.stop - rows.start

    def room(dim: int) -> Tensor:
        numbers = count * tokens * dim
        # In steps: what a prefill step has given back then fits the next one, whose history is longer.
        whole = -(-numbers // _STEP) * _STEP if numbers > _STEP else numbers
        return torch.empty(whole, dtype=tier.dtype, device=tier.compute)[:numbers].view(count, tokens, dim)

    return room(tier.dim), room(tier.v_dim)
