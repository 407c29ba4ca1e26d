"""``hga tune-kernels``: find the best launch parameters of the Triton kernels on this GPU, and keep them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hga_compile.cli import options
from hga_compile.cli.errors import BadInputError, guarded
from hga_compile.cli.output import console, note, print_json

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from hga_compile.kernels.tuner import Outcome, Workload

_DEFAULT = "4x8x128x16384,4x8x128x65536,4x8x128x262144"


@guarded
def tune_kernels(
    shapes: Annotated[
        str,
        typer.Option(
            "--shapes",
            help="Decode steps to tune for, ROWSxHEADSxDIMxTOKENS: KV heads times batch, query heads of a KV "
            "head, channels, tokens; several with commas.",
        ),
    ] = _DEFAULT,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Try launch parameters of the Triton kernels on the present GPU and keep the best.

    Each candidate's result is compared with the defaults' before it is timed.
    """
    loads = parse_shapes(shapes)
    import torch

    if not torch.cuda.is_available():
        raise BadInputError("tune-kernels needs a CUDA device, got none; run it on the machine with the GPU")
    from importlib.util import find_spec

    if find_spec("triton") is None:
        raise BadInputError("tune-kernels needs Triton, which is not installed; try pip install triton")
    from hga_compile.kernels.launch import table_path

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    path = table_path(name)
    found: dict[tuple[str, str], Outcome] = {}
    for load in loads:
        # What a cut run has found stays found.
        outcomes = _outcomes(load, device, found)
        keep(outcomes, name)
        found |= {(outcome.kernel, outcome.shape.text()): outcome for outcome in outcomes}
        if not as_json:
            _print("x".join(map(str, asdict(load).values())), name, outcomes)
        note(f"kept in {path}")
    if as_json:
        kernels = [_plain(outcome) for outcome in found.values()]
        print_json({"device": name, "table": str(path), "kernels": kernels})


def parse_shapes(text: str) -> list[Workload]:
    """Read ``4x8x128x65536,...``.

    Raises
    ------
    BadInputError
        Anything else, or numbers that the kernels do not cover.
    """
    from hga_compile.kernels.tuner import Workload

    loads = []
    for part in text.split(","):
        numbers = part.strip().lower().split("x")
        if len(numbers) != 4 or not all(number.isascii() and number.isdigit() for number in numbers):
            raise BadInputError(
                f"a shape must be ROWSxHEADSxDIMxTOKENS, got {part!r}; try 4x8x128x65536 (--shapes)"
            )
        load = Workload(*map(int, numbers))
        most = Workload(4096, 64, 256, 2**22)
        for field, given, bound in zip(
            asdict(load), asdict(load).values(), asdict(most).values(), strict=True
        ):
            least = 1024 if field == "tokens" else 1
            if not least <= given <= bound:
                raise BadInputError(f"{field} must be {least} to {bound}, got {given} in {part!r} (--shapes)")
        loads.append(load)
    return loads


def keep(outcomes: Sequence[Outcome], device: str) -> None:
    """Add what was found to the table of a GPU; what it holds of other shapes stays."""
    from hga_compile.kernels.launch import load_table, save_table, table_path

    path = table_path(device)
    try:
        table = load_table(path, device)
    except (OSError, ValueError):
        table = {}
    for outcome in outcomes:
        table.setdefault(outcome.kernel, {})[outcome.shape.text()] = outcome.best
    save_table(path, device, table)


def _outcomes(load: Workload, device: Any, known: Container[tuple[str, str]]) -> list[Outcome]:
    """Tune for one shape, but for kernels that do not see what is new about it; say so after each kernel."""
    from time import perf_counter

    from hga_compile.kernels.tuner import compile_all, graph_microseconds, tasks_of, tune

    outcomes: list[Outcome] = []
    for task in tasks_of(load, device):
        name, shape = task.kernel.name(), task.shape.text()
        if (name, shape) in known:
            continue
        begin = perf_counter()
        compile_all(task)
        compiled = perf_counter()
        outcome = tune(task, graph_microseconds)
        outcomes.append(outcome)
        timed = perf_counter() - compiled
        note(
            f"{name} ({shape}): {outcome.default_microseconds:.1f} -> {outcome.best_microseconds:.1f} µs, "
            f"{outcome.tried} tried, {compiled - begin:.1f} s to compile, {timed:.1f} s to time"
        )
    return outcomes


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "kernel": outcome.kernel,
        "shape": outcome.shape.text(),
        "default": asdict(outcome.default),
        "best": asdict(outcome.best),
        "default_microseconds": outcome.default_microseconds,
        "best_microseconds": outcome.best_microseconds,
        "ratio": outcome.ratio,
        "tried": outcome.tried,
        "refused": outcome.refused,
    }


def _print(shape: str, device: str, outcomes: Sequence[Outcome]) -> None:
    from rich.table import Table

    table = Table(title=f"launch parameters for {shape} on {device}", title_justify="left")
    for column in ("kernel", "size x rows x heads x dim", "default", "best"):
        table.add_column(column)
    for column in ("default, µs", "best, µs", "best / default", "tried", "refused"):
        table.add_column(column, justify="right")
    for row in map(_plain, outcomes):
        names = [
            ", ".join(f"{name} {value}" for name, value in row[of].items()) for of in ("default", "best")
        ]
        best = "the default" if row["best"] == row["default"] else names[1]
        times = (
            f"{row['default_microseconds']:.1f}",
            f"{row['best_microseconds']:.1f}",
            f"{row['ratio']:.2f}",
        )
        table.add_row(
            row["kernel"], row["shape"], names[0], best, *times, str(row["tried"]), str(row["refused"])
        )
    console().print(table)
