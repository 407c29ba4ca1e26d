"""The ``hga`` command line; see `main`.

Nothing heavy is imported here: torch and transformers load inside the commands that need them.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``hga`` command line.

    Parameters
    ----------
    argv
        Arguments after the program's name; those of the process when omitted.

    Returns
    -------
    int
        0 done, 1 failure, 2 usage or bad input, 130 interrupted.
    """
    from hga_compile.cli.app import run_app

    return run_app(argv)
