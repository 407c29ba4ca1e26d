"""``hga plan``: where a model's memory goes on a GPU, whether it fits, and what would make it fit."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hga_compile.cli import options
from hga_compile.cli.errors import BadInputError, guarded
from hga_compile.cli.output import console, note, print_json, size

if TYPE_CHECKING:
    from hga_compile.tuning.memory import MemoryPlan

_PLACES = {"gpu": "GPU memory", "host": "host RAM", "nvme": "drive"}
_ON_CPU = {**_PLACES, "gpu": "RAM"}


class Tier(StrEnum):
    """Choices of ``--tier``."""

    gpu = "gpu"
    host = "host"
    nvme = "nvme"


@guarded
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Name of the catalogue, hub id, or local folder.", show_default=False
        ),
    ],
    gpu: Annotated[
        str, typer.Option("--gpu", help="Name of the catalogue; auto: the present device.")
    ] = "auto",
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens.", show_default="the model's longest")
    ] = None,
    tier: Annotated[
        Tier | None,
        typer.Option("--tier", help="Home of the token K/V.", show_default="the profile's"),
    ] = None,
    profile: options.ProfileName = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")] = 1,
    prefill_step: Annotated[
        int, typer.Option("--prefill-step", min=1, help="Prompt tokens a forward pass.")
    ] = 1024,
    ram_layers: Annotated[
        int,
        typer.Option(
            "--ram-layers", min=0, help="Decoder layers whose weights stay in host RAM (accelerate)."
        ),
    ] = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what goes where in memory, whether it fits, and what would make it fit; nothing is loaded.

    Examples: hga plan qwen3-30b --gpu rtx5090 --context 65536; hga plan ./checkpoint --tier gpu --json
    """
    from hga_compile.configs.catalogue import CatalogueError
    from hga_compile.tuning.fit import longest_context, remedies, with_tier
    from hga_compile.tuning.memory import plan_memory
    from hga_compile.tuning.target import TargetError, find_gpu, find_model

    try:
        target, device = find_model(model, say=note), find_gpu(gpu)
    except (CatalogueError, TargetError) as error:
        raise BadInputError(str(error)) from None
    card, settings = target.card, options.pick_profile(profile)
    if tier is not None:
        settings = with_tier(settings, tier.value)
    tokens = context or card.context.max_tokens
    if ram_layers > card.geometry.layers:
        raise BadInputError(f"{card.name} has {card.geometry.layers} layers, got {ram_layers} (--ram-layers)")
    if ram_layers and device.kind == "cpu":
        raise BadInputError("a CPU has one memory: --ram-layers is for a GPU (--gpu)")
    given = {"batch": batch, "step": prefill_step, "ram_layers": ram_layers}
    found = plan_memory(card, device, settings, tokens, **given)
    result: dict[str, Any] = {
        "model": card.name,
        "gpu": device.name,
        "kind": device.kind,
        "context": tokens,
        "model_context": card.context.max_tokens,
        "profile": settings.name,
        **given,
        **describe(found),
        "longest_context": longest_context(card, device, settings, **given),
        "remedies": [vars(remedy) for remedy in remedies(card, device, settings, found, **given)],
    }
    if as_json:
        print_json(result)
    else:
        _print(result)


def describe(plan: MemoryPlan) -> dict[str, Any]:
    """Return a plan as plain data."""
    return {
        "tier": plan.tier,
        "fits": plan.fits,
        "max_memory": plan.max_memory,
        "parts": [vars(part) for part in plan.parts],
        "places": {
            place: {"used": plan.used(place), "room": room, "spare": -plan.lacks(place)}
            for place, room in plan.room.items()
        },
    }


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    places = _ON_CPU if result["kind"] == "cpu" else _PLACES
    head = f"{result['model']} on {result['gpu']}, {result['context']:,} tokens"
    table = Table(title=f"{head}, profile {result['profile']}", title_justify="left")
    for name in ("what", "where", "size", "how"):
        table.add_column(name, justify="right" if name == "size" else "left")
    for part in result["parts"]:
        if part["bytes"]:
            table.add_row(part["name"], places[part["place"]], size(part["bytes"]), part["how"])
    out = console()
    out.print(table)
    for place, numbers in result["places"].items():
        spare = numbers["spare"]
        verdict = f"{size(spare)} to spare" if spare >= 0 else f"{size(-spare)} too much"
        out.print(f"{places[place]}: {size(numbers['used'])} of {size(numbers['room'])}, {verdict}")
    if result["max_memory"]:
        room = ", ".join(
            f'{place!r}: "{-(-held // 2**20)}MiB"' for place, held in result["max_memory"].items()
        )
        out.print(f'Weights: from_pretrained(..., device_map="auto", max_memory={{{room}}})', soft_wrap=True)
    if result["fits"]:
        out.print(f"It fits; the most that does is {result['longest_context']:,} tokens.")
    else:
        out.print("It does not fit. What would make it fit, each by itself:")
        for remedy in result["remedies"]:
            out.print(f"  {remedy['change']}: {remedy['why']}")
        if not result["remedies"]:
            out.print("  no single change does")
    if result["context"] > result["model_context"]:
        out.print(f"The model was made for {result['model_context']:,} tokens.")
