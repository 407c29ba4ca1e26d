"""One layer's decode step with K/V in GPU memory, host RAM or on files, beside dense attention.

    python benchmarks/offload.py [--contexts 16384,65536] [--tiers gpu,host,nvme] [--folder DIR]

Routed sets are replayed from recordings of a real model that decodes a real text (`record_routes.py`), so
that hot caches hit and miss as they would there; K/V are random, which time does not depend on. A step stores
a token, routes (by random codes: its result is not used), looks the replayed list up, and attends to it. All
is replayed from one CUDA graph of several layers, each with K/V, index, and cache of its own; the nvme tier,
whose reads the CPU makes, is timed by the clock. Caches are warm: the first steps of a recording are not
timed, and each replay begins with the state that they left.

Peers in the same run are cuDNN SDPA over the whole K/V in GPU memory, and over K/V that are copied from
pinned host memory while the layer before is at work: what transformers' offloaded cache does, without its
copies back. The floor is what must be read once, each place at the rate that the same run measures.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write_json
from decode_attention import rates
from offload_layer import Layer, Shape, Traffic, layers_for, mean, read_bytes
from offload_peers import dense, disk_rate
from recorded import DATA, Recording, lru_hits, nearest
from table import render
from torch import Tensor

from hga_compile.configs.profile import Offload
from hga_compile.kernels.hot import HotCache
from hga_compile.store.nvme import NvmePages
from hga_compile.store.tier import Tier
from hga_compile.store.tiers import make_tier

CONTEXTS = (16384, 65536, 262144, 1048576)
SHARES = (None, 0.01, 0.03, 0.1)
TIERS = ("gpu", "host", "nvme")
# Steps that are timed, the last ones of a recording; on files fewer, each is a thousand times as long.
TIMED, FILED, FILED_WARM = 32, 8, 24
REPLAYS = 7


def warmed(
    layers: Sequence[Layer], tiers: Sequence[Tier], hots: Sequence[HotCache | None], steps: Sequence[int]
) -> list[Tensor]:
    """Run steps of all layers; return what the last of them gave."""
    out: list[Tensor] = []
    for number in steps:
        out = [each.step(number, tier, hot) for each, tier, hot in zip(layers, tiers, hots, strict=True)]
    return out


def time_replayed(
    layers: Sequence[Layer], tiers: Sequence[Tier], share: float | None
) -> tuple[float, list[Tensor], float | None]:
    """Time the last steps of a recording in a CUDA graph.

    Returns
    -------
    tuple
        Microseconds of a step of a layer, what the last step gave, and misses of a step of a layer.
    """
    hots = [None if share is None else layer.hot_cache(share) for layer in layers]
    first = len(layers[0].steps) - TIMED
    warmed(layers, tiers, hots, range(first))
    parts = [
        part for hot in hots if hot is not None
        for part in (hot.pool, hot.table, hot.owners, hot.used, hot.clock, hot.counts)
    ]  # fmt: skip
    state = [part.clone() for part in parts]
    before = sum(hot.misses() for hot in hots if hot is not None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = warmed(layers, tiers, hots, range(first, first + TIMED))
    took = []
    for _ in range(REPLAYS):
        for part, was in zip(parts, state, strict=True):
            part.copy_(was)
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / (TIMED * len(layers)))
    misses = None
    if share is not None:
        after = sum(hot.misses() for hot in hots if hot is not None)
        misses = (after - before) / (TIMED * len(layers))
    return statistics.median(took), [part.clone() for part in out], misses


def time_filed(
    layers: Sequence[Layer], tiers: Sequence[NvmePages]
) -> tuple[float, list[Tensor], dict[str, float]]:
    """Time the last steps with K/V on files, by the clock; also groups and pages a step and layer."""
    none = [None] * len(layers)
    first = len(layers[0].steps) - FILED
    warmed(layers, tiers, none, range(max(0, first - FILED_WARM), first))
    names = ("hits", "misses", "reads", "prefetched")
    before = {name: sum(getattr(tier.traffic, name) for tier in tiers) for name in names}
    _wait(layers[0].device)
    begin = time.perf_counter()
    out = warmed(layers, tiers, none, range(first, first + FILED))
    _wait(layers[0].device)
    took = (time.perf_counter() - begin) * 1e6 / (FILED * len(layers))
    pages = {
        name: (sum(getattr(tier.traffic, name) for tier in tiers) - before[name]) / (FILED * len(layers))
        for name in names
    }
    return took, out, pages


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def case(
    tokens: int, tier: str, share: float | None, took: float, traffic: Traffic,
    bandwidth: dict[str, float], **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return one row of the result."""
    floor = traffic.floor(bandwidth)
    return {
        "tokens": tokens,
        "tier": tier,
        "hot_cache": share,
        "microseconds": took,
        "floor_microseconds": floor,
        "measured_over_floor": took / floor,
        "listed_groups": traffic.listed,
        "hit_rate": None if tier == "gpu" or share is None else traffic.hit_rate,
        "pcie_bytes": traffic.pcie,
        "file_bytes": traffic.files,
        **more,
    }


