"""Orthogonal rotation of the head dimension that spreads a key's outliers over all channels."""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["half_rotation", "rotation", "signs"]


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


@lru_cache(maxsize=64)
def signs(dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `rotation` as 1, 0 and -1, and what each of its columns is multiplied by.

    A product with the first is exact in any dtype, where one with `rotation` is rounded.

    Parameters
    ----------
    dim : int
        Channels of a head.
    dtype : torch.dtype
        Of the first.
    device : torch.device
        Where both live.

    Returns
    -------
    tuple of Tensor
        ``[dim, dim]`` of `dtype` and ``[dim]`` float32.
    """
    matrix = rotation(dim, device)
    return matrix.sign().to(dtype), matrix.abs().amax(0)
