"""How long a decode step and a prefill take on a GPU: rooflines of their kernels, calibrated on an H200.

A kernel's time is a sum of terms: what it moves over a bandwidth of the GPU's card, what it computes over a
rate of it, and a constant for launches. The factors of the terms come from measurements
(`hga_compile.tuning.calibrate`) and are taken to be the same on other GPUs: shares of bandwidths and rates
that kernels reach, and latencies.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from hga_compile.configs.cards import GpuCard, ModelCard
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import CENTRE_BLOCK, Routing

__all__ = ["CALIBRATION", "Step", "calibration", "decode_ms", "dense_terms", "gather_terms", "prefill_ms"]
__all__ += ["hit_rate", "hot_terms", "hot_us", "predict", "read_share", "step_terms", "step_us"]

CALIBRATION = "hardware.json"
Terms = dict[str, float]
"""Microseconds of each term at a factor of 1."""

# Lanes of a streaming multiprocessor.
_LANES = 128
# Bytes of a token's codes that the scoring kernel takes at least (see `kernels.triton_score`).
_LEAST_BYTES = 32
# Queries of a prefill that share a routed set where `auto` says so (see `kernels.tiles`).
_TILE = 64


@dataclass(frozen=True)
class Step:
    """One layer's decode step."""

    tokens: int
    rows: int
    """KV heads times batch."""
    heads: int
    """Query heads of a KV head."""
    dim: int
    routing: Routing
    tier: str
    item: int = 2
    """Bytes of a channel of K/V."""
    hot: float | None = None
    """Share of the tokens that the hot cache has slots for, with the tier `host`; None: there is none."""

    @property
    def groups(self) -> int:
        """Groups of each row."""
        return -(-self.tokens // self.routing.group_size)

    @property
    def attended(self) -> int:
        """Tokens of each row that are attended to."""
        return min(self.tokens, self.routing.budget.tokens_for(self.tokens))

    @property
    def routed_bytes(self) -> float:
        """Bytes of K/V that are attended to."""
        return 2.0 * self.rows * self.attended * self.dim * self.item

    @property
    def scored_tokens(self) -> float:
        """Tokens of each row whose summaries are read at the second level."""
        if self.routing.uses_chunks(self.tokens):
            return min(self.tokens, self.routing.chunk_tokens_for(self.tokens))
        return self.tokens

    @property
    def unpacked(self) -> int:
        """Channels of a token, or of a mean, that the scoring kernel computes with, padding included."""
        if self.routing.summary != "lowbit":
            return self.dim
        width = -(-self.dim * self.routing.bits // 8)
        return max(_LEAST_BYTES, 1 << (width - 1).bit_length()) * (8 // self.routing.bits)

    @property
    def index_bytes(self) -> float:
        """Bytes of summaries that are read."""
        routing = self.routing
        if routing.summary == "lowbit":
            token = -(-self.dim * routing.bits // 8) + 2.0
            if routing.centre == "block":
                token += 2.0 * self.dim / CENTRE_BLOCK
        else:
            token = 2.0 * self.dim / routing.group_size
        chunks = 0.0
        if routing.uses_chunks(self.tokens):
            chunks = self.tokens / routing.chunk_size * routing.chunk_parts * 2.0 * self.dim
        return self.rows * (self.scored_tokens * token + chunks)


def step_terms(step: Step, gpu: GpuCard) -> Terms:
    """Return the terms of a layer's decode step: score, vote and select, attend.

    Parameters
    ----------
    step : Step
        What is done.
    gpu : GpuCard
        Its bandwidths and rates.
    """
    routing, share = step.routing, 1e6 / gpu.bandwidth.value
    vectors = step.scored_tokens / (1 if routing.summary == "lowbit" else routing.group_size)
    scored = step.rows * step.scored_tokens / routing.group_size
    masses = scored * max(8, step.heads) * 4.0
    moved = step.index_bytes + 2 * masses
    on_gpu = step.routed_bytes if step.tier == "gpu" else 0.0
    lanes = gpu.cores.value * gpu.clock.value * _LANES / 1e6
    one_bit = routing.summary == "lowbit" and routing.bits == 1
    unpacked = step.rows * vectors * step.unpacked / lanes
    terms = {
        "launch": 1.0,
        # Every code is unpacked to a number once, whatever its bits.
        "unpack": unpacked,
        # Eight numbers of a byte are more than registers hold.
        "one_bit": unpacked if one_bit else 0.0,
        # Masses, votes and the selection are of groups.
        "votes": scored * max(8, step.heads) / lanes,
        "memory": (moved + on_gpu) * share,
        # What is read again in the next step and does not stay in the cache.
        "spill": max(0.0, moved + on_gpu - gpu.cache.value) * share,
        "host": 0.0 if step.tier == "gpu" else step.routed_bytes / gpu.host_bandwidth.value * 1e6,
    }
    if routing.uses_chunks(step.tokens):
        terms["launch"] *= 1.6  # 8 kernels in the place of 5
    return terms


def hot_terms(missed_bytes: float, gpu: GpuCard) -> Terms:
    """Return the terms of what a hot cache takes beyond a step whose K/V are in GPU memory."""
    return {"launch": 1.0, "host": missed_bytes / gpu.host_bandwidth.value * 1e6}


def hit_rate(share: float) -> float:
    """Return how much of what a step is routed to a hot cache holds, by the recorded rates.

    Between the recorded sizes it is linear in the logarithm of the size, below them in the size; a larger
    cache than those is taken to hold no more.

    Parameters
    ----------
    share : float
        Its slots, over the tokens that a step is routed to.
    """
    sizes, rates = zip(*calibration()["hits"], strict=True)
    if share <= sizes[0]:
        return float(rates[0] * share / sizes[0])
    return float(np.interp(np.log(share), np.log(sizes), rates))


def hot_us(step: Step, gpu: GpuCard) -> float:
    """Return the microseconds by which a step with a hot cache is slower than one in GPU memory."""
    assert step.hot is not None  # the caller checked
    missed = step.routed_bytes * (1 - hit_rate(step.hot * step.tokens / step.attended))
    return predict(hot_terms(missed, gpu), calibration()["kernels"]["hot"]["factors"])


def gather_terms(block_bytes: int, blocks: int, gpu: GpuCard) -> Terms:
    """Return the terms of a kernel that gathers blocks from pinned host memory."""
    return {"launch": 1.0, "host": block_bytes * blocks / gpu.host_bandwidth.value * 1e6}


def dense_terms(tokens: int, rows: int, dim: int, gpu: GpuCard, item: int = 2) -> Terms:
    """Return the terms of dense decode attention with its K/V in GPU memory."""
    return {"launch": 1.0, "memory": 2.0 * tokens * rows * dim * item / gpu.bandwidth.value * 1e6}


@cache
def calibration() -> dict[str, Any]:
    """Return the shipped calibration: factors by kernel, where they are from, and their errors."""
    text = resources.files("hga_compile.configs").joinpath(CALIBRATION).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def predict(terms: Terms, factors: dict[str, float]) -> float:
    """Return the microseconds of a kernel."""
    return sum(factors[name] * value for name, value in terms.items())


def step_us(step: Step, gpu: GpuCard) -> float:
    """Return the microseconds of one layer's decode step, as a CUDA graph replays it.

    Never less than its bytes take at the share of the bandwidth that kernels reach: other GPUs have less
    bandwidth against their rates.
    """
    if step.hot is not None and step.tier == "host":
        return step_us(replace(step, tier="gpu", hot=None), gpu) + hot_us(step, gpu)
    found, terms = calibration(), step_terms(step, gpu)
    factors = found["kernels"]["step"]["factors"]
    floor: float = factors["launch"] * terms["launch"] + terms["memory"] / found["reached"]["memory"]
    return max(predict(terms, factors), floor + float(factors["host"]) * terms["host"])


def decode_ms(card: ModelCard, gpu: GpuCard, profile: Profile, context: int, batch: int = 1) -> float:
    """Return the milliseconds of one token: attention of all layers, and the weights read once.

    Everything is taken to be replayed from CUDA graphs: what Python needs to launch kernels is left out.
    On a CPU the terms are those of a roofline alone.

    Raises
    ------
    ValueError
        The tier `nvme`: it has no model.
    """
    shape, routing, offload = card.geometry, profile.routing, profile.offload
    if offload.home == "nvme":
        raise ValueError(
            f"the hardware model does not have the tier nvme, got tier {offload.tier!r}, expected gpu, host "
            "or auto (offload.tier)"
        )
    tier = "host" if offload.home == "host" and gpu.kind == "cuda" else "gpu"
    item = 2 if gpu.kind == "cuda" else 4
    total = 0.0
    for layer in full_layers(card):
        rows, heads = batch * shape.kv_heads, shape.heads // shape.kv_heads
        if routing.is_dense(layer, shape.layers):
            total += _dense_us(context, rows, shape.head_dim, gpu, item)
            continue
        own = routing.for_layer(layer, shape.layers)
        hot = offload.hot_cache if tier == "host" else None
        step = Step(context, rows, heads, shape.head_dim, own, tier, item, hot)
        if gpu.kind == "cuda":
            total += step_us(step, gpu)
            continue
        moved = step.index_bytes + step.routed_bytes
        total += moved / gpu.bandwidth.value * 1e6
    for _ in range(shape.layers - shape.full_layers):
        total += _dense_us(shape.window or 1, batch * shape.kv_heads, shape.head_dim, gpu, item)
    weights = card.active_bytes() if gpu.kind == "cuda" else shape.parameters * 4
    reached = calibration()["reached"]["memory"] if gpu.kind == "cuda" else 1.0
    return total / 1e3 + weights / (gpu.bandwidth.value * reached) * 1e3


def read_share(card: ModelCard, profile: Profile, context: int, item: int = 2) -> float:
    """Return the bytes that a decode step's attention reads, over those that dense attention reads.

    Parameters
    ----------
    card, profile : ModelCard, Profile
        What runs.
    context : int
        Tokens.
    item : int
        Bytes of a channel of K/V.

    Returns
    -------
    float
        Of the layers with full attention: K/V of the routed tokens, and summaries.
    """
    shape, routing, layers = card.geometry, profile.routing, full_layers(card)
    dense, found = 2.0 * shape.kv_heads * context * shape.head_dim * item, 0.0
    for layer in layers:
        own, heads = routing.for_layer(layer, shape.layers), shape.heads // shape.kv_heads
        step = Step(context, shape.kv_heads, heads, shape.head_dim, own, "gpu", item)
        whole = routing.is_dense(layer, shape.layers)
        found += dense if whole else step.routed_bytes + step.index_bytes
    return found / (dense * len(layers))


def prefill_ms(card: ModelCard, gpu: GpuCard, profile: Profile, context: int) -> float:
    """Return the milliseconds of a prompt: the arithmetic that is done, at the rate dense attention reaches.

    Routed attention's part is not calibrated: no prefill of it is recorded.
    """
    shape, routing = card.geometry, profile.routing
    rate = gpu.matrix_rate.value * float(calibration()["reached"]["matrix"])
    experts = shape.active_experts or 1
    linear = shape.attention_parameters + shape.layers * shape.expert_parameters * experts
    operations = 2.0 * linear * context
    pairs = context * (context + 1) / 2
    for layer in full_layers(card):
        own = routing.for_layer(layer, shape.layers)
        if routing.is_dense(layer, shape.layers) or own.prefill == "dense":
            operations += 4.0 * pairs * shape.heads * shape.head_dim
            continue
        tile = _TILE if own.prefill_tile == "auto" and gpu.kind == "cuda" else own.prefill_tile
        tile = 1 if tile == "auto" else tile
        wide = own.shared() if tile > 1 else own
        attended = sum(
            min(seen, wide.budget.tokens_for(seen)) for seen in range(_TILE, context + 1, _TILE)
        ) * float(_TILE)
        # Votes by means of groups and by 4 candidates for each group chosen, in 8 bits at twice the rate; or
        # by every low-bit key.
        votes = pairs / own.group_size / 2 + 4 * attended / 2 if tile > 1 else pairs
        operations += (2.0 * votes + 4.0 * attended) * shape.heads * shape.head_dim
    window = min(shape.window or context, context)
    operations += (shape.layers - shape.full_layers) * 4.0 * context * window * shape.heads * shape.head_dim
    return operations / rate * 1e3


def full_layers(card: ModelCard) -> list[int]:
    """Return the layers that attend to the whole history."""
    every = card.geometry.full_every or 1
    return [layer for layer in range(card.geometry.layers) if layer % every == every - 1]


def _dense_us(tokens: int, rows: int, dim: int, gpu: GpuCard, item: int) -> float:
    terms = dense_terms(tokens, rows, dim, gpu, item)
    if gpu.kind == "cpu":
        return terms["memory"]
    return predict(terms, calibration()["kernels"]["dense"]["factors"])