def measure_context(
    tokens: int, recording: Recording, shape: Shape, tiers: Sequence[str], folder: str | None,
    bandwidth: dict[str, float], device: torch.device, say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Time all tiers and hot caches at one context."""
    layers = [Layer(number, shape, recording, tokens, device) for number in range(layers_for(tokens, shape))]
    size, steps = layers[0].routing.group_size, range(len(layers[0].steps) - TIMED, len(layers[0].steps))
    sizes = (shape.kv_heads, shape.dim, shape.dim, size)
    facts = {"layers": len(layers), "extended": tokens // recording.tokens}
    cases: list[dict[str, Any]] = []
    want: list[Tensor] = []
    for tier in ("gpu", "host"):
        # The first tier's answers are what the others are held against: it runs in any case.
        if tier not in tiers and want:
            continue
        place = Offload(tier=tier, reserve_tokens=tokens)
        made = [make_tier(tier, sizes, shape.dtype, device, "auto", place) for _ in layers]
        for layer, each in zip(layers, made, strict=True):
            layer.fill(each)
        for share in SHARES if tier == "host" else (None,):
            took, out, misses = time_replayed(layers, made, share)
            want = want or out
            traffic = mean([read_bytes(layer, steps, tier, misses) for layer in layers])
            lru = None
            if share is not None:
                found = [lru_hits(layer.steps, size, share, steps.start) for layer in layers]
                lru = statistics.fmean(found)
            same = all(torch.equal(*pair) for pair in zip(out, want, strict=True))
            row = case(tokens, tier, share, took, traffic, bandwidth, lru=lru, same_bits=same, **facts)
            say(f"{tokens} {tier} {share}: {took:.1f} us, floor {row['floor_microseconds']:.1f}")
            cases.append(row)
        for each in made:
            each.close()
        del made
        gc.collect()
        torch.cuda.empty_cache()
    if "nvme" in tiers:
        cases.append(measure_filed(layers[:2], want, sizes, folder, bandwidth, facts, 0.1))
        say(f"{tokens} nvme: {cases[-1]['microseconds']:.0f} us")
    return cases


def measure_filed(
    layers: Sequence[Layer], want: Sequence[Tensor], sizes: tuple[int, int, int, int], folder: str | None,
    bandwidth: dict[str, float], facts: dict[str, Any], share: float,
) -> dict[str, Any]:  # fmt: skip
    """Time the nvme tier with RAM for a share of the K/V."""
    shape, tokens, device = layers[0].shape, layers[0].tokens, layers[0].device
    whole = tokens * shape.kv_heads * 2 * shape.dim * shape.dtype.itemsize * len(layers)
    place = Offload(tier="nvme", nvme_folder=folder, nvme_cache=round(share * whole), reserve_tokens=tokens)
    made = [NvmePages(*sizes, shape.dtype, device, "auto", place, number) for number in range(len(layers))]
    try:
        for layer, tier in zip(layers, made, strict=True):
            layer.fill(tier)
        took, out, pages = time_filed(layers, made)
    finally:
        for tier in made:
            tier.close()
    steps = range(len(layers[0].steps) - FILED, len(layers[0].steps))
    plain = mean([read_bytes(layer, steps, "host", None) for layer in layers])
    files = (pages["reads"] + pages["prefetched"]) * place.nvme_page
    traffic = Traffic(plain.listed, plain.fetched, plain.gpu, plain.pcie, files)
    asked = max(1.0, pages["hits"] + pages["misses"])
    same = all(torch.equal(*pair) for pair in zip(out, want[: len(out)], strict=True))
    row = case(tokens, "nvme", share, took, traffic, bandwidth, lru=None, same_bits=same, **facts)
    return row | {"hit_rate": pages["hits"] / asked, "layers": len(layers), "pages": pages}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--contexts", default=",".join(map(str, CONTEXTS)))
    add("--tiers", default=",".join(TIERS))
    add("--folder", help="of the nvme tier's files (default: the system's temporary folder)")
    add("--recordings", type=Path, nargs="*", help="(default: all of benchmarks/data)")
    add("--json", type=Path, default=RESULTS / "offload.json")
    options = parser.parse_args(arguments)
    tiers = options.tiers.split(",")
    if unknown := set(tiers) - set(TIERS):
        parser.error(f"--tiers: expected some of {', '.join(TIERS)}, got {', '.join(sorted(unknown))}")
    paths = options.recordings or sorted(DATA.glob("routes_*.npz"))
    recordings = [Recording.load(path) for path in paths]
    pairs = [(tokens, nearest(recordings, tokens)) for tokens in map(int, options.contexts.split(","))]
    for tokens, recording in pairs:
        if recording is None or recording.steps < TIMED * 2:
            have = ", ".join(f"{each.tokens} tokens in {each.steps} steps" for each in recordings) or "none"
            parser.error(
                f"no recording of {2 * TIMED} steps or more fits {tokens} tokens, got {have}; "
                "make one with record_routes.py"
            )
    if not torch.cuda.is_available():
        print("a CUDA device wanted, got none", file=sys.stderr)
        return 1
    device, shape = torch.device("cuda", 0), Shape()
    heads = f"{shape.kv_heads * shape.heads} query / {shape.kv_heads}"
    bandwidth = rates()
    if "nvme" in tiers:
        bandwidth["nvme"] = disk_rate(options.folder)
    cases: list[dict[str, Any]] = []
    peers = {}
    say = partial(print, file=sys.stderr, flush=True)
    for tokens, recording in pairs:
        assert recording is not None  # looked at above
        cases += measure_context(tokens, recording, shape, tiers, options.folder, bandwidth, device, say)
        peers[str(tokens)] = dense(tokens, shape, device)
    write_json(
        options.json,
        {
            "benchmark": "offload",
            "environment": environment("cuda"),
            "model": {"name": f"one layer, {heads} KV heads x {shape.dim}, bfloat16"},
            "settings": {"timed_steps": TIMED, "replays": REPLAYS},
            "recordings": [
                {"tokens": each.tokens, "steps": each.steps, "heads": each.groups.shape[1], **each.facts}
                for each in recordings
            ],
            "bandwidth": bandwidth,
            "dense": peers,
            "cases": cases,
        },
    )
    print(render(options.json))
    return 0 if all(row["same_bits"] for row in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
