"""Settings that are laid over a profile: call options, shorthands and `HGA_*` variables."""

import difflib
import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from hga_compile.configs.errors import Path, ProfileError, did_you_mean, field_path, quoted, types_of
from hga_compile.configs.profile import Profile
from hga_compile.configs.yaml_source import MAX_DEPTH, parse_yaml

ENV_PREFIX = "HGA_"

SHORTHANDS: dict[str, Path] = {
    "budget": ("routing", "budget"),
    "tier": ("offload", "tier"),
    "inner": ("compile", "inner"),
    "strict": ("compile", "strict"),
    "prefill": ("routing", "prefill"),
    "kernels": ("compile", "kernels"),
}
_YES_NO = dict.fromkeys(("1", "yes", "on", "true"), True) | dict.fromkeys(("0", "no", "off", "false"), False)


class Overlay:
    """Fields set by one source, each with the name under which it was given.

    Parameters
    ----------
    prefix : str
        What messages put before a name: "option " or "".
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.values: dict[Path, Any] = {}
        self.names: dict[Path, str] = {}

    def set(self, path: Path, value: Any, name: str) -> None:
        """Record one field; a second name for the same field is an error."""
        for other, given in self.names.items():
            shared = min(len(path), len(other))
            if path[:shared] == other[:shared]:
                raise ProfileError(f"{self.prefix}{name}: sets the same field as {given}; give one of them")
        self.values[path] = value
        self.names[path] = f"{self.prefix}{name}"

    def apply(self, document: dict[str, Any]) -> None:
        """Write the fields into a profile's document, in place."""
        for path, value in self.values.items():
            target = document
            for part in path[:-1]:
                if not isinstance(target.get(str(part)), dict):
                    target[str(part)] = {}
                target = target[str(part)]
            target[str(path[-1])] = value

    def name_of(self, path: Path) -> str | None:
        """Return the name that set `path`, a part of it, or what is around it."""
        for own, name in self.names.items():
            shared = min(len(path), len(own))
            if path[:shared] == own[:shared] and path:
                return name
        return None


def from_options(options: Mapping[str, Any]) -> Overlay:
    """Read call options, `profile` left aside.

    Parameters
    ----------
    options : mapping
        Nested fields, dotted fields and shorthands, mixed as the caller likes.

    Returns
    -------
    Overlay
        One entry per field.

    Raises
    ------
    ProfileError
        Unknown names (with the nearest known one), a field given twice, values that are not plain data.
    """
    overlay = Overlay("option ")
    for key, value in options.items():
        if not isinstance(key, str):
            raise ProfileError(f"option {quoted(key)}: expected a field name, got type {type(key).__name__}")
        if key in SHORTHANDS:
            value = plain_data(value, f"option {key}")
            overlay.set(SHORTHANDS[key], _budget(value, f"option {key}") if key == "budget" else value, key)
        elif key != "profile":
            for path, leaf in _leaves(tuple(key.split(".")), value):
                overlay.set(path, plain_data(leaf, f"option {field_path(path)}"), field_path(path))
    return overlay


def from_environment(environ: Mapping[str, str]) -> Overlay:
    """Read the `HGA_*` variables that set fields; empty ones count as unset.

    Parameters
    ----------
    environ : mapping of str to str
        The process environment.

    Returns
    -------
    Overlay
        One entry per field.

    Raises
    ------
    ProfileError
        A name with `__` that is no field, a name close to a shorthand's, text that is not one YAML value.
    """
    overlay = Overlay("")
    known = {f"{ENV_PREFIX}{name.upper()}": path for name, path in SHORTHANDS.items()}
    known |= {ENV_PREFIX + "__".join(map(str, path)).upper(): path for path in fields() if _is_leaf(path)}
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name == f"{ENV_PREFIX}PROFILE" or not environ[name]:
            continue
        if name in known:
            path = known[name]
            value = _from_text(environ[name], path, name)
            overlay.set(path, _budget(value, name) if path == SHORTHANDS["budget"] else value, name)
        elif "__" in name:
            raise ProfileError(f"{name}: unknown variable{did_you_mean(name, known)}")
        elif near := difflib.get_close_matches(name, _short_names(), n=1, cutoff=0.85):
            # Other HGA_ variables, such as HGA_MODELS, are not about profiles.
            raise ProfileError(f"{name}: unknown variable; did you mean '{near[0]}'?")
    return overlay


