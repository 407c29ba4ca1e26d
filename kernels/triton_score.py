"""Triton: softmax masses of groups by low-bit keys (reference: `lowbit.LowBitSummary.scorer`)."""

from dataclasses import dataclass
from typing import Any

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
    shares : int
        Blocks that are summed together.
    """

    def __init__(
        self, rows: int, heads: int, groups: int, block: int, device: torch.device, shares: int = 1
    ) -> None:
        self.block, self.blocks = block, triton.cdiv(groups, block)
        kind: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.mass = torch.empty(rows, groups, heads, **kind)
        """``[rows, groups, heads]``; infinite for a group with a score that is not a number, or infinite."""
        self.sums = torch.empty(rows, 2, triton.cdiv(self.blocks, shares), heads, **kind)
        """``[rows, 2, parts, heads]``: greatest score of a part (-inf: none), and sum of its masses."""
        self.peaks = torch.empty(rows, self.blocks, heads, **kind) if shares > 1 else self.sums[:, 0]
        """``[rows, blocks, heads]``: greatest score of a block; parts are so many blocks each."""


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
    rows, _, heads, dim = turned.halves.shape
    launch = launch_parameters(Score, codes.device, shape_of(groups * group_size, rows, heads, dim))
    tokens = max(launch.tokens, group_size)
    blocks = triton.cdiv(groups * group_size, tokens)
    shares = triton.cdiv(blocks * rows, launch.programs)
    masses = Masses(rows, heads, groups, tokens // group_size, codes.device, shares)
    width = triton.cdiv(dim * bits, 8)
    _score[(triton.cdiv(blocks, shares), rows)](
        codes, codes.stride(0), codes.stride(2), scales, scales.stride(0), turned.halves, turned.steps, spans,
        masses.mass, masses.sums, masses.peaks, groups, blocks, shares, rows_of_span,
        None if kept is None else kept.chunks, 0 if kept is None else kept.chunks.shape[1],
        SPAN=spans.shape[1], HEADS=heads, DIM=dim, BITS=bits, BYTES=width,
        PADDED_BYTES=max(32, triton.next_power_of_2(width)), GROUP=group_size, BLOCK=tokens // group_size,
        ASSEMBLY=_ASSEMBLY, CHUNK=0 if kept is None else kept.groups * group_size, LOOPED=shares > 1,
        STAGES=2, num_warps=launch.warps, **overlap(codes.device),
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


@triton.jit
def _power(number, ASSEMBLY: tl.constexpr):
    """Return 2 to the power of a number; on a GPU what is below 2^-126 is 0: three instructions less."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [number], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(number)


