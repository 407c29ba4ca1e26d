"""How the command line fails: one line on stderr, and an exit code that says whose fault it was."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

FAILURE = 1
BAD_INPUT = 2
INTERRUPTED = 130
# Failures that explain themselves, of modules that the command line does not import before they are needed.
EXPECTED = ("StrictError", "CorpusError", "NothingRouted", "NotFinite", "StoreError")


class BadInputError(ValueError):
    """What the user passed cannot be used; the message says what, got, expected and which knob."""


class CommandError(RuntimeError):
    """Work that was asked for correctly and still failed."""


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what a command raises into one line on stderr and an exit code.

    The command takes a ``debug`` argument; when it is true the traceback is printed as well.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            code, line = describe(error)
            say_error(line)
            raise typer.Exit(code) from error

    return wrapper


def describe(error: BaseException) -> tuple[int, str]:
    """Exit code and one-line message for an exception.

    Parameters
    ----------
    error
        Whatever a command raised. An error that the compiler wrapped is unwrapped first, because its own
        message is the one with the knob in it.

    Returns
    -------
    tuple of int and str
    """
    root = _unwrap(error)
    if isinstance(root, CommandError) or any(_is_named(root, name) for name in EXPECTED):
        return FAILURE, one_line(root)
    # A ValueError of the backend is about the profile that it was given.
    refused = root is not error and isinstance(root, ValueError)
    refused = (
        refused
        or _is_named(root, "ProfileError")
        or _is_named(root, "KernelError")
        or _is_named(root, "StudyError")
        or _is_named(root, "LayersError")
    )
    if refused or isinstance(root, BadInputError):
        return BAD_INPUT, one_line(root)
    if _is_named(root, "OutOfMemoryError") or isinstance(root, MemoryError):
        return FAILURE, (
            f"memory ran out: {one_line(root) or 'the allocation was refused'}; use a shorter prompt, "
            "a smaller --prefill-step, or a profile whose offload.tier is host or nvme"
        )
    return FAILURE, f"{type(root).__name__}: {one_line(root)} (--debug shows the traceback)"


def one_line(error: BaseException | str) -> str:
    """Text of an error without its line breaks; the first line alone when it is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    joined = " ".join(lines)
    return joined if len(joined) <= 400 or not lines else lines[0]


def say_error(line: str) -> None:
    """Print ``hga: error: line`` to stderr, unwrapped, so that scripts can read it."""
    print(f"hga: error: {line}", file=sys.stderr)


def _unwrap(error: BaseException) -> BaseException:
    while True:
        inner = getattr(error, "inner_exception", None)  # torch._dynamo.exc.BackendCompilerFailed
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _is_named(error: BaseException, name: str) -> bool:
    # By name: importing the class would import torch or pydantic for commands that need neither.
    return any(cls.__name__ == name for cls in type(error).__mro__)
