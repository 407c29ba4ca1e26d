"""What commands print: data on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int], None]


def print_json(document: object) -> None:
    """Write one JSON document and a line break to stdout; numbers that JSON lacks become null."""
    text = json.dumps(_finite(document), ensure_ascii=False, indent=2, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def console(*, stderr: bool = False) -> Console:
    """Rich console over the present stdout or stderr; plain text when that is not a terminal."""
    from rich.console import Console

    found = Console(stderr=stderr, highlight=False)
    # A pipe has no width: tables must not be cut to the 80 columns that rich assumes.
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=200)


def note(text: str) -> None:
    """One line for the person who waits, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Progress bar on stderr; silent when stderr is not a terminal.

    Parameters
    ----------
    label
        What is being counted.
    total
        Tokens to go.

    Yields
    ------
    callable
        Adds a number of tokens to the bar.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda tokens: bar.advance(task, tokens)


@contextmanager
def status(label: str) -> Iterator[None]:
    """Spinner on stderr while a step runs; silent when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(label):
        yield


def quiet_bars() -> None:
    """Keep the libraries' bars off a stderr that is no terminal; to be called before they are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quiet_libraries() -> None:
    """Silence the libraries' loading bars and advice, which would mix with ours."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def percent(fraction: float | None) -> str:
    """``0.0312`` as ``3.12%``."""
    return "-" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.3g}%"


def size(count: float | None) -> str:
    """Bytes in the largest binary unit that leaves a number of at least one."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def rate(tokens_per_second: float | None) -> str:
    """Tokens per second with three digits."""
    return "-" if tokens_per_second is None else f"{tokens_per_second:,.3g} tokens/s"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
