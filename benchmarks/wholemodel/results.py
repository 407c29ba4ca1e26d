"""Points of a whole model on disk: what is there is kept, what is measured again takes its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import write_json

__all__ = ["Results"]


class Results:
    """The points of one JSON file, written after each of them.

    Parameters
    ----------
    path : Path
        The file; read if it is there.
    header : dict
        Benchmark, environment, model and settings.
    fresh : bool
        Forget what is there.
    by : str
        The number that tells the points of a system apart.

    Raises
    ------
    SystemExit
        The file has points of another model or of other settings.
    """

    def __init__(self, path: Path, header: dict[str, Any], fresh: bool = False, by: str = "context") -> None:
        self.path, self.header, self.by = path, header, by
        self.points: list[dict[str, Any]] = []
        if fresh or not path.is_file():
            return
        old = json.loads(path.read_text(encoding="utf-8"))
        for part in ("model", "settings"):
            if old[part] != json.loads(json.dumps(header[part])):
                raise SystemExit(
                    f"{path.name} has points of another {part}: {old[part]}, got {header[part]}; "
                    "write to another file (--json) or begin anew (--fresh)"
                )
        self.points = old["points"]

    def has(self, system: str, number: int, code: str) -> bool:
        """Say whether a point was measured with this code, and came to an end of its own."""
        done = ("ok", "out of memory", "out of host memory", "unavailable")
        return any(
            point["code"] == code and point["status"] in done
            for point in self.points
            if self._key(point) == (system, number)
        )

    def add(self, point: dict[str, Any]) -> None:
        """Put a point in and write the file."""
        self.points = [old for old in self.points if self._key(old) != self._key(point)]
        self.points = sorted([*self.points, point], key=lambda one: (one[self.by], one["order"]))
        write_json(self.path, {**self.header, "points": self.points})

    def _key(self, point: dict[str, Any]) -> tuple[str, int]:
        return point["system"], point[self.by]
