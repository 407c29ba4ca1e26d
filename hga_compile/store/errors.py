"""What a store refuses or fails with: each error says what, got, expected, and the knob that changes it."""

__all__ = [
    "CorruptPageError",
    "JoinError",
    "SnapshotError",
    "StoreBusyError",
    "StoreError",
    "StoreFolderError",
    "StoreForkedError",
    "StoreFullError",
    "StoreIOError",
]


class StoreError(RuntimeError):
    """Any error of a store. What was stored before the call that raised it is still there."""


class StoreFullError(StoreError):
    """There is no room for more K/V.

    Attributes
    ----------
    need, free : int
        Bytes asked for and bytes left.
    knob : str
        The setting that changes it.
    """

    def __init__(self, what: str, need: int, free: int, knob: str) -> None:
        super().__init__(f"{what}: got a need for {need:,} bytes, expected at most {free:,} ({knob})")
        self.need, self.free, self.knob = need, free, knob

    def __reduce__(self) -> tuple[object, ...]:
        return _full, (str(self), self.need, self.free, self.knob)


def _full(text: str, need: int, free: int, knob: str) -> StoreFullError:
    error = StoreFullError.__new__(StoreFullError)
    RuntimeError.__init__(error, text)
    error.need, error.free, error.knob = need, free, knob
    return error


class StoreIOError(StoreError):
    """The file system failed to open, read or write a file of a store."""


class CorruptPageError(StoreError):
    """What was read is not what was written: another page, an older one, or other bytes."""


class StoreBusyError(StoreError):
    """A folder stays locked by others."""


class StoreFolderError(StoreError):
    """A folder that others could tamper with, or that is none."""


class StoreForkedError(StoreError):
    """A store is used in a process that was forked from its own."""


class SnapshotError(StoreError):
    """A saved cache that is damaged, or does not fit the model that it is loaded for."""


class JoinError(StoreError):
    """Caches that cannot be joined to one, or one that cannot be split."""
