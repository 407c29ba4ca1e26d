"""Token K/V of one layer in pages: one page holds a group of tokens of all rows, K and V together."""

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.kernels.dispatch import triton_serves
from hga_compile.kernels.gpu import load_rows, store_rows

__all__ = ["Pages"]

# Tokens that a kernel moves without a wait; the copy engine is faster for more.
_FEW = 64


class Pages:
    """Pages in one growing buffer ``[groups, rows, group_size * (dim + v_dim)]``.

    A row is one KV head of one sequence. K and V of one group of one row are one contiguous run, the unit
    that routing fetches; groups come first, so that the buffer grows at its end.

    Parameters
    ----------
    rows, dim, v_dim : int
        KV heads times batch, channels of a key, channels of a value.
    group_size : int
        Tokens of a page.
    dtype : torch.dtype
        Of the K/V.
    compute : torch.device
        Where K/V come from and go to.
    home : torch.device
        Where the pages live; pinned when that is the CPU and `compute` is a CUDA device.
    kernels : {"auto", "triton", "native", "reference"}
        What moves rows (see `use`).
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        v_dim: int,
        group_size: int,
        dtype: torch.dtype,
        compute: torch.device,
        home: torch.device,
        kernels: Kernels = "auto",
    ) -> None:
        self.rows, self.dim, self.v_dim, self.group_size = rows, dim, v_dim, group_size
        self.dtype, self.compute, self.home = dtype, compute, home
        self.buffer = self._allocate(0)
        self.use(kernels)
        self._in_flight = False
        """Whether kernels may still be at work on pages in host memory."""

    def __del__(self) -> None:
        # Freed pages are given to whoever asks next: no kernel may be reading them then.
        with suppress(Exception):
            self._settle()

    def use(self, kernels: Kernels) -> None:
        """Move rows by what a profile asks for (`compile.kernels`); the pages stay as they are."""
        self.kernels = kernels
        self._triton = triton_serves(kernels, self.compute, self.dtype, max(self.dim, self.v_dim))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens; what is stored stays."""
        needed, have = -(-tokens // self.group_size), self.buffer.shape[0]
        if needed <= have:
            return
        # A quarter of slack: appending n tokens one by one copies less than 5 n of them.
        larger = self._allocate(max(needed, have + have // 4 + 64))
        self._settle()
        larger[:have] = self.buffer
        self.buffer = larger

    def write(self, key: Tensor, value: Tensor, begin: int) -> None:
        """Store ``[rows, n, dim]`` keys and values as tokens ``begin, begin + 1, ...``."""
        self.reserve(begin + key.shape[1])
        if self._triton and key.shape[1] <= _FEW:
            store_rows(self.buffer, key, value, begin, self.group_size)
            self._in_flight = self.home.type == "cpu"
            return
        for groups, inside, tokens in self._runs(begin, begin + key.shape[1]):
            for view, rows in zip(self._views(groups), (key, value), strict=True):
                # [rows, n, dim] -> [groups, rows, tokens of a group, dim]
                run = rows[:, tokens].unflatten(1, (groups.stop - groups.start, -1))
                view[:, :, inside].copy_(run.transpose(0, 1))

    def read(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return copies of keys ``[rows, end - begin, dim]`` and values, on the compute device."""
        if self._triton and end - begin <= _FEW:
            self._in_flight = self.home.type == "cpu"
            return load_rows(self.buffer, begin, end, self.dim, self.group_size, self.compute)
        self._settle()
        key = torch.empty(self.rows, end - begin, self.dim, dtype=self.dtype, device=self.compute)
        value = torch.empty(self.rows, end - begin, self.v_dim, dtype=self.dtype, device=self.compute)
        for groups, inside, tokens in self._runs(begin, end):
            for view, rows in zip(self._views(groups), (key, value), strict=True):
                run = rows[:, tokens].unflatten(1, (groups.stop - groups.start, -1))
                run.copy_(view[:, :, inside].transpose(0, 1))
        return key, value

    def gather(self, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, n * group_size, dim]`` and values of the ``[rows, n]`` groups."""
        if group_size != self.group_size:
            raise ValueError(f"pages hold groups of {self.group_size} tokens, got a request for {group_size}")
        self._settle()
        rows = torch.arange(self.rows, device=self.home)[:, None]
        flat = (groups.to(self.home) * self.rows + rows).flatten()
        pages = self.buffer.flatten(0, 1)
        if self.home.type == "cpu" and self.compute.type == "cuda":
            staging = torch.empty(len(flat), pages.shape[1], dtype=self.dtype, pin_memory=True)
            torch.index_select(pages, 0, flat, out=staging)
            found = staging.to(self.compute, non_blocking=True)
        else:
            found = pages.index_select(0, flat)
        found = found.view(self.rows, -1, pages.shape[1])
        split = self.group_size * self.dim
        key = found[..., :split].reshape(self.rows, -1, self.dim)
        return key, found[..., split:].reshape(self.rows, -1, self.v_dim)

    @property
    def host_pages(self) -> Tensor | None:
        """The buffer, if kernels for the CPU can read it: float32, for a model that runs there."""
        plain = self.dtype == torch.float32 and self.compute.type == "cpu"
        return self.buffer if plain else None

    @property
    def gpu_pages(self) -> Tensor | None:
        """The buffer, if kernels for the GPU can read it: in its memory, or pinned for it."""
        if not self._triton:
            return None
        self._in_flight = self.home.type == "cpu"
        return self.buffer

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows` (int64 indices)."""
        self._settle()
        self.buffer = self._pinned(self.buffer.index_select(1, rows.to(self.home)))
        self.rows = len(rows)

    def moved(self, group_size: int, home: torch.device, tokens: int) -> "Pages":
        """Return pages of another group size or home with the first `tokens` tokens."""
        shape = (self.rows, self.dim, self.v_dim, group_size)
        pages = Pages(*shape, self.dtype, self.compute, home, self.kernels)
        if tokens:
            pages.write(*self.read(0, tokens), 0)
        return pages

    def clone(self) -> "Pages":
        """Return an independent copy."""
        self._settle()
        shape = (self.rows, self.dim, self.v_dim, self.group_size)
        pages = Pages(*shape, self.dtype, self.compute, self.home, self.kernels)
        pages.buffer = self._pinned(self.buffer.clone())
        return pages

    def _settle(self) -> None:
        """Wait for the GPU before the CPU reads or gives up host memory that kernels use."""
        if self._in_flight:
            if self.compute.type == "cuda":
                torch.cuda.synchronize(self.compute)
            self._in_flight = False

    def nbytes(self) -> int:
        """Return the bytes allocated."""
        return self.buffer.nbytes

    def _runs(self, begin: int, end: int) -> Iterator[tuple[slice, slice, slice]]:
        """Cut ``begin <= token < end`` into part of a group, whole groups, and part of a group.

        Yields the groups, the tokens inside each of them, and the tokens counted from `begin`.
        """
        size = self.group_size
        head = min(end, begin + -begin % size)
        body = head + (end - head) // size * size
        for start, stop in ((begin, head), (head, body), (body, end)):
            if start < stop:
                first, offset = divmod(start, size)
                last = -(-stop // size)
                inside = slice(offset, offset + (stop - start) // (last - first))
                yield slice(first, last), inside, slice(start - begin, stop - begin)

    def _views(self, groups: slice) -> tuple[Tensor, Tensor]:
        """K and V of groups as ``[groups, rows, group_size, dim]``."""
        split = self.group_size * self.dim
        pages = self.buffer[groups]
        return (
            pages[..., :split].unflatten(-1, (self.group_size, self.dim)),
            pages[..., split:].unflatten(-1, (self.group_size, self.v_dim)),
        )

    def _allocate(self, groups: int) -> Tensor:
        shape = (groups, self.rows, self.group_size * (self.dim + self.v_dim))
        pin = self.home.type == "cpu" and self.compute.type == "cuda"
        return torch.empty(shape, dtype=self.dtype, device=self.home, pin_memory=pin)

    def _pinned(self, buffer: Tensor) -> Tensor:
        pin = self.home.type == "cpu" and self.compute.type == "cuda"
        return buffer.pin_memory() if pin else buffer
