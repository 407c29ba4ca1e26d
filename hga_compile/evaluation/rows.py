"""The rows of a comparison: profiles to measure, and the window-only control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hga_compile.evaluation.reference import MODE_OPTIONS

CONTROL = "window only"
CONTROL_OPTIONS = {"routing.window.fraction": 1.0}  # the whole budget is window: nothing is left to choose


@dataclass(frozen=True)
class Row:
    """One setting to measure: its name in the table, its compile options, and what identifies it."""

    name: str
    options: Mapping[str, object]
    identity: str
    routing: Mapping[str, Any]
    """The profile's routing section as it is in force, for the result."""

    def in_mode(self, mode: str) -> dict[str, object]:
        """Return the compile options that measure this row in a mode."""
        return {**self.options, **MODE_OPTIONS[mode]}


def make_rows(profiles: Sequence[str], extra: Mapping[str, object], control: bool = True) -> list[Row]:
    """Return the rows to measure: the control on the first profile's budget, then each profile.

    Parameters
    ----------
    profiles
        Names or paths.
    extra
        Options laid over each of them.
    control
        Whether to have the control.

    Raises
    ------
    ProfileError
        If a profile or an option is wrong.
    ValueError
        If two rows would have one name.
    """
    from hga_compile.configs.loader import resolve_profile

    wanted = [(CONTROL, {"profile": profiles[0], **extra, **CONTROL_OPTIONS})] if control else []
    wanted += [(Path(profile).stem, {"profile": profile, **extra}) for profile in profiles]
    if len({name for name, _ in wanted}) < len(wanted):
        raise ValueError(f"profiles must differ in their names, got {', '.join(profiles)} (--profile)")
    rows = []
    for name, options in wanted:
        profile = resolve_profile(options)
        rows.append(Row(name, options, profile.digest(), profile.model_dump(mode="json")["routing"]))
    return rows
