"""Routing of a tile of queries in plain torch: cheap votes keep candidates, low-bit keys choose among them.

Every query of a tile votes, so what most groups are scored by must be small: the mean of their low-bit keys,
in 8-bit floats, times queries in 8-bit floats. A query's masses are weighed by a normaliser from fewer means
still. The groups with the most votes are then voted for again, by the low-bit keys of their tokens: a group's
score is that of its best token. What each step costs in quality is in docs/routing.md.

Where summaries are means of the keys themselves (`routing.summary: mean`, parts of chunks), they and the
queries stay as they are: a channel that is large in all keys would hide their differences in 8 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hga_compile.kernels.centres import BLOCK_TOKENS

__all__ = [
    "BLOCK",
    "CANDIDATES",
    "SINGLES",
    "Coarse",
    "TileKeys",
    "average",
    "bases_of",
    "exact",
    "levels_of",
    "to_eight_bits",
    "votes_by_means",
    "votes_by_tokens",
]

# The largest magnitude after scaling: far from both ends of what 4 exponent bits reach.
LARGEST = 256.0
# First tokens that the normaliser takes one by one, as sinks hold much of the mass, and tokens of its means.
SINGLES, BLOCK = 16, 32
# Candidates for each group to choose.
CANDIDATES = 4


@dataclass(frozen=True)
class Coarse:
    """Vectors, each with its factor: in 8-bit floats (4 exponent, 3 mantissa bits), or as they were."""

    values: Tensor
    """``[..., padded]``; the dtype is one that holds them, channels past the head's own are 0."""
    steps: Tensor
    """``[...]`` float32: what a vector is multiplied by; not a number where the vector is not."""

    def first(self, count: int) -> "Coarse":
        """Return the first `count` vectors of each row."""
        return Coarse(self.values[:, :count], self.steps[:, :count])


@dataclass(frozen=True)
class TileKeys:
    """What the queries of a tile are scored against."""

    means: Coarse
    """``[rows, groups, padded]``: means of groups."""
    anchors: Coarse
    """``[rows, entries, padded]``: what the normaliser is made of. Where there are low-bit keys, the first
    `SINGLES` tokens from a row's start on and then means of `BLOCK` tokens; else the means of groups."""
    codes: Tensor | None = None
    """``[rows, bytes, tokens]`` uint8: low-bit keys (see `lowbit.encode_keys`); None: there are none."""
    scales: Tensor | None = None
    """``[rows, tokens]`` float16 of them."""
    bits: int = 0
    """Bits of a code."""
    dim: int = 0
    """Channels of a key."""
    chunks: Coarse | None = None
    """``[rows, chunks * parts, padded]``: means of parts of chunks, not rotated; None: all are kept."""
    centres: Coarse | None = None
    """``[rows, >= blocks, padded]``: what keys of each block are coded about (see `centres`); None: all are
    coded about one centre. Means and anchors have it in them."""

    @property
    def refined(self) -> bool:
        """Whether candidates are voted for again by low-bit keys."""
        return self.codes is not None


def to_eight_bits(vectors: Tensor) -> Coarse:
    """Scale each vector by its largest magnitude and round it to 8-bit floats.

    Parameters
    ----------
    vectors : Tensor
        ``[..., dim]`` float32.
    """
    peak = vectors.abs().amax(-1)
    broken = ~torch.isfinite(peak)
    usual = torch.where(broken | (peak == 0), torch.ones_like(peak), peak)
    steps = usual / LARGEST
    values = vectors.masked_fill(broken[..., None], 0.0) / steps[..., None]
    return Coarse(values.to(torch.float8_e4m3fn).float(), steps.masked_fill(broken, torch.nan))


def exact(vectors: Tensor) -> Coarse:
    """Keep vectors ``[..., dim]`` float32 as they are."""
    broken = ~torch.isfinite(vectors).all(-1)
    steps = torch.ones(broken.shape, device=vectors.device).masked_fill(broken, torch.nan)
    return Coarse(vectors.masked_fill(broken[..., None], 0.0), steps)


def average(keys: Tensor, size: int) -> Coarse:
    """Average runs of `size` keys: ``[rows, n * size, dim]`` float32 to ``[rows, n, dim]``."""
    return to_eight_bits(keys.unflatten(1, (-1, size)).mean(2))


