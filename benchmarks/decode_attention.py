"""One layer's decode step in Triton beside dense attention, on one GPU: routing included, CUDA-graph replay.

    python benchmarks/decode_attention.py

Random K/V: time does not depend on them. As in a model of many layers, no step finds what it reads in the
cache: each call reads an index, or K/V, of its own, so many that they do not fit. Peers in the same run are
cuDNN and flash SDPA over the whole K/V in GPU memory, and FlexAttention over the same share of it in whole
blocks of 128 tokens, given which ones: no routing is in its time. The floor is what must be read once, at
rates that the same run measures: codes and scales from GPU memory, routed K/V from where they lie.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels import gpu
from hga_compile.kernels.plan import plan_queries
from hga_compile.tuning.uncached import CALLS, copies, microseconds

KV_HEADS, HEADS, DIM, DTYPE = 4, 8, 128, torch.bfloat16
ROUTING = Routing(budget=Budget(fraction=0.03, tokens=256), auto_chunk_tokens=2**21)
CASES = ((1, 16384), (1, 65536), (1, 262144), (1, 1048576), (8, 65536))
PEERS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FLEX, FLEX_BLOCK = "FlexAttention", 128


def rates() -> dict[str, float]:
    """Measure bytes per second: read and written in GPU memory, and copied from pinned host memory."""
    inside = torch.ones(2, 2**28, device="cuda")
    host = torch.empty(2**28, pin_memory=True)
    # By a kernel: the copy engine reaches two thirds of what kernels do.
    negation = microseconds(lambda: torch.neg(inside[0], out=inside[1]), [()], 1)
    transfer = microseconds(lambda: inside[0].copy_(host, non_blocking=True), [()], 1)
    return {"gpu": 2 * 2**30 / negation * 1e6, "host": 2**30 / transfer * 1e6}


@cache
def compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_steps(query: Tensor, key: Tensor, value: Tensor, share: float) -> tuple[Any, Any]:
    """Return FlexAttention to K/V over a share of random blocks, and what dense attention to these gives.

    Parameters
    ----------
    query, key, value : Tensor
        ``[1, heads, 1, dim]`` and ``[1, kv_heads, tokens, dim]``; tokens are a multiple of the block.
    share : float
        Of the blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens, device = key.shape[2], key.device
    blocks = tokens // FLEX_BLOCK
    order = torch.randperm(blocks, device=device)
    count = max(1, round(share * blocks))
    order[:count] = order[:count].sort().values
    listed, number = order.int().view(1, 1, 1, -1), torch.full((1, 1, 1), count, device=device).int()
    chosen = torch.zeros(blocks, dtype=torch.bool, device=device).index_fill_(0, order[:count], True)
    # One list for all heads, of whole blocks, which need no mask: the least work that it can be given.
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(number), listed, number, listed, BLOCK_SIZE=FLEX_BLOCK, seq_lengths=(1, tokens),
        mask_mod=lambda batch, head, query, key: chosen[key // FLEX_BLOCK],
    )  # fmt: skip
    inside = order[:count, None] * FLEX_BLOCK + torch.arange(FLEX_BLOCK, device=device)
    near = [part[:, :, inside.flatten()] for part in (key, value)]
    dense = torch.nn.functional.scaled_dot_product_attention(query, near[0], near[1], enable_gqa=True)

    def step(query: Tensor, key: Tensor, value: Tensor) -> object:
        return compiled_flex()(query, key, value, block_mask=mask, enable_gqa=True)

    return step, dense


def measure_flex(case: dict[str, Any], inputs: list[Any]) -> None:
    """Add FlexAttention's time to a case, or why there is none."""
    try:
        query, key, value = inputs[0]
        step, want = flex_steps(query, key, value, ROUTING.budget.fraction or 1.0)
        torch.testing.assert_close(step(*inputs[0]), want, rtol=0.02, atol=0.02)
        case["sparse"] = {FLEX: microseconds(step, inputs)}
    except Exception as error:  # whatever a compiler raises; the other peers go on
        first = next(iter(str(error).splitlines()), "")
        case["errors"] = {FLEX: f"{type(error).__name__}: {first}"[:300]}


