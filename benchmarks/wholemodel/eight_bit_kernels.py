"""Triton: products with 8-bit weights of one scale a row, which are turned into 16 bits on their way in.

`row_products` and `row_sums` read a weight once for every row of the input: for a decode step, which has few.
`tile_products` runs tiles of rows of one expert through the matrix units: for a prefill step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["row_products", "row_sums", "tile_products"]


def row_products(x: Tensor, experts: Tensor, weight: Tensor, scale: Tensor, *, top_k: int) -> Tensor:
    """Gate and up projection, and their product, of every pair of a token and an expert.

    Parameters
    ----------
    x : Tensor
        ``[tokens, channels]``.
    experts : Tensor
        ``[tokens * top_k]`` int64: the expert of each pair.
    weight, scale : Tensor
        ``[experts, 2 * inner, channels]`` 8-bit floats, and ``[experts, 2 * inner]`` float32.
    top_k : int
        Experts of a token.

    Returns
    -------
    Tensor
        ``[tokens * top_k, inner]``, dtype of `x`.
    """
    pairs, inner, channels = len(experts), weight.shape[1] // 2, weight.shape[2]
    out = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    step = min(512, triton.next_power_of_2(channels))
    _gated_rows[(triton.cdiv(inner, 8), pairs)](
        x, experts, weight, scale, out, inner, CHANNELS=channels, TOP_K=top_k, ROWS=8, STEP=step, num_warps=4
    )
    return out


def row_sums(
    x: Tensor, experts: Tensor | None, shares: Tensor | None, weight: Tensor, scale: Tensor
) -> Tensor:
    """Products of rows with a weight each, summed over the pairs of a token.

    Parameters
    ----------
    x : Tensor
        ``[pairs, channels]``.
    experts, shares : Tensor or None
        ``[tokens, top_k]`` int64 and their weights in the sum; None: one pair a token, of expert 0.
    weight, scale : Tensor
        ``[experts, out, channels]`` 8-bit floats, and ``[experts, out]`` float32.

    Returns
    -------
    Tensor
        ``[tokens, out]``, dtype of `x`.
    """
    top_k = 1 if experts is None else experts.shape[1]
    tokens, rows, channels = len(x) // top_k, weight.shape[1], weight.shape[2]
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    step = min(512, triton.next_power_of_2(channels))
    _summed_rows[(triton.cdiv(rows, 8), tokens)](
        x, experts, shares, weight, scale, out, rows, CHANNELS=channels, TOP_K=top_k,
        MIXED=experts is not None, ROWS=8, STEP=step, num_warps=4,
    )  # fmt: skip
    return out


def tile_products(
    x: Tensor, experts: Tensor, shares: Tensor | None, weight: Tensor, scale: Tensor, *, top_k: int
) -> Tensor:
    """Products of pairs of a token and an expert, the pairs of one expert in tiles.

    Parameters
    ----------
    x : Tensor
        ``[pairs // top_k, channels]``: row ``pair // top_k`` is a pair's input.
    experts : Tensor
        ``[pairs]`` int64: the expert of each pair.
    shares : Tensor or None
        ``[pairs]``: what each product is multiplied by. None: the weight is a gate above an up projection,
        whose product comes out.
    weight, scale : Tensor
        ``[experts, rows, channels]`` 8-bit floats, and ``[experts, rows]`` float32.
    top_k : int
        Pairs that share a row of `x`.

    Returns
    -------
    Tensor
        ``[pairs, rows]``, or half as many columns with a gate; dtype of `x`.
    """
    count, rows, channels = weight.shape
    gated, pairs = shares is None, len(experts)
    size = 64 if pairs // count >= 48 else 16
    order = experts.argsort(stable=True)
    many = torch.zeros(count, dtype=torch.int64, device=x.device)
    many.scatter_add_(0, experts, torch.ones_like(experts))
    ends, tiles = many.cumsum(0), (many + size - 1) // size
    last = tiles.cumsum(0)
    # As many as there can be: how many there are is known on the GPU alone.
    number = torch.arange(-(-pairs // size) + count, device=x.device)
    expert = torch.searchsorted(last, number, right=True)
    safe = expert.clamp(max=count - 1)
    begin = ends[safe] - many[safe] + (number - last[safe] + tiles[safe]) * size
    columns = rows // 2 if gated else rows
    out = torch.empty(pairs, columns, dtype=x.dtype, device=x.device)
    wide, step = (
        min(64 if gated else 128, triton.next_power_of_2(columns)),
        min(64, triton.next_power_of_2(channels)),
    )
    _tiles[(triton.cdiv(columns, wide), len(number))](
        x, order, expert, begin, ends, shares, weight, scale, out, count, columns,
        CHANNELS=channels, TOP_K=top_k, GATED=gated, SIZE=size, WIDE=max(16, wide), STEP=max(16, step),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _dot_rows(x, weight, rows, inside, CHANNELS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Multiply some rows of a weight with one row."""
    column = tl.arange(0, STEP)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, CHANNELS, STEP):
        real = begin + column < CHANNELS
        value = tl.load(x + begin + column, mask=real, other=0.0).to(tl.float32)
        place = rows[:, None] * CHANNELS + (begin + column)[None, :]
        part = tl.load(weight + place, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
        total += tl.sum(part * value[None, :], 1)
    return total


@triton.jit
def _gated_rows(
    x, experts, weight, scale, out, inner, CHANNELS: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(experts + pair).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < inner
    weight += expert * 2 * inner * CHANNELS
    scale += expert * 2 * inner
    x += pair // TOP_K * CHANNELS
    gate = _dot_rows(x, weight, row, inside, CHANNELS, ROWS, STEP)
    up = _dot_rows(x, weight, row + inner, inside, CHANNELS, ROWS, STEP)
    gate *= tl.load(scale + row, mask=inside, other=0.0)
    up *= tl.load(scale + inner + row, mask=inside, other=0.0)
    found = gate * tl.sigmoid(gate) * up
    tl.store(out + pair * inner + row, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _summed_rows(
    x, experts, shares, weight, scale, out, rows, CHANNELS: tl.constexpr, TOP_K: tl.constexpr,
    MIXED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    total = tl.zeros((ROWS,), tl.float32)
    for number in range(0, TOP_K):
        pair = token * TOP_K + number
        expert = tl.zeros((), tl.int64)
        share = 1.0
        if MIXED:
            expert = tl.load(experts + pair).to(tl.int64)
            share = tl.load(shares + pair).to(tl.float32)
        own = weight + expert * rows * CHANNELS
        found = _dot_rows(x + pair * CHANNELS, own, row, inside, CHANNELS, ROWS, STEP)
        total += found * tl.load(scale + expert * rows + row, mask=inside, other=0.0) * share
    tl.store(out + token * rows + row, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tiles(
    x, order, experts, begins, ends, shares, weight, scale, out, count, columns,
    CHANNELS: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    expert = tl.load(experts + tile).to(tl.int64)
    if expert < count:
        place = tl.load(begins + tile) + tl.arange(0, SIZE)
        real = place < tl.load(ends + expert)
        pair = tl.load(order + place, mask=real, other=0).to(tl.int64)
        source = x + (pair // TOP_K)[:, None] * CHANNELS
        row = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
        inside = row < columns
        many = 2 * columns if GATED else columns
        weight += expert * many * CHANNELS
        scale += expert * many
        column = tl.arange(0, STEP)
        total = tl.zeros((SIZE, WIDE), tl.float32)
        other = tl.zeros((SIZE, WIDE), tl.float32)
        for begin in range(0, CHANNELS, STEP):
            at = begin + column
            here = at < CHANNELS
            value = tl.load(source + at[None, :], mask=real[:, None] & here[None, :], other=0.0)
            kept = inside[None, :] & here[:, None]
            part = tl.load(weight + row[None, :] * CHANNELS + at[:, None], mask=kept, other=0.0)
            total = tl.dot(value, part.to(value.dtype), total, input_precision="ieee")
            if GATED:
                below = (columns + row)[None, :] * CHANNELS
                part = tl.load(weight + below + at[:, None], mask=kept, other=0.0)
                other = tl.dot(value, part.to(value.dtype), other, input_precision="ieee")
        total *= tl.load(scale + row, mask=inside, other=0.0)[None, :]
        if GATED:
            other *= tl.load(scale + columns + row, mask=inside, other=0.0)[None, :]
            total = total * tl.sigmoid(total) * other
        else:
            total *= tl.load(shares + pair, mask=real, other=0.0).to(tl.float32)[:, None]
        kept = real[:, None] & inside[None, :]
        tl.store(out + pair[:, None] * columns + row[None, :], total.to(out.dtype.element_ty), mask=kept)
