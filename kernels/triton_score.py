"""Triton: softmax masses of groups by low-bit keys (reference: `lowbit.LowBitSummary.scorer`)."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.launch import Score, launch_parameters, shape_of
from hga_compile.kernels.overlap import follow, overlap
from hga_compile.kernels.triton_turn import Turned

__all__ = ["Kept", "Masses", "group_masses"]

# The interpreter knows no machine instructions.
_ASSEMBLY = not triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Kept:
    """Chunks whose groups are scored: all others are not read."""

    chunks: Tensor
    """``[rows, n]`` int32, ascending."""
    groups: int
    """Groups of a chunk."""


class Masses:
    """Softmax masses of groups, each against the greatest score of its block of groups.

    Parameters
    ----------
    rows, heads, groups : int
        KV heads times batch, query heads of a KV head (a power of two, 8 at least), groups looked at.
    block : int
        Groups of a block.
    device : torch.device
        Where they live.
    """

    def __init__(self, rows: int, heads: int, groups: int, block: int, device: torch.device) -> None:
        self.block, self.blocks = block, triton.cdiv(groups, block)
        self.mass = torch.empty(rows, groups, heads, dtype=torch.float32, device=device)
        """``[rows, groups, heads]``; infinite for a group with a score that is not a number, or infinite."""
        self.sums = torch.empty(rows, 2, self.blocks, heads, dtype=torch.float32, device=device)
        """``[rows, 2, blocks, heads]``: greatest score of a block (-inf: none), and sum of its masses."""


def group_masses(
    codes: Tensor,
    scales: Tensor,
    turned: Turned,
    spans: Tensor,
    *,
    groups: int,
    group_size: int,
    bits: int,
    rows_of_span: int,
    kept: Kept | None = None,
) -> Masses:
    """Score all groups before the window, or those of kept chunks.

    Parameters
    ----------
    codes : Tensor
        ``[rows, bytes, tokens]`` uint8, bytes innermost in memory (see `lowbit.encode_keys`).
    scales : Tensor
        ``[rows, tokens]`` float16.
    turned : Turned
        The queries.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    groups : int
        Groups to look at: all up to the last window, or those in `kept`, each summarised.
    group_size, bits : int
        Settings of the layer; the group size is a power of two.
    rows_of_span : int
        Rows that a line of `spans` is for.
    kept : Kept or None
        Chunks whose groups are looked at; None: all groups.
    """
    rows, heads, dim = turned.high.shape
    launch = launch_parameters(Score, codes.device, shape_of(groups * group_size, rows, heads, dim))
    tokens = max(launch.tokens, group_size)
    masses = Masses(rows, heads, groups, tokens // group_size, turned.high.device)
    width = triton.cdiv(dim * bits, 8)
    _score[(masses.blocks, rows)](
        codes, codes.stride(0), codes.stride(2), scales, scales.stride(0), turned.high, turned.low,
        turned.steps, spans, masses.mass, masses.sums, groups, masses.blocks, rows_of_span,
        None if kept is None else kept.chunks, 0 if kept is None else kept.chunks.shape[1],
        SPAN=spans.shape[1], HEADS=heads, DIM=dim, BITS=bits, BYTES=width,
        PADDED_BYTES=max(32, triton.next_power_of_2(width)), GROUP=group_size, BLOCK=tokens // group_size,
        ASSEMBLY=_ASSEMBLY, CHUNK=0 if kept is None else kept.groups * group_size, num_warps=launch.warps,
        **overlap(codes.device),
    )  # fmt: skip
    return masses


@triton.jit
def _four(packed, CODE: tl.constexpr):
    """Run an instruction on four bytes at a time."""
    return tl.inline_asm_elementwise(CODE, "=r,r", [packed], tl.int8, is_pure=True, pack=4)


@triton.jit
def _levels(packed, PLACE: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Levels of every 8 / BITS-th channel as int8; those of 8 bits less 128."""
    if ASSEMBLY and BITS == 8:
        level = _four(packed, "xor.b32 $0, $1, 0x80808080;")
    elif ASSEMBLY and BITS == 4 and PLACE == 0:
        level = _four(packed, "and.b32 $0, $1, 0x0f0f0f0f;")
    elif ASSEMBLY and BITS == 4:
        level = _four(packed, "{.reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f;}")
    elif ASSEMBLY and BITS == 2 and PLACE == 0:
        level = _four(packed, "and.b32 $0, $1, 0x03030303;")
    elif ASSEMBLY and BITS == 2 and PLACE == 1:
        level = _four(packed, "{.reg .b32 t; shr.u32 t, $1, 2; and.b32 $0, t, 0x03030303;}")
    elif ASSEMBLY and BITS == 2 and PLACE == 2:
        level = _four(packed, "{.reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x03030303;}")
    elif ASSEMBLY and BITS == 2:
        level = _four(packed, "{.reg .b32 t; shr.u32 t, $1, 6; and.b32 $0, t, 0x03030303;}")
    else:
        level = (packed >> (PLACE * BITS)) & (2**BITS - 1)
        if BITS == 8:
            level = level ^ 128
        level = level.to(tl.int8, bitcast=True)
    return level


