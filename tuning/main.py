"""The ``hga-tune`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hga_compile.cli import options
from hga_compile.cli.errors import BAD_INPUT, INTERRUPTED, BadInputError, guarded, say_error
from hga_compile.cli.output import note, print_json, quiet_bars
from hga_compile.tuning.showing import show_found, show_plan

if TYPE_CHECKING:
    from hga_compile.evaluation.corpora import Document
    from hga_compile.tuning.tune import Found, Request

NOTHING_FEASIBLE = 3
# Built from what Python brings and what the package brings: no network.
_TEXTS = "asyncio,persuasion"

_HELP = """Find the best profile for a model on a GPU, measured, and write it.

\b
Examples:
  hga-tune --model smollm2-135m --gpu cpu
  hga-tune --model qwen3-30b --gpu rtx5090 --context 65536 --prefer balanced
  hga-tune --model ./checkpoint --gpu auto --trials 200 --corpus emma,hamlet --lengths 8192
  hga-tune --model llama3.1-8b --gpu rtx4090 --dry-run
  hga-tune --model smollm2-135m --gpu cpu --out tuned --resume --trials 200

Quality (KL and delta NLL against the dense model) is measured on real weights: the model's own where they are
on this machine, else those of --quality-model, and then marked as transferred. Latency is measured where the
GPU is this machine's, else modelled. Memory is computed.

Of the settings that keep all constraints, --prefer quality takes the least KL, balanced the least KL of those
at most 10% slower than the default setting, speed the fastest whose KL is not above the default setting's.

Exit codes: 0 a profile is written, 1 failure, 2 usage or bad input, 3 nothing is feasible, 130 interrupted
(the best so far is written).
"""

app = typer.Typer(name="hga-tune", add_completion=False, pretty_exceptions_enable=False)


class Prefer(StrEnum):
    """Choices of ``--prefer``."""

    quality = "quality"
    balanced = "balanced"
    speed = "speed"


class Sampler(StrEnum):
    """Choices of ``--sampler``."""

    tpe = "tpe"
    gp = "gp"
    nsga2 = "nsga2"


@app.command(help=_HELP)
@guarded
def tune_command(
    run: typer.Context,
    model: Annotated[
        str,
        typer.Option("--model", help="Name of the catalogue, local folder, or hub id.", show_default=False),
    ],
    gpu: Annotated[str, typer.Option("--gpu", help="Name of the catalogue; auto: this machine's.")] = "auto",
    context: Annotated[
        int | None,
        typer.Option("--context", min=1024, help="Tokens to tune for.", show_default="65536, or the model's"),
    ] = None,
    tiers: Annotated[
        str | None, typer.Option("--tiers", help="Homes of the K/V to choose from.", show_default="gpu,host")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the results.", show_default="hga-tune-MODEL-GPU"),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Settings for the cheap stage.")] = 60,
    measured: Annotated[
        int, typer.Option("--measured", min=1, help="Survivors to measure on the full model.")
    ] = 8,
    timeout: Annotated[float | None, typer.Option("--timeout", min=1, help="Seconds of search.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampler.")] = 0,
    sampler: Annotated[Sampler, typer.Option("--sampler", help="What proposes settings.")] = Sampler.tpe,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Trials of the cheap stage at a time.")] = 1,
    prefer: Annotated[
        Prefer, typer.Option("--prefer", help="Which setting is taken: see above.")
    ] = Prefer.balanced,
    max_delta_nll: Annotated[
        float | None,
        typer.Option(
            "--max-delta-nll",
            help="Most that NLL may rise over dense, nats a token.",
            show_default="0.1, or what the default setting has",
        ),
    ] = None,
    max_read: Annotated[
        str | None,
        typer.Option(
            "--max-read",
            metavar="SHARE|default",
            help="Most bytes that attention may read, over dense attention's; default: as the default.",
            show_default="no bound",
        ),
    ] = None,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="The prompt's time is an objective too.")
    ] = False,
    profile: options.ProfileName = None,
    quality_model: Annotated[
        str | None,
        typer.Option("--quality-model", help="Checkpoint to measure quality on.", show_default="its own"),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Named texts (`hga eval texts`).", show_default=_TEXTS)
    ] = None,
    text: Annotated[list[Path] | None, typer.Option("--text", help="UTF-8 file; may be repeated.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths", help="Tokens of the texts.", show_default="at most 4096 on a CPU, else 8192"
        ),
    ] = None,
    scored: Annotated[int, typer.Option("--scored", min=1, help="Tokens that are predicted of each.")] = 128,
    storage: Annotated[
        str | None,
        typer.Option("--storage", help="File.db, a journal file, or a URL.", show_default="OUT/study.db"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study in OUT.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Measure the choice through the compiled model.")
    ] = True,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write OUT/report.html.")] = True,
    device: options.Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Find and write a profile; see the help text of the command."""
    quiet_bars()
    from hga_compile.configs.catalogue import CatalogueError
    from hga_compile.tuning.feasibility import Infeasible, possible_tiers
    from hga_compile.tuning.storage import ResumeError
    from hga_compile.tuning.target import TargetError, find_gpu, find_model

    try:
        target, card = find_model(model, say=note), find_gpu(gpu)
    except (CatalogueError, TargetError) as error:
        raise BadInputError(str(error)) from None
    base = options.pick_profile(profile)
    tokens = context or min(target.card.context.max_tokens, 65536)
    wanted = _tiers(tiers, card.kind)
    if dry_run:
        show_plan(target.card, card, base, tokens, wanted, trials, measured, as_json)
    try:
        possible = possible_tiers(target.card, card, base, tokens, wanted)
    except Infeasible as error:
        say_error(str(error))
        raise typer.Exit(NOTHING_FEASIBLE) from None
    if dry_run:
        return
    _need_optuna()
    if report:
        _need_plotly()
    folder = out or Path(f"hga-tune-{target.card.name}-{card.name}")
    from hga_compile.tuning.quality import quality_checkpoint
    from hga_compile.tuning.tune import NoneFeasible, Request

    place = options.pick_device(device)
    try:
        checkpoint = quality_checkpoint(target, quality_model)
        if not checkpoint.own:
            note(f"no weights of {target.card.name} here: quality is transferred from {checkpoint.card.name}")
        documents = _documents(text or [], corpus)
        measured_at = _lengths(lengths, tokens, checkpoint.card.context.max_tokens, place.type)
        request = Request(
            target, card, tokens, base, possible, checkpoint, documents, measured_at,
            storage or str(folder / "study.db"), trials=trials, measured=measured, seed=seed,
            sampler=sampler.value, jobs=jobs, timeout=timeout, prefer=prefer.value,
            max_delta_nll=max_delta_nll, max_read=_share(max_read), with_prefill=prefill,
            scored=scored, resume=resume, verify=verify, device=place,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        found = _run(request, run.obj)
    except (TargetError, CatalogueError, ResumeError) as error:
        raise BadInputError(str(error)) from None
    except NoneFeasible as error:
        say_error(str(error))
        raise typer.Exit(NOTHING_FEASIBLE) from None
    _write(found, folder, report)
    if as_json:
        print_json(found.result)
    else:
        show_found(found, folder)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)