@triton.jit
def _block(
    block, best, whole, codes, code_token, scales, kept, groups, blocks, first, end, planes, middle, step,
    worst, mass, peaks,
    HEADS: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, PADDED_BYTES: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, LOOPED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Score the tokens of a block; return the greatest score and the sum of masses so far."""
    TOKENS: tl.constexpr = GROUP * BLOCK
    token = block * TOKENS + tl.arange(0, TOKENS)
    known = token < groups * GROUP
    if CHUNK:
        # Tokens of kept chunks, one chunk after another; the last one may reach past what is summarised.
        chunk = tl.load(kept + token // CHUNK, mask=known, other=0)
        token = chunk * CHUNK + token % CHUNK
        known = known & (token < end * GROUP)
    byte = tl.arange(0, PADDED_BYTES)
    at = codes + token[:, None].to(tl.int64) * code_token + byte[None, :]
    if BYTES == PADDED_BYTES:
        packed = tl.load(at, mask=known[:, None], other=0)
    else:
        packed = tl.load(at, mask=known[:, None] & (byte[None, :] < BYTES), other=0)
    size = tl.load(scales + token, mask=known, other=0.0).to(tl.float32)
    seen = known & (token >= first * GROUP) & (token < end * GROUP)
    result = tl.zeros([TOKENS, 2 * HEADS], tl.int32)
    for place in tl.static_range(8 // BITS):
        result = tl.dot(_levels(packed, place, BITS, ASSEMBLY), planes[place], result, out_dtype=tl.int32)
    # A high half counts as much as 254 low ones: one integer of both is exact.
    worth = tl.where(tl.arange(0, 2) == 0, 254, 1)
    number = tl.sum(tl.reshape(result, [TOKENS, 2, HEADS]) * worth[None, :, None], 1)
    score = (number.to(tl.float32) * step[None, :] + middle[None, :]) * size[:, None]
    plain = tl.min((seen & (tl.abs(size) * worst < 1e38)).to(tl.int32), 0)
    if plain > 0:
        peak = tl.max(score, 0)
        weight = _power(score - peak[None, :], ASSEMBLY)
        of_group = tl.sum(tl.reshape(weight, [BLOCK, GROUP, HEADS]), 1)
        total = tl.sum(of_group, 0)
    else:
        broken = seen[:, None] & ((score != score) | (score == float("inf")))
        score = tl.where(seen[:, None] & (broken == 0), score, float("-inf"))
        peak = tl.max(score, 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        weight = _power(score - base[None, :], ASSEMBLY)
        total = tl.sum(weight, 0)
        weight = tl.where(broken, float("inf"), weight)
        of_group = tl.sum(tl.reshape(weight, [BLOCK, GROUP, HEADS]), 1)
    head = tl.arange(0, HEADS)
    group = block * BLOCK + tl.arange(0, BLOCK)
    to = mass + group[:, None].to(tl.int64) * HEADS + head[None, :]
    tl.store(to, of_group, mask=group[:, None] < groups)
    if LOOPED:
        tl.store(
            peaks + block * HEADS + head, peak * 0.6931471805599453, mask=(head < HEADS) & (block < blocks)
        )
    most = tl.maximum(best, peak)
    base = tl.where(most == float("-inf"), 0.0, most)
    whole = whole * _power(best - base, ASSEMBLY) + total * _power(peak - base, ASSEMBLY)
    return most, whole


@triton.jit(do_not_specialize=["groups", "blocks", "shares", "rows_of_span", "entries"])
def _score(
    codes, code_row, code_token, scales, scale_row, halves, steps, spans, mass, sums, peaks, groups, blocks,
    shares, rows_of_span, kept, entries,
    SPAN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
    PADDED_BYTES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr,
    CHUNK: tl.constexpr, LOOPED: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // BITS
    # Levels of 8 bits are counted from 128.
    TOP: tl.constexpr = (2**BITS - 1) / 2 - (128 if BITS == 8 else 0)
    # No dot product of levels and halves is as large as this.
    LARGEST: tl.constexpr = DIM * 2**BITS * 127 * 254 * 2.0
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    first, end = tl.load(span), tl.load(span + 2)
    codes += row * code_row
    scales += row * scale_row
    if CHUNK:
        kept += row * entries
    follow(EARLY)
    byte = tl.arange(0, PADDED_BYTES)
    head = tl.arange(0, HEADS)
    both = tl.arange(0, 2 * HEADS)
    planes = ()
    middle = tl.zeros([2 * HEADS], tl.int32)
    for place in tl.static_range(PER_BYTE):
        channel = byte * PER_BYTE + place
        at = halves + (row * 2 * HEADS + both[None, :]) * DIM + channel[:, None]
        plane = tl.load(at, mask=channel[:, None] < DIM, other=0)
        # Triton has no unpacking, and no other type for it.
        planes = planes + (plane,)  # type: ignore[assignment]  # noqa: RUF005
        middle += tl.sum(plane.to(tl.int32), 0)
    # A high half counts as much as 254 low ones: one integer of both is exact.
    worth = tl.where(tl.arange(0, 2) == 0, 254, 1)
    middle = tl.sum(tl.reshape(middle, [2, HEADS]) * worth[:, None], 0)
    # Scores are logarithms to the base 2 here.
    step = tl.load(steps + row * HEADS + head) * (1.4426950408889634 / 254)
    # Levels are centred through the query: no pass over the codes for it.
    middle = middle.to(tl.float32) * step * (-TOP)
    worst = tl.max(tl.abs(step), 0) * LARGEST
    # A step that is not a number may hide from the greatest one.
    worst = tl.where(tl.sum((step != step).to(tl.int32), 0) > 0, float("inf"), worst)
    best = tl.full([HEADS], float("-inf"), tl.float32)
    whole = tl.zeros([HEADS], tl.float32)
    begin = tl.program_id(0) * shares
    mass += row * groups * HEADS
    peaks += row * blocks * HEADS
    if LOOPED & ASSEMBLY:
        # Codes of the blocks that follow are on their way meanwhile.
        for share in tl.range(shares, num_stages=STAGES):
            best, whole = _block(
                begin + share, best, whole, codes, code_token, scales, kept, groups, blocks, first, end,
                planes, middle, step, worst, mass, peaks,
                HEADS, BITS, BYTES, PADDED_BYTES, GROUP, BLOCK, CHUNK, LOOPED, ASSEMBLY,
            )  # fmt: skip
    else:
        share = 0
        while share < shares:
            best, whole = _block(
                begin + share, best, whole, codes, code_token, scales, kept, groups, blocks, first, end,
                planes, middle, step, worst, mass, peaks,
                HEADS, BITS, BYTES, PADDED_BYTES, GROUP, BLOCK, CHUNK, LOOPED, ASSEMBLY,
            )  # fmt: skip
            share += 1
    parts = tl.cdiv(blocks, shares)
    to = sums + (row * 2 * parts + tl.program_id(0)) * HEADS + head
    tl.store(to, best * 0.6931471805599453)
    tl.store(to + parts * HEADS, whole)
