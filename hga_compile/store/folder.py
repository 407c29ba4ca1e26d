"""Files that have no name: made in a folder of their own, opened, and unlinked at once.

Nothing of a store is ever found by name, so nobody can open it, and nothing is left when its process is
killed but what lay between making a file and unlinking it. Such remains are swept away by the next store.
"""

import logging
import os
import stat
import tempfile
from contextlib import suppress

from hga_compile.store.errors import StoreBusyError, StoreFolderError, StoreIOError
from hga_compile.store.storage_io import StorageIO

__all__ = ["NAME", "PREFIX", "open_nameless", "sweep"]

log = logging.getLogger(__name__)

PREFIX, NAME = "hga-", "pages"
_KNOB = "offload.nvme_folder"
_TRIES = 20


def open_nameless(parent: str | None, io: StorageIO) -> tuple[int, int | None]:
    """Make a file, open it with and without O_DIRECT, and take its name away.

    Parameters
    ----------
    parent : str or None
        Folder on the file system that is to hold the file; None: the system's temporary folder.
    io : StorageIO
        The file system.

    Returns
    -------
    tuple of int and (int or None)
        File descriptors through the page cache and around it; None where the file system refuses the second.

    Raises
    ------
    StoreFolderError
        A folder that others could tamper with, or none.
    StoreBusyError
        Others keep locking every folder that is made here.
    StoreIOError
        The file system failed.
    """
    parent = os.path.realpath(tempfile.gettempdir()) if parent is None else os.path.abspath(parent)
    try:
        _check_parent(parent, io)
        sweep(parent, io)
        for _ in range(_TRIES):
            opened = _try_open(parent, io)
            if opened is not None:
                return opened
    except OSError as error:
        raise StoreIOError(
            f"no file could be made in {parent}: got {error.strerror or error}, expected a folder that this "
            f"user can write to ({_KNOB})"
        ) from error
    raise StoreBusyError(
        f"no folder could be locked in {parent}: got {_TRIES} that others had locked, expected one ({_KNOB})"
    )


def sweep(parent: str, io: StorageIO) -> int:
    """Remove what killed processes left in a folder; what somebody has locked, or is not ours, stays.

    Returns
    -------
    int
        Folders removed.
    """
    removed = 0
    with suppress(OSError):
        for name in io.list_folder(parent):
            if name.startswith(PREFIX):
                removed += _sweep_one(os.path.join(parent, name), io)
    return removed


def _try_open(parent: str, io: StorageIO) -> tuple[int, int | None] | None:
    """Make folder and file; None if somebody swept the folder away before it was locked."""
    path = io.make_folder(parent)
    folder: int | None = None
    try:
        try:
            folder = io.open_folder(path)
            io.lock(folder)
        except (FileNotFoundError, BlockingIOError):
            return None
        found = io.status(folder)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise StoreFolderError(
                f"{path} must be this user's alone, got owner {found.st_uid} and mode "
                f"{stat.S_IMODE(found.st_mode):o}, expected {os.geteuid()} and 700 ({_KNOB})"
            )
        try:
            return _open_both(folder, io)
        except FileNotFoundError:
            return None
    finally:
        with suppress(OSError):
            io.remove_folder(path)
        if folder is not None:
            # Closed last: up to here the lock keeps others from sweeping.
            _close(folder, io)


def _open_both(folder: int, io: StorageIO) -> tuple[int, int | None]:
    plain = io.create(NAME, folder)
    direct = None
    try:
        try:
            direct = io.reopen(NAME, folder, getattr(os, "O_DIRECT", 0)) if hasattr(os, "O_DIRECT") else None
        except OSError as error:
            log.info("the file system refuses O_DIRECT (%s): reads go through its cache", error)
        io.unlink(NAME, folder)
    except BaseException:
        for fd in (plain, direct):
            if fd is not None:
                _close(fd, io)
        with suppress(OSError):
            io.unlink(NAME, folder)
        raise
    return plain, direct


def _check_parent(parent: str, io: StorageIO) -> None:
    try:
        found = io.status_at(parent)
    except FileNotFoundError:
        raise StoreFolderError(f"{parent} must be a folder, got none there ({_KNOB})") from None
    mode = found.st_mode
    if stat.S_ISLNK(mode) or not stat.S_ISDIR(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no folder"
        raise StoreFolderError(f"{parent} must be a folder itself, got {kind} ({_KNOB})")
    # In a sticky folder such as /tmp others cannot rename or remove what is ours.
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise StoreFolderError(
            f"{parent} must not be writable for everybody, got mode {stat.S_IMODE(mode):o}, expected 700 or "
            f"a sticky folder ({_KNOB})"
        )
    if found.st_uid not in (0, os.geteuid()) and os.geteuid() != 0:
        raise StoreFolderError(
            f"{parent} must belong to this user or root, got owner {found.st_uid}, expected {os.geteuid()} "
            f"({_KNOB})"
        )


def _sweep_one(path: str, io: StorageIO) -> bool:
    try:
        folder = io.open_folder(path)
    except OSError:
        return False
    try:
        found = io.status(folder)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o700:
            return False
        io.lock(folder)
        names = io.list_folder(folder)
        if set(names) <= {NAME}:
            for name in names:
                io.unlink(name, folder)
            io.remove_folder(path)
            log.info("removed %s, which a killed process had left", path)
            return True
    except OSError:
        pass
    finally:
        _close(folder, io)
    return False


def _close(fd: int, io: StorageIO) -> None:
    """Close; Linux gives the descriptor up even where it reports an error."""
    with suppress(OSError):
        io.close(fd)
