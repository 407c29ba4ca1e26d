"""The one seam to the file system: every call that a store makes on files and folders goes through here."""

import fcntl
import os
import tempfile
from collections.abc import Sequence

__all__ = ["StorageIO"]

Buffer = memoryview


class StorageIO:
    """The operating system's calls, one method each; tests put one in its place that fails."""

    def make_folder(self, parent: str) -> str:
        """Make a folder that only this user can enter, under a name of its own; return its path."""
        return tempfile.mkdtemp(prefix="hga-", dir=parent)

    def open_folder(self, path: str) -> int:
        """Open a folder, never through a symbolic link."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def lock(self, fd: int) -> None:
        """Lock an open folder; BlockingIOError if somebody else has it."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def list_folder(self, path: str | int) -> list[str]:
        """Return the names in a folder."""
        return os.listdir(path)

    def create(self, name: str, folder: int, flags: int = 0) -> int:
        """Make a file that was not there, for its owner alone, and open it to read and write."""
        secure = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, secure | flags, 0o600, dir_fd=folder)

    def reopen(self, name: str, folder: int, flags: int) -> int:
        """Open an existing file to read and write."""
        return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)

    def open_read(self, path: str) -> int:
        """Open an existing file to read."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def unlink(self, name: str, folder: int | None) -> None:
        """Remove a name."""
        os.unlink(name, dir_fd=folder)

    def rename(self, old: str, new: str) -> None:
        """Put a file in the place of another, at once."""
        os.replace(old, new)

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def status(self, fd: int) -> os.stat_result:
        """Return what is known of an open file."""
        return os.fstat(fd)

    def status_at(self, path: str) -> os.stat_result:
        """Return what is known of a path, links not followed."""
        return os.lstat(path)

    def free_bytes(self, fd: int) -> int:
        """Return what the file system of an open file has left."""
        found = os.fstatvfs(fd)
        return found.f_bavail * found.f_frsize

    def allocate(self, fd: int, begin: int, end: int) -> None:
        """Make the file system set aside ``begin <= byte < end``."""
        os.posix_fallocate(fd, begin, end - begin)

    def resize(self, fd: int, size: int) -> None:
        """Set the length of a file without setting anything aside."""
        os.ftruncate(fd, size)

    def read(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Fill buffers in order; return the bytes read, which may be fewer."""
        return os.preadv(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write buffers in order; return the bytes written, which may be fewer."""
        return os.pwritev(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        """Wait until a file is on the device."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a file."""
        os.close(fd)
