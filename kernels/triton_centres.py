"""Triton: what centres that move add to scores (reference: `centres.BlockCentres.add_scores`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.overlap import follow, overlap
from hga_compile.kernels.triton_turn import Turned

__all__ = ["centre_scores"]

# Centres of a program.
_BLOCKS = 32


def centre_scores(centres: Tensor, turned: Turned, blocks: int) -> Tensor:
    """Multiply queries by centres.

    Parameters
    ----------
    centres : Tensor
        ``[rows, >= blocks, dim]`` bfloat16, contiguous.
    turned : Turned
        The queries.
    blocks : int
        Centres wanted.

    Returns
    -------
    Tensor
        ``[rows, blocks, heads]`` float32, the softmax scale applied: logarithms to the base 2.
    """
    rows, per_byte, _, heads, width = turned.halves.shape
    scores = torch.empty(rows, blocks, heads, dtype=torch.float32, device=centres.device)
    _multiply[(triton.cdiv(blocks, _BLOCKS), rows)](
        centres, centres.stride(0), turned.halves, turned.steps, scores, blocks,
        HEADS=heads, DIM=centres.shape[2], PER_BYTE=per_byte, BYTES=width,
        PADDED_BYTES=max(16, triton.next_power_of_2(width)), BLOCKS=_BLOCKS, num_warps=4,
        **overlap(centres.device),
    )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=["blocks"])
def _multiply(
    centres, centre_row, halves, steps, scores, blocks,
    HEADS: tl.constexpr, DIM: tl.constexpr, PER_BYTE: tl.constexpr, BYTES: tl.constexpr,
    PADDED_BYTES: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    both, head, byte = tl.arange(0, 2 * HEADS), tl.arange(0, HEADS), tl.arange(0, PADDED_BYTES)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    follow(EARLY)
    result = tl.zeros([2 * HEADS, BLOCKS], tl.float32)
    for place in tl.static_range(PER_BYTE):
        at = halves + ((row * PER_BYTE + place) * 2 * HEADS + both[:, None]) * BYTES + byte[None, :]
        half = tl.load(at, mask=byte[None, :] < BYTES, other=0).to(tl.float32)
        channel = byte * PER_BYTE + place
        wanted = (channel[:, None] < DIM) & (block[None, :] < blocks)
        at = centres + row * centre_row + block[None, :].to(tl.int64) * DIM + channel[:, None]
        centre = tl.load(at, mask=wanted, other=0.0).to(tl.float32)
        # Neither has more bits than tf32 keeps: products are exact.
        result = tl.dot(half, centre, result, input_precision="tf32")
    worth = tl.where(tl.arange(0, 2) == 0, 254.0, 1.0)
    number = tl.sum(tl.reshape(result, [2, HEADS, BLOCKS]) * worth[:, None, None], 0)
    step = tl.load(steps + row * HEADS + head) * (1.4426950408889634 / 254)
    to = scores + (row * blocks + block[None, :]) * HEADS + head[:, None]
    tl.store(to, number * step[:, None], mask=block[None, :] < blocks)
