"""What ``hga-tune`` prints: the settings it measured, and before that what it would do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hga_compile.cli.output import console, print_json, size

if TYPE_CHECKING:
    from hga_compile.configs.cards import GpuCard, ModelCard
    from hga_compile.configs.profile import Profile
    from hga_compile.tuning.tune import Found

__all__ = ["show_found", "show_plan"]


def show_found(found: Found, folder: Path) -> None:
    """Print what was measured, and where the profile was written."""
    from rich.table import Table

    result, out = found.result, console()
    table = Table(title="settings measured on the full model", title_justify="left")
    for heading in ("trial", "KL", "delta NLL", "ms a token", "bytes read", "", "setting"):
        table.add_column(heading, justify="left" if heading in ("", "setting") else "right")
    for trial in sorted(result["trials"]["full"], key=lambda one: one["values"][0]):
        number = trial["number"]
        marks = ["chosen"] if number == result["chosen"]["number"] else []
        marks += ["default"] if result["default"] and number == result["default"]["number"] else []
        marks += [] if trial["feasible"] else ["infeasible"]
        marks += ["front"] if number in result["front"] else []
        read = f"{trial['kv_bytes'] + trial['summary_bytes']:.1%}"
        setting = ", ".join(f"{name} {_short(value)}" for name, value in trial["params"].items())
        values = (f"{trial['values'][0]:.4f}", f"{trial['delta_nll']:+.4f}", f"{trial['values'][1]:.2f}")
        table.add_row(str(number), *values, read, ", ".join(marks), setting)
    out.print(table)
    for name, value in found.facts.items():
        out.print(f"{name}: {value}", soft_wrap=True)
    print(folder / f"{found.profile.name}.yaml")


def show_plan(
    model: ModelCard, gpu: GpuCard, base: Profile, context: int, tiers: tuple[str, ...], trials: int,
    measured: int, as_json: bool,
) -> None:  # fmt: skip
    """Print the space, what fits, and about how long it would take."""
    from hga_compile.tuning.estimate import seconds
    from hga_compile.tuning.feasibility import table
    from hga_compile.tuning.space import Space

    cells = table(model, gpu, base, context)
    space = Space(base, tiers).describe()
    times = seconds(trials, measured)
    if as_json:
        print_json({"space": space, "feasibility": [asdict(cell) for cell in cells], "seconds": times})
        return
    from rich.table import Table

    out = console()
    shown = Table(title="what is searched", title_justify="left")
    shown.add_column("setting")
    shown.add_column("values")
    for name, values in space.items():
        shown.add_row(name, values)
    out.print(shown)
    fits = Table(title=f"what fits: {model.name} on {gpu.name}, default setting", title_justify="left")
    for heading in ("tier", "context", "fits", "GPU memory", "host RAM", "longest"):
        fits.add_column(heading, justify="left" if heading in ("tier", "fits") else "right")
    for cell in cells:
        verdict = ("yes" if cell.fits else "no") + ("" if cell.searched else ", not searched")
        sizes = (size(cell.gpu_bytes), size(cell.host_bytes))
        fits.add_row(cell.tier, f"{cell.context:,}", verdict, *sizes, f"{cell.longest:,}")
    out.print(fits)
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in times.items())
    out.print(f"Time on this machine, about: {parts}")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
