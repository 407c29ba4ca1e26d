"""``hga explain``: what is done with every attention site of a model, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hga_compile.cli import checkpoint, options
from hga_compile.cli.engine import Routed
from hga_compile.cli.errors import BadInputError, guarded
from hga_compile.cli.output import console, note, print_json, quiet_bars, quiet_libraries, status

if TYPE_CHECKING:
    import torch


@guarded
def explain(
    model: options.Model,
    profile: options.ProfileName = None,
    random: Annotated[
        bool,
        typer.Option("--random", help="Build the model from its configuration alone, with random weights."),
    ] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="With --random: keep the first N layers.", show_default="all")
    ] = None,
    device: options.Device = "auto",
    dtype: options.DTypeChoice = options.DType.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List every attention site of a model with its decision and the reason.

    The model is compiled and run on a few made-up tokens, prefill and decode.
    """
    quiet_bars()
    if layers is not None and not random:
        raise BadInputError("--layers shortens a random model, got it without --random")
    chosen = options.pick_profile(profile)
    place = options.pick_device(device)
    weights = options.pick_dtype(dtype, place)
    files = checkpoint.find_checkpoint(model, weights=not random, say=note)
    if not debug:
        quiet_libraries()
    with status("building the model" if random else "loading the model"):
        if random:
            loaded = checkpoint.random_model(files, place, weights, layers)
        else:
            loaded = checkpoint.load_model(files, place, weights)
    with status("compiling"):
        result = decisions(loaded, chosen, place)
    if as_json:
        print_json(result)
        return
    _print(result)


def decisions(model: Any, profile: Any, device: torch.device) -> dict[str, Any]:
    """Compile a model, run prefill and decode, and return the report's sites as plain data.

    Parameters
    ----------
    model
        Causal language model of transformers.
    profile
        Profile to compile with. The rest of the graph is not compiled: decisions do not depend on it.
    device
        Where the model is.
    """
    import torch

    import hga_compile

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(32, device=device)[None] % vocabulary
    engine = Routed(model, profile, inner="eager")
    cache, rest = engine.start(ids)
    with torch.no_grad():
        for piece in (rest, ids[:, :1]):
            engine.call(input_ids=piece, past_key_values=cache, use_cache=True)
    report = hga_compile.report()
    sites = [
        {
            "graph": site.graph,
            "layer": site.layer,
            "phase": site.phase,
            "site": site.site,
            "decision": "routed" if site.routed else "dense",
            "reason": str(site.reason),
            "detail": site.detail,
        }
        for site in report.sites
    ]
    routed = sum(site["decision"] == "routed" for site in sites)
    return {
        "model": type(model).__name__,
        "profile": profile.name,
        "kernels": profile.compile.kernels,
        "sites": sites,
        "routed": routed,
        "dense": len(sites) - routed,
        "fallbacks": dict(report.fallbacks),
    }


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"{result['model']} with profile {result['profile']}, kernels {result['kernels']}"
    table = Table(title=title, title_justify="left")
    for column in ("graph", "layer", "phase", "site", "decision", "reason", "detail"):
        table.add_column(column, justify="right" if column in ("graph", "layer") else "left")
    for site in result["sites"]:
        colour = "green" if site["decision"] == "routed" else "yellow"
        layer = "-" if site["layer"] is None else str(site["layer"])
        table.add_row(
            str(site["graph"]), layer, site["phase"], site["site"], f"[{colour}]{site['decision']}[/]",
            site["reason"], site["detail"],
        )  # fmt: skip
    out = console()
    out.print(table)
    out.print(f"{result['routed']} routed, {result['dense']} dense", highlight=False)
    for reason, count in result["fallbacks"].items():
        out.print(f"fallback: {count} x {reason}", highlight=False)