def measure(batch: int, tokens: int, tier: str, bandwidth: dict[str, float]) -> dict[str, Any]:
    """Time one case and its peers."""
    rows, size, device = batch * KV_HEADS, ROUTING.group_size, torch.device("cuda", 0)
    groups = -(-tokens // size)
    place: dict[str, Any] = {"device": device} if tier == "gpu" else {"device": "cpu", "pin_memory": True}
    pages = torch.empty(groups, rows, size * 2 * DIM, dtype=DTYPE, **place)
    for part in pages.split(4096):  # noise made on the CPU would take minutes
        part.copy_(torch.randn(part.shape, dtype=DTYPE, device=device))
    code_shape = (rows, groups * size, DIM * ROUTING.bits // 8)
    queries = torch.randn(CALLS, rows, HEADS, DIM, dtype=DTYPE, device=device)
    inputs: list[Any] = [
        (
            torch.randint(0, 256, code_shape, dtype=torch.uint8, device=device).transpose(1, 2),
            torch.rand(rows, groups * size, device=device).half() + 0.5,
            query,
        )
        for query in queries[: copies(rows * tokens * (DIM * ROUTING.bits // 8 + 2))]
    ]
    spans = gpu.spans_of(ROUTING, plan_queries(ROUTING, tokens - 1, 1, None), None, device)
    settings: dict[str, Any] = {"routing": ROUTING, "scale": DIM**-0.5, "kv_heads": KV_HEADS}

    def step(codes: Tensor, scales: Tensor, query: Tensor) -> object:
        return gpu.decode_step(pages, codes, scales, query, spans, length=tokens, **settings)

    took = microseconds(step, inputs)
    index_bytes = rows * spans.groups * size * (DIM * ROUTING.bits / 8 + 2)
    routed_bytes = rows * spans.attended * 2 * DIM * DTYPE.itemsize
    floor = (index_bytes / bandwidth["gpu"] + routed_bytes / bandwidth[tier]) * 1e6
    case: dict[str, Any] = {
        "batch": batch,
        "tokens": tokens,
        "tier": tier,
        "attended": spans.attended / tokens,
        "microseconds": took,
        "floor_microseconds": floor,
        "measured_over_floor": took / floor,
        "peers": {},
    }
    if tier == "gpu":
        del inputs
        shape = (2, batch, KV_HEADS, tokens, DIM)
        dense: list[Any] = [
            (query.view(batch, KV_HEADS * HEADS, 1, DIM), *torch.randn(shape, dtype=DTYPE, device=device))
            for query in queries[: copies(2 * rows * tokens * DIM * DTYPE.itemsize)]
        ]
        for name, backend in PEERS.items():
            with sdpa_kernel(backend):
                case["peers"][name] = microseconds(
                    partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True), dense
                )
        if batch == 1:
            measure_flex(case, dense)
    return case


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "decode_attention.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("a CUDA device wanted, got none", file=sys.stderr)
        return 1
    bandwidth = rates()
    cases = [measure(*case, "gpu", bandwidth) for case in CASES]
    cases += [measure(1, tokens, "host", bandwidth) for tokens in (65536, 262144)]
    write_json(
        options.json,
        {
            "benchmark": "decode_attention",
            "environment": environment("cuda"),
            "model": {"name": f"one layer, {KV_HEADS * HEADS} query / {KV_HEADS} KV heads x {DIM}, bfloat16"},
            "settings": {"profile": "default", "budget": 0.03},
            "bandwidth": bandwidth,
            "bandwidth_from": "the same run",
            "cases": cases,
        },
    )
    table = Table(title="decode attention, microseconds a layer")
    for heading in ("batch", "tokens", "K/V in", "hga", "measured / floor", *PEERS, f"{FLEX}, 3%"):
        table.add_column(heading, justify="right")
    for case in cases:
        times = case["peers"] | case.get("sparse", {})
        peers = [f"{times[name]:.1f}" if name in times else "-" for name in (*PEERS, FLEX)]
        if "errors" in case:
            peers[-1] = "failed"
            print(f"{FLEX} at {case['tokens']} tokens: {case['errors'][FLEX]}", file=sys.stderr)
        numbers = (f"{case['microseconds']:.1f}", f"{case['measured_over_floor']:.2f}")
        table.add_row(str(case["batch"]), str(case["tokens"]), case["tier"], *numbers, *peers)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
