"""Options that the commands of ``hga eval`` share, and how their values are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from hga_compile.cli import options
from hga_compile.cli.errors import BadInputError

Files = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[FILE]...", help="More text files: --text *.txt works.", show_default=False),
]
Text = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="FILE", help="UTF-8 text file, or a folder of them; may be repeated."),
]
TEXTS = "emma,asyncio,email,hamlet"
Corpus = Annotated[
    str | None,
    typer.Option(
        "--corpus", metavar="NAME,NAME", help="Named texts, see `hga eval texts`.", show_default=TEXTS
    ),
]
Scored = Annotated[
    int, typer.Option("--scored", min=1, help="Tokens at the end of each sequence to predict.")
]
Profiles = Annotated[
    list[str] | None,
    typer.Option(
        "--profile", help="Built-in profile or path of a YAML file; may be repeated.", show_default="default"
    ),
]
Lengths = Annotated[str, typer.Option("--lengths", metavar="N,N", help="Tokens of each sequence.")]
Modes = Annotated[
    str,
    typer.Option(
        "--mode",
        metavar="MODE,MODE",
        help="decode: dense prefill, then each scored query routed by itself; all: every query routed.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a setting of every profile: routing.budget.fraction=0.02.",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder for JSON, CSV and PNG of the result.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Keep the runs in --out that still hold.")]
Picture = Annotated[bool, typer.Option("--picture/--no-picture", help="Draw a PNG into --out, or not.")]


@dataclass(frozen=True)
class Request:
    """The options that all evaluations take, as they were given."""

    model: str
    text: list[Path] | None
    files: list[Path] | None
    profile: list[str] | None
    lengths: str
    mode: str
    changes: list[str] | None
    out: Path | None
    resume: bool
    picture: bool
    device: str
    dtype: options.DType
    as_json: bool
    debug: bool

    @property
    def texts(self) -> list[Path]:
        """Files of --text, and those behind the first that a shell made of one pattern."""
        return [*(self.text or ()), *(self.files or ())]


def request(given: Mapping[str, Any]) -> Request:
    """Return the shared options among a command's parameters, by name: its `locals()` will do."""
    return Request(**{part.name: given[part.name] for part in fields(Request)})


def split_numbers(text: str, option: str, least: int) -> list[int]:
    """Read ``4096,8192``.

    Raises
    ------
    BadInputError
        Anything else, or a number below `least`.
    """
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if any(number < least for number in numbers):
        raise BadInputError(
            f"{option} must be whole numbers from {least} on with commas, got {text!r} ({option})"
        )
    return list(dict.fromkeys(numbers))


def split_modes(text: str) -> list[str]:
    """Read ``decode,all``."""
    from hga_compile.evaluation.reference import MODES

    modes = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise BadInputError(
            f"a mode must be {' or '.join(MODES)}, got {', '.join(map(repr, unknown))} (--mode)"
        )
    return modes


def settings(pairs: Sequence[str]) -> dict[str, object]:
    """Read ``FIELD=VALUE`` pairs; values are YAML.

    Raises
    ------
    BadInputError
        Text without ``=``.
    """
    from hga_compile.configs.options import SHORTHANDS
    from hga_compile.configs.yaml_source import parse_yaml

    # Numbers do not depend on the inner compiler, and eager starts at once.
    found: dict[str, object] = {"compile.inner": "eager"}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise BadInputError(f"a setting must be FIELD=VALUE, got {pair!r}; try budget=0.02 (--set)")
        name = name.strip()
        # One name for a field, so that it is replaced, not given twice; what a budget means is in its type.
        key = name if name == "budget" or name not in SHORTHANDS else ".".join(map(str, SHORTHANDS[name]))
        found[key] = parse_yaml(value.encode(errors="surrogatepass"), f"--set {name}").data
    return found
