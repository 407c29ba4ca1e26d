"""Codes of low-bit keys, unpacked."""

import torch
from torch import Tensor

__all__ = ["decode_levels"]


def decode_levels(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Unpack codes to level numbers.

    Parameters
    ----------
    codes : Tensor
        ``[rows, bytes, tokens]`` uint8.
    bits, dim : int
        Bits a channel and channels.

    Returns
    -------
    Tensor
        ``[rows, dim, tokens]`` float32, ``0 .. 2**bits - 1``.
    """
    rows, _, tokens = codes.shape
    per_byte, mask = 8 // bits, 2**bits - 1
    planes = torch.empty(rows, codes.shape[1], per_byte, tokens, dtype=torch.float32, device=codes.device)
    for place in range(per_byte):
        part = codes >> (place * bits) if place else codes
        # The highest channel of a byte has nothing above it to mask away.
        planes[:, :, place].copy_(part if place == per_byte - 1 else part & mask)
    return planes.view(rows, -1, tokens)[:, :dim]
