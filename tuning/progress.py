"""How far a study is and the best trial so far: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["telling"]

Say = Callable[[str], None]
Told = Callable[[str, int, int, str], None]
# Seconds between lines where no bar shows how far it is.
_PAUSE = 10.0


@contextmanager
def telling(note: Say) -> Iterator[tuple[Say, Told]]:
    """Yield what is told what takes time, and what is told of each trial.

    Parameters
    ----------
    note
        Writes one line for the person who waits.
    """
    if not sys.stderr.isatty():
        yield note, _lines(note)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hga_compile.cli.output import console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[best]}"), console=console(stderr=True)) as bar:
        tasks: dict[str, int] = {}
        waiting = bar.add_task("starting", total=None, best="")

        def say(text: str) -> None:
            bar.update(waiting, description=text, visible=True)

        def told(stage: str, done: int, total: int, best: str) -> None:
            bar.update(waiting, visible=False)
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, best="")
            bar.update(tasks[stage], completed=done, total=max(total, done), best=best)  # type: ignore[arg-type]  # TaskID is an int

        yield say, told


def _lines(note: Say) -> Told:
    last = [0.0]

    def told(stage: str, done: int, total: int, best: str) -> None:
        now = time.monotonic()
        if now - last[0] >= _PAUSE or done >= total:
            last[0] = now
            note(f"{stage}: {done} of {total}; {best}")

    return told
