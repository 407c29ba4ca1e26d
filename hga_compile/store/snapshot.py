"""A file of named tensors, each with a checksum: written in pieces, put in its place at once, read checked.

The layout is that of safetensors (a length, a JSON header, raw bytes), so that other tools can look inside.
Nothing in it is ever executed, and nothing is mapped into memory.
"""

import errno
import json
import math
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hga_compile.store.errors import SnapshotError, StoreFullError, StoreIOError
from hga_compile.store.storage_io import StorageIO

__all__ = ["DTYPES", "Entry", "SnapshotReader", "SnapshotWriter"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
"""Types that a file holds, by their names in it."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Bytes = NDArray[np.uint8]
_LENGTH = struct.Struct("<Q")
_MOST_HEADER = 2**26
_STALLS = 100


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SnapshotWriter:
    """Writes a file beside its place, and moves it there when all is written; use it in a ``with``.

    Parameters
    ----------
    path : str
        Where the file is to be; what is there is replaced.
    entries : mapping of str to Entry
        What it will hold, in order.
    facts : mapping
        What else is to be known of it, as JSON holds it.
    io : StorageIO
        The file system.

    Raises
    ------
    StoreFullError, StoreIOError
        The file system has no room, or failed: what was at `path` is still there.
    """

    def __init__(
        self, path: str, entries: Mapping[str, Entry], facts: Mapping[str, Any], io: StorageIO
    ) -> None:
        self._path, self._entries, self._facts, self._io = os.path.abspath(path), dict(entries), facts, io
        self._done = dict.fromkeys(entries, 0)
        self._sums = dict.fromkeys(entries, 0)
        header = self._header()
        self._starts: dict[str, int] = {}
        place = len(header)
        for name, entry in self._entries.items():
            self._starts[name] = place
            place += entry.nbytes
        self._folder, name = os.path.split(self._path)
        self._draft = f".{name}.{secrets.token_hex(4)}"
        self._fd: int | None = None
        try:
            folder = io.open_read(self._folder)
            try:
                self._fd = io.create(self._draft, folder)
            finally:
                io.close(folder)
            io.allocate(self._fd, 0, place)
        except OSError as error:
            self._discard()
            raise self._error(error, place) from error

    def __enter__(self) -> "SnapshotWriter":
        return self

    def write(self, name: str, piece: Tensor) -> None:
        """Append to a tensor: the next values of it in order."""
        raw = piece.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
        self._put(raw, self._starts[name] + self._done[name])
        self._done[name] += len(raw)
        self._sums[name] = google_crc32c.extend(self._sums[name], raw)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()
            return
        assert self._fd is not None  # it is there until the end
        for name, entry in self._entries.items():
            assert self._done[name] == entry.nbytes, name
        try:
            self._put(np.frombuffer(self._header(), np.uint8), 0)
            self._io.sync(self._fd)
            self._io.rename(os.path.join(self._folder, self._draft), self._path)
        except OSError as failed:
            self._discard()
            raise self._error(failed, 0) from failed
        except BaseException:
            self._discard()
            raise
        self._close()
        with suppress(OSError):
            # So that the name is there after a power cut too; the file is whole in any case.
            folder = self._io.open_read(self._folder)
            try:
                self._io.sync(folder)
            finally:
                self._io.close(folder)

    def _header(self) -> bytes:
        """Return the header; its length does not depend on the checksums."""
        begin, tensors = 0, {}
        for name, entry in self._entries.items():
            end = begin + entry.nbytes
            tensors[name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        sums = {name: f"{value:08x}" for name, value in self._sums.items()}
        about = {"hga": json.dumps({"facts": self._facts, "crc32c": sums}, sort_keys=True)}
        text = json.dumps({"__metadata__": about, **tensors}).encode()
        text += b" " * (-len(text) % 8)
        return _LENGTH.pack(len(text)) + text

    def _put(self, raw: Bytes, offset: int) -> None:
        assert self._fd is not None  # it is there until the end
        view, done, stalls = raw.data, 0, 0
        while done < len(view):
            try:
                moved = self._io.write(self._fd, [view[done:]], offset + done)
            except InterruptedError as error:
                moved, failed = 0, error
            except OSError as error:
                raise self._error(error, len(view) - done) from error
            else:
                failed = InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
            done, stalls = done + moved, 0 if moved else stalls + 1
            if stalls > _STALLS:
                raise self._error(failed, len(view) - done)

    def _error(self, error: OSError, need: int) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = 0
            with suppress(OSError):
                free = self._io.free_bytes(self._fd) if self._fd is not None else 0
            return StoreFullError("the file system of a saved cache is full", need, free, "path")
        return StoreIOError(
            f"a cache could not be saved to {self._path}: got {error.strerror or error}, expected a folder "
            "that this user can write to (path)"
        )

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                self._io.close(fd)

    def _discard(self) -> None:
        had = self._fd is not None
        self._close()
        if had:
            with suppress(OSError):
                self._io.unlink(os.path.join(self._folder, self._draft), None)


class SnapshotReader:
    """Reads what a `SnapshotWriter` wrote; use it in a ``with``.

    Parameters
    ----------
    path : str
        The file.
    io : StorageIO
        The file system.

    Raises
    ------
    SnapshotError
        No such file, or one that is damaged.
    StoreIOError
        The file system failed.
    """

    def __init__(self, path: str, io: StorageIO) -> None:
        self.path, self._io = path, io
        try:
            self._fd: int | None = io.open_read(path)
        except OSError as error:
            raise SnapshotError(
                f"{path} must be a saved cache, got {error.strerror or error} (path)"
            ) from error
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SnapshotReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                self._io.close(fd)

    def pieces(self, name: str, lines: int) -> Iterator[Tensor]:
        """Yield a tensor in runs of up to `lines` of its first dimension.

        Raises
        ------
        SnapshotError
            After the last one, if they are not what was written: all of them count for nothing then.
        """
        entry, place = self.entries[name], self._starts[name]
        line, total = entry.nbytes // max(1, entry.shape[0]), 0
        for begin in range(0, entry.shape[0], lines):
            count = min(lines, entry.shape[0] - begin)
            piece = torch.empty((count, *entry.shape[1:]), dtype=entry.dtype, device="cpu")
            raw = piece.view(-1).view(torch.uint8).numpy()
            self._get(raw, place + begin * line)
            total = google_crc32c.extend(total, raw)
            yield piece
        if f"{total:08x}" != self._sums.get(name):
            raise self._damaged(f"another checksum for {name}")

    def whole(self, name: str) -> Tensor:
        """Return a tensor (see `pieces`)."""
        parts = list(self.pieces(name, max(1, self.entries[name].shape[0])))
        return parts[0] if parts else torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)

    def _read_header(self) -> None:
        assert self._fd is not None  # it has just been opened
        try:
            size = self._io.status(self._fd).st_size
        except OSError as error:
            raise self._failed(error) from error
        length = bytearray(_LENGTH.size)
        if size < len(length):
            raise self._damaged(f"{size} bytes")
        self._get(np.frombuffer(length, np.uint8), 0)
        count = _LENGTH.unpack(length)[0]
        if count > min(_MOST_HEADER, size - len(length)):
            raise self._damaged(f"a header of {count} bytes in a file of {size}")
        text = bytearray(count)
        self._get(np.frombuffer(text, np.uint8), len(length))
        try:
            tensors = json.loads(text)
            about = json.loads(tensors.pop("__metadata__")["hga"])
            self.facts: dict[str, Any] = dict(about["facts"])
            self._sums = dict(about["crc32c"])
            self.entries: dict[str, Entry] = {}
            self._starts: dict[str, int] = {}
            place = 0
            for name, found in tensors.items():
                shape = tuple(found["shape"])
                if not all(type(extent) is int and extent >= 0 for extent in shape):
                    raise ValueError(f"shape {shape}")
                entry = self.entries[name] = Entry(DTYPES[found["dtype"]], shape)
                if list(found["data_offsets"]) != [place, place + entry.nbytes]:
                    raise ValueError(f"offsets of {name}")
                self._starts[name] = len(length) + count + place
                place += entry.nbytes
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"no header of a saved cache ({error})") from error
        if len(length) + count + place != size:
            raise self._damaged(f"{size} bytes, not {len(length) + count + place}")

    def _get(self, raw: Bytes, offset: int) -> None:
        assert self._fd is not None  # nothing is read once it is closed
        view, done, stalls = raw.data, 0, 0
        while done < len(view):
            try:
                moved = self._io.read(self._fd, [view[done:]], offset + done)
            except InterruptedError as error:
                stalls += 1
                if stalls > _STALLS:
                    raise self._failed(error) from error
                continue
            except OSError as error:
                raise self._failed(error) from error
            if moved <= 0:
                raise self._damaged("an early end")
            done, stalls = done + moved, 0

    def _failed(self, error: OSError) -> StoreIOError:
        return StoreIOError(
            f"{self.path} could not be read: got {error.strerror or error}, expected a working device (path)"
        )

    def _damaged(self, got: str) -> SnapshotError:
        return SnapshotError(f"{self.path} must be a whole saved cache, got {got}: save it anew (path)")
