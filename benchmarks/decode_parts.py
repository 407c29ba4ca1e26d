r"""The kernels of one layer's decode step, each beside the whole step, in microseconds by CUDA-graph replay.

    python benchmarks/decode_parts.py [--case 1x65536 ...] [--serial]

For measuring one change of a kernel at a time. Parts are replayed one after another of their kind, so that
with early launches a part is seen with its own start hidden; ``--serial`` launches none early.

``--once`` runs one warm step a case instead, between cudaProfilerStart and cudaProfilerStop, for the counters
of the hardware:

    ncu --profile-from-start off --clock-control none --set detailed --csv \
        python benchmarks/decode_parts.py --once
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import torch
from decode_attention import CASES, DIM, DTYPE, HEADS, KV_HEADS, ROUTING
from rich.console import Console
from rich.table import Table

from hga_compile.kernels import gpu, overlap
from hga_compile.kernels.plan import plan_queries
from hga_compile.kernels.tuner import graph_microseconds as microseconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from hga_compile.kernels.triton_score import Masses


def measure(batch: int, tokens: int, once: bool) -> dict[str, float]:
    """Time the parts of one case, and all of it; ``once`` shows a profiler one step instead."""
    from hga_compile.kernels.triton_attend import attend_listed
    from hga_compile.kernels.triton_score import group_masses
    from hga_compile.kernels.triton_select import select_groups, votes_of
    from hga_compile.kernels.triton_turn import turn

    rows, size, device = batch * KV_HEADS, ROUTING.group_size, torch.device("cuda", 0)
    groups = -(-tokens // size)
    pages = torch.empty(groups, rows, size * 2 * DIM, dtype=DTYPE, device=device)
    for part in pages.split(4096):
        part.normal_()
    shape = (rows, groups * size, DIM * ROUTING.bits // 8)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).transpose(1, 2)
    scales = torch.rand(rows, groups * size, device=device).half() + 0.5
    query = torch.randn(rows, HEADS, DIM, dtype=DTYPE, device=device)
    spans = gpu.spans_of(ROUTING, plan_queries(ROUTING, tokens - 1, 1, None), None, device)
    table, scale = spans.table, DIM**-0.5
    step: dict[str, Any] = {"length": tokens, "routing": ROUTING, "scale": scale, "kv_heads": KV_HEADS}
    attend: dict[str, Any] = {
        "group_size": size, "scale": scale, "softcap": 0.0, "kv_heads": KV_HEADS,
        "rows_of_span": rows,
    }  # fmt: skip

    def whole() -> None:
        gpu.decode_step(pages, codes, scales, query, spans, **step)

    def score() -> Masses:
        return group_masses(
            codes, scales, turned, table, groups=spans.groups, group_size=size, rows_of_span=rows
        )

    if once:
        _show_profiler(whole)
        return {}
    turned = turn(query, scale, ROUTING.bits)
    masses = score()
    # Votes are counted in the masses' bins once: those that are timed below are others.
    votes = votes_of(score(), table, HEADS, False, rows)
    chosen = select_groups(votes, table, spans.width, rows)
    return {
        "all": microseconds(whole),
        "turn": microseconds(lambda: turn(query, scale, ROUTING.bits)),
        "score": microseconds(score),
        "votes": microseconds(lambda: votes_of(masses, table, HEADS, False, rows)),
        "select": microseconds(lambda: select_groups(votes, table, spans.width, rows)),
        "attend": microseconds(lambda: attend_listed(pages, chosen, table, query, None, **attend)),
    }


def _show_profiler(step: Callable[[], None]) -> None:
    """Run a step that is compiled and warm between the profiler's start and stop."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", action="append", metavar="BATCHxTOKENS", help="default: all")
    parser.add_argument(
        "--serial", action="store_true", help="no kernel starts before the one before it ends"
    )
    parser.add_argument("--once", action="store_true", help="for ncu: nothing is timed")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("a CUDA device wanted, got none", file=sys.stderr)
        return 1
    if options.serial:
        overlap._able = lambda device: False
        overlap.overlap.cache_clear()
    cases = [tuple(map(int, case.split("x"))) for case in options.case or []] or CASES
    table = Table(title="a decode step's kernels, microseconds")
    for heading in ("batch", "tokens", "all", "turn", "score", "votes", "select", "attend"):
        table.add_column(heading, justify="right")
    for batch, tokens in cases:
        took = measure(batch, tokens, options.once)
        if options.once:
            continue
        table.add_row(str(batch), str(tokens), *(f"{took[part]:.1f}" for part in took))
    if not options.once:
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
