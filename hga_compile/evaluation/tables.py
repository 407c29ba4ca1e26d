"""Results of an evaluation as tables on the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hga_compile.cli.output import percent
from hga_compile.evaluation.nll import SHARES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Entry = dict[str, Any]
_TEXT = ("row", "mode", "positions", "task", "depth")


def print_nll(out: Console, summary: Sequence[Entry]) -> None:
    """Print the averages over all scored tokens, then by position."""
    whole = _table(
        "against dense, mean over texts [95% bootstrap interval]; nats",
        ("tokens", "row", "mode", "texts", "NLL", "delta NLL", "KL(dense || row)", "same top-1", "attended",
         "K/V read", "summaries read"),
    )  # fmt: skip
    parts = _table(
        "by position of the scored token",
        ("tokens", "positions", "row", "mode", "NLL", "delta NLL", "KL(dense || row)", "same top-1"),
    )
    for entry in summary:
        head = (f"{entry['length']:,}", entry["row"], entry["mode"])
        shares = (percent(entry[key]["mean"]) for key in SHARES)
        whole.add_row(*head, str(entry["documents"]), *_distances(entry), *shares)
        for bucket in entry["buckets"]:
            positions = f"{bucket['first']:,}-{bucket['end'] - 1:,}"
            parts.add_row(head[0], positions, *head[1:], *_distances(bucket))
    out.print(whole)
    if any(len(entry["buckets"]) > 1 for entry in summary):
        out.print(parts)


def print_needles(out: Console, summary: Sequence[Entry]) -> None:
    """Print one line for each task, length, row and mode, then the maps as numbers."""
    whole = _table(
        "facts found, mean over depths and trials [95% bootstrap interval]; NLL of the answer in nats",
        ("task", "facts", "tokens", "row", "mode", "trials", "exact", "parts found", "answer NLL",
         "delta NLL", "attended", "K/V read", "summaries read"),
    )  # fmt: skip
    for entry in summary:
        if entry["depth"] is not None:
            continue
        shares = (percent(entry[key]["mean"]) for key in SHARES)
        whole.add_row(
            *_head(entry), str(entry["trials"]), _interval(entry["exact"], 3),
            percent(entry["found"]["mean"]), _interval(entry["nll"]), _interval(entry["delta_nll"]), *shares,
        )  # fmt: skip
    out.print(whole)
    depths = sorted({entry["depth"] for entry in summary if entry["depth"] is not None})
    cells = _table(
        "by depth: share exact / answer NLL",
        ("task", "facts", "tokens", "row", "mode", *(f"{depth:.0%}" for depth in depths)),
    )
    lines: dict[tuple[str, ...], dict[float, str]] = {}
    for entry in summary:
        if entry["depth"] is not None:
            cell = f"{entry['exact']['mean']:.2f} / {entry['nll']['mean']:.3f}"
            lines.setdefault(_head(entry), {})[entry["depth"]] = cell
    for names, found in lines.items():
        cells.add_row(*names, *(found.get(depth, "-") for depth in depths))
    out.print(cells)


def print_layers(out: Console, found: Sequence[Entry], suggested: Entry) -> None:
    """Print what each layer costs by itself at each multiple of its budget, and what is suggested for it."""
    factors = sorted({entry["factor"] for entry in found})
    table = _table(
        "KL(dense || one layer routed), mean over texts [95% bootstrap interval]; nats",
        ("tokens", "layer", *(f"budget x {factor:g}" for factor in factors), "suggested"),
    )
    lines: dict[tuple[int, int], dict[float, str]] = {}
    for entry in found:
        lines.setdefault((entry["length"], entry["layer"]), {})[entry["factor"]] = _interval(entry["kl"], 5)
    for (length, layer), cells in sorted(lines.items()):
        chosen = suggested["factors"][str(layer)]
        table.add_row(f"{length:,}", str(layer), *(cells[factor] for factor in factors), f"x {chosen:g}")
    out.print(table)
    now, then = suggested["sum_of_kl_now"], suggested["sum_of_kl"]
    out.print(f"sum of the layers' KL: {now:.4f} now, {then:.4f} as suggested, at the same mean budget")
    held = suggested["held_out"]
    if held is None:
        out.print("one text: nothing says what the suggestion is worth on others; give several")
    else:
        then = held["sum_of_kl"]
        out.print(
            f"on texts left out of the choice: {held['sum_of_kl_now']:.4f} now, {then:.4f} as suggested"
        )


def print_fallbacks(out: Console, runs: Sequence[Entry]) -> None:
    """Print how often a row ran in something else than the fastest kernels, and why; nothing if never."""
    counts: dict[tuple[str, str, str], int] = {}
    for run in runs:
        for reason, count in run["fallbacks"].items():
            key = (run["row"], run["mode"], reason)
            counts[key] = counts.get(key, 0) + count
    for (row, mode, reason), count in counts.items():
        out.print(f"fallback: {row}, {mode}: {count} x {reason}", markup=False)


def _table(title: str, headings: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in _TEXT else "right")
    return table


def _head(entry: Entry) -> tuple[str, ...]:
    return entry["task"], str(entry["facts"]), f"{entry['length']:,}", entry["row"], entry["mode"]


def _distances(entry: Entry) -> list[str]:
    spread = [_interval(entry[key]) for key in ("delta_nll", "kl")]
    return [f"{entry['nll']['mean']:.4f}", *spread, percent(entry["top1"]["mean"])]


def _interval(value: dict[str, float | None], digits: int = 4) -> str:
    mean = f"{value['mean']:.{digits}f}"
    if value["low"] is None:
        return mean
    return f"{mean} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