@triton.jit(do_not_specialize=["groups", "blocks", "rows_of_span", "entries"])
def _score(
    codes, code_row, code_token, scales, scale_row, highs, lows, steps, spans, mass, sums, groups, blocks,
    rows_of_span, kept, entries,
    SPAN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
    PADDED_BYTES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr,
    CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // BITS
    # Levels of 8 bits are counted from 128.
    TOP: tl.constexpr = (2**BITS - 1) / 2 - (128 if BITS == 8 else 0)
    TOKENS: tl.constexpr = GROUP * BLOCK
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    first, end = tl.load(span), tl.load(span + 2)
    token = block * TOKENS + tl.arange(0, TOKENS)
    known = token < groups * GROUP
    if CHUNK:
        # Tokens of kept chunks, one chunk after another; the last one may reach past what is summarised.
        chunk = tl.load(kept + row * entries + token // CHUNK, mask=known, other=0)
        token = chunk * CHUNK + token % CHUNK
        known = known & (token < end * GROUP)
    seen = known & (token >= first * GROUP) & (token < end * GROUP)
    byte = tl.arange(0, PADDED_BYTES)
    head = tl.arange(0, HEADS)
    at = codes + row * code_row + token[:, None].to(tl.int64) * code_token + byte[None, :]
    if BYTES == PADDED_BYTES:
        packed = tl.load(at, mask=known[:, None], other=0)
    else:
        packed = tl.load(at, mask=known[:, None] & (byte[None, :] < BYTES), other=0)
    scale = tl.load(scales + row * scale_row + token, mask=known, other=0.0).to(tl.float32)
    # The kernel before rotates the queries; all else is older, and is on its way meanwhile.
    follow(EARLY)
    upper = tl.zeros([TOKENS, HEADS], tl.int32)
    lower = tl.zeros([TOKENS, HEADS], tl.int32)
    middle = tl.zeros([HEADS], tl.float32)
    for place in tl.static_range(PER_BYTE):
        channel = byte * PER_BYTE + place
        of_query = (row * HEADS + head[None, :]) * DIM + channel[:, None]
        high = tl.load(highs + of_query, mask=channel[:, None] < DIM, other=0)
        low = tl.load(lows + of_query, mask=channel[:, None] < DIM, other=0)
        level = _levels(packed, place, BITS, ASSEMBLY)
        upper = tl.dot(level, high, upper, out_dtype=tl.int32)
        lower = tl.dot(level, low, lower, out_dtype=tl.int32)
        middle += tl.sum(high.to(tl.float32) + low.to(tl.float32) * (1 / 254), 0)
    # Levels are centred through the query: no pass over the codes for it.
    score = upper.to(tl.float32) + lower.to(tl.float32) * (1 / 254) - TOP * middle[None, :]
    score = score * scale[:, None] * tl.load(steps + row * HEADS + head)[None, :]
    broken = seen[:, None] & ((score != score) | (score == float("inf")))
    score = tl.where(seen[:, None] & (broken == 0), score, float("-inf"))
    peak = tl.max(score, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(score - base[None, :])
    total = tl.sum(weight, 0)
    weight = tl.where(broken, float("inf"), weight)
    of_group = tl.sum(tl.reshape(weight, [BLOCK, GROUP, HEADS]), 1)
    group = block * BLOCK + tl.arange(0, BLOCK)
    to = mass + (row * groups + group[:, None]) * HEADS + head[None, :]
    tl.store(to, of_group, mask=group[:, None] < groups)
    to = sums + (row * 2 * blocks + block) * HEADS + head
    tl.store(to, peak)
    tl.store(to + blocks * HEADS, total)
