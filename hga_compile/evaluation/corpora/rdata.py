"""Read character vectors out of an R lazy-load database (`NAME.rdx` + `NAME.rdb`) without R.

An `.rdx` is a gzip-compressed serialised list that maps each variable to (offset, length) in the `.rdb`; each
record there is a 4-byte big-endian size and a zlib stream holding one serialised object. The serialisation is
XDR, versions 2 and 3, as the manual "R Internals", section "Serialization Formats", describes it.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

MAX_OBJECT_BYTES = 1 << 28  # a novel is 1 MB; more than 256 MiB is a damaged file, not a text

# Type codes of R's serialisation that data sets of text use.
_NIL, _GLOBAL, _EMPTY, _BASE, _REFERENCE = 254, 253, 242, 241, 255
_SYMBOL, _PAIRLIST, _CHAR, _LOGICAL, _INTEGER, _REAL, _STRING, _LIST = 1, 2, 9, 10, 13, 14, 16, 19
_HAS_ATTRIBUTES, _HAS_TAG = 1 << 9, 1 << 10


class RDataError(ValueError):
    """The file is damaged, or holds an R object of a kind that texts do not need."""


class _Reader:
    """Cursor over one serialised object; returns plain Python values, keeps no attribute but names."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.references: list[Any] = []

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise RDataError(f"R data ends early: {count} bytes wanted at {self.at}, {len(self.data)} in all")
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self) -> int:
        return int(struct.unpack(">i", self.take(4))[0])

    def header(self) -> None:
        if self.take(2) != b"X\n":
            raise RDataError("not XDR-serialised R data")
        version = self.integer()
        self.take(8)  # writer's and oldest reader's R version
        if version == 3:
            self.take(self.integer())  # native encoding
        elif version != 2:
            raise RDataError(f"R serialisation version 2 or 3 expected, got {version}")

    def item(self) -> Any:
        flags = self.integer()
        kind = flags & 0xFF
        if kind in (_NIL, _GLOBAL, _EMPTY, _BASE):
            return None
        if kind == _REFERENCE:
            return self.references[((flags >> 8) or self.integer()) - 1]
        if kind == _SYMBOL:
            self.references.append(self.item())
            return self.references[-1]
        if kind == _PAIRLIST:
            return self.pairs(flags)
        if kind == _CHAR:
            size = self.integer()
            # The level field starts at bit 12; its bit 2 marks latin-1, everything else is read as UTF-8.
            return None if size == -1 else self.take(size).decode("latin-1" if flags & (1 << 14) else "utf-8")
        return self.vector(kind, flags)

    def pairs(self, flags: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while flags & 0xFF == _PAIRLIST:
            if flags & _HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & _HAS_TAG else str(len(found))
            found[tag] = self.item()
            flags = self.integer()
        return found

    def vector(self, kind: int, flags: int) -> Any:
        count = self.integer()
        values: Any
        if kind in (_STRING, _LIST):
            values = [self.item() for _ in range(count)]
        elif kind in (_INTEGER, _LOGICAL):
            values = list(struct.unpack(f">{count}i", self.take(4 * count)))
        elif kind == _REAL:
            values = list(struct.unpack(f">{count}d", self.take(8 * count)))
        else:
            raise RDataError(f"R object of type {kind} at byte {self.at}; texts, numbers and lists are read")
        attributes = self.item() if flags & _HAS_ATTRIBUTES else None
        if kind == _LIST and attributes and attributes.get("names"):
            return dict(zip(attributes["names"], values, strict=True))
        return values


def parse(data: bytes) -> Any:
    """Return the Python value of one serialised R object (lists with names become dictionaries)."""
    reader = _Reader(data)
    reader.header()
    return reader.item()


def _inflate(data: bytes, wbits: int) -> bytes:
    inflater = zlib.decompressobj(wbits)
    try:
        out = inflater.decompress(data, MAX_OBJECT_BYTES)
    except zlib.error as error:
        raise RDataError(f"damaged compressed R data: {error}") from error
    if not inflater.eof:
        raise RDataError("compressed R data is cut short or larger than 256 MiB")
    return out


def read_strings(rdb: Path, variable: str) -> list[str]:
    """Return the character vector `variable` of the lazy-load database `rdb` (its `.rdx` lies beside it).

    Raises
    ------
    RDataError
        If the variable is missing, is no character vector, or the files are damaged.
    """
    try:
        index = parse(gzip.decompress(rdb.with_suffix(".rdx").read_bytes()))
    except (OSError, EOFError, zlib.error) as error:
        raise RDataError(f"cannot read {rdb.with_suffix('.rdx').name}: {error}") from error
    variables = index.get("variables", {}) if isinstance(index, dict) else {}
    if variable not in variables:
        raise RDataError(f"no variable {variable!r} in {rdb.name}; it has {', '.join(sorted(variables))}")
    offset, length = variables[variable]
    with rdb.open("rb") as file:
        file.seek(offset)
        record = file.read(length)
    value = parse(_inflate(record[4:], zlib.MAX_WBITS))
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise RDataError(f"{variable!r} in {rdb.name} is not a character vector")
    return value
