"""``hga eval layers``: which layers need a larger budget, and a profile that gives it to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hga_compile.cli import eval_common as common
from hga_compile.cli import eval_options as asked
from hga_compile.cli import options
from hga_compile.cli.errors import BadInputError, guarded
from hga_compile.cli.output import console, note, print_json, progress, quiet_bars

if TYPE_CHECKING:
    from hga_compile.configs.profile import Profile
    from hga_compile.evaluation.rows import Row
    from hga_compile.evaluation.single_layer import OneLayer
    from hga_compile.evaluation.study import Case, Study


@guarded
def layers(
    model: options.Model,
    files: asked.Files = None,
    text: asked.Text = None,
    corpus: asked.Corpus = None,
    profile: Annotated[
        str, typer.Option("--profile", help="Built-in profile or path of a YAML file.")
    ] = "default",
    lengths: asked.Lengths = "4096",
    factors: Annotated[
        str, typer.Option("--factors", metavar="X,X", help="Multiples of a layer's budget; 1 is among them.")
    ] = "0.5,1,2",
    scored: asked.Scored = 256,
    changes: asked.Set = None,
    out: asked.Out = None,
    resume: asked.Resume = False,
    picture: asked.Picture = True,
    device: options.Device = "auto",
    dtype: options.DTypeChoice = options.DType.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Route one layer at a time, the others dense, and suggest a budget for each.

    KL(dense || one layer routed) of the last tokens of texts behind a dense prefill, at multiples of the
    layer's budget. From these the multiples with the least sum at the same mean budget, as
    `routing.overrides` and as a profile (--out). Measure it on other texts with
    `hga eval nll MODEL --profile default --profile OUT/layers.yaml`.
    """
    request = asked.request(locals() | {"profile": [profile], "mode": "decode"})
    quiet_bars()
    sizes = asked.split_numbers(lengths, "--lengths", 2)
    multiples = split_factors(factors)
    common.check_scored(scored, request, sizes)
    common.prepare_out(out, resume, picture)
    documents = common.read_texts(request.texts, corpus, asked.TEXTS)
    more = {"scored": scored, "factors": multiples}
    setup = common.set_up(request, "layers", sizes, more)
    from hga_compile.configs.loader import resolve_profile, save_profile
    from hga_compile.evaluation import nll, sensitivity
    from hga_compile.evaluation.single_layer import OneLayer

    cases, used = common.scored_cases(setup, documents, scored, 1)
    chosen = resolve_profile(setup.rows[-1].options)
    _check_routed(chosen, sizes, multiples)
    header = {**setup.header, "documents": [document.entry() for document in used]}
    study = common.study_of(request, header)
    one = OneLayer(setup.model)
    count = setup.model.config.get_text_config(decoder=True).num_hidden_layers
    with one.installed():
        rows = sensitivity.layer_rows(chosen, one.layers(), count, multiples)
        if not rows:
            raise BadInputError("every layer is dense in this profile; change routing.dense_layers (--set)")
        _scan(study, cases, rows, one)
    found = sensitivity.curves(nll.summarise(study.runs), rows)
    suggested = sensitivity.suggest(study.runs, rows, chosen.routing, count)
    result = study.save({"layers": found, "suggested": suggested})
    if out is not None:
        _write(out, found, str(header["model"]["name"]), len(used), picture)
        save_profile(sensitivity.with_overrides(chosen, suggested["overrides"]), out / "layers.yaml")
    if as_json:
        print_json(result)
        return
    from hga_compile.evaluation.tables import print_layers

    print_layers(console(), found, suggested)
    if out is not None:
        note(f"saved in {out}; {out / 'layers.yaml'} is a profile with these budgets")


def split_factors(text: str) -> list[float]:
    """Read ``0.5,1,2``."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = [-1.0]
    if not all(0.0 < factor <= 1000.0 for factor in found) or 1.0 not in found:
        raise BadInputError(
            f"factors must be numbers above 0 with commas, 1 among them, got {text!r} (--factors)"
        )
    return found


def _check_routed(profile: Profile, sizes: Sequence[int], factors: Sequence[float]) -> None:
    """Refuse lengths at which the largest budget, or a threshold, leaves nothing to choose."""
    from hga_compile.evaluation.sensitivity import scaled

    routing, least = profile.routing, min(sizes)
    bound = max(routing.dense_below, routing.centre_tokens)
    most = scaled(routing.budget, max(factors)).tokens_for(least)
    if least <= bound or most >= least:
        raise BadInputError(
            f"a text must be longer than what is dense anyway, got {least} tokens, dense up to {bound}, "
            f"largest budget {most}; raise --lengths or lower --factors"
        )


def _scan(study: Study, cases: Sequence[Case], rows: Sequence[Row], one: OneLayer) -> None:
    from hga_compile.evaluation.study import case_tokens

    made = {row.name: one.candidate(row.options["layer"], row.options["routing"]) for row in rows}  # type: ignore[arg-type]  # as layer_rows made them
    total = len(rows) * sum(case_tokens(case, "decode") for case in cases)
    with progress("tokens read", total) as advance:
        one.advance = advance
        for case in cases:
            study.case(case, rows, ["decode"], one.model, lambda row, mode: made[row.name], advance)


def _write(out: Path, found: Sequence[dict[str, Any]], name: str, texts: int, picture: bool) -> None:
    from hga_compile.evaluation.files import write_csv
    from hga_compile.evaluation.sensitivity import flat

    write_csv(out / "layers.csv", flat(found))
    if picture:
        from hga_compile.evaluation.pictures import draw_layers

        draw_layers(out / "layers.png", found, f"{name}, {texts} texts")
