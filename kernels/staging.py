"""How much of a layer's history is on the GPU at once while the queries of a prefill read it."""

__all__ = ["PIECE", "STAGED", "rows_at_once", "staged_bytes"]

STAGED = 2**28
"""Bytes that are read at once at most, unless one row of one sequence has more."""
PIECE = 2**26
"""Bytes that are on their way as pages at once, where all rows are read."""


def rows_at_once(rows: int, row_bytes: int, apart: bool) -> int:
    """Return of how many rows the K/V are read at a time.

    Parameters
    ----------
    rows : int
        KV heads times batch.
    row_bytes : int
        Of the K/V of one row, all tokens; of its codes too where both are there at once.
    apart : bool
        Whether some rows are read without the others being read too.
    """
    if not apart or rows * row_bytes + PIECE <= STAGED:
        return rows
    return max(1, min(rows, STAGED // max(1, row_bytes)))


def staged_bytes(rows: int, row_bytes: int, apart: bool, moved: int) -> int:
    """Return the bytes that reading takes.

    Parameters
    ----------
    rows, row_bytes, apart
        As `rows_at_once` takes them.
    moved : int
        Bytes that cross as pages, all rows: 0 where the K/V are in GPU memory already.
    """
    count = rows_at_once(rows, row_bytes, apart)
    return count * row_bytes + (min(PIECE, moved) if count == rows else 0)
