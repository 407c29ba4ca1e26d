"""Finding, reading, combining and saving profiles."""

import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hga_compile.configs import errors
from hga_compile.configs.errors import ProfileError, did_you_mean, first_line, quoted
from hga_compile.configs.options import ENV_PREFIX, from_environment, from_options, plain_data
from hga_compile.configs.profile import Profile
from hga_compile.configs.scalars import plain_scalar
from hga_compile.configs.yaml_source import YamlDocument, parse_yaml, read_yaml

__all__ = ["DEFAULT", "ProfileError", "builtin_names", "load_profile", "resolve_profile", "save_profile"]

DEFAULT = "default"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def builtin_names() -> list[str]:
    """Return the names of the built-in profiles, sorted."""
    return sorted(name for name in _builtin_files())


def load_profile(name_or_path: str | Path) -> Profile:
    """Read a built-in profile by name, or a user's by path.

    Parameters
    ----------
    name_or_path : str or pathlib.Path
        A `Path`, or text that has a path separator or ends in ``.yaml`` or ``.yml``, is a file;
        other text is the name of a built-in profile. A leading ``~`` is the home folder.

    Returns
    -------
    Profile
        Validated.

    Raises
    ------
    ProfileError
        One line: file and line, field, what was expected and what came.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise ProfileError(f"profile: expected a name or a path, got type {type(name_or_path).__name__}")
    document = _read(name_or_path)
    return _validate(document.data, document.where)


def resolve_profile(
    options: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None
) -> Profile:
    """Combine call options, environment and profile.

    A field comes from the first of: call options, `HGA_*` variables, the profile, the defaults.

    Parameters
    ----------
    options : mapping or None
        ``profile`` (a name, a path, a `Profile` or a mapping of its fields); any field, nested or dotted
        (``{"routing.budget.fraction": 0.05}``), which leaves the fields beside it as they are; the
        shorthands ``budget`` (a float is a share without a minimum, an int a count of tokens), ``tier``,
        ``inner``, ``strict``, ``prefill``, ``kernels``.
    environ : mapping or None
        The environment, by default the process's: ``HGA_PROFILE``, the shorthands as ``HGA_BUDGET`` and
        so on, any field as ``HGA_ROUTING__GROUP_SIZE``. Empty variables count as unset.

    Returns
    -------
    Profile
        Validated as a whole.

    Raises
    ------
    ProfileError
        One line: the option, variable or file, the field, what was expected and what came.
    """
    options = {} if options is None else options
    environ = os.environ if environ is None else environ
    if not isinstance(options, Mapping):
        raise ProfileError(f"options: expected a mapping, got type {type(options).__name__}")
    base = _base(options, environ)
    called, environment = from_options(options), from_environment(environ)
    if not called.values and not environment.values:
        return base
    document = base.model_dump(mode="json")
    environment.apply(document)
    called.apply(document)

    together = ", ".join([*called.names.values(), *environment.names.values()])

    def where(path: errors.Path) -> tuple[str, int]:
        name = called.name_of(path) or environment.name_of(path)
        return (name, 0) if name else (f"profile {quoted(base.name)} with {together}", 1)

    return _validate(document, where)


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write a profile as YAML, replacing the file in one step.

    Parameters
    ----------
    profile : Profile
        What to write; fields that are null are left out.
    path : str or pathlib.Path
        The file. Readers see the old content or the new, never a part.

    Raises
    ------
    ProfileError
        The folder or file cannot be written; an old file is then unchanged.
    """
    target = Path(path).expanduser()
    document = profile.model_dump(mode="json", exclude_none=True)
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        try:
            # Not mkstemp: the file gets the permissions that the user's umask gives a new file.
            with open(draft, "x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise ProfileError(f"{target}: cannot write the profile: {reason}") from None


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 would read as something else; PyYAML knows only YAML 1.1's traps."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quote = None if isinstance(plain_scalar(text[:100]), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quote)


_Dumper.add_representer(str, _text)


def _base(options: Mapping[str, object], environ: Mapping[str, str]) -> Profile:
    """Return the profile under the overlays: the call's, else the environment's, else the default."""
    chosen = options.get("profile")
    if chosen is None:
        named = environ.get(f"{ENV_PREFIX}PROFILE") or DEFAULT
        return load_profile(named)
    if isinstance(chosen, Profile):
        return chosen
    if isinstance(chosen, Mapping):
        document = {"name": "options", **plain_data(chosen, "option profile")}
        return _validate(document, lambda path: ("option profile", 0))
    if isinstance(chosen, str | os.PathLike):
        return load_profile(Path(chosen) if isinstance(chosen, os.PathLike) else chosen)
    raise ProfileError(
        f"option profile: expected a name, a path, a Profile or a mapping, got type {type(chosen).__name__}"
    )


def _validate(data: Any, where: Callable[[errors.Path], tuple[str, int]]) -> Profile:
    """Validate plain data through JSON, where pydantic's strict mode takes no text for a number."""
    try:
        return Profile.model_validate_json(json.dumps(data))
    except ValidationError as failure:
        raise ProfileError(first_line(failure, Profile, where)) from None
    except ValueError as failure:
        raise ProfileError(f"{where(())[0]}: {failure}") from None


def _read(name_or_path: str | os.PathLike[str]) -> YamlDocument:
    """Find a profile's document."""
    if isinstance(name_or_path, os.PathLike):
        return read_yaml(Path(name_or_path).expanduser())
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    if any(separator in name_or_path for separator in separators) or name_or_path.endswith((".yaml", ".yml")):
        return read_yaml(Path(name_or_path).expanduser())
    files = _builtin_files()
    if not _NAME.fullmatch(name_or_path) or ".." in name_or_path:
        raise ProfileError(
            f"profile {quoted(name_or_path)}: expected a name of letters, digits, '-', '_' and '.' "
            "or the path of a .yaml file"
        )
    if name_or_path not in files:
        raise ProfileError(
            f"profile {quoted(name_or_path)}: unknown profile{did_you_mean(name_or_path, files)} "
            "(a file is given by its path, such as ./mine.yaml)"
        )
    return parse_yaml(files[name_or_path].read_bytes(), f"built-in profile {name_or_path}.yaml")


def _builtin_files() -> dict[str, Any]:
    """Return the built-in profiles' files by name; never built from a user's text."""
    folder = resources.files("hga_compile.configs").joinpath("profiles")
    return {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
