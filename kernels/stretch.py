"""How many tokens a decode step goes for that is recorded once and replayed."""

__all__ = ["last_position"]

# Tokens that a recorded graph has room for at least, and whole numbers of which it has room for.
_ROOM, _STRETCH = 512, 2048


def last_position(length: int) -> int:
    """Return up to how many tokens a step goes that is recorded when there are `length`."""
    return -(-(length + _ROOM) // _STRETCH) * _STRETCH
