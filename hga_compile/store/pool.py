"""RAM as the cache of files: slots that hold parts of them, found by a table, given up by a clock."""

import os
import threading
from weakref import WeakValueDictionary

import numpy as np
import psutil
from numpy.typing import NDArray

from hga_compile.store.aligned import AlignedPages
from hga_compile.store.errors import StoreFullError
from hga_compile.store.host_memory import Lease

__all__ = ["PagePool", "Residents", "shared_pool"]

Numbers = NDArray[np.int64]

# Bytes by which the pool grows.
_STEP = 2**24
# Slots that the clock looks at together.
_WINDOW = 4096
_NONE = -1
# Looking for RAM that is not there takes a tenth of a second: what is garbage is cleared away first.
_PATIENCE = 256


class Residents:
    """Which pages of one file are in a pool."""

    def __init__(self, number: int) -> None:
        self.number = number
        """Who this is, in the pool."""
        self.table: Numbers = np.full(64, _NONE, np.int64)
        """Slot of each page; `_NONE` without one."""

    def reach(self, pages: int) -> None:
        """Make the table long enough for `pages` pages."""
        if pages > len(self.table):
            more = max(pages, 2 * len(self.table)) - len(self.table)
            self.table = np.concatenate([self.table, np.full(more, _NONE, np.int64)])


