"""How Triton kernels are launched: block sizes and warps by shape, from a table of what is best on this GPU.

The table is made by ``hga tune-kernels`` and kept in the user's cache folder, one file for each kind of GPU.
"""

import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, cast

import torch
from platformdirs import user_cache_dir

__all__ = ["KERNELS", "Attend", "Encode", "Launch", "Score", "Select", "Shape", "Turn", "Vote"]
__all__ += ["launch_parameters", "load_table", "save_table", "shape_of", "table_path", "trying"]

log = logging.getLogger(__name__)

_SCHEMA = 3
_MOST_BYTES = 2**20


class Shape(NamedTuple):
    """Class of shapes that share their parameters."""

    size: int
    """Logarithm to the base 2, rounded up, of what grows: tokens or groups."""
    rows: int
    """KV heads times batch."""
    heads: int
    """Query heads of a KV head; 0 where they do not matter."""
    dim: int
    """Channels, or bytes of a key's codes; 0 where they do not matter."""

    def text(self) -> str:
        """Return the name of the class in a table."""
        return f"2^{self.size} x {self.rows} x {self.heads} x {self.dim}"


def shape_of(size: int, rows: int, heads: int = 0, dim: int = 0) -> Shape:
    """Return the class of a shape: `size` tokens or groups, the rest as it is."""
    return Shape(max(size - 1, 0).bit_length(), rows, heads, dim)


def _among(default: int, tried: tuple[int, ...], others: tuple[int, ...] = ()) -> Any:
    """Make a field: what the tuner tries, and what else a table may hold."""
    return field(default=default, metadata={"tried": tried, "allowed": {default, *tried, *others}})


def _warps(default: int, *tried: int) -> Any:
    return _among(default, tried, (1, 2, 4, 8, 16))


@dataclass(frozen=True)
class Launch:
    """Parameters of one kernel; a sub-class has a field for each."""

    @classmethod
    def default(cls, shape: Shape) -> Self:
        """Return the parameters of a shape that no table has."""
        return cls()

    @classmethod
    def name(cls) -> str:
        """Return the kernel's name in a table."""
        return cls.__name__.lower()

    @classmethod
    def candidates(cls) -> list[Self]:
        """Return all parameters that the tuner tries."""
        return [cls(*values) for values in product(*(part.metadata["tried"] for part in fields(cls)))]

    @classmethod
    def read(cls, values: object) -> Self:
        """Make parameters of a table's entry.

        Raises
        ------
        ValueError
            Names or values that are not allowed.
        """
        known = {part.name: part.metadata["allowed"] for part in fields(cls)}
        if not isinstance(values, dict) or values.keys() != known.keys():
            raise ValueError(f"{cls.name()} must have {', '.join(known)}, got {values!r:.80}")
        for name, value in values.items():
            if type(value) is not int or value not in known[name]:
                raise ValueError(
                    f"{cls.name()}.{name} must be one of {sorted(known[name])}, got {value!r:.80}"
                )
        return cls(**values)


@dataclass(frozen=True)
class Score(Launch):
    """Of `triton_score.group_masses`."""

    tokens: int = _among(64, (64, 128), (16, 32, 256, 512))
    """Of a block."""
    programs: int = _among(1584, (1056, 1584, 2112), (4, 132, 264, 528, 4224))
    """At most about so many in all: each sums its blocks up, and all votes read the sums."""
    warps: int = _warps(1, 1, 2)

    @classmethod
    def default(cls, shape: Shape) -> Self:
        """Return smaller blocks where there are too few to keep a large GPU busy, and fewer sums of them."""
        size = shape.rows << shape.size
        return cls(128 if size > 2**19 else 64, 2112 if size > 2**18 else 1584)


