"""A text and where it is from, and users' own files as such texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

OWN = "the user's own"


class TextError(ValueError):
    """A file that is no text to read; the message says which and why."""


@dataclass(frozen=True)
class Document:
    """A text and where it is from; `sha256` is of the UTF-8 text."""

    name: str
    title: str
    licence: str
    source: str
    sha256: str
    characters: int
    text: str

    def entry(self) -> dict[str, object]:
        """Return what goes into JSON: everything but the text."""
        return {key: value for key, value in asdict(self).items() if key != "text"}


def read_files(files: Sequence[Path]) -> list[Document]:
    """Read text files; a folder stands for the ``.txt``, ``.md`` and ``.rst`` files in it.

    Parameters
    ----------
    files
        UTF-8 files, or folders of them.

    Returns
    -------
    list of Document
        In the order given, without a file that has another's text; equal names get a number.

    Raises
    ------
    TextError
        If a file is missing, empty or not UTF-8.
    """
    found: dict[str, Document] = {}
    names: set[str] = set()
    for file in _each(files):
        text = _read(file)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in found:
            continue
        name, number = file.stem, 2
        while name in names:
            name, number = f"{file.stem}-{number}", number + 1
        names.add(name)
        # The file's name, not its path: results are shown to others.
        found[digest] = Document(name, file.name, OWN, file.name, digest, len(text), text)
    return list(found.values())


def _each(files: Sequence[Path]) -> list[Path]:
    each: list[Path] = []
    for file in files:
        file = file.expanduser()
        if file.is_dir():
            inside = sorted(path for path in file.iterdir() if path.suffix in (".txt", ".md", ".rst"))
            if not inside:
                raise TextError(f"folder {str(file)!r} has no .txt, .md or .rst file (--text)")
            each += inside
        else:
            each.append(file)
    return each


def _read(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise TextError(f"text {str(file)!r} cannot be read: {error.strerror} (--text)") from None
    except UnicodeDecodeError as error:
        raise TextError(
            f"text {str(file)!r} must be UTF-8, got a byte that is not at offset {error.start} (--text)"
        ) from None
    if not text.strip():
        raise TextError(f"text {str(file)!r} is empty (--text)")
    return text
