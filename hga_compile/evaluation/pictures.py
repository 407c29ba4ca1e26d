"""Results of an evaluation as PNG: distance by position, and maps of facts found by depth and length."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class NoMatplotlib(ValueError):
    """Matplotlib is not installed; the message says what to do."""


def need_matplotlib() -> None:
    """Raise unless pictures can be drawn, before hours of work are lost to it.

    Raises
    ------
    NoMatplotlib
        If matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise NoMatplotlib(
            "drawing needs matplotlib: pip install 'hga-compile[eval]', or leave pictures out (--no-picture)"
        )


def draw_nll(path: Path, summary: Sequence[Entry], title: str) -> None:
    """Draw delta NLL and KL by position, a line for each row, mode and length, with 95% intervals."""
    figure = _figure((12, 5.2), title)
    entries = [entry for entry in summary if entry["row"] != "dense"]
    colours = {row: f"C{number}" for number, row in enumerate(dict.fromkeys(e["row"] for e in entries))}
    styles = {
        mode: style
        for mode, style in zip(dict.fromkeys(e["mode"] for e in entries), ("-", "--"), strict=False)
    }
    for number, (key, name) in enumerate((("delta_nll", "NLL - dense NLL"), ("kl", "KL(dense || row)"))):
        axes = figure.add_subplot(1, 2, number + 1)
        labelled = set()
        for entry in entries:
            points = [(b["first"] + b["end"]) / 2 for b in entry["buckets"]]
            values = [b[key] for b in entry["buckets"]]
            label = f"{entry['row']}, {entry['mode']}"
            axes.plot(
                points, [v["mean"] for v in values], marker="o", markersize=4, color=colours[entry["row"]],
                linestyle=styles[entry["mode"]], label=None if label in labelled else label,
            )  # fmt: skip
            labelled.add(label)
            if values[0]["low"] is not None:
                low, high = [v["low"] for v in values], [v["high"] for v in values]
                axes.fill_between(points, low, high, color=colours[entry["row"]], alpha=0.15, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("position of the scored token")
        axes.set_ylabel(f"{name} (nats)")
        axes.grid(alpha=0.25)
    figure.axes[1].legend()
    _save(figure, path)


def draw_needles(path: Path, summary: Sequence[Entry], title: str) -> None:
    """Draw maps of depth by length: colour is the share of exact answers, the number the answer's NLL."""
    entries = [entry for entry in summary if entry["depth"] is not None]
    columns = list(dict.fromkeys((e["row"], e["mode"]) for e in entries))
    bands = list(dict.fromkeys((e["task"], e["facts"]) for e in entries))
    depths = sorted({e["depth"] for e in entries})
    lengths = sorted({e["length"] for e in entries})
    size = (
        1.6 + len(columns) * max(2.4, 0.9 * len(lengths)),
        1.4 + len(bands) * max(2.2, 0.45 * len(depths) + 0.8),
    )
    figure = _figure(size, title)
    found = {(e["task"], e["facts"], e["row"], e["mode"], e["depth"], e["length"]): e for e in entries}
    for band, (task, facts) in enumerate(bands):
        for column, (row, mode) in enumerate(columns):
            axes = figure.add_subplot(len(bands), len(columns), band * len(columns) + column + 1)
            cells = [
                [found.get((task, facts, row, mode, depth, length)) for length in lengths] for depth in depths
            ]
            grid = [[float("nan") if c is None else c["exact"]["mean"] for c in line] for line in cells]
            axes.imshow(grid, cmap="RdYlGn", vmin=-0.4, vmax=1.4, aspect="auto")
            for y, line in enumerate(cells):
                for x, cell in enumerate(line):
                    if cell is not None:
                        axes.text(x, y, f"{cell['nll']['mean']:.2f}", ha="center", va="center", fontsize=8)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
            if band == 0:
                axes.set_title(row if mode == "-" else f"{row}, {mode}", fontsize=9)
            if band == len(bands) - 1:
                axes.set_xlabel("tokens", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"{task}, {facts}\ndepth" if facts > 1 else f"{task}\ndepth", fontsize=8)
    figure.supxlabel("green: all exact, red: none; numbers: NLL of the answer in nats", fontsize=8)
    _save(figure, path)


def draw_layers(path: Path, found: Sequence[Entry], title: str) -> None:
    """Draw the KL of each layer by itself, a line for each multiple of its budget, lengths side by side."""
    lengths = sorted({entry["length"] for entry in found})
    figure = _figure((1.0 + 7.0 * len(lengths), 4.2), title)
    for number, length in enumerate(lengths):
        axes = figure.add_subplot(1, len(lengths), number + 1)
        for factor in sorted({entry["factor"] for entry in found}):
            line = [e for e in found if (e["length"], e["factor"]) == (length, factor)]
            layers, means = [e["layer"] for e in line], [e["kl"]["mean"] for e in line]
            drawn = axes.plot(layers, means, marker="o", markersize=3, label=f"budget x {factor:g}")[0]
            if line and line[0]["kl"]["low"] is not None:
                low, high = [e["kl"]["low"] for e in line], [e["kl"]["high"] for e in line]
                axes.fill_between(layers, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.set_xlabel(f"layer routed, the others dense ({length:,} tokens)")
        axes.set_ylabel("KL(dense || row) (nats)")
        axes.grid(alpha=0.25)
    figure.axes[-1].legend()
    _save(figure, path)


def _figure(size: tuple[float, float], title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    return figure


def _save(figure: Any, path: Path) -> None:
    draft = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.png")
    try:
        figure.savefig(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
