"""GPU memory and time a token against the context, and tokens a second against requests at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw", "draw_batches"]

_COLOURS = {
    "hga": "#0a6cbc", "hga-gpu": "#58a5dd", "dense": "#555555", "dense-uncapped": "#999999",
    "dynamic": "#c2571a", "offloaded": "#2e8b57", "quantized": "#8e44ad",
}  # fmt: skip


def draw(points: list[dict[str, Any]], target: Path, cap: int | None) -> None:
    """Draw the points that were measured; a cross marks a context that ran out of memory.

    Parameters
    ----------
    points
        Of `headline.py`.
    target
        The PNG.
    cap
        Bytes of GPU memory that capped systems may take.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (memory, speed) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    names = list(dict.fromkeys(point["system"] for point in sorted(points, key=lambda one: one["order"])))
    for name in names:
        mine = sorted((one for one in points if one["system"] == name), key=lambda one: one["context"])
        label, drawn = mine[0]["label"], {"color": _COLOURS.get(name)}
        done = [one for one in mine if one["status"] == "ok"]
        taken = [one["memory"]["reserved"] / 2**30 for one in done]
        memory.plot(_thousands(done), taken, "o-", label=label, **drawn)
        speed.plot(_thousands(done), [one["decode"]["median_ms"] for one in done], "o-", label=label, **drawn)
        again = [one for one in done if "decode_replayed" in one]
        if again:
            times = [one["decode_replayed"]["median_ms"] for one in again]
            speed.plot(_thousands(again), times, "s--", label=f"{label}, recorded routes", **drawn)
        short = [one for one in mine if one["status"] == "out of memory"]
        if short and cap:
            memory.plot(_thousands(short), [cap / 2**30] * len(short), "x", ms=9, mew=2, **drawn)
    if cap:
        memory.axhline(cap / 2**30, color="black", lw=0.8, ls=":")
    memory.set(ylabel="GPU memory taken, GiB", ylim=(0, None))
    speed.set(ylabel="milliseconds a decoded token, median")
    shown = [float(value) for line in speed.lines for value in line.get_ydata()]
    if shown and max(shown) > 10 * min(shown):
        speed.set_yscale("log")
    else:
        speed.set_ylim(0, None)
    for axes in (memory, speed):
        _ticked(axes, "context, thousands of tokens", {one["context"] // 1024 or 1 for one in points})
    speed.legend(fontsize=7)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def draw_batches(points: list[dict[str, Any]], target: Path) -> None:
    """Draw tokens a second of all requests; a cross marks a number of them that ran out of memory.

    Parameters
    ----------
    points
        Of `batch.py`.
    target
        The PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.4), layout="constrained")
    for name in dict.fromkeys(point["system"] for point in sorted(points, key=lambda one: one["order"])):
        mine = [one for one in points if one["system"] == name]
        done = [one for one in mine if one["status"] == "ok"]
        rates, drawn = [one["decode"]["tokens_per_second"] for one in done], {"color": _COLOURS.get(name)}
        axes.plot([one["requests"] for one in done], rates, "o-", label=mine[0]["label"], **drawn)
        short = [one["requests"] for one in mine if one["status"].startswith("out of")]
        axes.plot(short, [0] * len(short), "x", ms=9, mew=2, clip_on=False, **drawn)
    axes.set(ylabel="decoded tokens/s, all requests", ylim=(0, None))
    _ticked(axes, "requests at once", {one["requests"] for one in points})
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def _ticked(axes: Any, label: str, numbers: set[int]) -> None:
    """Have a logarithmic axis with the numbers that were measured."""
    ticks = sorted(numbers)
    axes.set(xlabel=label, xscale="log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _thousands(points: list[dict[str, Any]]) -> list[float]:
    return [one["context"] / 1024 for one in points]
