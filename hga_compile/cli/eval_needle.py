"""``hga eval needle`` and ``hga eval ruler``: facts planted in a text and asked for at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hga_compile.cli import eval_common as common
from hga_compile.cli import eval_options as asked
from hga_compile.cli import options
from hga_compile.cli.errors import BadInputError, guarded
from hga_compile.cli.output import console, note, print_json, quiet_bars

RULER = ("multi-key", "multi-value", "variables")

Trials = Annotated[int, typer.Option("--trials", min=1, help="Cases for each length and depth.")]
Depths = Annotated[
    str, typer.Option("--depths", metavar="D,D", help="Where the fact is planted: 0 the start, 1 the end.")
]


@guarded
def needle(
    model: options.Model,
    files: asked.Files = None,
    text: asked.Text = None,
    profile: asked.Profiles = None,
    lengths: asked.Lengths = "4096,8192",
    depths: Depths = "0,0.25,0.5,0.75,1",
    keys: Annotated[
        str, typer.Option("--keys", metavar="N,N", help="Facts planted, of which one is asked for.")
    ] = "1,4",
    trials: Trials = 2,
    mode: asked.Modes = "decode",
    changes: asked.Set = None,
    out: asked.Out = None,
    resume: asked.Resume = False,
    picture: asked.Picture = True,
    device: options.Device = "auto",
    dtype: options.DTypeChoice = options.DType.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Map which planted facts are found, by depth and length, beside dense attention.

    A number of seven digits is hidden in a text (the demo's novel, or --text) under a key, alone or among
    other keys, and asked for at the end: exact match and NLL of the answer.
    """
    request = asked.request(locals())
    counts = asked.split_numbers(keys, "--keys", 1)
    tasks = [("single" if count == 1 else "multi-key", count) for count in counts]
    _run(request, "needle", tasks, depths, trials)


@guarded
def ruler(
    model: options.Model,
    files: asked.Files = None,
    text: asked.Text = None,
    profile: asked.Profiles = None,
    lengths: asked.Lengths = "4096,8192",
    depths: Depths = "0,0.5",
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="NAME,NAME", help=f"Of {', '.join(RULER)}.")
    ] = ",".join(RULER),
    count: Annotated[int, typer.Option(min=2, help="Keys, values, or variables of a chain.")] = 4,
    trials: Trials = 2,
    mode: asked.Modes = "decode",
    changes: asked.Set = None,
    out: asked.Out = None,
    resume: asked.Resume = False,
    picture: asked.Picture = True,
    device: options.Device = "auto",
    dtype: options.DTypeChoice = options.DType.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Ask for several facts: one of many keys, all values of a key, all variables of a chain.

    The answer is teacher-forced, in the order of the text; "parts found" counts its parts by themselves.
    """
    request = asked.request(locals())
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    if unknown := [name for name in names if name not in RULER]:
        raise BadInputError(
            f"a task must be one of {', '.join(RULER)}, got {', '.join(map(repr, unknown))} (--tasks)"
        )
    _run(request, "ruler", [(name, count) for name in names], depths, trials)


def split_depths(text: str) -> list[float]:
    """Read ``0,0.5,1``."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0.0 <= depth <= 1.0 for depth in found):
        raise BadInputError(f"depths must be numbers from 0 to 1 with commas, got {text!r} (--depths)")
    return sorted(set(found))


def _run(
    request: asked.Request, command: str, tasks: Sequence[tuple[str, int]], depths: str, trials: int
) -> None:
    quiet_bars()
    sizes = asked.split_numbers(request.lengths, "--lengths", 256)
    places = split_depths(depths)
    asked.split_modes(request.mode)
    out = request.out
    common.prepare_out(out, request.resume, request.picture)
    hay, source = _hay(request.texts)
    more = {"tasks": [list(task) for task in tasks], "depths": places, "trials": trials, "text": source}
    setup = common.set_up(request, command, sizes, more)
    from hga_compile.evaluation import needles

    try:
        haystack = needles.Haystack.of(hay, setup.tokenizer)
        plans = needles.plans(tasks, sizes, places, trials)
        cases = [needles.build(plan, haystack, setup.tokenizer) for plan in plans]
    except needles.HaystackError as error:
        raise BadInputError(str(error)) from None
    study = common.study_of(request, setup.header)
    common.run_cases(setup, study, cases)
    summary = needles.summarise(study.runs)
    result = study.save({"summary": summary})
    if out is not None:
        _write(out, command, summary, str(setup.header["model"]["name"]), request.picture)
    if request.as_json:
        print_json(result)
        return
    from hga_compile.evaluation.tables import print_fallbacks, print_needles

    screen = console()
    print_needles(screen, summary)
    print_fallbacks(screen, study.runs)
    if out is not None:
        note(f"saved in {out}")


def _hay(files: Sequence[Path]) -> tuple[str, str]:
    """Return the text to hide facts in, and its name."""
    if files:
        documents = common.read_texts(files, None, "")
        return "\n\n".join(document.text for document in documents), ", ".join(d.title for d in documents)
    from hga_compile.demo.text import paragraphs

    return "\n\n".join(paragraphs()), "Jane Austen: Persuasion (the demo's)"


def _write(out: Path, command: str, summary: Sequence[dict[str, Any]], name: str, picture: bool) -> None:
    from hga_compile.evaluation.files import write_csv
    from hga_compile.evaluation.needles import flat

    write_csv(out / f"{command}.csv", flat(summary))
    if picture:
        from hga_compile.evaluation.pictures import draw_needles

        draw_needles(out / f"{command}.png", summary, name)
