"""Triton: votes of a tile of queries for candidate groups by their low-bit keys (reference: `coarse`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.centres import BLOCK_TOKENS
from hga_compile.kernels.coarse import Coarse
from hga_compile.kernels.triton_select import Votes

__all__ = ["votes_by_tokens"]

# Tokens that a program unpacks.
_TOKENS = 256


def votes_by_tokens(
    query: Coarse,
    codes: Tensor,
    scales: Tensor,
    candidates: Tensor,
    bases: Tensor,
    spans: Tensor,
    *,
    group_size: int,
    bits: int,
    dim: int,
    most: bool,
    rows_of_span: int,
    centres: Coarse | None = None,
) -> Votes:
    """Let every query and head of each tile vote for candidates, each scored by its best token.

    Parameters
    ----------
    query : Coarse
        ``[rows, tiles, lines, padded]``, from `triton_coarse.coarse_queries`.
    codes, scales : Tensor
        ``[rows, bytes, tokens]`` uint8, bytes innermost in memory, and ``[rows, tokens]`` float16 (see
        `lowbit.encode_keys`).
    candidates : Tensor
        ``[tiles * rows, width]`` int32: groups, those of the first tile first.
    bases : Tensor
        ``[rows, tiles, lines]`` float32, from `triton_tile_vote.bases_of`.
    spans : Tensor
        ``[tiles * lines of a tile, SPAN]`` int32 (see `gpu.tile_spans`): the fourth number of a line is how
        many candidates there are.
    group_size, bits, dim : int
        Tokens of a group; bits and channels of a key.
    most : bool
        Whether the vote is the greatest mass rather than the sum.
    rows_of_span : int
        Rows that a line of `spans` is for.
    centres : Coarse or None
        ``[rows, >= blocks, padded]`` float16, from `triton_coarse.coarse_means`: what the keys of each block
        are coded about (see `centres`); None: all are coded about one centre.

    Returns
    -------
    Votes
        ``[tiles * rows, width]``: one vote for each candidate, -1 past the last.
    """
    rows, tiles, lines, padded = query.values.shape
    width, block = candidates.shape[1], max(1, _TOKENS // group_size)
    votes = torch.empty(tiles * rows, width, dtype=torch.float32, device=codes.device)
    used = triton.cdiv(dim * bits, 8)
    _refine[(triton.cdiv(width, block), tiles, rows)](
        query.values, query.steps, codes, codes.stride(0), codes.stride(2), scales, scales.stride(0),
        candidates, spans, bases, votes, width, tiles, lines, rows_of_span,
        None if centres is None else centres.values, None if centres is None else centres.steps,
        0 if centres is None else centres.steps.shape[1],
        MOVED=BLOCK_TOKENS if centres is not None else 0,
        SPAN=spans.shape[1], DIM=padded, BITS=bits, BYTES=used, GROUP=group_size, LINES=32, BLOCK=block,
        MOST=most, num_warps=4,
    )  # fmt: skip
    return Votes(votes)


@triton.jit
def _unpacked(packed, BITS: tl.constexpr, DIM: tl.constexpr):
    """Spread ``[tokens, bytes]`` over channels as centred levels, ``[tokens, DIM]`` float32."""
    if BITS == 8:
        level = packed
    elif BITS == 4:
        level = tl.join(packed & 15, packed >> 4)
    elif BITS == 2:
        level = tl.join(tl.join(packed & 3, (packed >> 4) & 3), tl.join((packed >> 2) & 3, packed >> 6))
    else:
        even = tl.join(tl.join(packed & 1, (packed >> 4) & 1), tl.join((packed >> 2) & 1, (packed >> 6) & 1))
        odd = tl.join(tl.join((packed >> 1) & 1, (packed >> 5) & 1), tl.join((packed >> 3) & 1, packed >> 7))
        level = tl.join(even, odd)
    level = tl.reshape(level, [packed.shape[0], DIM])
    return level.to(tl.float32) - (2**BITS - 1) / 2


@triton.jit(do_not_specialize=["width", "tiles", "lines", "rows_of_span", "blocks"])
def _refine(
    queries, query_steps, codes, code_row, code_token, scales, scale_row, candidates, spans, bases, votes,
    width, tiles, lines, rows_of_span, centres, centre_steps, blocks,
    MOVED: tl.constexpr, SPAN: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
    GROUP: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    # A product has 16 rows at least: of fewer groups, that with the centre is done for each token.
    ONCE: tl.constexpr = BLOCK >= 16
    tile = tiles - 1 - tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    place = tile * tl.num_programs(2) + row
    count = tl.load(spans + place // rows_of_span * SPAN + 3)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    vote = tl.full([BLOCK], -1.0, tl.float32)
    if tl.program_id(0) * BLOCK < count:
        byte = tl.arange(0, DIM * BITS // 8)
        channel = tl.arange(0, DIM)
        # Members of a group lie far apart: the best of them is found within a thread.
        index = tl.arange(0, GROUP * BLOCK)
        which = tl.program_id(0) * BLOCK + index % BLOCK
        group = tl.load(candidates + place * width + which, mask=which < count, other=0)
        token = group.to(tl.int64) * GROUP + index // BLOCK
        at = codes + row * code_row + token[:, None] * code_token + byte[None, :]
        packed = tl.load(at, mask=byte[None, :] < BYTES, other=0)
        level = _unpacked(packed, BITS, DIM).to(queries.dtype.element_ty)
        scale = tl.load(scales + row * scale_row + token).to(tl.float32)
        lost = (tl.abs(scale) < float("inf")) == 0
        scale = tl.where(lost, 0.0, scale)
        broken = tl.max(tl.reshape(lost.to(tl.int32), [GROUP, BLOCK]), 0)
        if MOVED:
            of_centre = token // MOVED
            if ONCE:
                named = tl.load(candidates + place * width + entry, mask=entry < count, other=0)
                of_centre = named.to(tl.int64) * GROUP // MOVED
            of_centre += row * blocks
            centre = tl.load(centres + of_centre[:, None] * DIM + channel[None, :])
            unit = tl.load(centre_steps + of_centre)
        number = tl.arange(0, LINES)
        masses = tl.zeros([BLOCK, LINES], tl.float32)
        for begin in tl.range(0, lines, LINES, num_stages=3):
            line = (row * tiles + tile) * lines + begin + number
            query = tl.load(queries + line[:, None] * DIM + channel[None, :])
            base = tl.load(bases + line)
            step = tl.where(base == float("inf"), 0.0, tl.load(query_steps + line))
            score = tl.dot(level, tl.trans(query)) * scale[:, None]
            if MOVED:
                moved = tl.dot(centre, tl.trans(query.to(tl.float16))) * unit[:, None]
                if not ONCE:
                    score += moved
            best = tl.max(tl.reshape(score, [GROUP, BLOCK, LINES]), 0)
            if MOVED and ONCE:
                best += moved
            mass = tl.exp2(best * step[None, :] - base[None, :])
            masses = tl.maximum(masses, mass) if MOST else masses + mass
        vote = tl.max(masses, 1) if MOST else tl.sum(masses, 1)
        vote = tl.where(broken > 0, float("inf"), vote)
        vote = tl.where(entry < count, vote, -1.0)
    tl.store(votes + place * width + entry, vote, mask=entry < width)
