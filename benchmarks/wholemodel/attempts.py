"""A run that may end early: it says why, keeps to a time and a share of the GPU, and meters what it took."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from hga_compile.kernels.states import STATES
from hga_compile.store import StoreError
from wholemodel.systems import System, Unavailable

__all__ = ["Meter", "TimeLimit", "attempt", "wait"]

Kind = TypeVar("Kind", bound=System)


class TimeLimit(RuntimeError):
    """A point that took longer than it was given."""


def attempt(
    make: Callable[[], Kind],
    run: Callable[[Kind, dict[str, Any], Meter], None],
    *,
    limit: float,
    cap: int | None = None,
    anew: bool = True,
) -> dict[str, Any]:
    """Make a system, run it, and give it up, whatever happens.

    Parameters
    ----------
    make
        Makes the system.
    run
        Measures it: given the system, what it adds its findings to, and a meter.
    limit
        Seconds for both.
    cap
        Bytes of GPU memory that PyTorch may take; None: all there are.
    anew
        Forget compiled code first.

    Returns
    -------
    dict
        Plain data: `status` is ``ok``, ``out of memory``, ``out of host memory``, ``time limit``,
        ``unavailable`` or ``failed``, with a `reason`; and what was measured until then.
    """
    found: dict[str, Any] = {"status": "ok", "reason": "", "stage": "start", "reached": 0}
    system: Kind | None = None
    _settle(cap, anew)
    started, meter = time.perf_counter(), Meter()
    try:
        with _limited(limit), torch.no_grad():
            system = make()
            run(system, found, meter)
    except Unavailable as error:
        found |= {"status": "unavailable", "reason": str(error)}
    except TimeLimit as error:
        found |= {"status": "time limit", "reason": str(error)}
    except StoreError as error:
        found |= {"status": "out of host memory", "reason": _line(error)}
    except Exception as error:  # one system that fails must not cost the others
        short = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        found |= {"status": "out of memory" if short else "failed", "reason": _line(error)}
    found["seconds"] = time.perf_counter() - started
    if system is not None:
        system.close()
    del system
    return found


class Meter:
    """Peaks of PyTorch's GPU memory since `reset`, and of all that it reserved; zeros without a GPU."""

    def __init__(self) -> None:
        self.on = torch.cuda.is_available()
        self.before = torch.cuda.memory_allocated() if self.on else 0
        """Bytes allocated at the start: the weights."""
        self.reserved = 0

    def reset(self) -> None:
        """Begin anew."""
        if self.on:
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Return the most bytes that were allocated at once."""
        if not self.on:
            return 0
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        return torch.cuda.max_memory_allocated()


def wait() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _settle(cap: int | None, anew: bool) -> None:
    if anew:
        torch.compiler.reset()
    gc.collect()
    STATES.collect()  # a cache that is gone leaves its memory to the next one, which may not be hga's
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        share = 1.0 if cap is None else min(1.0, cap / total)
        torch.cuda.set_per_process_memory_fraction(share)
        torch.cuda.reset_peak_memory_stats()


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `TimeLimit` in the main thread after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeLimit(f"more than {seconds:.0f} s (--limit)")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