class PagePool:
    """Slots of one size that many files share.

    A slot that is pinned keeps its page. Whoever is handed slots unpins them when it has read them.

    Parameters
    ----------
    page_bytes : int
        Size of a slot.
    limit : int
        Most bytes of all slots.
    budget : int or None
        Most host RAM of the process for K/V; with it used up the pool stays as large as it is.
    """

    def __init__(self, page_bytes: int, limit: int, budget: int | None) -> None:
        most = min(limit, psutil.virtual_memory().total) // page_bytes
        self.memory = AlignedPages(most, page_bytes)
        self._lease = Lease(budget)
        # A finaliser may close a file's residents while its thread is at work here.
        self._lock = threading.RLock()
        self._owner: Numbers = np.full(most, _NONE, np.int64)
        self._page: Numbers = np.zeros(most, np.int64)
        self._pins = np.zeros(most, np.int32)
        self._used = np.zeros(most, np.bool_)
        self._ready = self._hand = self._opened = 0
        self._patience = 0
        """How often more slots may be asked for before RAM is looked for again."""
        self._occupied = 0
        """Slots that hold a page."""
        self._residents: dict[int, Residents] = {}

    def open(self) -> Residents:
        """Begin to keep pages of a file."""
        with self._lock:
            self._opened += 1
            residents = self._residents[self._opened] = Residents(self._opened)
            return residents

    def close(self, residents: Residents, poison: bool = False) -> None:
        """Forget a file, and with `poison` overwrite its pages."""
        with self._lock:
            self.drop(residents, 0, poison)
            self._residents.pop(residents.number, None)

    def find(self, residents: Residents, pages: Numbers) -> Numbers:
        """Return the slots of pages, -1 for those that are not there; pins the others."""
        with self._lock:
            if len(pages):
                residents.reach(int(pages.max()) + 1)
            slots = residents.table[pages]
            there = slots[slots != _NONE]
            self._pins[there] += 1
            self._used[there] = True
            return slots

    def take(self, count: int) -> Numbers:
        """Return up to `count` slots to fill, pinned; other pages are given up for them."""
        with self._lock:
            taken = self._vacant()[:count]
            while len(taken) < count and self._grow():
                taken = self._vacant()[:count]
            if len(taken) < count:
                taken = np.concatenate([taken, self._evict(count - len(taken))])
            self._pins[taken] = 1
            return taken

    def publish(self, residents: Residents, pages: Numbers, slots: Numbers) -> None:
        """Say that slots that were taken hold pages now."""
        with self._lock:
            if len(pages):
                residents.reach(int(pages.max()) + 1)
            self._free(residents.table[pages])
            residents.table[pages] = slots
            self._occupied += int((self._owner[slots] == _NONE).sum())
            self._owner[slots], self._page[slots] = residents.number, pages
            # Not before it is asked for again: what is read once does not drive out what is read often.
            self._used[slots] = False

    def unpin(self, slots: Numbers) -> None:
        """Allow slots to be given up again; those that hold no page are free."""
        with self._lock:
            self._pins[slots[slots != _NONE]] -= 1

    def drop(self, residents: Residents, first: int, poison: bool = False) -> None:
        """Forget the pages of a file from number `first` on."""
        with self._lock:
            slots = residents.table[first:]
            there = slots[slots != _NONE]
            if poison and len(there):
                self.memory.array[there] = 0xFF
            self._free(slots)
            residents.table[first:] = _NONE

    def held(self, residents: Residents) -> int:
        """Return the bytes that a file's pages take here."""
        with self._lock:
            return int((residents.table != _NONE).sum()) * self.memory.page_bytes

    @property
    def pinned(self) -> int:
        """Slots that somebody is reading or filling."""
        return int((self._pins != 0).sum())

    def _grow(self) -> bool:
        """Make more slots ready, if limit and budget allow."""
        more = min(self.memory.count - self._ready, max(1, _STEP // self.memory.page_bytes))
        if more <= 0:
            return False
        if self._patience:
            self._patience -= 1
            return False
        try:
            self._lease.resize((self._ready + more) * self.memory.page_bytes)
        except StoreFullError:
            self._patience = _PATIENCE
            return False
        self._ready += more
        return True

    def _evict(self, count: int) -> Numbers:
        """Give up to `count` pages up, those first that were not used since the hand last passed."""
        found: list[Numbers] = []
        looked = 0
        # Once round, whatever the hand passes has its second chance; the second time there is none.
        while count and looked < 2 * self._ready:
            at = self._hand + np.arange(min(_WINDOW, self._ready - self._hand))
            able = (self._pins[at] == 0) & (self._owner[at] != _NONE)
            stale = np.flatnonzero(able & ~self._used[at])[:count]
            passed = int(stale[-1]) + 1 if len(stale) == count else len(at)
            given = at[stale]
            self._give_up(given)
            self._used[at[:passed][able[:passed]]] = False
            found.append(given)
            count -= len(stale)
            looked += passed
            self._hand = (self._hand + passed) % self._ready
        return np.concatenate([*found, np.zeros(0, np.int64)])

    def _vacant(self) -> Numbers:
        """Return the slots that hold nothing and that nobody fills."""
        if self._occupied == self._ready:
            return np.zeros(0, np.int64)
        return np.flatnonzero((self._owner[: self._ready] == _NONE) & (self._pins[: self._ready] == 0))

    def _give_up(self, slots: Numbers) -> None:
        for number in np.unique(self._owner[slots]):
            own = slots[self._owner[slots] == number]
            residents = self._residents.get(int(number))
            if residents is not None:
                residents.table[self._page[own]] = _NONE
        self._free(slots)

    def _free(self, slots: Numbers) -> None:
        slots = slots[slots != _NONE]
        self._occupied -= int((self._owner[slots] != _NONE).sum())
        self._owner[slots] = _NONE


_pools: WeakValueDictionary[tuple[int, int, int, int | None], PagePool] = WeakValueDictionary()
_pools_lock = threading.Lock()


def shared_pool(page_bytes: int, limit: int, budget: int | None) -> PagePool:
    """Return the pool that all files of this process with these settings share."""
    # Threads may hold a lock while a process forks: the child starts with a pool of its own.
    key = (os.getpid(), page_bytes, limit, budget)
    with _pools_lock:
        pool = _pools.get(key)
        if pool is None:
            pool = _pools[key] = PagePool(page_bytes, limit, budget)
        return pool