def _run(request: Request, arguments: Sequence[str]) -> Found:
    from hga_compile.cli.output import quiet_libraries
    from hga_compile.tuning.outcome import command_line
    from hga_compile.tuning.progress import telling
    from hga_compile.tuning.tune import tune

    quiet_libraries()
    with telling(note) as (say, told):
        return tune(request, say, told, command_line(arguments))


def _write(found: Found, folder: Path, report: bool) -> None:
    from hga_compile.evaluation.files import write_json
    from hga_compile.tuning.tune import save

    save(found, folder / f"{found.profile.name}.yaml")
    write_json(folder / "result.json", found.result)
    if report:
        from hga_compile.tuning.report import write_report

        write_report(found, folder / "report.html")


def _documents(files: list[Path], corpus: str | None) -> list[Document]:
    from hga_compile.cli.eval_common import read_texts

    return read_texts(files, corpus, _TEXTS)


def _lengths(text: str | None, context: int, most: int, device: str) -> list[int]:
    if text is None:
        return [min(context, most, 8192 if device == "cuda" else 4096)]
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) >= 1024 for part in parts):
        raise BadInputError(f"lengths must be whole numbers of at least 1024, got {text!r} (--lengths)")
    return sorted({int(part) for part in parts})


def _share(text: str | None) -> float | Literal["default"] | None:
    if text is None:
        return None
    if text == "default":
        return "default"
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise BadInputError(f"a share is above 0 and at most 1, or default, got {text!r} (--max-read)")
    return found


def _tiers(text: str | None, kind: str) -> tuple[str, ...]:
    from hga_compile.tuning.feasibility import SEARCHED

    if kind == "cpu":
        return ("auto",)  # one memory
    found = tuple(dict.fromkeys(part.strip() for part in (text or "gpu,host").split(",")))
    if unknown := [tier for tier in found if tier not in SEARCHED]:
        more = "; the time of a step in nvme is neither measured nor modelled" if "nvme" in unknown else ""
        raise BadInputError(f"tiers are gpu and host, got {', '.join(unknown)}{more} (--tiers)")
    return found


def _need_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise BadInputError("hga-tune needs Optuna: pip install 'hga-compile[tune]'") from None
    if int(optuna.__version__.split(".")[0]) < 5:
        raise BadInputError(
            f"hga-tune needs Optuna 5 or newer, got {optuna.__version__}: pip install -U optuna"
        )


def _need_plotly() -> None:
    from importlib.util import find_spec

    if find_spec("plotly") is None:
        raise BadInputError("the report needs plotly: pip install 'hga-compile[report]', or give --no-report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``hga-tune`` and return its exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        outcome = app(args=given, prog_name="hga-tune", standalone_mode=False, obj=given)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        say_error(f"{' '.join(error.format_message().split()).rstrip('.')} (see 'hga-tune --help')")
        return getattr(error, "exit_code", BAD_INPUT)
    return outcome if isinstance(outcome, int) else 0


if __name__ == "__main__":
    sys.exit(main())
