"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from hga_compile.cli.errors import BadInputError

if TYPE_CHECKING:
    import torch

    from hga_compile.configs.profile import Profile


class DType(StrEnum):
    """Choices of ``--dtype``."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Hub id, local folder, or a GGUF file or folder.", show_default=False
    ),
]
ProfileName = Annotated[
    str | None,
    typer.Option("--profile", help="Built-in profile or path of a YAML file.", show_default="default"),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto (CUDA if there is one).")]
DTypeChoice = Annotated[
    DType,
    typer.Option("--dtype", help="Type of weights and K/V; auto: bfloat16 on CUDA, float32 on the CPU."),
]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")]


def pick_device(name: str) -> torch.device:
    """Device of a ``--device`` value.

    Raises
    ------
    BadInputError
        If the name is no CPU or CUDA device, or this machine does not have it.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise BadInputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r} (--device)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise BadInputError(f"device {name!r} is not there: found {found} CUDA devices; try cpu (--device)")
    return device


def pick_dtype(choice: DType, device: torch.device) -> torch.dtype:
    """Type of a ``--dtype`` value on a device."""
    import torch

    if choice is DType.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, choice.value)
    return dtype


def pick_profile(name: str | None) -> Profile:
    """Profile in force: the named one with the environment's changes, or the environment's own."""
    from hga_compile.configs.loader import resolve_profile

    return resolve_profile({} if name is None else {"profile": name})
