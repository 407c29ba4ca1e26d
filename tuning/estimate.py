"""About how long a study takes on this machine: a small matrix product says how fast it is."""

from __future__ import annotations

import time

import torch

from hga_compile.configs.catalogue import model_card
from hga_compile.tuning.quality import STAND_IN

__all__ = ["seconds"]

_SIDE = 768


def seconds(
    trials: int, measured: int, texts: int = 2, length: int = 4096, scored: int = 128
) -> dict[str, float]:
    """Return about how many seconds each part takes, with the stand-in checkpoint on this machine.

    Parameters
    ----------
    trials, measured
        Of the cheap stage, and on the full model.
    texts, length, scored
        What they are measured on.
    """
    rate = _operations_per_second()
    shape = model_card(STAND_IN).geometry
    pair = 4.0 * shape.heads * shape.head_dim * shape.layers
    dense = texts * (2.0 * shape.parameters * length + pair * length * length) / rate
    # A routed query reads its index and its set: a tenth of dense attention's arithmetic, unpacking included.
    query = pair * length / 5 + 2.0 * shape.parameters
    one = texts * scored * query / rate
    return {
        "dense runs": dense,
        "cheap stage": trials * max(0.3, one / 10),
        "full model": (measured + 4) * max(1.0, 2 * one),
        "compiled model": 40.0,
    }


def _operations_per_second() -> float:
    if torch.cuda.is_available():
        device = torch.device("cuda")
        one = torch.randn(4 * _SIDE, 4 * _SIDE, device=device, dtype=torch.bfloat16)
    else:
        device, one = torch.device("cpu"), torch.randn(_SIDE, _SIDE)
    found = 0.0
    for _ in range(4):
        begin = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize()
        found = max(found, 2.0 * one.shape[0] ** 3 / (time.perf_counter() - begin))
    return found