@cache
def fields() -> dict[Path, Any]:
    """Return every field of a profile by path, sections too, with its annotation."""
    return dict(_walk(Profile, ()))


def plain_data(value: Any, name: str, depth: int = 0) -> Any:
    """Turn models, mappings, tuples and paths into what JSON holds.

    Raises
    ------
    ProfileError
        Another type, keys that are not text, or more than 32 levels.
    """
    if depth > MAX_DEPTH:
        raise ProfileError(f"{name}: must not nest deeper than {MAX_DEPTH} levels")
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ProfileError(f"{name}: expected text as keys, got {quoted(list(value))}")
        return {key: plain_data(inner, name, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(inner, name, depth + 1) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ProfileError(f"{name}: expected plain data, got type {type(value).__name__}")


def _walk(model: type[BaseModel], path: Path) -> Iterator[tuple[Path, Any]]:
    for name, field in model.model_fields.items():
        yield (*path, name), field.annotation
        section = _section(field.annotation)
        if section is not None:
            yield from _walk(section, (*path, name))


def _section(annotation: Any) -> type[BaseModel] | None:
    models = (kind for kind in types_of(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))
    return next(models, None)


def _is_leaf(path: Path) -> bool:
    return _section(fields()[path]) is None


def _short_names() -> list[str]:
    return [f"{ENV_PREFIX}{name.upper()}" for name in ("profile", *SHORTHANDS)]


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    """Split a nested mapping into its fields, so that what it does not name is kept."""
    if path not in fields():
        raise ProfileError(f"option {field_path(path)}: unknown option{_nearest(path)}")
    if not isinstance(value, Mapping) or _is_leaf(path):
        yield path, value
        return
    for key, inner in value.items():
        parts = tuple(key.split(".")) if isinstance(key, str) else (quoted(key),)
        yield from _leaves((*path, *parts), inner)


def _nearest(path: Path) -> str:
    """Suggest an option: the same last word in another section, or the nearest spelling."""
    dotted = [field_path(known) for known in fields()]
    same = [known for known in dotted if known.rpartition(".")[2] == path[-1]]
    if same:
        return f"; did you mean '{same[0]}'?"
    if len(path) > 1 and path[:-1] in fields():
        return did_you_mean(
            field_path(path), [field_path(known) for known in fields() if known[:-1] == path[:-1]]
        )
    hint = did_you_mean(field_path(path), [*dotted, *SHORTHANDS, "profile"])
    top = ", ".join([*SHORTHANDS, "profile", *Profile.model_fields])
    return hint if "did you mean" in hint else f"; known: {top}"


def _budget(value: Any, name: str) -> Any:
    """Expand the shorthand: a float is a share without a minimum, an integer a count of tokens."""
    if isinstance(value, dict):
        return value
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return {"fraction": value, "tokens": None}
    if type(value) is int and value >= 1:
        return {"fraction": None, "tokens": value}
    raise ProfileError(
        f"{name}: expected a share above 0.0 and at most 1.0 or a whole number of tokens, got {quoted(value)}"
    )


def _from_text(text: str, path: Path, name: str) -> Any:
    """Read a variable's text as the field's type wants it."""
    kinds = types_of(fields()[path])
    if bool in kinds and text.lower() in _YES_NO:
        return _YES_NO[text.lower()]
    if str in kinds:
        return text
    return parse_yaml(text.encode(errors="surrogatepass"), name).data
