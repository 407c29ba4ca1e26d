"""Triton: a kernel starts while the one before it ends (programmatic dependent launch)."""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton
    gdc_wait = gdc_launch_dependents = None

__all__ = ["COMPILED", "follow", "overlap"]

COMPILED = not triton.knobs.runtime.interpret
"""Whether kernels are compiled: the interpreter knows no machine instructions, and no loops of a length that
is known late."""


@lru_cache(maxsize=64)
def overlap(device: torch.device) -> dict[str, Any]:
    """Return what each launch of a step is given: whether it may begin early, which Hopper's GPUs know.

    The one place that decides it.

    Parameters
    ----------
    device : torch.device
        Where the kernel runs.
    """
    return {"EARLY": True, "launch_pdl": True} if _able(device) else {"EARLY": False}


def _able(device: torch.device) -> bool:
    if gdc_wait is None or not COMPILED:
        return False
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def follow(EARLY: tl.constexpr):
    """Wait for the kernel before; must come before what it wrote is read and before anything is written.

    Only then is the next kernel let in: so whatever was there before the one that it waits for, it may read
    without a wait.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
