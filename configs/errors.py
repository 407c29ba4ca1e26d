"""The one error of profiles, and how a failed validation becomes its single line."""

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hga_compile.configs.scalars import plain_scalar

Path = tuple[str | int, ...]


class ProfileError(ValueError):
    """A profile, option or `HGA_*` variable that is wrong: where, which field, what it got and expected."""


def field_path(path: Sequence[str | int]) -> str:
    """Write a path as ``routing.overrides[0].layers``; what is not a plain name is quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part.isidentifier() and part.isascii() else quoted(part)
            text += f".{name}" if text else name
    return text


def quoted(value: object) -> str:
    """Write a value as short ASCII JSON, so that a message stays one printable line."""
    try:
        text = json.dumps(value, default=lambda other: type(other).__name__)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?``, or the known words when none is near and they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(word[:100], names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names)}" if len(names) <= 20 else ""


def types_of(annotation: Any) -> list[Any]:
    """Return the members of a union, without `Annotated` around them."""
    if get_origin(annotation) is Annotated:
        return types_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in types_of(member)]
    return [annotation]


def model_at(root: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel] | None:
    """Return the model that describes the mapping at `path` below `root`, if there is one."""
    kinds: list[Any] = [root]
    for part in path:
        if isinstance(part, int):
            kinds = [inner for kind in kinds for item in get_args(kind)[:1] for inner in types_of(item)]
            continue
        owner = _model(kinds)
        field = owner.model_fields.get(part) if owner else None
        if field is None:
            return None
        kinds = types_of(field.annotation)
    return _model(kinds)


def _model(kinds: Sequence[Any]) -> type[BaseModel] | None:
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if found else None


def first_line(
    failure: ValidationError, root: type[BaseModel], where: Callable[[Path], tuple[str, int]]
) -> str:
    """Write the first error of a failed validation as one line.

    Parameters
    ----------
    failure : pydantic.ValidationError
        What pydantic raised.
    root : type of pydantic.BaseModel
        The model that was validated.
    where : callable
        Gives for a field's path the place to name, and a number to order places by.

    Returns
    -------
    str
        ``place: field: expected ..., got ...``, and how many errors follow.
    """
    found = []
    for error in failure.errors(include_url=False):
        path: Path = error["loc"] + tuple(error.get("ctx", {}).get("path", ()))
        place, order = where(path)
        found.append((order, place, path, error))
    found.sort(key=lambda entry: entry[0])
    _, place, path, chosen = found[0]
    field = field_path(path)
    # An option or variable may be called just like its field.
    field = f"{field}: " if field and not place.endswith(f" {field}") else ""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{place}: {field}{_message(chosen, path, root)}{more}"


def _message(error: ErrorDetails, path: Path, root: type[BaseModel]) -> str:
    """Say what was expected and what came, with the likely remedy."""
    kind, text, value = error["type"], error["msg"], error["input"]
    if kind == "conflict":
        return text
    if kind == "extra_forbidden":
        owner = model_at(root, path[:-1])
        return "unknown field" + did_you_mean(str(path[-1]), owner.model_fields if owner else ())
    if kind == "missing":
        return "this field is required"
    if kind == "model_type":
        owner = model_at(root, path)
        return (
            f"expected a mapping with {', '.join(owner.model_fields if owner else ())}, got {quoted(value)}"
        )
    expected = text.removeprefix("Input should be ").replace("valid array", "list")
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    start = f"expected {expected}" if text.startswith("Input") else text[:1].lower() + text[1:]
    return f"{start}, got {quoted(value)}{_remedy(kind, value)}"


def _remedy(kind: str, value: object) -> str:
    """Name the fix of the usual slips of YAML."""
    if kind in ("int_type", "float_type") and isinstance(value, str):
        if not isinstance(plain_scalar(value), str | None):
            return "; write it without quotes"
        if value.isascii() and value.isdigit():
            return f"; write {value.lstrip('0') or '0'} for decimal, 0o... for octal"
    if kind == "bool_type" and isinstance(value, str):
        return "; write true or false"
    return ""
