"""Triton: centres that move, made and multiplied by queries (reference: `centres`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.centres import BLOCK_TOKENS
from hga_compile.kernels.overlap import follow, overlap
from hga_compile.kernels.rotation import rotation
from hga_compile.kernels.triton_turn import Turned

__all__ = ["centre_scores", "follow_centre"]

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


def follow_centre(pages: Tensor, centres: Tensor, middle: Tensor, end: Tensor, group_size: int) -> None:
    """Write the centre of the block that the last token begins; nothing where it begins none.

    Parameters
    ----------
    pages : Tensor
        ``[groups, rows, group_size * (dim + v_dim)]`` (see `store.pages.Pages`) without padding; memory that
        the GPU reaches.
    centres : Tensor
        ``[rows, blocks, dim]`` bfloat16, contiguous.
    middle : Tensor
        ``[rows, dim]`` float32, contiguous: the mean of the first keys, rotated.
    end : Tensor
        Tokens there are, int32 on the GPU.
    group_size : int
        Tokens of a group.
    """
    (rows, dim), page = middle.shape, pages.shape[2]
    padded = max(16, triton.next_power_of_2(dim))
    _follow[(rows,)](
        pages, centres, centres.stride(0), middle, rotation(dim, centres.device), end, rows,
        DIM=dim, PAGE=page, GROUP=group_size, PADDED=padded, COLUMNS=min(padded, 32), TOKENS=32,
        MOVED=BLOCK_TOKENS, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _follow(
    pages, centres, centre_row, middle, matrix, end, rows,
    DIM: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begun = tl.load(end).to(tl.int64) - 1
    if (begun % MOVED == 0) & (begun > 0):
        channel = tl.arange(0, PADDED)
        # As the reference sums, so that order does not matter.
        total = tl.zeros([PADDED], tl.float64)
        count = tl.zeros([PADDED], tl.float32)
        for part in tl.static_range(MOVED // TOKENS):
            token = begun - MOVED + part * TOKENS + tl.arange(0, TOKENS)
            at = pages + (token // GROUP * rows + row) * PAGE + token % GROUP * DIM
            key = tl.load(at[:, None] + channel[None, :], mask=channel[None, :] < DIM, other=0.0).to(
                tl.float32
            )
            broken = tl.sum(tl.where(tl.abs(key) < float("inf"), 0, 1), 1) > 0
            total += tl.sum(tl.where(broken[:, None], 0.0, key).to(tl.float64), 0)
            count += tl.sum(tl.where(broken, 0.0, 1.0), 0)
        mean = (total / tl.maximum(count, 1.0).to(tl.float64)).to(tl.float32)
        for part in tl.static_range(PADDED // COLUMNS):
            column = part * COLUMNS + tl.arange(0, COLUMNS)
            inside = (channel[:, None] < DIM) & (column[None, :] < DIM)
            rotate = tl.load(matrix + channel[:, None] * DIM + column[None, :], mask=inside, other=0.0)
            turned = tl.sum(mean[:, None] * rotate, 0)
            turned -= tl.load(middle + row * DIM + column, mask=column < DIM, other=0.0)
            turned = tl.where(tl.max(count, 0) > 0, turned, 0.0)
            turned = tl.minimum(tl.maximum(turned, -3.3895313892515355e38), 3.3895313892515355e38)
            # To the nearest of bfloat16: conversions cut in the interpreter.
            bits = turned.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            rounded = bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
            tl.store(centres + row * centre_row + begun // MOVED * DIM + column, rounded, mask=column < DIM)


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
