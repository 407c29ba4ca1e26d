"""Triton: softmax masses of groups by low-bit keys (reference: `lowbit.LowBitSummary.scorer`)."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.centres import BLOCK_TOKENS
from hga_compile.kernels.launch import Score, launch_parameters, shape_of
from hga_compile.kernels.overlap import COMPILED, follow, overlap
from hga_compile.kernels.triton_bins import BINS, clear_bins, empty_bins
from hga_compile.kernels.triton_centres import centre_scores
from hga_compile.kernels.triton_turn import Turned

__all__ = ["Kept", "Masses", "group_masses"]


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
        self.bins = empty_bins(rows, device)
        """``[rows, LINE]`` int32 (see `triton_bins`): 0, for votes to be counted in once."""


def group_masses(
    codes: Tensor,
    scales: Tensor,
    turned: Turned,
    spans: Tensor,
    *,
    groups: int,
    group_size: int,
    rows_of_span: int,
    kept: Kept | None = None,
    centres: Tensor | None = None,
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
    group_size : int
        Of the layer, a power of two.
    rows_of_span : int
        Rows that a line of `spans` is for.
    kept : Kept or None
        Chunks whose groups are looked at; None: all groups.
    centres : Tensor or None
        ``[rows, >= blocks, dim]`` bfloat16: what the keys of each block are coded about (see `centres`);
        None: all are coded about one centre.
    """
    rows, per_byte, _, heads, width = turned.halves.shape
    padded = max(32, triton.next_power_of_2(width))
    launch = launch_parameters(Score, codes.device, shape_of(groups * group_size, rows, heads, padded))
    # Registers hold the codes and the scores of a block.
    tokens = max(16, min(launch.tokens, 2**14 // (max(padded, heads * 4) * launch.warps)), group_size)
    blocks = triton.cdiv(groups * group_size, tokens)
    shares = triton.cdiv(blocks * rows, launch.programs)
    masses = Masses(rows, heads, groups, tokens // group_size, codes.device, shares)
    # Codes of a program's first blocks, in lines of the cache.
    ahead = triton.next_power_of_2(triton.cdiv(min(4, shares) * tokens * codes.stride(2), 128))
    moved, of_centres = 0, None
    if centres is not None:
        # All tokens of a block of groups are of one block of keys, or may be of several.
        moved = 1 if kept is None and tokens <= BLOCK_TOKENS else 2
        wanted = triton.cdiv(groups * group_size, BLOCK_TOKENS) if kept is None else centres.shape[1]
        assert wanted <= centres.shape[1]  # made before codes are
        of_centres = centre_scores(centres, turned, wanted)
    # So many programs of the largest block fit as of the smaller one.
    limit = 128 if launch.warps == 1 and padded == 32 and heads == 8 else None
    _score[(triton.cdiv(blocks, shares), rows)](
        codes, codes.stride(0), scales, scales.stride(0), turned.halves, turned.steps, spans, masses.mass,
        masses.sums, masses.peaks, masses.bins, groups, blocks, shares, rows_of_span,
        None if kept is None else kept.chunks, 0 if kept is None else kept.chunks.shape[1], of_centres,
        0 if of_centres is None else of_centres.stride(0),
        SPAN=spans.shape[1], HEADS=heads, BITS=8 // per_byte, BYTES=width, PADDED_BYTES=padded,
        STRIDE=codes.stride(2), GROUP=group_size, BLOCK=tokens // group_size, ASSEMBLY=COMPILED,
        CHUNK=0 if kept is None else kept.groups * group_size, LOOPED=shares > 1, STAGES=2, AHEAD=ahead,
        WARPS=launch.warps, BINS=BINS, MOVED=moved, SPREAD=BLOCK_TOKENS, num_warps=launch.warps,
        maxnreg=limit, **overlap(codes.device),
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
def _fetch(at):
    """Have the second-level cache read what lies there."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _place(
    column, TOKENS: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr, NEAR: tl.constexpr
):  # fmt: skip
    """Return which token of a block a column of the product is.

    Of every 8 columns a thread holds 2 next to each other: in this order it holds all tokens of a group.
    """
    group = column // (8 * WARPS * RUN) * (8 * WARPS) + column // 8 % WARPS * 8 + column % 8 // NEAR * NEAR
    return group * RUN + column // (8 * WARPS) % RUN * NEAR + column % NEAR


@triton.jit
def _real(number, kept, CHUNK: tl.constexpr):
    """Return the token or group that a number in the list of kept chunks of `CHUNK` stands for."""
    if CHUNK:
        number = tl.load(kept + number // CHUNK) * CHUNK + number % CHUNK
    return number


@triton.jit
def _scores(
    block, codes, scales, kept, of_centres, first, end, listed, planes, middle, step,
    HEADS: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, PADDED_BYTES: tl.constexpr,
    STRIDE: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    ASSEMBLY: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr, NEAR: tl.constexpr, MOVED: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    """Return scores of a block ``[HEADS, PARTS, RUN, WARPS, 8 / NEAR, NEAR]``; -inf where nothing is seen."""
    PARTS: tl.constexpr = TOKENS // (8 * WARPS * RUN)
    count = listed * GROUP
    token = block * TOKENS + _place(tl.arange(0, TOKENS), TOKENS, WARPS, RUN, NEAR)
    natural = block * TOKENS + tl.arange(0, TOKENS)
    # The last block may reach past the list: what is read again there counts for nothing.
    token = _real(tl.minimum(token, count - 1), kept, CHUNK)
    if CHUNK:
        # And the last chunk past what is summarised.
        token = tl.maximum(tl.minimum(token, end * GROUP - 1), 0)
        natural = _real(tl.minimum(natural, count - 1), kept, CHUNK)
        natural = tl.maximum(tl.minimum(natural, end * GROUP - 1), 0)
        size = tl.load(scales + natural)
    else:
        size = tl.load(scales + natural, mask=natural < count, other=0.0)
    byte = tl.arange(0, PADDED_BYTES)
    at = codes + token[None, :] * STRIDE + byte[:, None]
    packed = tl.load(at) if BYTES == PADDED_BYTES else tl.load(at, mask=byte[:, None] < BYTES, other=0)
    result = tl.zeros([2 * HEADS, TOKENS], tl.int32)
    for place in tl.static_range(8 // BITS):
        result = tl.dot(planes[place], _levels(packed, place, BITS, ASSEMBLY), result, out_dtype=tl.int32)
    # A high half counts as much as 254 low ones: one integer of both is exact.
    worth = tl.where(tl.arange(0, 2) == 0, 254, 1)
    number = tl.sum(tl.reshape(result, [2, HEADS, TOKENS]) * worth[:, None, None], 0)
    score = number.to(tl.float32) * step[:, None] + middle[:, None]
    size = tl.permute(tl.reshape(size, [PARTS, WARPS, 8 // NEAR, RUN, NEAR]), [0, 3, 1, 2, 4])
    score = score * tl.reshape(size, [TOKENS]).to(tl.float32)[None, :]
    head = tl.arange(0, HEADS)
    if MOVED == 1:
        number = tl.minimum(block * TOKENS, count - 1) // SPREAD
        score += tl.load(of_centres + number * HEADS + head)[:, None]
    elif MOVED == 2:
        score += tl.load(of_centres + (token // SPREAD)[None, :] * HEADS + head[:, None])
    score = tl.reshape(score, [HEADS, PARTS, RUN, WARPS, 8 // NEAR, NEAR])
    # Which groups are seen, each once for all of its tokens.
    part, warp = tl.arange(0, PARTS), tl.arange(0, WARPS)
    group = (part[:, None, None] * WARPS + warp[None, :, None]) * 8 + tl.arange(0, 8 // NEAR)[
        None, None, :
    ] * NEAR
    group = (block * TOKENS + group * RUN) // GROUP
    known = group < listed
    group = _real(tl.minimum(group, listed - 1), kept, CHUNK // GROUP)
    seen = known & (group >= first) & (group < end)
    return score + tl.where(seen, 0.0, float("-inf"))[None, :, None, :, :, None]


@triton.jit
def _groups(weight, HEADS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr):
    """Sum what `_scores` has of each token over its group: ``[HEADS, BLOCK]``."""
    if WHOLE:
        return tl.reshape(tl.sum(tl.sum(weight, 5), 2), [HEADS, BLOCK])
    else:
        return tl.sum(tl.reshape(weight, [HEADS, BLOCK, GROUP]), 2)


@triton.jit
def _block(
    block, best, whole, codes, scales, kept, of_centres, first, end, groups, blocks, planes, middle, step,
    mass, peaks,
    HEADS: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, PADDED_BYTES: tl.constexpr,
    STRIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ASSEMBLY: tl.constexpr, WARPS: tl.constexpr, LOOPED: tl.constexpr, MOVED: tl.constexpr,
    SPREAD: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Write the masses of a block; return the greatest score and the sum of masses so far."""
    TOKENS: tl.constexpr = GROUP * BLOCK
    # Whether all tokens of a group can be one thread's: 2 next to each other, as often as it takes.
    WHOLE: tl.constexpr = (GROUP > 1) & (TOKENS >= 4 * WARPS * GROUP)
    NEAR: tl.constexpr = 2 if WHOLE else 1
    RUN: tl.constexpr = GROUP // 2 if WHOLE else 1
    score = _scores(
        block, codes, scales, kept, of_centres, first, end, groups, planes, middle, step,
        HEADS, BITS, BYTES, PADDED_BYTES, STRIDE, GROUP, TOKENS, CHUNK, ASSEMBLY, WARPS, RUN, NEAR, MOVED,
        SPREAD,
    )  # fmt: skip
    if CAREFUL:
        broken = (score != score) | (score == float("inf"))
        score = tl.where(broken, float("-inf"), score)
    # Not -inf, from which nothing can be taken: a block of which nothing is seen has masses of 0.
    peak = tl.maximum(tl.max(tl.reshape(score, [HEADS, TOKENS]), 1), -1e30)
    weight = _power(score - peak[:, None, None, None, None, None], ASSEMBLY)
    of_group = _groups(weight, HEADS, BLOCK, GROUP, WHOLE)
    total = tl.sum(of_group, 1)
    if CAREFUL:
        of_group = _groups(tl.where(broken, float("inf"), weight), HEADS, BLOCK, GROUP, WHOLE)
    head = tl.arange(0, HEADS)
    group = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(mass + group[None, :] * HEADS + head[:, None], of_group, mask=group[None, :] < groups)
    if LOOPED:
        tl.store(
            peaks + block * HEADS + head,
            peak * 0.6931471805599453,
            mask=(head < HEADS) & (head * 0 + block < blocks),
        )
    most = tl.maximum(best, peak)
    whole = whole * _power(best - most, ASSEMBLY) + total * _power(peak - most, ASSEMBLY)
    return most, whole


@triton.jit(do_not_specialize=["groups", "blocks", "shares", "rows_of_span", "entries"])
def _score(
    codes, code_row, scales, scale_row, halves, steps, spans, mass, sums, peaks, bins, groups, blocks, shares,
    rows_of_span, kept, entries, of_centres, centre_row,
    SPAN: tl.constexpr, HEADS: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
    PADDED_BYTES: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    ASSEMBLY: tl.constexpr, CHUNK: tl.constexpr, LOOPED: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, WARPS: tl.constexpr, BINS: tl.constexpr, MOVED: tl.constexpr, SPREAD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // BITS
    TOKENS: tl.constexpr = GROUP * BLOCK
    # Levels of 8 bits are counted from 128.
    TOP: tl.constexpr = (2**BITS - 1) / 2 - (128 if BITS == 8 else 0)
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    first, end = tl.load(span), tl.load(span + 2)
    codes += row * code_row
    scales += row * scale_row
    begin = tl.program_id(0) * shares
    if CHUNK:
        kept += row * entries
    elif EARLY:
        # Codes are there already: they come nearer while the queries are turned.
        line = begin * TOKENS * STRIDE + tl.arange(0, AHEAD) * 128
        _fetch(codes + tl.minimum(line, groups * GROUP * STRIDE - 1))
    follow(EARLY)
    if tl.program_id(0) == 0:
        clear_bins(bins, row, BINS)
    byte = tl.arange(0, PADDED_BYTES)
    head = tl.arange(0, HEADS)
    both = tl.arange(0, 2 * HEADS)
    planes = ()
    middle = tl.zeros([2 * HEADS], tl.int32)
    for place in tl.static_range(PER_BYTE):
        at = halves + ((row * PER_BYTE + place) * 2 * HEADS + both[:, None]) * BYTES + byte[None, :]
        plane = tl.load(at) if BYTES == PADDED_BYTES else tl.load(at, mask=byte[None, :] < BYTES, other=0)
        # Triton has no unpacking, and no other type for it.
        planes = planes + (plane,)  # type: ignore[assignment]  # noqa: RUF005
        middle += tl.sum(plane.to(tl.int32), 1)
    worth = tl.where(tl.arange(0, 2) == 0, 254, 1)
    middle = tl.sum(tl.reshape(middle, [2, HEADS]) * worth[:, None], 0)
    # Scores are logarithms to the base 2 here.
    step = tl.load(steps + row * HEADS + head) * (1.4426950408889634 / 254)
    # Levels are centred through the query: no pass over the codes for it.
    middle = middle.to(tl.float32) * step * (-TOP)
    best = tl.full([HEADS], float("-inf"), tl.float32)
    whole = tl.zeros([HEADS], tl.float32)
    if MOVED:
        of_centres += row * centre_row
    mass += row * groups * HEADS
    peaks += row * blocks * HEADS
    if ASSEMBLY:
        # Codes of the blocks that follow are on their way meanwhile.
        for share in tl.range(shares, num_stages=STAGES):
            best, whole = _block(
                begin + share, best, whole, codes, scales, kept, of_centres, first, end, groups, blocks,
                planes, middle, step, mass, peaks, HEADS, BITS, BYTES, PADDED_BYTES, STRIDE, GROUP, BLOCK,
                CHUNK, ASSEMBLY, WARPS, LOOPED, MOVED, SPREAD, False,
            )  # fmt: skip
    # A score that is not a number, or infinite, is seen in the sums: then all is done again, with care.
    broken = tl.max(((whole - whole != 0) | (best == float("inf"))).to(tl.int32), 0) > 0
    if broken or not ASSEMBLY:
        best = tl.full([HEADS], float("-inf"), tl.float32)
        whole = tl.zeros([HEADS], tl.float32)
        share = 0
        while share < shares:
            best, whole = _block(
                begin + share, best, whole, codes, scales, kept, of_centres, first, end, groups, blocks,
                planes, middle, step, mass, peaks, HEADS, BITS, BYTES, PADDED_BYTES, STRIDE, GROUP, BLOCK,
                CHUNK, ASSEMBLY, WARPS, LOOPED, MOVED, SPREAD, True,
            )  # fmt: skip
            share += 1
    parts = tl.cdiv(blocks, shares)
    to = sums + (row * 2 * parts + tl.program_id(0)) * HEADS + head
    tl.store(to, best * 0.6931471805599453)
    tl.store(to + parts * HEADS, whole)
