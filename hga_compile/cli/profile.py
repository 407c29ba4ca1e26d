"""``hga profile``: validate, show and describe profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hga_compile.cli import options
from hga_compile.cli.errors import BAD_INPUT, guarded, say_error
from hga_compile.cli.output import print_json

app = typer.Typer(help="Validate, show and describe profiles.", no_args_is_help=False)


@app.command()
@guarded
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="YAML files.", show_default=False)],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check profile files; every wrong one gets one line with file, line and field."""
    from hga_compile.configs.loader import ProfileError, load_profile

    found: list[dict[str, Any]] = []
    for file in files:
        try:
            found.append({"file": str(file), "ok": True, "name": load_profile(file).name, "error": None})
        except ProfileError as error:
            found.append({"file": str(file), "ok": False, "name": None, "error": str(error)})
    if as_json:
        print_json(found)
    else:
        for entry in found:
            if entry["ok"]:
                print(f"{entry['file']}: ok ({entry['name']})")
            else:
                say_error(str(entry["error"]))
    if not all(entry["ok"] for entry in found):
        raise typer.Exit(BAD_INPUT)


@app.command()
@guarded
def show(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Built-in profile or path of a YAML file.", show_default=False),
    ],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Print a profile with every field at its value."""
    from hga_compile.configs.loader import load_profile

    document = load_profile(name).model_dump(mode="json")
    if as_json:
        print_json(document)
        return
    import yaml

    print(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100), end="")


@app.command()
@guarded
def schema(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """Print the JSON schema of profiles, for editors; it is JSON with or without --json."""
    from hga_compile.configs.schema import profile_schema

    print_json(profile_schema())
