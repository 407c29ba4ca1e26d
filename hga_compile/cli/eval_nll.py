"""``hga eval nll``: distance from dense attention on texts, by position."""

from __future__ import annotations

from typing import Annotated

import typer

from hga_compile.cli import eval_common as common
from hga_compile.cli import eval_options as asked
from hga_compile.cli import options
from hga_compile.cli.errors import guarded
from hga_compile.cli.output import console, note, print_json, quiet_bars


@guarded
def nll(
    model: options.Model,
    files: asked.Files = None,
    text: asked.Text = None,
    corpus: asked.Corpus = None,
    profile: asked.Profiles = None,
    lengths: asked.Lengths = "4096,8192",
    mode: asked.Modes = "decode,all",
    scored: asked.Scored = 1024,
    buckets: Annotated[int, typer.Option(min=1, help="Runs of positions to divide these into.")] = 4,
    changes: asked.Set = None,
    out: asked.Out = None,
    resume: asked.Resume = False,
    picture: asked.Picture = True,
    device: options.Device = "auto",
    dtype: options.DTypeChoice = options.DType.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Predict the last tokens of texts, teacher-forced, and compare with dense attention.

    Rows: dense, the profile's budget spent on the latest tokens alone (window only), and each profile. NLL,
    KL(dense || row), agreement of the likeliest token, and the shares of tokens and bytes read, with 95%
    intervals from resampling the texts.
    """
    request = asked.request(locals())
    quiet_bars()
    sizes = asked.split_numbers(lengths, "--lengths", 2)
    common.check_scored(scored, request, sizes)
    asked.split_modes(mode)
    common.prepare_out(out, resume, picture)
    documents = common.read_texts(request.texts, corpus, asked.TEXTS)
    setup = common.set_up(request, "nll", sizes, {"scored": scored, "buckets": buckets})
    from hga_compile.evaluation import nll as evaluation

    cases, used = common.scored_cases(setup, documents, scored, buckets)
    header = {**setup.header, "documents": [document.entry() for document in used]}
    study = common.study_of(request, header)
    common.run_cases(setup, study, cases)
    summary = evaluation.summarise(study.runs)
    result = study.save({"summary": summary})
    if out is not None:
        from hga_compile.evaluation.files import write_csv

        write_csv(out / "nll.csv", evaluation.flat(summary))
        if picture:
            from hga_compile.evaluation.pictures import draw_nll

            draw_nll(out / "nll.png", summary, f"{header['model']['name']}, {len(used)} texts")
    if as_json:
        print_json(result)
        return
    from hga_compile.evaluation.tables import print_fallbacks, print_nll

    screen = console()
    print_nll(screen, summary)
    print_fallbacks(screen, study.runs)
    if out is not None:
        note(f"saved in {out}")
