"""The demo's result as a table: dense beside HGA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hga_compile.cli.output import console, percent, rate, size
from hga_compile.demo.text import ANSWER, FACT, QUESTION

if TYPE_CHECKING:
    from hga_compile.demo.result import Result, Side

Row = tuple[str, str, str]


def print_result(result: Result) -> None:
    """Print the table to stdout."""
    from rich.table import Table

    settings = result.settings
    out = console()
    table = Table(
        title=f"{settings.tokens:,} tokens of context, profile {settings.profile.name}, {settings.device}",
        title_justify="left",
        show_lines=False,
    )
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("hga", justify="right", style="bold")
    for name, dense, hga in rows(result):
        table.add_row(name, dense, hga)
    where = result.document.fact.start
    out.print(f"planted    {FACT!r} at token {where:,}", markup=False)
    out.print(f"asked      {QUESTION!r}", markup=False)
    out.print(table)
    inner = settings.inner or settings.profile.compile.inner
    out.print(
        f"compiled once in {result.compile_seconds:.0f} s (--inner {inner}); "
        f"the whole demo took {result.seconds:.0f} s"
    )
    if settings.picture is not None:
        out.print(f"routes drawn to {settings.picture}", markup=False)


def rows(result: Result) -> Iterator[Row]:
    """Name, dense and HGA of every line of the table."""
    dense, hga = result.dense, result.hga
    yield "answer", dense.reading.text, hga.reading.text
    yield f"answer is {ANSWER}", _yes(dense), _yes(hga)
    yield (
        f"NLL of the last {result.scored:,} tokens (nats)",
        f"{dense.reading.nll:.4f}",
        f"{hga.reading.nll:.4f} ({result.delta_nll:+.4f})",
    )
    yield "KL(dense || hga), same tokens (nats)", "0", f"{result.divergence:.4f}"
    yield "same first choice, same tokens", "100%", percent(result.agreement)
    for phase in ("prefill", "decode"):
        ours = hga.prefill_reads if phase == "prefill" else hga.decode_reads
        yield f"attended tokens, {phase}", "100%", percent(ours["attended"])
        parts = f"{percent(ours['kv_bytes_read'])} + {percent(ours['summary_bytes_read'])}"
        yield f"bytes read, {phase}: token K/V + summaries", "100% + 0%", parts
    yield "K/V and summaries read by a decoded token", size(dense.read_per_token), size(hga.read_per_token)
    if result.settings.device.type == "cuda":
        yield (
            "K/V in accelerator memory",
            size(dense.memory["accelerator_kv"]),
            size(hga.memory["accelerator_kv"]),
        )
        yield (
            "most accelerator memory allocated",
            size(dense.reading.peak_bytes),
            size(hga.reading.peak_bytes),
        )
    yield "K/V in host memory", size(dense.memory["host_kv"]), size(hga.memory["host_kv"])
    yield "index of summaries", "-", size(hga.memory["accelerator_index"])
    yield "prefill", rate(dense.reading.prefill.rate), rate(hga.reading.prefill.rate)
    yield "decode", rate(dense.reading.decode.rate), rate(hga.reading.decode.rate)


def _yes(side: Side) -> str:
    return "yes" if side.reading.correct else "no"
