"""What the commands of ``hga eval`` share: texts, the folder of results, the model, the loop over cases."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hga_compile.cli import checkpoint, options
from hga_compile.cli.errors import BadInputError
from hga_compile.cli.eval_options import Request, settings, split_modes
from hga_compile.cli.output import note, progress, quiet_libraries, status

if TYPE_CHECKING:
    from hga_compile.evaluation.corpora import Document
    from hga_compile.evaluation.rows import Row
    from hga_compile.evaluation.study import Case, Run, Study


@dataclass(frozen=True)
class Setup:
    """A loaded model and what to measure with it."""

    model: Any
    tokenizer: Any
    rows: list[Row]
    modes: list[str]
    lengths: list[int]
    header: dict[str, Any]


def read_texts(files: Sequence[Path], corpus: str | None, default: str) -> list[Document]:
    """Return users' files, or the named texts.

    Raises
    ------
    BadInputError
        If both are given, or a file is no text.
    CorpusError
        If a named text cannot be fetched.
    """
    from hga_compile.evaluation import corpora

    if files and corpus is not None:
        raise BadInputError("texts are files (--text) or named ones (--corpus), got both; leave one out")
    try:
        if files:
            return corpora.read_files(files)
    except corpora.TextError as error:
        raise BadInputError(str(error)) from None
    names = list(dict.fromkeys((corpus or default).split(",")))
    if unknown := [name for name in names if name not in corpora.names()]:
        raise BadInputError(
            f"no text is named {', '.join(map(repr, unknown))}; `hga eval texts` lists them (--corpus)"
        )
    documents = []
    for name in names:
        with status(f"fetching {name}"):
            documents.append(corpora.load(name))
    return documents


def prepare_out(out: Path | None, resume: bool, picture: bool) -> None:
    """Make the folder of results, and raise at once if it cannot be used."""
    if out is None:
        if resume:
            raise BadInputError("--resume goes on from results in a folder, got none; name it with --out")
        return
    if picture:
        from hga_compile.evaluation.pictures import NoMatplotlib, need_matplotlib

        try:
            need_matplotlib()
        except NoMatplotlib as error:
            raise BadInputError(str(error)) from None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"folder {str(out)!r} cannot be made: {error.strerror} (--out)") from None


def check_scored(scored: int, request: Request, sizes: Sequence[int]) -> None:
    """Refuse to score all of a text."""
    if scored >= min(sizes):
        raise BadInputError(
            f"scored tokens must be fewer than every length, got {scored} and {request.lengths} (--scored)"
        )


def scored_cases(
    setup: Setup, documents: Sequence[Document], scored: int, buckets: int
) -> tuple[list[Case], list[Document]]:
    """Return the cases of texts whose last tokens are scored, and the texts that are long enough.

    Raises
    ------
    BadInputError
        If none is.
    """
    from hga_compile.evaluation import nll

    cases = nll.cases(documents, setup.lengths, scored, buckets, setup.tokenizer, say=note)
    if not cases:
        raise BadInputError(
            f"every text is shorter than {min(setup.lengths):,} tokens; give longer ones or smaller --lengths"
        )
    used = {case.where["text"] for case in cases}
    return cases, [document for document in documents if document.name in used]


def study_of(request: Request, header: dict[str, Any]) -> Study:
    """Return the runs of an evaluation, saved in --out under its name, gone on with where asked for."""
    from hga_compile.evaluation.study import Study

    path = None if request.out is None else request.out / f"{header['evaluation']}.json"
    return Study(header, path, request.resume, say_run)


def set_up(request: Request, command: str, lengths: list[int], more: dict[str, Any]) -> Setup:
    """Check the options that are left and load the model.

    Parameters
    ----------
    request
        Options of the command.
    command
        Name of the evaluation, for its result.
    lengths
        Tokens of the sequences.
    more
        Further settings, for its result.
    """
    modes = split_modes(request.mode)
    place = options.pick_device(request.device)
    files = checkpoint.find_checkpoint(request.model, say=note)
    if not request.debug:
        quiet_libraries()
    from hga_compile.evaluation.provenance import environment, model_facts

    profiles, pairs = request.profile or ["default"], request.changes or []
    rows = _rows(profiles, settings(pairs))
    with status("loading the model"):
        tokenizer = checkpoint.load_tokenizer(files)
        loaded = checkpoint.load_model(files, place, options.pick_dtype(request.dtype, place))
        facts = model_facts(files.folder / files.gguf if files.gguf else files.folder)
    most = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most and max(lengths) > most:
        note(f"note: sequences of {max(lengths):,} tokens; the model was made for {most:,}")
    header = {
        "evaluation": command,
        "environment": environment(str(place)),
        "model": facts,
        "settings": {
            "profiles": [Path(name).stem for name in profiles],
            "set": pairs,
            "lengths": lengths,
            "modes": modes,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            **more,
        },
        "routing": {row.name: row.routing for row in rows},
    }
    return Setup(loaded, tokenizer, rows, modes, lengths, header)


def run_cases(setup: Setup, study: Study, cases: Sequence[Case]) -> None:
    """Measure every row on every case, with a bar of the tokens that candidates read."""
    import torch._dynamo

    from hga_compile.evaluation.candidates import Candidate, RoutedCandidate
    from hga_compile.evaluation.study import case_tokens

    total = len(setup.rows) * sum(case_tokens(case, mode) for case in cases for mode in setup.modes)
    made: dict[tuple[str, str], Candidate] = {}
    # Each row is a backend of its own for the same forward.
    limit = torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024)
    with limit, progress("tokens read", total) as advance:

        def candidate(row: Row, mode: str) -> Candidate:
            if (row.name, mode) not in made:
                options = row.in_mode(mode)
                made[row.name, mode] = RoutedCandidate(setup.model, options, advance, dynamic=True)
            return made[row.name, mode]

        for case in cases:
            study.case(case, setup.rows, setup.modes, setup.model, candidate, advance)


def say_run(run: Run) -> None:
    """One line for each finished run, where no bar shows how far it is."""
    if sys.stderr.isatty():
        return
    head = [run.get("text") or f"{run['task']} {run['facts']} at {run['depth']:.0%}", f"{run['length']:,}"]
    numbers = f"delta NLL {run['delta_nll']:+.4f}, KL {run['kl']:.4f}"
    exact = f", exact {run['exact']:.0f}" if "exact" in run else ""
    note(f"{' '.join(head)} {run['row']} {run['mode']}: NLL {run['nll']:.4f}, {numbers}{exact}")


def _rows(profiles: Sequence[str], extra: dict[str, object]) -> list[Row]:
    from hga_compile.configs.loader import ProfileError
    from hga_compile.evaluation.rows import make_rows

    try:
        return make_rows(profiles, extra)
    except ProfileError:
        raise
    except ValueError as error:
        raise BadInputError(str(error)) from None
