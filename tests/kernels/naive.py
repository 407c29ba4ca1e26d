"""The specification of routed attention, query by query in float64: slow, and independent of the kernels.

Written from the documentation (`configs/routing.py`, `kernels/tail.py`), not from the code of the kernels. Of
these it uses `encode_keys` and `decode_keys` only: codes are data, not a rule that could be checked here.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.lowbit import decode_keys, encode_keys


@dataclass
class Answer:
    """What routed attention should give for the last queries of a sequence."""

    out: np.ndarray
    """``[batch, query_heads, queries, v_dim]`` float64."""
    routed: np.ndarray
    """``[batch, kv_heads, queries, tokens]`` bool: tokens attended exactly."""
    votes: list[list[list[dict[int, float]]]]
    """By batch, KV head and query: votes of the groups to choose from; empty for a dense query."""
    visible: int
    """Visible tokens, summed over batch, KV heads and queries."""


def softmax(scores: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        weight = np.exp(scores - scores.max())
        return weight / weight.sum()


def hadamard(dim: int) -> np.ndarray:
    """Orthonormal Sylvester matrices, one for each power of two in `dim`, the largest first."""
    matrix, begin = np.zeros((dim, dim)), 0
    for size in (1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1):
        for i in range(size):
            for j in range(size):
                matrix[begin + i, begin + j] = (-1) ** (i & j).bit_count() / math.sqrt(size)
        begin += size
    return matrix


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to the precision that means are kept in."""
    return torch.from_numpy(values).float().bfloat16().double().numpy()


def low_bit_keys(key: np.ndarray, real: np.ndarray, routing: Routing) -> np.ndarray:
    """Return what the codes of ``[tokens, dim]`` keys stand for, turned back, the first centre left out."""
    usable = np.flatnonzero(real)[: routing.centre_tokens]
    usable = usable[np.isfinite(key[usable]).all(1)]
    centre = key[usable].mean(0) if len(usable) else np.zeros(key.shape[1])
    turn = hadamard(key.shape[1])
    moved = np.zeros_like(key)
    if routing.centre == "block":
        for begin in range(128, len(key), 128):
            block = slice(begin - 128, begin)
            before = key[block][real[block] & np.isfinite(key[block]).all(1)]
            if len(before):
                moved[begin : begin + 128] = bfloat16((before.mean(0) - centre) @ turn)
    rotated = torch.from_numpy((key - centre) @ turn - moved).float()
    codes, scales = encode_keys(rotated[None], routing.bits)
    decoded = decode_keys(codes, scales, routing.bits, key.shape[1])[0].double().numpy()
    return (decoded + moved) @ turn.T


def vote(scores: np.ndarray, routing: Routing) -> np.ndarray:
    """Merge scores ``[heads, units]`` into one vote a unit: the sum or maximum of the heads' softmax mass."""
    broken = ~(scores < np.inf)
    mass = np.stack([softmax(row) for row in np.where(broken, -np.inf, scores)])
    merged = np.nan_to_num(mass.sum(0) if routing.vote == "mass_sum" else mass.max(0))
    merged[broken.any(0)] = np.inf
    return merged


def best(votes: dict[int, float], most: int) -> set[int]:
    return set(sorted(votes, key=lambda name: -votes[name])[:most])


def attend_naively(
    routing: Routing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    all_queries: Tensor | None = None,
) -> Answer:
    """Compute `hga::attention` slowly.

    `all_queries` are those of the whole sequence, for the tail's mean query, where `query` is only its end.
    """
    q, k, v = (part.detach().double().cpu().numpy() for part in (query, key, value))
    early = q if all_queries is None else all_queries.detach().double().cpu().numpy()
    batch, query_heads, queries, _ = q.shape
    kv_heads, tokens = k.shape[1], k.shape[2]
    heads = query_heads // kv_heads
    real = np.ones((batch, tokens), bool) if mask is None else mask[:, :tokens].cpu().numpy().astype(bool)
    out = np.zeros((batch, query_heads, queries, v.shape[3]))
    routed = np.zeros((batch, kv_heads, queries, tokens), bool)
    votes: list = [[[{} for _ in range(queries)] for _ in range(kv_heads)] for _ in range(batch)]
    visible_tokens = 0
    for b in range(batch):
        for h in range(kv_heads):
            mine = slice(h * heads, (h + 1) * heads)
            keys, values = k[b, h], v[b, h]
            stand_in = low_bit_keys(keys, real[b], routing) if routing.summary == "lowbit" else keys
            row = _Row(routing, keys, stand_in, real[b])
            mean_query = None
            if routing.tail == "estimate":
                used = np.flatnonzero(real[b, tokens - early.shape[2] :])[: routing.centre_tokens]
                mean_query = (early[b, mine][:, used] * scale).sum(1) / max(len(used), 1)
            for i in range(queries):
                position = tokens - queries + i
                scaled = q[b, mine, i] * scale
                chosen, votes[b][h][i] = row.route(position, scaled)
                routed[b, h, i] = chosen
                visible_tokens += int(real[b, : position + 1].sum())
                out[b, mine, i] = row.attend(position, scaled, chosen, values, mean_query)
    return Answer(out, routed, votes, visible_tokens)


