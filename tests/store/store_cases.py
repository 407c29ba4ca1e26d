"""Small layers in every tier, and file systems that fail, for the tests of this folder."""

import errno
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.profile import Kernels, Offload
from hga_compile.configs.routing import Routing
from hga_compile.kernels.site import SiteConfig
from hga_compile.store import LayerStore
from hga_compile.store.storage_io import StorageIO

SCALE = 0.3
ROUTING: dict[str, object] = {
    "budget": Budget(tokens=24),
    "window": Window(tokens=6),
    "centre_tokens": 8,
    "dense_below": 30,
    "chunk_size": 16,
}


def place_of(tier: str, **changes: Any) -> Offload:
    """Return a place whose pages are as small as they may be, and of which RAM keeps a few."""
    return Offload(**({"tier": tier, "nvme_cache": 2**17, "nvme_threads": 2} | changes))


def site_of(
    tier: str, kernels: Kernels = "auto", place: Offload | None = None, **changes: object
) -> SiteConfig:
    place = place_of(tier) if place is None else place
    return SiteConfig(0, place.home, Routing(**(ROUTING | changes)), kernels, place)


def rows_of(
    tokens: int, batch: int = 2, kv_heads: int = 2, dim: int = 64, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return queries ``[batch, 2 * kv_heads, tokens, dim]``, keys and values."""
    random = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, heads, tokens, dim, generator=random)
        for heads in (2 * kv_heads, kv_heads, kv_heads)
    )


def attend(
    store: LayerStore,
    parts: tuple[Tensor, ...],
    begin: int,
    end: int,
    site: SiteConfig,
    mask: Tensor | None = None,
) -> Tensor:
    query, key, value = (part[:, :, begin:end] for part in parts)
    return store.attend(query, key, value, end, mask, SCALE, site)


def run_steps(
    store: LayerStore,
    parts: tuple[Tensor, ...],
    steps: list[int],
    site: SiteConfig,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Attend step after step, from the first token on."""
    outs, begin = [], 0
    for step in steps:
        now = None if mask is None else mask[:, : begin + step]
        outs.append(attend(store, parts, begin, begin + step, site, now))
        begin += step
    return outs


def open_files() -> set[str]:
    """Return the open descriptors of this process, and what they lead to."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return found


Fault = Callable[[StorageIO, str, tuple[Any, ...]], Any]


def error_of(number: int) -> Fault:
    """Return a fault that fails a call with an error."""

    def fail(io: StorageIO, name: str, args: tuple[Any, ...]) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def short(io: StorageIO, name: str, args: tuple[Any, ...]) -> Any:
    """Move a part of what is asked for only: an odd number of bytes."""
    if name not in ("read", "write"):
        return None if name == "close" else getattr(StorageIO, name)(io, *args)
    fd, buffers, offset = args
    first = buffers[0]
    # As at a signal: around the page cache a part would have to be aligned, so the file is read through it.
    cut = first[: max(1, len(first) // 2 - 1)]
    count = os.preadv if name == "read" else os.pwritev
    try:
        return count(fd, [cut], offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return count(fd, [first[: max(4096, len(first) // 2 // 4096 * 4096)]], offset)


class FaultyIO(StorageIO):
    """A file system whose n-th call fails, once or from then on; `only` names the calls that are counted."""

    def __init__(self, number: int, fault: Fault, lasting: bool = False, only: tuple[str, ...] = ()) -> None:
        self.calls, self.failed = 0, 0
        self._number, self._fault, self._lasting, self._only = number, fault, lasting, only

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or name in ("calls", "failed"):
            return found
        if self._only and name not in self._only:
            return found

        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls == self._number or (self._lasting and self.calls > self._number):
                self.failed += 1
                if name == "close":
                    found(*args)  # Linux gives the descriptor up all the same
                return self._fault(self, name, args)
            return found(*args)

        return call
