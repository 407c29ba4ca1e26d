"""Orthogonal rotation of the head dimension that spreads a key's outliers over all channels."""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["half_rotation", "rotation"]


@lru_cache(maxsize=64)
def rotation(dim: int, device: torch.device) -> Tensor:
    """Return the orthogonal matrix that keys and queries are multiplied by before quantisation.

    Sylvester-Hadamard blocks of the powers of two that `dim` is the sum of (96 = 64 + 32), each scaled to be
    orthonormal, so that any head dimension works without padding. A rotation leaves dot products alone.

    Parameters
    ----------
    dim : int
        Channels of a head, at least 1.
    device : torch.device
        Where the matrix lives.

    Returns
    -------
    Tensor
        ``[dim, dim]``, float32, symmetric.
    """
    blocks = []
    for power in range(dim.bit_length() - 1, -1, -1):
        if dim >> power & 1:
            block = torch.ones(1, 1, dtype=torch.float32)
            for _ in range(power):
                block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)], 0)
            blocks.append(block * 2.0 ** (-power / 2))
    matrix: Tensor = torch.block_diag(*blocks)
    return matrix.to(device)


@lru_cache(maxsize=64)
def half_rotation(dim: int, device: torch.device) -> Tensor:
    """Return `rotation` in float16."""
    return rotation(dim, device).half()
