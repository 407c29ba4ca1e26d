"""What was decided at compile time and what happened at run time, in one report."""

import json
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from hga_compile.kernels.ledger import LEDGER, RouteRecord, Use
from hga_compile.passes.decision import Decision

__all__ = ["LayerUse", "Report", "SiteReport", "note_graph", "record_routes", "report", "reset_report"]


@dataclass(frozen=True)
class SiteReport:
    """The decision about one attention site of one compiled graph."""

    graph: int
    """Number of the graph, in the order of compilation."""
    site: str
    layer: int | None
    phase: str
    routed: bool
    reason: str
    detail: str


@dataclass(frozen=True)
class LayerUse:
    """What one layer (or all of them) read in one phase.

    Token counts are sums over batch, KV heads and queries; bytes follow from them, as if every query read its
    own K/V and summaries.
    """

    layer: int
    """Number of the layer; -1 in totals."""
    phase: str
    calls: int
    queries: int
    attended: int
    visible: int
    kv_bytes: int
    summary_bytes: int
    dense_bytes: int
    """What dense attention would have read."""
    hits: int
    """Routed groups that a hot cache (`offload.hot_cache`) had on the GPU."""
    misses: int
    """Those that it fetched."""

    @property
    def attended_fraction(self) -> float:
        """The budget that was really used: attended tokens over visible ones."""
        return self.attended / self.visible if self.visible else 0.0

    @property
    def bytes_fraction(self) -> float:
        """Bytes of K/V and summaries over the bytes of dense attention."""
        return (self.kv_bytes + self.summary_bytes) / self.dense_bytes if self.dense_bytes else 0.0

    @property
    def hit_rate(self) -> float | None:
        """Hits over all groups that a hot cache was asked for; None without one."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


@dataclass(frozen=True)
class Report:
    """Decisions per site, counters per layer and phase, and counted fallbacks."""

    sites: tuple[SiteReport, ...]
    layers: tuple[LayerUse, ...]
    fallbacks: dict[str, int]

    def totals(self, phase: str | None = None) -> LayerUse:
        """Add up all layers, of one phase (`prefill` or `decode`) or of both."""
        return _sum([use for use in self.layers if phase in (None, use.phase)], phase or "all")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        phases = {phase: self.totals(phase) for phase in ("prefill", "decode")}
        totals = {
            phase: asdict(total)
            | {
                "attended_fraction": total.attended_fraction,
                "bytes_fraction": total.bytes_fraction,
                "hit_rate": total.hit_rate,
            }
            for phase, total in phases.items()
        }
        return {
            "sites": [asdict(site) for site in self.sites],
            "layers": [asdict(use) for use in self.layers],
            "totals": totals,
            "fallbacks": dict(self.fallbacks),
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [f"{'graph':>5} {'layer':>5} {'phase':<8} decision"]
        for graph, layers, phase, why in _merged(self.sites):
            lines.append(f"{graph:>5} {layers:>5} {phase:<8} {why}")
        for phase in ("prefill", "decode"):
            total = self.totals(phase)
            if total.calls:
                dense = max(total.dense_bytes, 1)
                lines.append(
                    f"{phase}: {total.queries} queries x layers attended to {total.attended_fraction:.2%} of "
                    f"what they see; read {total.kv_bytes / dense:.2%} of the K/V bytes and "
                    f"{total.summary_bytes / dense:.2%} in summaries"
                    + ("" if total.hit_rate is None else f"; the hot cache had {total.hit_rate:.0%}")
                )
        lines += [f"fallback: {reason}: {count}" for reason, count in self.fallbacks.items()]
        return "\n".join(lines)


class _Decisions:
    """Decisions of every graph compiled so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graphs: list[tuple[Decision, ...]] = []

    def add(self, decisions: Iterable[Decision]) -> None:
        with self._lock:
            self._graphs.append(tuple(decisions))

    def clear(self) -> None:
        with self._lock:
            self._graphs.clear()

    def sites(self) -> tuple[SiteReport, ...]:
        with self._lock:
            graphs = list(self._graphs)
        return tuple(
            SiteReport(number, d.site, d.layer, d.phase, d.routed, d.reason.value, d.detail)
            for number, decisions in enumerate(graphs)
            for d in decisions
        )


_DECISIONS = _Decisions()


def note_graph(decisions: Iterable[Decision]) -> None:
    """Add the decisions about one compiled graph to the report."""
    _DECISIONS.add(decisions)


def report() -> Report:
    """Return what was decided and done since the last `reset_report`.

    Waits for the devices that hold counters.
    """
    layers = tuple(_layer_use(layer, phase, use) for (layer, phase), use in LEDGER.uses().items())
    return Report(_DECISIONS.sites(), layers, LEDGER.fallbacks())


def reset_report(*, sites: bool = False) -> None:
    """Forget the counters; with `sites` also the decisions about graphs compiled so far."""
    LEDGER.reset()
    if sites:
        _DECISIONS.clear()


def record_routes(layers: Iterable[int] | None = None) -> AbstractContextManager[list[RouteRecord]]:
    """Record which groups each query is routed to, for as long as the context is open.

    Parameters
    ----------
    layers : iterable of int or None
        Layers to record; None: all.

    Returns
    -------
    context manager
        Yields the list that `RouteRecord` are added to: layer, first query, group size, and
        ``[batch, kv_heads, queries, groups]`` bool on the CPU.
    """
    return LEDGER.recording(None if layers is None else list(layers))


def _layer_use(layer: int, phase: str, use: Use) -> LayerUse:
    return LayerUse(
        layer=layer,
        phase=phase,
        calls=use.calls,
        queries=use.queries,
        attended=use.attended,
        visible=use.visible,
        kv_bytes=use.attended * use.row_bytes,
        summary_bytes=round(use.summary_bytes),
        dense_bytes=use.visible * use.dense_row_bytes,
        hits=use.hits,
        misses=use.misses,
    )


def _sum(uses: list[LayerUse], phase: str) -> LayerUse:
    counted = [name for name in LayerUse.__dataclass_fields__ if name not in ("layer", "phase")]
    return LayerUse(-1, phase, **{name: sum(getattr(use, name) for use in uses) for name in counted})


def _merged(sites: tuple[SiteReport, ...]) -> list[tuple[int, str, str, str]]:
    """Put runs of layers with one decision into one line."""
    lines: list[tuple[int, str, str, str]] = []
    run: list[SiteReport] = []
    for site in (*sites, None):
        same = (
            run and site and (site.graph, site.phase, site.reason, site.detail)
            == (run[-1].graph, run[-1].phase, run[-1].reason, run[-1].detail)
        )  # fmt: skip
        if run and not same:
            first, last = run[0], run[-1]
            layers = "-" if first.layer is None else str(first.layer)
            if last is not first and first.layer is not None:
                layers += f"-{last.layer}"
            why = first.reason + (f" ({first.detail})" if first.detail else "")
            lines.append((first.graph, layers, first.phase, why))
            run = []
        if site is not None:
            run.append(site)
    return lines