def levels_of(levels: Tensor, bits: int) -> Tensor:
    """Centre level numbers and round them to 8-bit floats, which is exact up to 4 bits."""
    centred: Tensor = levels - (2**bits - 1) / 2
    return centred.to(torch.float8_e4m3fn).float()


def bases_of(query: Coarse, anchors: Coarse, seen: Tensor, weights: Tensor) -> Tensor:
    """Return the log of the normaliser of every query.

    Parameters
    ----------
    query : Coarse
        ``[rows, heads, queries, dim]``.
    anchors : Coarse
        ``[rows, entries, dim]``.
    seen : Tensor
        ``[rows or 1, entries]`` bool.
    weights : Tensor
        ``[entries]`` float32: tokens of an entry.

    Returns
    -------
    Tensor
        ``[rows, heads, queries]``; infinite for a query that has no vote: one that is not a number, or sees
        nothing.
    """
    scores = _scores(query, anchors).masked_fill(
        (torch.isnan(anchors.steps) | ~seen)[:, None, None], -torch.inf
    )
    base = torch.logsumexp(scores + weights.log(), -1)
    return base.masked_fill(torch.isneginf(base) | torch.isnan(base), torch.inf)


def votes_by_means(query: Coarse, means: Coarse, bases: Tensor, vote: str, parts: int = 1) -> Tensor:
    """Merge the votes of all queries and query heads of a tile for groups, by their means.

    Parameters
    ----------
    query : Coarse
        ``[rows, heads, queries, dim]``.
    means : Coarse
        ``[rows, groups * parts, dim]``.
    bases : Tensor
        From `bases_of`.
    vote : str
        `mass_sum` or `mass_max` (`routing.vote`), over heads and queries.
    parts : int
        Means of a group (or of a chunk), of which the best is its score.

    Returns
    -------
    Tensor
        ``[rows, groups]``: infinite for a group that is not a number, so that broken keys are attended to.
    """
    broken = torch.isnan(means.steps)
    scores = _scores(query, means).masked_fill(broken[:, None, None], -torch.inf)
    scores, broken = scores.unflatten(-1, (-1, parts)).amax(-1), broken.unflatten(-1, (-1, parts)).any(-1)
    return _votes(scores, broken, bases, vote)


def votes_by_tokens(
    query: Coarse,
    levels: Tensor,
    scales: Tensor,
    bases: Tensor,
    vote: str,
    centres: Coarse | None = None,
) -> Tensor:
    """Do what `votes_by_means` does with the best of each group's low-bit keys as its score.

    Parameters
    ----------
    query : Coarse
        ``[rows, heads, queries, dim]``.
    levels : Tensor
        ``[rows, groups, tokens, dim]`` float32, from `levels_of`.
    scales : Tensor
        ``[rows, groups, tokens]`` float32.
    bases, vote
        As `votes_by_means` takes them.
    centres : Coarse or None
        What the keys of each block are coded about (see `TileKeys`).
    """
    broken = ~torch.isfinite(scales)
    scores = torch.einsum("rhqd,rgtd->rhqgt", query.values, levels)
    scores = scores * scales.masked_fill(broken, 0.0)[:, None, None]
    if centres is not None:
        products = torch.einsum("rhqd,rbd->rhqb", query.values, centres.values) * centres.steps[:, None, None]
        token = torch.arange(scales[0].numel(), device=scales.device)
        scores = scores + products[..., token // BLOCK_TOKENS].view_as(scores)
    return _votes(scores.amax(-1) * query.steps[..., None], broken.any(-1), bases, vote)


def _scores(query: Coarse, keys: Coarse) -> Tensor:
    scores = torch.einsum("rhqd,rgd->rhqg", query.values, keys.values)
    return scores * query.steps[..., None] * keys.steps[:, None, None]


def _votes(scores: Tensor, broken: Tensor, bases: Tensor, vote: str) -> Tensor:
    mass = torch.exp(scores - bases[..., None]).masked_fill(torch.isinf(bases)[..., None], 0.0)
    votes = mass.amax((1, 2)) if vote == "mass_max" else mass.sum((1, 2))
    return votes.masked_fill(broken, torch.inf)
