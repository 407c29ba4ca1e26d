"""What came out of a study, in words and as plain data."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hga_compile.tuning.search import feasible

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hga_compile.tuning.measure import Quality
    from hga_compile.tuning.quality import Calibration
    from hga_compile.tuning.search import Goal
    from hga_compile.tuning.tune import Request

__all__ = ["command_line", "facts_of", "plain", "why_none"]


def facts_of(
    request: Request, calibration: Calibration, goal: Goal, taken: FrozenTrial, start: FrozenTrial | None,
    verified: Quality | None, where: dict[str, object], command: str,
) -> dict[str, Any]:  # fmt: skip
    """Return the comment lines of a profile: what was measured, where, and with what."""
    card, shown = request.target.card, taken.user_attrs
    texts = ", ".join(shown["by_text"])
    if request.checkpoint.own:
        origin = f"measured on {calibration.facts['name']}, SHA-256 {str(calibration.facts['sha256'])[:16]}"
    else:
        origin = (
            f"TRANSFERRED, not measured on {card.name}: of {request.checkpoint.card.name}, SHA-256 "
            f"{str(calibration.facts['sha256'])[:16]}"
        )
    quality = (
        f"KL {taken.values[0]:.4f}, delta NLL {shown['delta_nll']:+.4f} nats a token against dense; "
        f"{shown['kv_bytes']:.1%} of the K/V's bytes read and {shown['summary_bytes']:.1%} of summaries"
    )
    scored = f"{texts}; the last {request.scored} tokens of each, dense prefill, every query routed by itself"
    plan = goal.memory(goal.space.profile(taken.params, "x"))
    room = ", ".join(
        f"{place} {plan.used(place) / 2**30:.2f} of {size / 2**30:.1f} GiB"
        for place, size in plan.room.items()
    )
    facts: dict[str, Any] = {
        "Made by": command,
        "Quality": f"{origin}. {quality}",
        "Texts": scored,
        "Decode": f"{taken.values[1]:.2f} ms a token at {request.context:,} tokens ({goal.latency.how})",
        "Memory": f"{room} (computed)",
    }
    if start is not None:
        numbers = f"KL {start.values[0]:.4f}, delta NLL {start.user_attrs['delta_nll']:+.4f}"
        facts["Default setting"] = f"{numbers}, {start.values[1]:.2f} ms a token"
    if verified is not None:
        facts["Compiled model"] = (
            f"KL {verified.kl:.4f}, delta NLL {verified.delta_nll:+.4f} on the same texts"
        )
    facts["Trial"] = f"{taken.number} of study {request.name}.full, seed {request.seed}, {request.sampler}"
    versions = f"torch {where['torch']}, transformers {where['transformers']}, code {where['code']}"
    facts["Where"] = f"{where['device']}, {versions}, {datetime.date.today().isoformat()}"
    return facts


def why_none(finished: Sequence[FrozenTrial], interrupted: bool) -> str:
    """Name the constraint that most trials break."""
    if not finished:
        what = "interrupted before" if interrupted else "the time was over before"
        return f"{what} any setting was measured on the full model; raise --timeout, or go on with --resume"
    broken: dict[str, list[float]] = {}
    for trial in finished:
        for name, value in trial.constraints.items():
            if value > 0:
                broken.setdefault(name, []).append(value)
    name = max(broken, key=lambda one: (len(broken[one]), min(broken[one])))
    knob = {"delta_nll": "--max-delta-nll", "vram_gib": "--gpu, --context", "ram_gib": "--tiers, --context"}
    knob["read_share"] = "--max-read"
    return (
        f"none of {len(finished)} settings keeps all constraints: {name} binds in {len(broken[name])}, the "
        f"nearest miss is {min(broken[name]):.4f} over ({knob.get(name, '--context')})"
    )


def plain(trial: FrozenTrial) -> dict[str, Any]:
    """Return a finished trial as plain data."""
    return {
        "number": trial.number,
        "params": trial.params,
        "values": list(trial.values),
        "constraints": dict(trial.constraints),
        "feasible": feasible(trial),
        **{key: value for key, value in trial.user_attrs.items()},
    }


def command_line(arguments: Sequence[str]) -> str:
    """Return how a run is written on the command line, without this machine's folders."""
    shown, skip = ["hga-tune"], False
    for argument in arguments:
        if skip or argument.startswith(("--out=", "--storage=", "--profile-out=")):
            skip = False
            continue
        if argument in ("--out", "--storage", "--profile-out"):
            skip = True
            continue
        if argument in ("--resume", "--json"):
            continue
        path = Path(argument)
        shown.append(path.name if path.is_absolute() else argument)
    return shlex.join(shown)
