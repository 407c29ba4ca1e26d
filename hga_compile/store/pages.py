"""The tiers `gpu` and `host`: pages in one buffer, in GPU memory or in host RAM that grows where it is."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels, Offload
from hga_compile.kernels.dispatch import triton_serves
from hga_compile.kernels.fp8 import EXTRA, blank
from hga_compile.kernels.gpu import load_rows, store_rows
from hga_compile.kernels.hot import HotCache
from hga_compile.kernels.staging import PIECE
from hga_compile.kernels.stretch import BEYOND
from hga_compile.store.host_memory import Lease
from hga_compile.store.host_pins import Pins
from hga_compile.store.host_range import HostRange
from hga_compile.store.tier import Held, Pair, room_for

__all__ = ["Pages"]

# Shares of the RAM that is left, of which a layer takes one at most before it needs it.
_SHARES = 256
# Tokens that a kernel moves to and from pinned memory itself; the copy engine moves more of them.
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
    place : Offload
        RAM budget, room to make at once, and whether to poison.
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
        place: Offload | None = None,
    ) -> None:
        self.rows, self.dim, self.v_dim, self.group_size = rows, dim, v_dim, group_size
        self.dtype, self.compute, self.home = dtype, compute, home
        self.place = Offload() if place is None else place
        self._in_flight = False
        """Whether kernels may still be at work on pages in host memory."""
        self._hot: HotCache | None = None
        self._lease = Lease(self.place.host_budget)
        self._pinned = home.type == "cpu" and compute.type == "cuda"
        # Host memory grows in place; that of a GPU by a copy.
        self._range: HostRange | None = None
        if home.type == "cpu":
            self._range = HostRange(Pins(compute) if self._pinned else None)
        self.buffer = self._allocate(0)
        self.use(kernels)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - names of this module are gone when the interpreter ends
            self.close()
        except Exception:
            pass

    def close(self) -> None:
        """Give the pages up; with `offload.poison` overwrite them first."""
        # Freed pages are given to whoever asks next: no kernel may be reading them then.
        self._settle()
        if self.place.poison and (self._range is None or self._range.here):
            _poison(self.buffer)
            if self._hot is not None:
                _poison(self._hot.pool)
        self._hot = None
        self.buffer = self.buffer[:0].clone()
        if self._range is not None:
            self._range.close()
        self._lease.resize(0)

    def use(self, kernels: Kernels) -> None:
        """Move rows by what a profile asks for (`compile.kernels`); the pages stay as they are."""
        self.kernels = kernels
        dtype, v_dim = self.dtype, self.v_dim
        if dtype == torch.uint8:
            # Bytes are moved as they are; what they stand for is up to who reads them.
            dtype, v_dim = torch.bfloat16, v_dim - EXTRA
        self._triton = triton_serves(kernels, self.compute, dtype, max(self.dim, v_dim))

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one row."""
        return (self.dim + self.v_dim) * self.dtype.itemsize

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens; what is stored stays.

        Raises
        ------
        StoreFullError
            They exceed the RAM budget, or what is left of the RAM.
        """
        needed, have = -(-tokens // self.group_size), self.buffer.shape[0]
        if needed <= have:
            return
        first = 0 if have else -(-(self.place.reserve_tokens or 0) // self.group_size)
        # A quarter of slack: appending n tokens one by one copies less than 5 n of them.
        slack = first or have + have // 4 + 64
        if self.home.type == "cpu" and not first:
            # Other layers have to grow too: none takes much of what is left before it needs it.
            group = self.rows * self.group_size * (self.dim + self.v_dim) * self.dtype.itemsize
            slack = min(slack, needed + self._lease.memory.spare(self._lease.budget) // (_SHARES * group))
            if self.place.reserve_tokens:
                slack = min(slack, needed + BEYOND // self.group_size)  # what comes beyond them is little
        self._grow(max(needed, slack))

    def truncate(self, length: int) -> None:
        """Give up tokens from number `length` on, and host RAM that they took; see also `offload.poison`."""
        self._forget(length)
        kept = -(-length // self.group_size)
        reserved = -(-(self.place.reserve_tokens or 0) // self.group_size)
        if self._range is not None and len(self.buffer) > max(2 * kept + 64, reserved):
            self._grow(kept)
        if self.place.poison and length < len(self.buffer) * self.group_size:
            self._settle()
            for groups, inside, _ in self._runs(length, len(self.buffer) * self.group_size):
                for view in self._views(groups):
                    view[:, :, inside] = blank(self.dtype)

    def write(self, key: Tensor, value: Tensor, begin: int) -> None:
        """Store ``[rows, n, dim]`` keys and values as tokens ``begin, begin + 1, ...``."""
        self.reserve(begin + key.shape[1])
        self._forget(begin)
        if self._triton and (self._pinned or key.shape[1] <= _FEW):
            for groups, tokens in self._pieces(begin, begin + key.shape[1]):
                part = key[:, tokens], value[:, tokens]
                if groups.start == groups.stop:
                    store_rows(self.buffer, *part, begin + tokens.start, self.group_size)
                    continue
                packed = torch.empty_like(self.buffer[groups], device=self.compute)
                store_rows(packed, *part, 0, self.group_size)
                self._copied(groups, packed, out=True)
            self._in_flight = self.home.type == "cpu"
            return
        for groups, inside, tokens in self._runs(begin, begin + key.shape[1]):
            for view, rows in zip(self._views(groups), (key, value), strict=True):
                # [rows, n, dim] -> [groups, rows, tokens of a group, dim]
                run = rows[:, tokens].unflatten(1, (groups.stop - groups.start, -1))
                view[:, :, inside].copy_(run.transpose(0, 1))

    @property
    def apart(self) -> bool:
        """Whether some of the rows are read without the others being read too: by a kernel."""
        return self._triton

    def read(self, begin: int, end: int, into: Pair | None = None, rows: slice | None = None) -> Pair:
        """Return copies of keys ``[rows, end - begin, dim]`` and values, on the compute device.

        With `rows`, of those rows alone: the copy engine would bring pages of all rows.
        """
        key, value = into or room_for(self, end - begin, rows)
        if rows is not None:
            if not self._triton:
                raise ValueError("rows are read one without the others by Triton's kernels alone (`apart`)")
            load_rows(self.buffer, key, value, begin, self.group_size, rows.start)
            self._in_flight = self.home.type == "cpu"
            return key, value
        if self._triton and (self._pinned or end - begin <= _FEW):
            for groups, tokens in self._pieces(begin, end):
                part = key[:, tokens], value[:, tokens]
                if groups.start == groups.stop:
                    load_rows(self.buffer, *part, begin + tokens.start, self.group_size)
                    continue
                packed = torch.empty_like(self.buffer[groups], device=self.compute)
                self._copied(groups, packed, out=False)
                load_rows(packed, *part, 0, self.group_size)
            self._in_flight = self.home.type == "cpu"
            return key, value
        self._settle()
        for groups, inside, tokens in self._runs(begin, end):
            for view, out in zip(self._views(groups), (key, value), strict=True):
                run = out[:, tokens].unflatten(1, (groups.stop - groups.start, -1))
                run.copy_(view[:, :, inside].transpose(0, 1))
        return key, value

    def gather(self, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[rows, n * group_size, dim]`` and values of the ``[rows, n]`` groups."""
        if group_size != self.group_size:
            raise ValueError(f"pages hold groups of {self.group_size} tokens, got a request for {group_size}")
        found = self._copies(groups).view(self.rows, -1, self.buffer.shape[2])
        split = self.group_size * self.dim
        key = found[..., :split].reshape(self.rows, -1, self.dim)
        return key, found[..., split:].reshape(self.rows, -1, self.v_dim)

    def fetch(self, groups: Tensor) -> Tensor:
        """Return copies of the ``[rows, n]`` groups: pages ``[n, rows, page]`` on the compute device."""
        found = self._copies(groups).view(self.rows, -1, self.buffer.shape[2])
        return found.transpose(0, 1).contiguous()

    def _copies(self, groups: Tensor) -> Tensor:
        """Copy ``[rows, n]`` groups to the compute device, ``[rows * n, page]``."""
        self._settle()
        rows = torch.arange(self.rows, device=self.home)[:, None]
        flat = (groups.to(self.home) * self.rows + rows).flatten()
        pages = self.buffer.flatten(0, 1)
        if self._pinned:
            staging = torch.empty(len(flat), pages.shape[1], dtype=self.dtype, pin_memory=True)
            torch.index_select(pages, 0, flat, out=staging)
            return staging.to(self.compute, non_blocking=True)
        return pages.index_select(0, flat)

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

    @property
    def hot(self) -> HotCache | None:
        """Slots on the GPU that kernels keep copies of listed pages in (`offload.hot_cache`)."""
        if self._hot is None and self.place.hot_cache is not None and self._pinned and self._triton:
            share, page = self.place.hot_cache, self.buffer.shape[2]
            self._hot = HotCache(self.rows, page, share, self.dtype, self.compute)
        return self._hot

    def _forget(self, length: int) -> None:
        """Have no copies of groups with tokens from number `length` on."""
        if self._hot is not None:
            self._hot.forget(length // self.group_size, self.place.poison)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows` (int64 indices)."""
        other = self._like(len(rows))
        other._grow(len(self.buffer))
        self._settle()
        torch.index_select(self.buffer, 1, rows.to(self.home), out=other.buffer)
        self._take_over(other)

    def clone(self) -> "Pages":
        """Return an independent copy."""
        other = self._like(self.rows)
        other._grow(len(self.buffer))
        self._settle()
        other.buffer.copy_(self.buffer)
        return other

    def _like(self, rows: int) -> "Pages":
        shape = (rows, self.dim, self.v_dim, self.group_size)
        return Pages(*shape, self.dtype, self.compute, self.home, self.kernels, self.place)

    def _take_over(self, other: "Pages") -> None:
        """Become another one, which becomes what this was and is given up."""
        self.__dict__, other.__dict__ = other.__dict__, self.__dict__
        other.close()

    def _settle(self) -> None:
        """Wait for the GPU before the CPU reads or gives up host memory that kernels use."""
        if self._in_flight:
            if self.compute.type == "cuda":
                torch.cuda.synchronize(self.compute)
            self._in_flight = False

    def held(self) -> Held:
        """Return the bytes allocated, by place."""
        if self.home.type != "cpu":
            return Held(self.buffer.nbytes)
        return Held(0 if self._hot is None else self._hot.nbytes(), host=self._lease.held)

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

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[slice, slice]]:
        """Cut ``begin <= token < end`` into what kernels and the copy engine move at a time.

        Yields the groups that are moved as whole pages, none where a kernel moves tokens where they lie, and
        the tokens counted from `begin`.
        """
        size, step = self.group_size, max(1, PIECE // self._page_bytes)
        if end - begin <= _FEW:
            yield slice(0, 0), slice(0, end - begin)
            return
        for groups, _, tokens in self._runs(begin, end):
            if tokens.stop - tokens.start < size:
                yield slice(0, 0), tokens
                continue
            for first in range(groups.start, groups.stop, step):
                last, at = min(groups.stop, first + step), tokens.start + (first - groups.start) * size
                yield slice(first, last), slice(at, at + (last - first) * size)

    @property
    def _page_bytes(self) -> int:
        """Bytes of a group of all rows."""
        return self.rows * self.group_size * self.row_bytes

    def _copied(self, groups: slice, packed: Tensor, out: bool) -> None:
        """Have the copy engine bring pages of pinned memory to the GPU, or back (`out`), without a wait."""
        assert self._range is not None  # pinned
        there, begin = packed.flatten().view(torch.uint8), groups.start * self._page_bytes
        for part in self._range.parts(begin, groups.stop * self._page_bytes):
            near, far = there[part.start - begin : part.stop - begin], self._range.bytes[part]
            (far if out else near).copy_(near if out else far, non_blocking=True)

    def _views(self, groups: slice) -> tuple[Tensor, Tensor]:
        """K and V of groups as ``[groups, rows, group_size, dim]``."""
        split = self.group_size * self.dim
        pages = self.buffer[groups]
        return (
            pages[..., :split].unflatten(-1, (self.group_size, self.dim)),
            pages[..., split:].unflatten(-1, (self.group_size, self.v_dim)),
        )

    def _grow(self, groups: int) -> None:
        """Make the buffer `groups` long, or shorter; it stays as it was if there is no room."""
        have, page = min(len(self.buffer), groups), self.rows * self.group_size * (self.dim + self.v_dim)
        size = groups * page * self.dtype.itemsize
        old, host = self._lease.held, self._range
        if host is not None and host.need(size) > old:
            self._lease.resize(host.need(size))
        try:
            if host is not None:
                if host.moves(size):
                    self._settle()
                self.buffer = self.buffer[:0].clone()  # nothing may point there while it moves
                self.buffer = self._shaped(host.resized(size, have * page * self.dtype.itemsize))
            else:
                larger = self._allocate(groups)
                larger[:have] = self.buffer
                self.buffer = larger
        except BaseException:
            if host is not None:
                self.buffer = self._shaped(host.bytes)
            self._lease.resize(old)
            raise
        if host is not None:
            self._lease.resize(host.committed)
        if self.place.poison or _torch_fills():
            _poison(self.buffer[have:])

    def _shaped(self, raw: Tensor) -> Tensor:
        return raw.view(self.dtype).view(-1, self.rows, self.group_size * (self.dim + self.v_dim))

    def _allocate(self, groups: int) -> Tensor:
        shape = (groups, self.rows, self.group_size * (self.dim + self.v_dim))
        return torch.empty(shape, dtype=self.dtype, device=self.home)


def _torch_fills() -> bool:
    """Say whether torch fills the memory that it hands out, for tests."""
    return (
        torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    )


def _poison(buffer: Tensor) -> None:
    """Fill with NaN, in every floating-point type."""
    if buffer.numel():
        buffer.view(torch.uint8).fill_(0xFF)