@dataclass(frozen=True)
class Vote(Launch):
    """Of `triton_select.votes_of`."""

    groups: int = _among(512, (256, 512, 1024), (64, 128, 2048))
    """Of a program, at a time."""
    programs: int = _among(528, (528, 1056), (4, 132, 264, 2112))
    """At most about so many in all."""
    warps: int = _warps(4, 4, 8)

    @classmethod
    def default(cls, shape: Shape) -> Self:
        """Return as many groups as registers hold masses of."""
        return cls(min(512 if shape.rows << shape.size > 2**16 else 256, 4096 // shape.heads))


@dataclass(frozen=True)
class Select(Launch):
    """Of `triton_select.select_groups`."""

    whole: int = _among(2**14, (2**10, 2**14), (64, 2**11, 2**12, 2**13))
    """Groups of a row that one program chooses from by itself, in registers, at most."""
    part: int = _among(512, (256, 1024), (64, 128, 2048, 4096))
    """Groups that one of several programs looks through at a time, at least."""
    held: int = _among(2**11, (2**11, 2**12), (16, 64, 256, 2**10, 2**13, 2**14))
    """Of all the votes near the least one that is chosen, so many are kept between the kernels."""
    warps: int = _warps(8, 4, 8, 16)

    @classmethod
    def default(cls, shape: Shape) -> Self:
        """Return several programs for few rows, else one with 16 or 32 votes a thread."""
        if shape.rows >= 64:
            # A program of each row is enough for a large GPU.
            return cls(warps=2 ** min(max(shape.size - (10 if shape.rows >= 132 else 9), 0), 4))
        if shape.size <= 15:
            return cls(2**10, 512, 2**11, 4)
        return cls(2**10, 2 ** min(shape.size - 6, 11), 2 ** min(shape.size - 4, 13), 8)


@dataclass(frozen=True)
class Attend(Launch):
    """Of `triton_attend.attend_listed`."""

    tokens: int = _among(32, (32, 64, 128), (16, 256))
    """Of a tile."""
    programs: int = _among(528, (132, 264, 528), (33, 66, 1056))
    """About so many in all: as many as keep the memory channels of a large GPU busy."""
    warps: int = _warps(4, 4, 8)

    @classmethod
    def default(cls, shape: Shape) -> Self:
        """Return larger tiles where there are many."""
        return cls(64 if shape.rows << shape.size > 2**16 else 32)


@dataclass(frozen=True)
class Encode(Launch):
    """Of `triton_encode.encode`."""

    tokens: int = _among(64, (16, 64), (32, 128))
    """Of a program."""
    columns: int = _among(32, (16, 32), (64,))
    """Channels that are rotated at a time."""
    warps: int = _warps(4, 2, 4)

    @classmethod
    def default(cls, shape: Shape) -> Self:
        """Return small blocks for few tokens and for many channels."""
        padded = max(16, 1 << (shape.dim - 1).bit_length())
        return cls(16 if shape.size <= 4 else min(64, 8192 // padded))


@dataclass(frozen=True)
class Turn(Launch):
    """Of `triton_turn.turn`."""

    columns: int = _among(32, (16, 32, 64), (128,))
    """Channels of a program."""
    warps: int = _warps(4, 2, 4, 8)


KERNELS: dict[str, type[Launch]] = {
    kernel.name(): kernel for kernel in (Score, Vote, Select, Attend, Encode, Turn)
}
"""All kernels that have parameters, by name."""

P = TypeVar("P", bound=Launch)
Table = dict[str, dict[str, Launch]]
"""Parameters by kernel and by the text of a shape."""

_TRIED: ContextVar[Launch | None] = ContextVar("hga_tried_launch", default=None)


def launch_parameters(kernel: type[P], device: torch.device, shape: Shape) -> P:
    """Return the parameters of a kernel: those of the table of this GPU, else its defaults.

    Parameters
    ----------
    kernel : type
        One of `KERNELS`.
    device : torch.device
        Where it runs.
    shape : Shape
        From `shape_of`.
    """
    tried = _TRIED.get()
    if type(tried) is kernel:
        return tried
    return cast(P, _looked_up(kernel.name(), device, shape))


@contextmanager
def trying(parameters: Launch) -> Iterator[None]:
    """Launch the kernel of these parameters with them, whatever the table says."""
    token = _TRIED.set(parameters)
    try:
        yield
    finally:
        _TRIED.reset(token)


# A decode step pays for a look into this cache, not into the table.
@lru_cache(maxsize=4096)
def _looked_up(kernel: str, device: torch.device, shape: Shape) -> Launch:
    if device.type == "cuda":
        found = _table_of(torch.cuda.get_device_name(device)).get(kernel, {}).get(shape.text())
        if found is not None:
            return found
    return KERNELS[kernel].default(shape)


@cache
def _table_of(device: str) -> Table:
    """Return the table of a kind of GPU, read once; empty, with a warning, if the file is not one."""
    path = table_path(device)
    try:
        return load_table(path, device)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning(
            "%s is ignored, default launch parameters are used: %s (hga tune-kernels makes it anew)",
            path,
            error,
        )
        return {}


def table_path(device: str) -> Path:
    """Return where the table of a kind of GPU, as the driver names it, is kept."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(user_cache_dir("hga-compile")) / f"launch-{name or 'unknown'}.json"


def load_table(path: Path, device: str) -> Table:
    """Read a table.

    Parameters
    ----------
    path : Path
        From `table_path`.
    device : str
        Name of the GPU that it must be of.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        What is not a table of this GPU, of the installed Triton and of this version of hga-compile.
    """
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"a table has at most {_MOST_BYTES} bytes")
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    expected = _header(device)
    if not isinstance(document, dict) or sorted(document) != sorted([*expected, "kernels"]):
        raise ValueError(f"expected {', '.join(expected)} and kernels")
    for name, value in expected.items():
        if document[name] != value:
            raise ValueError(f"made for {name} {document[name]!r:.80}, expected {value!r}")
    table: Table = {}
    if not isinstance(document["kernels"], dict):
        raise ValueError("kernels must be a mapping")
    for name, entries in document["kernels"].items():
        if name not in KERNELS or not isinstance(entries, dict):
            raise ValueError(f"expected kernels {', '.join(KERNELS)}, got {name!r:.80}")
        table[name] = {shape: KERNELS[name].read(values) for shape, values in entries.items()}
    return table


def save_table(path: Path, device: str, table: Table) -> None:
    """Write a table whole or not at all, readable by its owner alone, and use it from here on.

    Parameters
    ----------
    path, device
        As `load_table` takes them.
    table : dict
        Parameters by kernel and by the text of a shape.
    """
    kernels = {
        name: {shape: asdict(entry) for shape, entry in entries.items()} for name, entries in table.items()
    }
    text = json.dumps(_header(device) | {"kernels": kernels}, indent=1, sort_keys=True) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    _table_of.cache_clear()
    _looked_up.cache_clear()


def _header(device: str) -> dict[str, Any]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"schema": _SCHEMA, "device": device, "triton": triton}
