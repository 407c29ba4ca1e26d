"""For how many tokens room is made: by a decode step that is recorded once, and past what was reserved."""

__all__ = ["BEYOND", "last_position", "room_of"]

BEYOND = 512
"""Tokens by which the host memory of a layer grows at most past those that were reserved."""

# Tokens that a recorded graph has room for at least, and whole numbers of which it has room for.
_ROOM, _STRETCH = 512, 2048


def last_position(length: int) -> int:
    """Return up to how many tokens a step goes that is recorded when there are `length`."""
    return -(-(length + _ROOM) // _STRETCH) * _STRETCH


def room_of(reserved: int | None) -> int:
    """Return for how many tokens an index is made where so many are reserved: those of recorded steps too."""
    return last_position(reserved) if reserved else 0
