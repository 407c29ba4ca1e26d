"""The ``hga`` command and its sub-commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from hga_compile import __version__
from hga_compile.cli import demo, eval, explain, plan, profile, run, tune_kernels
from hga_compile.cli.errors import BAD_INPUT, FAILURE, INTERRUPTED, say_error
from hga_compile.cli.options import Json
from hga_compile.cli.output import print_json

app = typer.Typer(
    name="hga",
    help='Run pretrained transformers with routed attention: torch.compile(model, backend="hga").',
    epilog="Exit codes: 0 done, 1 failure, 2 usage or bad input. Data goes to stdout, progress to stderr.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("explain")(explain.explain)
app.command("plan")(plan.plan)
app.add_typer(profile.app, name="profile")
app.command("demo")(demo.demo)
app.add_typer(eval.app, name="eval")
app.command("tune-kernels")(tune_kernels.tune_kernels)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Handle what is asked of ``hga`` itself."""
    if version:
        if as_json:
            print_json({"hga_compile": __version__})
        else:
            print(f"hga {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(BAD_INPUT)
    if as_json:
        raise typer.BadParameter("--json belongs after the command: hga COMMAND ... --json")


def run_app(argv: Sequence[str] | None = None) -> int:
    """Run the application and return its exit code; see `hga_compile.cli.main`."""
    try:
        outcome = app(args=None if argv is None else list(argv), prog_name="hga", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`hga run ... | head`): nothing is left to say, not even at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _usage_error(error)
    return outcome if isinstance(outcome, int) else 0


def _usage_error(error: Exception) -> int:
    # typer's own usage errors: one line instead of a panel.
    message: str = error.format_message()  # type: ignore[attr-defined]  # click.ClickException, vendored by newer typer
    context = getattr(error, "ctx", None)
    where = f" (see '{context.command_path} --help')" if context is not None else ""
    say_error(f"{' '.join(message.split()).rstrip('.')}{where}")
    code: int = getattr(error, "exit_code", BAD_INPUT)
    return code
