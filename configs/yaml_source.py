"""Reading YAML that may be hostile: plain data and the line of every field, or one clear error."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, NoReturn

import yaml

from hga_compile.configs.errors import Path, ProfileError, field_path, quoted
from hga_compile.configs.scalars import plain_scalar

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
# A profile has a few hundred values; the bound keeps PyYAML's slow parser below a second.
MAX_VALUES = 10_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CORE = "tag:yaml.org,2002:"
_SCALAR_TAGS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class YamlDocument:
    """One parsed document.

    Attributes
    ----------
    source : str
        The file, or what stands for it, as messages name it.
    data : object
        Dicts, lists, text, numbers, booleans and None.
    lines : dict
        Line, from 1, of every field's path.
    """

    source: str
    data: Any
    lines: dict[Path, int]

    def line_of(self, path: Path) -> int:
        """Return the line of a field, or of the nearest one around it."""
        return next(self.lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.lines)

    def where(self, path: Path) -> tuple[str, int]:
        """Return ``file:line`` of a field, and the line alone to order by."""
        line = self.line_of(path)
        return f"{self.source}:{line}", line


def read_yaml(path: FilePath) -> YamlDocument:
    """Read one YAML file.

    Parameters
    ----------
    path : pathlib.Path
        A regular file of at most 1 MiB.

    Returns
    -------
    YamlDocument
        Its data and lines.

    Raises
    ------
    ProfileError
        The file cannot be read, or is not the restricted YAML of `parse_yaml`.
    """
    source = _printable(str(path))
    try:
        # Non-blocking, so that a named pipe is refused rather than waited for.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ProfileError(f"{source}: expected a regular file")
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as failure:
        if isinstance(failure, ProfileError):
            raise
        reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
        raise ProfileError(f"{source}: cannot read: {reason}") from None
    return parse_yaml(content, source)


def parse_yaml(content: bytes, source: str) -> YamlDocument:
    """Parse one YAML document of plain data.

    Scalars follow the core schema of YAML 1.2 (`scalars.plain_scalar`). Refused: anchors and aliases, tags
    outside the core schema, duplicate keys, keys that are not text, several documents, more than 1 MiB, more
    than 32 levels, more than 10,000 values.

    Parameters
    ----------
    content : bytes
        UTF-8 text.
    source : str
        The file's name for messages.

    Returns
    -------
    YamlDocument
        Its data and lines.

    Raises
    ------
    ProfileError
        With file, line and field.
    """
    if len(content) > MAX_BYTES:
        line = content.count(b"\n", 0, MAX_BYTES) + 1
        raise ProfileError(f"{source}:{line}: the file must not exceed {MAX_BYTES} bytes (1 MiB)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = content.count(b"\n", 0, failure.start) + 1
        raise ProfileError(
            f"{source}:{line}: expected UTF-8 text, got byte 0x{content[failure.start]:02x}"
        ) from None
    try:
        return _Builder(source, yaml.parse(text, Loader=_LOADER)).document()
    except yaml.YAMLError as failure:
        mark = getattr(failure, "problem_mark", None)
        line = mark.line + 1 if mark else _line_of_unreadable(text)
        problem = getattr(failure, "problem", None) or getattr(failure, "reason", None) or "not YAML"
        raise ProfileError(f"{source}:{line}: invalid YAML: {_short(_printable(problem))}") from None


class _Builder:
    """Builds data from parser events, so that nothing is ever constructed from a tag or an alias."""

    def __init__(self, source: str, events: Iterator[Any]) -> None:
        self.source = source
        self.events = events
        self.lines: dict[Path, int] = {}
        self.values = 0

    def document(self) -> YamlDocument:
        """Read the whole stream, which must hold one document."""
        next(self.events)
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            self.fail(1, (), "the document is empty")
        data = self.value(next(self.events), ())
        next(self.events)
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            self.fail(_line(event), (), "expected one document, got a second")
        return YamlDocument(self.source, data, self.lines)

    def value(self, event: Any, path: Path) -> Any:
        """Build what starts with `event`."""
        line = _line(event)
        self.lines.setdefault(path, line)
        self.values += 1
        if self.values > MAX_VALUES:
            self.fail(line, path, f"the document must not hold more than {MAX_VALUES} values")
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self.fail(line, path, "anchors and aliases (&name, *name) are not allowed, write the value out")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, path)
        if len(path) >= MAX_DEPTH:
            self.fail(line, path, f"the document must not nest deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            self.check_tag(event, path, "seq")
            return self.sequence(path)
        self.check_tag(event, path, "map")
        return self.mapping(path)

    def sequence(self, path: Path) -> list[Any]:
        """Build a list up to its end event."""
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.value(event, (*path, len(items))))
        return items

    def mapping(self, path: Path) -> dict[str, Any]:
        """Build a dict up to its end event."""
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            line = _line(event)
            # Checked before it is built: a key inside a key would nest without adding to the path.
            if not isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
                self.fail(line, path, "expected a field name, got a list or mapping as a key")
            key = self.value(event, path)
            if not isinstance(key, str):
                self.fail(line, path, f"expected a field name, got {quoted(key)}")
            place = (*path, key)
            if key in items:
                self.fail(line, place, f"duplicate key, first on line {self.lines[place]}")
            self.lines[place] = line
            items[key] = self.value(next(self.events), place)
        return items

    def scalar(self, event: Any, path: Path) -> Any:
        """Return a scalar's value, by its style and core tag."""
        line, text = _line(event), event.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.fail(line, path, "expected text, got half of a surrogate pair")
        if event.tag is None:
            return self.plain(text, line, path) if event.implicit[0] else text
        kind = self.check_tag(event, path, "str", *_SCALAR_TAGS)
        if kind == "str":
            return text
        value = self.plain(text, line, path)
        if type(value) not in _SCALAR_TAGS[kind]:
            self.fail(line, path, f"expected a value of tag !!{kind}, got {quoted(text)}")
        return value

    def plain(self, text: str, line: int, path: Path) -> Any:
        """Return the meaning of an unquoted scalar."""
        try:
            return plain_scalar(text)
        except ValueError as failure:
            self.fail(line, path, str(failure))

    def check_tag(self, event: Any, path: Path, *allowed: str) -> str:
        """Return the short name of the event's tag, which must be one of `allowed`."""
        if event.tag is None:
            return allowed[0]
        kind = str(event.tag).removeprefix(_CORE)
        if event.tag == kind or kind not in allowed:
            shown = _short(_printable(f"!!{kind}" if event.tag != kind else str(event.tag)))
            core = ", ".join(f"!!{name}" for name in allowed)
            self.fail(_line(event), path, f"tag {shown} is not allowed; allowed here: {core}")
        return kind

    def fail(self, line: int, path: Path, message: str) -> NoReturn:
        """Raise with file, line and field."""
        field = f"{_short(field_path(path))}: " if path else ""
        raise ProfileError(f"{self.source}:{line}: {field}{message}")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:58]}...{text[-58:]}"


def _printable(text: str) -> str:
    """Keep control characters of a hostile file out of the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _line_of_unreadable(text: str) -> int:
    """Return the line of the first character that YAML forbids."""
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    return text.count("\n", 0, found.start()) + 1 if found else 1