@dataclass
class _Row:
    """One KV head of one sequence."""

    routing: Routing
    keys: np.ndarray
    stand_in: np.ndarray
    real: np.ndarray

    def route(self, position: int, queries: np.ndarray) -> tuple[np.ndarray, dict[int, float]]:
        """Return the routed tokens of the query at `position`, and the votes of the groups to choose from."""
        routing, size = self.routing, self.routing.group_size
        end = position + 1
        visible = self.real & (np.arange(len(self.real)) < end)
        count = int(visible.sum())
        budget = min(routing.budget.tokens_for(count), count)
        if budget >= count or count <= routing.dense_below or count <= routing.centre_tokens:
            return visible, {}
        window = max(0, end - routing.window.tokens_for(budget)) // size
        first = int(np.flatnonzero(self.real)[0])
        sinks = set(range(first // size, -(-(first + routing.sinks) // size))) if routing.sinks else set()
        sinks = {group for group in sinks if group < window}
        most = max(0, budget - (end - window * size) - len(sinks) * size) // size
        groups = [group for group in range(first // size, window) if self._has_real(group, size)]
        groups = self._in_kept_chunks(groups, window, queries, count, budget)
        votes: dict[int, float] = {}
        if groups:
            merged = vote(self._group_scores(queries, groups), routing)
            votes = {group: each for group, each in zip(groups, merged, strict=True) if group not in sinks}
        routed = np.zeros(len(self.real), bool)
        routed[window * size : end] = True
        for group in best(votes, most) | sinks:
            routed[group * size : (group + 1) * size] = True
        return routed & visible, votes

    def _in_kept_chunks(
        self, groups: list[int], window: int, queries: np.ndarray, count: int, budget: int
    ) -> list[int]:
        """Level 1: drop the groups of complete chunks that are not among the best."""
        routing, size = self.routing, self.routing.chunk_size
        if routing.chunk_stage == "off" or (
            routing.chunk_stage == "auto" and count <= routing.auto_chunk_tokens
        ):
            return groups
        complete = window * routing.group_size // size
        chunks = [chunk for chunk in range(complete) if self._has_real(chunk, size)]
        if not chunks:
            return groups
        part = size // routing.chunk_parts
        means = self.keys[: complete * size].reshape(complete, -1, part, self.keys.shape[1]).mean(2)
        with np.errstate(invalid="ignore"):
            scores = np.stack([(queries @ bfloat16(means[chunk]).T).max(1) for chunk in chunks], 1)
        most = -(-max(routing.chunk_budget.tokens_for(count), budget) // size)
        kept = best(dict(zip(chunks, vote(scores, routing), strict=True)), most)
        of = {group: group * routing.group_size // size for group in groups}
        return [group for group in groups if of[group] >= complete or of[group] in kept]

    def _has_real(self, number: int, size: int) -> bool:
        return bool(self.real[number * size : (number + 1) * size].any())

    def _group_scores(self, queries: np.ndarray, groups: list[int]) -> np.ndarray:
        """Score groups for ``[heads, dim]`` scaled queries: ``[heads, groups]``."""
        size = self.routing.group_size
        members = self.stand_in[: (groups[-1] + 1) * size].reshape(-1, size, self.keys.shape[1])[groups]
        with np.errstate(invalid="ignore", over="ignore"):
            if self.routing.summary == "mean":
                return queries @ bfloat16(members.mean(1)).T
            scores = np.einsum("hd,gsd->hgs", queries, members)
            peak = scores.max(2)
            return peak + np.log(np.exp(scores - peak[..., None]).sum(2))

    def attend(
        self,
        position: int,
        queries: np.ndarray,
        routed: np.ndarray,
        values: np.ndarray,
        mean_query: np.ndarray | None,
    ) -> np.ndarray:
        """Exact attention over the routed tokens, with the estimate of the others where asked for."""
        with np.errstate(invalid="ignore"):
            scores = queries @ self.keys.T
        scores[:, ~routed] = -np.inf
        if mean_query is not None:
            size = self.routing.chunk_size
            for begin in range(0, (position + 1) // size * size, size):
                chunk = slice(begin, begin + size)
                if not self.real[chunk].all():
                    continue
                for head, (query, mean) in enumerate(zip(queries, mean_query, strict=True)):
                    about_mean = self.keys[chunk] @ mean
                    key = softmax(about_mean) @ self.keys[chunk]
                    estimate = about_mean + (query - mean) @ key
                    scores[head, chunk] = np.where(routed[chunk], scores[head, chunk], estimate)
        out = np.zeros((len(queries), values.shape[1]))
        for head, row in enumerate(scores):
            if not np.isneginf(row).all():
                out[head] = softmax(row) @ values
        return out
