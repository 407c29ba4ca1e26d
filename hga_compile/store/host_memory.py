"""Host RAM that stores take, counted for the whole process and kept within what there is."""

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from hga_compile.kernels.states import STATES
from hga_compile.store.errors import StoreFullError

__all__ = ["HOST", "HostMemory", "Lease", "available_bytes"]

_KNOB = "offload.host_budget"


class HostMemory:
    """The RAM of one process's stores.

    Parameters
    ----------
    available : callable
        Returns the bytes of RAM that are left.
    """

    def __init__(self, available: Callable[[], int]) -> None:
        self.taken = 0
        """Bytes that leases hold."""
        self._available = available
        # A finaliser may give bytes back while its own thread takes some.
        self._lock = threading.RLock()
        self._room = 0

    def take(self, need: int, budget: int | None) -> None:
        """Count `need` bytes more.

        Raises
        ------
        StoreFullError
            They exceed the budget, or the RAM that is left.
        """
        with self._lock:
            if need > (free := self._free(budget)):
                # Caches that are gone may not have been cleared away yet: a traceback had them, or a handle.
                gc.collect()
                STATES.collect()
                free = self._free(budget)
            if need > free:
                what = "the host RAM budget for K/V is used up" if budget is not None else "host RAM is full"
                raise StoreFullError(what, need, max(0, free), _KNOB)
            self.taken += need

    def spare(self, budget: int | None) -> int:
        """Return the bytes that `take` would still give."""
        with self._lock:
            return max(0, self._free(budget))

    def _free(self, budget: int | None) -> int:
        left = self._available()
        # Memory that was given out is not used at once: what was there at first bounds it too.
        self._room = left if self.taken == 0 else self._room
        free = min(left, self._room - self.taken)
        return free if budget is None else min(free, budget - self.taken)

    def give(self, count: int) -> None:
        """Count `count` bytes less."""
        with self._lock:
            self.taken -= count


class Lease:
    """The bytes that one owner has taken; given back when it goes.

    Parameters
    ----------
    budget : int or None
        Most bytes of all leases together; None: what is free.
    memory : HostMemory
        Where they are counted.
    """

    def __init__(self, budget: int | None, memory: HostMemory | None = None) -> None:
        self.budget, self.memory = budget, HOST if memory is None else memory
        self.held = 0

    def resize(self, count: int) -> None:
        """Hold `count` bytes from here on.

        Raises
        ------
        StoreFullError
            There are not so many; the lease stays as it was.
        """
        if count > self.held:
            self.memory.take(count - self.held, self.budget)
        else:
            self.memory.give(self.held - count)
        self.held = count

    def __del__(self) -> None:
        held, self.held = self.held, 0
        self.memory.give(held)


def available_bytes(root: str = "/") -> int:
    """Return the bytes of RAM that this process may still use: the machine's, or its control group's.

    Parameters
    ----------
    root : str
        Where the file system begins; another one in tests.
    """
    free = int(psutil.virtual_memory().available)
    return min([free, *_group_limits(Path(root))])


def _group_limits(root: Path) -> Iterator[int]:
    """Bytes left in each control group that this process is in, outer ones too."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
            cache = "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            left = _left_in(folder, limit, used, cache)
            if left is not None:
                yield left
            if folder == base:
                break


def _left_in(folder: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        most = int((folder / limit).read_text())
        taken = int((folder / used).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    try:
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # File pages that nobody uses are given up before anything is refused.
        taken -= int(stats.get(cache, 0))
    except (OSError, ValueError):
        pass
    return max(0, most - taken)


HOST = HostMemory(available_bytes)
"""What the stores of this process take."""
