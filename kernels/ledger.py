"""What routed attention did: counters per layer and phase, decisions per site, and recorded routes."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from weakref import ReferenceType, WeakMethod, ref

import torch
from torch import Tensor

__all__ = ["LEDGER", "Ledger", "RouteRecord", "Use"]


@dataclass
class Use:
    """Counters of one layer in one phase; `attended` may lag on a device until it is read.

    Token counts are sums over batch, KV heads and queries.
    """

    calls: int = 0
    queries: int = 0
    visible: int = 0
    scored: int = 0
    """Tokens whose summaries were scored."""
    summary_bytes: float = 0.0
    row_bytes: int = 0
    """Bytes of one token's K and V in one KV head, as they are stored."""
    dense_row_bytes: int = 0
    """The same in the dtype of the model."""
    hits: int = 0
    """Routed groups that a hot cache had in its slots."""
    misses: int = 0
    """Those that it had not: they crossed PCIe."""
    _attended: int = 0
    _pending: dict[torch.device, Tensor] = field(default_factory=dict)

    def add_attended(self, count: int | Tensor) -> None:
        """Add attended tokens; a tensor is summed where it lives, without a wait."""
        if isinstance(count, int):
            self._attended += count
            return
        if count.device not in self._pending:
            # A tensor made in inference mode could not be added to outside of it.
            with torch.inference_mode(False):
                self._pending[count.device] = torch.zeros((), dtype=torch.int64, device=count.device)
        self._pending[count.device] += count

    @property
    def attended(self) -> int:
        """Tokens attended to; waits for the devices that hold counts."""
        return self._attended + sum(int(part) for part in self._pending.values())


@dataclass(frozen=True)
class RouteRecord:
    """Routed groups of a run of queries of one layer.

    `groups` is ``[batch, kv_heads, queries, groups]`` bool on the CPU: sinks, window and chosen groups.
    """

    layer: int
    first_query: int
    group_size: int
    groups: Tensor


@dataclass(frozen=True)
class _OnDevice:
    """Hits and misses that a device adds up."""

    layer: int
    owner: ReferenceType[object]
    counts: Tensor
    told: list[int]
    """What has been counted of them."""


# Counts on devices after which those of owners that are gone are settled.
_MANY = 256


class Ledger:
    """The process's one account of what was routed; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[tuple[int, str], Use] = {}
        self._fallbacks: Counter[str] = Counter()
        self._recorders: list[tuple[frozenset[int] | None, list[RouteRecord]]] = []
        self._late: list[WeakMethod[Callable[[], None]]] = []
        self._devices: list[_OnDevice] = []

    def settle_with(self, tell: Callable[[], None]) -> None:
        """Have a bound method called before counts are read; it adds those that its object has put off."""
        with self._lock:
            self._late = [late for late in self._late if late() is not None] + [WeakMethod(tell)]

    def count_on_device(
        self, layer: int, owner: object, counts: Tensor, told: Sequence[int] = (0, 0)
    ) -> None:
        """Have hits and misses added up in ``[rows, 2]`` int64 counted as those of a layer's decode steps.

        The counts are read when somebody asks, which waits for the device. `owner` is not held, and `told`
        not counted.
        """
        with self._lock:
            self._devices.append(_OnDevice(layer, ref(owner), counts, list(told)))
            many = len(self._devices) % _MANY == 0
        if many:  # counts of owners that are gone must not pile up
            self._settle()

    def use(self, layer: int, phase: str) -> Use:
        """Return the counters of a layer in a phase (`prefill` or `decode`), made on first use."""
        with self._lock:
            return self._uses.setdefault((layer, phase), Use())

    def uses(self) -> dict[tuple[int, str], Use]:
        """Return all counters by layer and phase."""
        self._settle()
        with self._lock:
            return dict(sorted(self._uses.items()))

    def count_fallback(self, reason: str) -> None:
        """Count a call that ran another way than asked."""
        with self._lock:
            self._fallbacks[reason] += 1

    def fallbacks(self) -> dict[str, int]:
        """Return the counted fallbacks by reason."""
        with self._lock:
            return dict(self._fallbacks)

    def reset(self) -> None:
        """Forget all counts; running recordings go on."""
        self._settle()
        with self._lock:
            self._uses.clear()
            self._fallbacks.clear()

    def _settle(self) -> None:
        for late in list(self._late):
            tell = late()
            if tell is not None:
                tell()
        with self._lock:
            devices, self._devices = self._devices, []
        for counted in devices:
            gone = counted.owner() is None
            now = counted.counts.sum(0).tolist()
            use = self.use(counted.layer, "decode")
            use.hits += now[0] - counted.told[0]
            use.misses += now[1] - counted.told[1]
            if not gone:
                with self._lock:
                    self._devices.append(replace(counted, told=now))

    @property
    def watched(self) -> bool:
        """Whether somebody records routes."""
        return bool(self._recorders)

    def wants(self, layer: int) -> bool:
        """Say whether somebody records the routes of `layer`."""
        return any(layers is None or layer in layers for layers, _ in self._recorders)

    def record(self, record: RouteRecord) -> None:
        """Hand a record to everybody who asked for its layer."""
        with self._lock:
            for layers, records in self._recorders:
                if layers is None or record.layer in layers:
                    records.append(record)

    @contextmanager
    def recording(self, layers: Sequence[int] | None = None) -> Iterator[list[RouteRecord]]:
        """Collect the routes of `layers` (None: all) for as long as the context is open."""
        records: list[RouteRecord] = []
        entry = (None if layers is None else frozenset(layers), records)
        with self._lock:
            self._recorders.append(entry)
        try:
            yield records
        finally:
            with self._lock:
                # By identity: two recordings may hold equal lists.
                self._recorders = [other for other in self._recorders if other is not entry]


LEDGER = Ledger()
"""The account that the ops write to."""
