"""Keys to low-bit codes and to means on one GPU, beside a copy of as many bytes: CUDA-graph replay.

    python benchmarks/summarize.py

Random keys, as a model's attention hands them over (the other heads' lie between): time does not depend on
them, and what comes out is checked against the reference before it is timed. The floor is the bytes that must
be read and written, at the rate at which the same run copies 2 GiB; the peer is a kernel that reads half as
many bytes and writes the other half. Neither keys nor what is copied are in the cache from the time before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, environment, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hga_compile.kernels import gpu
from hga_compile.kernels.lowbit import _STEP, encode_keys
from hga_compile.kernels.rotation import rotation
from hga_compile.tuning.uncached import copies, microseconds

ROWS, DIM, DTYPE = 4, 128, torch.bfloat16
TOKENS = (4096, 16384, 65536, 262144)
CHECKED = 1024


class Kind(NamedTuple):
    """What is made of the keys: codes of `bits` bits, or means of `group` tokens each."""

    bits: int = 0
    group: int = 0

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.bits}-bit codes" if self.bits else f"means of {self.group}"

    def bytes_of(self, tokens: int) -> int:
        """Return the bytes that must be read and written for keys of so many tokens."""
        written = DIM * self.bits / 8 + 2 if self.bits else DIM * DTYPE.itemsize / self.group
        return int(ROWS * tokens * (DIM * DTYPE.itemsize + written))


KINDS = (Kind(bits=2), Kind(bits=1), Kind(bits=4), Kind(bits=8), Kind(group=16))


def copy_microseconds(size: int) -> float:
    """Time a kernel that reads half of so many bytes and writes the other half."""
    half = torch.ones(copies(size // 2), size // 8, device="cuda")
    out = torch.empty_like(half[0])
    return microseconds(lambda given: torch.neg(given, out=out), [(part,) for part in half])


def coding(bits: int, tokens: int) -> Callable[[Tensor], None]:
    """Return what encodes keys ``[rows, tokens, dim]``, after a check of its last codes."""
    centre = torch.randn(ROWS, DIM, device="cuda") / 4
    # A summary keeps it rotated.
    turned = centre @ rotation(DIM, centre.device)
    shape = (ROWS, tokens, DIM * bits // 8)
    codes = torch.zeros(shape, dtype=torch.uint8, device="cuda").transpose(1, 2)
    scales = torch.zeros(ROWS, tokens, dtype=torch.float16, device="cuda")

    def step(keys: Tensor) -> None:
        gpu.encode(keys, centre, codes, scales, 0, bits, _STEP[bits], turned)

    keys = torch.randn(tokens, ROWS, DIM, dtype=DTYPE, device="cuda").transpose(0, 1)
    step(keys)
    near = keys[:, -CHECKED:].float() - centre[:, None]
    want, want_scales = encode_keys(near @ rotation(DIM, keys.device), bits)
    wrong = (codes[:, :, -CHECKED:] != want).float().mean().item()
    # A value on the border of two levels may be rounded either way.
    if wrong > 0.01:
        raise RuntimeError(f"codes of {bits} bits: at most 1% of the bytes may differ, got {wrong:.1%}")
    torch.testing.assert_close(scales[:, -CHECKED:], want_scales, rtol=0.02, atol=1e-3)
    return step


def averaging(group: int, tokens: int) -> Callable[[Tensor], None]:
    """Return what makes means of keys ``[rows, tokens, dim]``, after a check of its last means."""
    means = torch.zeros(ROWS, tokens // group, DIM, dtype=DTYPE, device="cuda")

    def step(keys: Tensor) -> None:
        gpu.store_means(keys, means, 0, group)

    keys = torch.randn(tokens, ROWS, DIM, dtype=DTYPE, device="cuda").transpose(0, 1)
    step(keys)
    want = keys[:, -CHECKED:].float().unflatten(1, (-1, group)).mean(2)
    torch.testing.assert_close(means[:, -CHECKED // group :].float(), want, rtol=0.01, atol=1e-6)
    return step


def measure(kind: Kind, tokens: int, rate: float) -> dict[str, Any]:
    """Time one kind of summary of so many tokens, and the copy beside it; `rate` in bytes per second."""
    step = coding(kind.bits, tokens) if kind.bits else averaging(kind.group, tokens)
    count = copies(ROWS * tokens * DIM * DTYPE.itemsize)
    shape = (tokens, ROWS, DIM)
    keys = [(torch.randn(shape, dtype=DTYPE, device="cuda").transpose(0, 1),) for _ in range(count)]
    took, moved = microseconds(step, keys), kind.bytes_of(tokens)
    del keys
    floor, copy = moved / rate * 1e6, copy_microseconds(moved)
    return {
        "kind": kind.name,
        "tokens": tokens,
        "bytes": moved,
        "microseconds": took,
        "floor_microseconds": floor,
        "measured_over_floor": took / floor,
        "peers": {"copy": copy},
        "share_of_copy": copy / took,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "summarize.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("a CUDA device wanted, got none", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    rate = 2**31 / copy_microseconds(2**31) * 1e6
    cases = [measure(kind, tokens, rate) for kind in KINDS for tokens in TOKENS]
    write_json(
        options.json,
        {
            "benchmark": "summarize",
            "environment": environment("cuda"),
            "model": {"name": f"{ROWS} KV heads x {DIM}, bfloat16"},
            "settings": {"kinds": [kind.name for kind in KINDS], "tokens": list(TOKENS)},
            "rate": rate,
            "cases": cases,
        },
    )
    table = Table(title=f"summaries of keys, microseconds; a copy runs at {rate / 1e9:,.0f} GB/s")
    for heading in ("what", "tokens", "hga", "measured / floor", "copy", "share of the copy's bandwidth"):
        table.add_column(heading, justify="right")
    for case in cases:
        numbers = (f"{case['microseconds']:.1f}", f"{case['measured_over_floor']:.2f}")
        beside = (f"{case['peers']['copy']:.1f}", f"{case['share_of_copy']:.0%}")
        table.add_row(case["kind"], str(case["tokens"]), *numbers, *beside)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
