"""Triton: queries turned as low-bit keys are, in 16 bits (reference: `lowbit.LowBitSummary._turned`)."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.launch import Turn, launch_parameters, shape_of
from hga_compile.kernels.overlap import follow, overlap
from hga_compile.kernels.rotation import rotation

__all__ = ["Turned", "turn"]


@dataclass(frozen=True)
class Turned:
    """Rotated queries in fixed point: ``(high + low / 254) * step``, one step a head."""

    halves: Tensor
    """``[rows, 8 / bits, 2, heads, bytes]`` int8, by a channel's place in its byte, high and low; 0 for heads
    past those of the query, and for channels past the last one."""
    steps: Tensor
    """``[rows, heads]`` float32, the softmax scale included."""


def turn(query: Tensor, scale: float, bits: int) -> Turned:
    """Rotate one query a head and round it.

    Parameters
    ----------
    query : Tensor
        ``[rows, heads, dim]``, contiguous.
    scale : float
        Softmax scale.
    bits : int
        Of the keys' codes, which say how channels are ordered.
    """
    rows, heads, dim = query.shape
    per_byte = 8 // bits
    padded = max(8, triton.next_power_of_2(heads))
    width = triton.cdiv(dim, per_byte)
    halves = torch.empty(rows, per_byte, 2, padded, width, dtype=torch.int8, device=query.device)
    steps = torch.empty(rows, padded, dtype=torch.float32, device=query.device)
    launch = launch_parameters(Turn, query.device, shape_of(1, rows, padded, dim))
    _turn[(rows, triton.cdiv(dim, launch.columns))](
        query, rotation(dim, query.device), halves, steps, scale,
        HEADS=heads, TO_HEADS=padded, PADDED_HEADS=max(16, padded), DIM=dim,
        PADDED=triton.next_power_of_2(max(dim, 16)), PER_BYTE=per_byte, BYTES=width, COLUMNS=launch.columns,
        num_warps=launch.warps, **overlap(query.device),
    )  # fmt: skip
    return Turned(halves, steps)


@triton.jit
def _turn(
    query, matrix, halves, steps, scale,
    HEADS: tl.constexpr, TO_HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, PER_BYTE: tl.constexpr, BYTES: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, PADDED_HEADS)
    channel = tl.arange(0, PADDED)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = (head[:, None] < HEADS) & (channel[None, :] < DIM)
    inside = (channel[:, None] < DIM) & (column[None, :] < DIM)
    rotate = tl.load(matrix + channel[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    follow(EARLY)
    given = tl.load(query + (row * HEADS + head[:, None]) * DIM + channel[None, :], mask=used, other=0.0)
    given = given.to(tl.float32)
    # Rotated, no channel is larger than the query is long. Squares of a huge query would overflow.
    peak = tl.max(tl.abs(given), 1)
    peak = tl.where(peak > 0, peak, 1.0)
    given = given / peak[:, None]
    length = tl.sqrt(tl.sum(given * given, 1))
    # A query that is not a number has a length that is none.
    length = tl.where(length == 0, 1.0, length)
    exact = tl.dot(given / length[:, None], rotate, input_precision="tf32x3") * 127.0
    high = tl.floor(exact + 0.5)
    low = tl.floor((exact - high) * 254.0 + 0.5)
    place, byte = column % PER_BYTE, column // PER_BYTE
    to = halves + (((row * PER_BYTE + place[None, :]) * 2) * TO_HEADS + head[:, None]) * BYTES + byte[None, :]
    wanted = (byte[None, :] < BYTES) & (head[:, None] < TO_HEADS)
    tl.store(to, high.to(tl.int8), mask=wanted)
    tl.store(to + TO_HEADS * BYTES, low.to(tl.int8), mask=wanted)
    if tl.program_id(1) == 0:
        tl.store(steps + row * TO_HEADS + head, peak * length * (scale / 127.0), mask=head < TO_HEADS)
