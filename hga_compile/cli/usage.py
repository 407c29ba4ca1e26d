"""The lines that ``hga run`` prints after the text."""

from __future__ import annotations

from typing import Any

from hga_compile.cli.output import percent, rate, size


def summary(result: dict[str, Any]) -> list[str]:
    """Lines on speed, attended tokens, bytes read, and the places of the K/V.

    Parameters
    ----------
    result
        What ``hga run --json`` writes.
    """
    lines = [_phase(phase, result[phase]) for phase in ("prefill", "decode")]
    held = result["memory"]
    lines.append(
        f"K/V      accelerator {size(held['accelerator_kv'])}, index {size(held['accelerator_index'])}, "
        f"host {size(held['host_kv'])}, nvme {size(held['nvme_kv'])}"
    )
    sites = result["sites"]
    if sites is not None:
        lines.append(
            f"sites    {sites['routed']} routed, {sites['dense']} dense in {sites['graphs']} graphs "
            "(hga explain says why)"
        )
        lines.extend(f"fallback {count} x {reason}" for reason, count in sites["fallbacks"].items())
    return lines


def _phase(phase: str, use: dict[str, Any]) -> str:
    if not use["tokens"]:
        return f"{phase:8} no forward pass"
    parts = f"token K/V {percent(use['kv_bytes_read'])} + summaries {percent(use['summary_bytes_read'])}"
    return (
        f"{phase:8} {use['tokens']:,} tokens, {_speed(use)}; attended {percent(use['attended'])}; "
        f"read {parts} of dense"
    )


def _speed(use: dict[str, Any]) -> str:
    steady, seconds = use["tokens_per_second"], f"{use['seconds']:.1f} s"
    if not use["compiled_steps"]:
        return f"{rate(steady)} ({seconds})"
    return f"{rate(steady)} ({seconds} with compilation)" if steady else f"{seconds} with compilation"
