"""One layer's prefill in Triton beside dense attention, on one GPU: routing of every query included.

    python benchmarks/prefill_attention.py

Random Q, K and V: time does not depend on them. Every query is routed, in tiles that share a routed set.
Peers in the same run are cuDNN and flash SDPA, causal, and FlexAttention over the same share of the K/V in
whole blocks of 128 tokens, given which ones: no routing is in its time. The floor is the arithmetic that is
done, at the rate that a large matrix product in the same run reaches: votes in 8 bits count half of what they
would in 16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hga_compile.configs.routing import Routing
from hga_compile.kernels import gpu_tiles
from hga_compile.kernels.coarse import BLOCK, SINGLES
from hga_compile.kernels.tiles import Tiles, plan_tiles

KV_HEADS, HEADS, DIM, DTYPE = 4, 8, 128, torch.bfloat16
TILE = 64
LENGTHS = (16384, 65536, 131072)
PEERS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FLEX, FLEX_BLOCK = "FlexAttention", 128


def milliseconds(step: Callable[[], object], times: int = 5) -> float:
    """Return the median time of a call."""
    step()
    took = []
    for _ in range(times):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end))
    return statistics.median(took)


def matrix_rate() -> float:
    """Measure floating-point operations per second of a large product in the dtype of the K/V."""
    side = 8192
    one, other = torch.randn(2, side, side, dtype=DTYPE, device="cuda").unbind()
    return 2 * side**3 / milliseconds(lambda: one @ other) * 1e3


def operations(tiles: Tiles, tokens: int) -> float:
    """Count what is done in units of 16-bit matrix products: votes in 8 bits, attention in 16."""
    lines = KV_HEADS * HEADS * TILE
    first, last = tiles.anchors(refined=True)
    votes = tiles.plan.window + last - first + tiles.candidates * Routing().group_size
    attended = tiles.attended(0, tokens, None) * KV_HEADS * HEADS
    return 2.0 * DIM * (float(votes.sum()) * lines / 2 + 2.0 * attended)


@cache
def compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_step(query: Tensor, key: Tensor, value: Tensor, share: float) -> Callable[[], Tensor]:
    """Return FlexAttention over a share of the earlier blocks of each block of queries, and its own."""
    from torch.nn.attention.flex_attention import BlockMask

    count = query.shape[2] // FLEX_BLOCK
    random = torch.Generator().manual_seed(0)
    order = torch.rand(count, count, generator=random).tril(-1).argsort(-1, descending=True)
    whole = (torch.arange(count) * share).ceil().int().clamp(max=count - 1)
    own = torch.zeros(count, count, dtype=torch.int32)
    own[:, 0] = torch.arange(count)
    parts = (torch.ones(count, dtype=torch.int32), own, whole, order.int())
    mask = BlockMask.from_kv_blocks(
        *(part[None, None].cuda().contiguous() for part in parts),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda b, h, q, k: q >= k,
    )
    flex = compiled_flex()
    return lambda: flex(query, key, value, block_mask=mask, enable_gqa=True)


def measure(tokens: int, rate: float) -> dict[str, Any]:
    """Time one length and its peers."""
    routing, device = Routing(), torch.device("cuda", 0)
    # As models make them: heads between tokens and channels.
    query = torch.randn(1, tokens, KV_HEADS * HEADS, DIM, dtype=DTYPE, device=device).transpose(1, 2)
    key, value = torch.randn(2, KV_HEADS, tokens, DIM, dtype=DTYPE, device=device).unbind()
    shape = (KV_HEADS, tokens, DIM * routing.bits // 8)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).transpose(1, 2)
    scales = torch.rand(KV_HEADS, tokens, device=device).half() + 0.5
    tiles = plan_tiles(routing, 0, tokens, None, TILE)
    spans = gpu_tiles.tile_spans(tiles, True, None, device)
    grouped = query.unflatten(1, (KV_HEADS, HEADS))

    def prefill() -> Tensor:
        keys = gpu_tiles.tile_keys(
            codes, scales, tiles.plan.last_window, routing.group_size, routing.bits, DIM, None
        )
        kv = gpu_tiles.whole(key, value)
        return gpu_tiles.prefill_tiles(
            kv, keys, grouped, spans, tiles, first=0, routing=routing, scale=DIM**-0.5
        )

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    took = milliseconds(prefill)
    floor = operations(tiles, tokens) / rate * 1e3
    attended = tiles.attended(0, tokens, None) / (tokens * (tokens + 1) / 2)
    case: dict[str, Any] = {
        "tokens": tokens,
        "tile": TILE,
        "attended": attended,
        "milliseconds": took,
        "floor_milliseconds": floor,
        "measured_over_floor": took / floor,
        "extra_bytes": torch.cuda.max_memory_allocated() - before,
        "peers": {},
        "errors": {},
    }
    keys, values = key[None], value[None]
    dense = query.contiguous()
    for name, backend in PEERS.items():
        with sdpa_kernel(backend):
            case["peers"][name] = milliseconds(
                lambda: torch.nn.functional.scaled_dot_product_attention(
                    dense, keys, values, is_causal=True, enable_gqa=True
                ),
                3,
            )
    try:
        case["peers"][FLEX] = milliseconds(flex_step(dense, keys, values, attended), 3)
    except Exception as error:  # whatever keeps a peer from running is a result
        case["errors"][FLEX] = f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"
    return case


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, comma-separated")
    parser.add_argument("--json", type=Path, default=RESULTS / "prefill_attention.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("a CUDA device wanted, got none", file=sys.stderr)
        return 1
    rate = matrix_rate()
    cases = [measure(int(tokens), rate) for tokens in options.lengths.split(",")]
    write_json(
        options.json,
        {
            "benchmark": "prefill_attention",
            "environment": environment("cuda"),
            "model": {"name": f"one layer, {KV_HEADS * HEADS} query / {KV_HEADS} KV heads x {DIM}, bfloat16"},
            "settings": {
                "profile": "default", "tile": TILE, "singles": SINGLES, "block": BLOCK,
                "prefill_budget": Routing().prefill_budget.fraction,
            },
            "rate": rate,
            "cases": cases,
        },
    )  # fmt: skip
    names = [*PEERS, FLEX]
    table = Table(title="prefill attention, milliseconds a layer")
    for heading in ("tokens", "attended", "hga", "measured / floor", *names):
        table.add_column(heading, justify="right")
    for case in cases:
        peers = (f"{case['peers'][name]:.2f}" if name in case["peers"] else "failed" for name in names)
        numbers = (f"{case['milliseconds']:.2f}", f"{case['measured_over_floor']:.2f}")
        table.add_row(str(case["tokens"]), f"{case['attended']:.1%}", *numbers, *peers)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
