"""Triton: means of keys, and softmax masses of groups or chunks by them (reference: `mean.MeanSummary`)."""

import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.overlap import follow, overlap
from hga_compile.kernels.triton_bins import BINS, clear_bins
from hga_compile.kernels.triton_score import Kept, Masses

__all__ = ["mean_masses", "store_means"]

# Keys that a thread asks for at a time, channels of them all that a program asks for, and its warps.
_LOADS, _HELD, _WARPS = 16, 16384, 4


def store_means(keys: Tensor, means: Tensor, begin: int, group_size: int) -> None:
    """Write the means of groups of keys.

    Parameters
    ----------
    keys : Tensor
        ``[rows, n * group_size, dim]``.
    means : Tensor
        ``[rows, groups, dim]``, channels contiguous; written from group `begin` on.
    begin, group_size : int
        Group that the first keys are; tokens of a group, any number.
    """
    rows, tokens, dim = keys.shape
    new = tokens // group_size
    # Keys of a group that a thread loads at a time: a power of two that divides the group.
    step = min(_LOADS, group_size & -group_size)
    padded = triton.next_power_of_2(dim)
    block = max(1, min(triton.next_power_of_2(new), _HELD // (max(step, 4) * padded)))
    _store[(triton.cdiv(new, block), rows)](
        keys, *keys.stride(), means, means.stride(0), means.stride(1), begin, new,
        GROUP=group_size, DIM=dim, PADDED=padded, STEP=step, BLOCK=block, num_warps=_WARPS,
    )  # fmt: skip


def mean_masses(
    means: Tensor,
    query: Tensor,
    spans: Tensor,
    *,
    groups: int,
    scale: float,
    rows_of_span: int,
    parts: int = 1,
    kept: Kept | None = None,
) -> Masses:
    """Score all groups before the window, or those of kept chunks.

    Parameters
    ----------
    means : Tensor
        ``[rows, groups * parts, dim]``, channels contiguous.
    query : Tensor
        ``[rows, heads, dim]``, contiguous.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    groups : int
        Groups to look at: all up to the last window, or those in `kept`, each summarised.
    scale : float
        Softmax scale.
    rows_of_span : int
        Rows that a line of `spans` is for.
    parts : int
        Means of one group, whose score is that of the best: those of a chunk are scored so.
    kept : Kept or None
        Chunks whose groups are looked at; None: all groups.
    """
    rows, heads, dim = query.shape
    # Fewer, larger blocks where there are many: each has a partial sum that all votes read.
    block = 64 if groups <= 2**14 else 128 if groups <= 2**16 else 256
    padded = max(16, triton.next_power_of_2(dim))
    masses = Masses(rows, max(8, triton.next_power_of_2(heads)), groups, block, query.device)
    _score[(masses.blocks, rows)](
        means, means.stride(0), means.stride(1), query, spans, None if kept is None else kept.chunks,
        masses.mass, masses.sums, masses.bins, groups, masses.blocks,
        0 if kept is None else kept.chunks.shape[1], parts, rows_of_span, scale,
        SPAN=spans.shape[1], HEADS=heads, PADDED_HEADS=masses.mass.shape[2], DIM=dim, PADDED=padded,
        COLUMNS=min(64, padded), BLOCK=block, CHUNK=0 if kept is None else kept.groups, BINS=BINS,
        num_warps=4 if block <= 128 else 8, **overlap(query.device),
    )  # fmt: skip
    return masses


@triton.jit(do_not_specialize=["begin", "new"])
def _store(
    keys, key_row, key_token, key_channel, means, mean_row, mean_group, begin, new,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, PADDED)
    # Loads with a mask are slower than those of the last group again and again.
    token = tl.minimum(group, new - 1).to(tl.int64) * GROUP
    at = keys + row * key_row + token[:, None] * key_token + channel[None, :].to(tl.int64) * key_channel
    total = tl.zeros([BLOCK, PADDED], tl.float32)
    for _ in range(GROUP // STEP):
        # All of them are asked for before the first is waited for.
        loaded = ()
        for inside in tl.static_range(STEP):
            if PADDED == DIM:
                key = tl.load(at + inside * key_token)
            else:
                key = tl.load(at + inside * key_token, mask=channel[None, :] < DIM, other=0.0)
            loaded += (key,)  # type: ignore[assignment]
        for inside in tl.static_range(STEP):
            total += loaded[inside].to(tl.float32)
        at += STEP * key_token
    to = means + row * mean_row + (begin + group[:, None]).to(tl.int64) * mean_group + channel[None, :]
    mean = (total / GROUP).to(means.dtype.element_ty)
    tl.store(to, mean, mask=(group[:, None] < new) & (channel[None, :] < DIM))


@triton.jit(do_not_specialize=["groups", "blocks", "entries", "parts", "rows_of_span"])
def _score(
    means, mean_row, mean_entry, query, spans, kept, mass, sums, bins, groups, blocks, entries, parts,
    rows_of_span, scale,
    SPAN: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    BINS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if block == 0:
        clear_bins(bins, row, BINS)
    span = spans + row // rows_of_span * SPAN
    first, end = tl.load(span), tl.load(span + 2)
    place = block * BLOCK + tl.arange(0, BLOCK)
    group = place
    if CHUNK:
        chunk = tl.load(kept + row * entries + place // CHUNK, mask=place < groups, other=0)
        group = chunk * CHUNK + place % CHUNK
    seen = (place < groups) & (group >= first) & (group < end)
    head = tl.arange(0, PADDED_HEADS)
    score = tl.full([BLOCK, PADDED_HEADS], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK, PADDED_HEADS], tl.int32)
    part = 0
    while part < parts:
        at = means + row * mean_row + (group.to(tl.int64) * parts + part)[:, None] * mean_entry
        own = tl.zeros([BLOCK, PADDED_HEADS], tl.float32)
        for piece in tl.static_range(PADDED // COLUMNS):
            channel = piece * COLUMNS + tl.arange(0, COLUMNS)
            wanted = seen[:, None] & (channel[None, :] < DIM)
            mean = tl.load(at + channel[None, :], mask=wanted, other=0.0).to(tl.float32)
            asked = tl.load(
                query + (row * HEADS + head[None, :]) * DIM + channel[:, None],
                mask=(head[None, :] < HEADS) & (channel[:, None] < DIM), other=0.0,
            )  # fmt: skip
            own = tl.dot(mean, asked.to(tl.float32) * scale, own, input_precision="tf32x3")
        # The greatest of scores may hide one that is not a number.
        broken |= ((own != own) | (own == float("inf"))).to(tl.int32)
        score = tl.where(own > score, own, score)
        part += 1
    score = tl.where(seen[:, None] & (broken == 0), score, float("-inf"))
    peak = tl.max(score, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(score - base[None, :])
    total = tl.sum(weight, 0)
    weight = tl.where(seen[:, None] & (broken > 0), float("inf"), weight)
    to = mass + (row * groups + place[:, None]) * PADDED_HEADS + head[None, :]
    tl.store(to, weight, mask=place[:, None] < groups)
    to = sums + (row * 2 * blocks + block) * PADDED_HEADS + head
    tl.store(to, peak)
    tl.store(to + blocks * PADDED_HEADS, total)
