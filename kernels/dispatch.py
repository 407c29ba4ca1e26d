"""Which kernels run a call: Triton, C++ or plain torch. Everything that has a choice asks here."""

from functools import cache
from importlib.util import find_spec
from os import environ
from typing import Literal, NamedTuple

import torch

from hga_compile.configs.profile import Kernels
from hga_compile.kernels import native
from hga_compile.kernels.ledger import LEDGER

__all__ = ["KernelError", "Need", "Way", "choose", "covers", "give_up", "preferred", "triton_serves"]

Way = Literal["triton", "native", "reference"]

_NAMES = {"triton": "Triton kernels", "native": "C++ kernels"}
_MOST_CHANNELS, _MOST_HEADS, _MOST_PARTS = 256, 64, 128
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class KernelError(RuntimeError):
    """Kernels that were asked for by name (`compile.kernels`), and a call that they do not cover."""


class Need(NamedTuple):
    """What one call of routed attention asks of its kernels."""

    device: torch.device
    dtype: torch.dtype
    """Of the K/V."""
    query_dtype: torch.dtype
    channels: int
    """Of a key or a value, whichever has more."""
    heads: int
    """Query heads of a KV head."""
    group_size: int
    phase: Literal["dense", "decode", "prefill"]
    """`dense` for a call in which nothing is routed: it needs no kernels, but must be of a covered layer."""
    paged: bool = True
    """Whether the K/V lie in pages of a store."""
    summary: str = "lowbit"
    chunks: bool = False
    """Whether chunks are chosen before groups."""
    parts: int = 1
    """Means that stand for a chunk."""
    shared: bool = False
    """Whether queries of a prefill share routed sets."""
    tail: bool = False
    """Whether a tail is estimated."""
    padding: Literal["", "left", "gaps"] = ""
    sinks: bool = True
    """Whether the first tokens are attended to by every query."""
    plain: bool = True
    """Whether weights follow from scores by a plain softmax: no soft-cap, no attention sinks."""
    recorded: bool = False
    """Whether somebody records the routes of the layer."""


def preferred(kernels: Kernels, device: torch.device) -> Way:
    """Return the kernels to try: those asked for, and for `auto` those that are made for the device."""
    if kernels != "auto":
        return kernels
    return "triton" if device.type == "cuda" else "native" if device.type == "cpu" else "reference"


def triton_serves(kernels: Kernels, device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Say whether Triton stores and encodes the rows of a layer, which decides how codes lie in memory.

    Parameters
    ----------
    kernels : {"auto", "triton", "native", "reference"}
        What the profile asks for (`compile.kernels`).
    device, dtype, channels
        Of the rows; the larger of the channels of keys and of values.
    """
    wanted = preferred(kernels, device) == "triton"
    return wanted and _triton_lacks(device, dtype, channels) is None


def covers(way: Way, need: Need) -> str | None:
    """Say why kernels do not cover a call; None if they do.

    Parameters
    ----------
    way : {"triton", "native", "reference"}
        The kernels.
    need : Need
        The call.

    Returns
    -------
    str or None
        To be read after "Triton kernels do not cover".
    """
    if way == "triton":
        return _triton_covers(need)
    return _native_covers(need) if way == "native" else None


def choose(kernels: Kernels, need: Need) -> Way:
    """Choose what runs a call; with `auto` a call that has to be run in plain torch is counted.

    Parameters
    ----------
    kernels : {"auto", "triton", "native", "reference"}
        What the profile asks for (`compile.kernels`).
    need : Need
        The call.

    Raises
    ------
    KernelError
        Kernels that were asked for by name do not cover the call.
    """
    way = preferred(kernels, need.device)
    reason = covers(way, need)
    if reason is None:
        return way
    give_up(kernels, way, reason)
    return "reference"


def give_up(kernels: Kernels, way: Way, reason: str) -> None:
    """Count a call that plain torch runs in the place of kernels; refuse it if they were asked for by name.

    Raises
    ------
    KernelError
        `kernels` is not `auto`.
    """
    said = f"{_NAMES[way]} do not cover {reason}"
    if kernels != "auto":
        raise KernelError(
            f"{said}, got kernels {kernels}, expected auto or reference, which run such calls in plain torch "
            "(compile.kernels)"
        )
    LEDGER.count_fallback(f"{said}: plain torch")


def _triton_covers(need: Need) -> str | None:
    lacking = _triton_lacks(need.device, need.dtype, need.channels, need.heads, need.group_size)
    if lacking is not None or need.phase == "dense":
        return lacking
    if need.phase == "prefill":
        if not need.shared:
            return "a prefill of queries with routed sets of their own (routing.prefill_tile)"
        if need.chunks and need.parts > _MOST_PARTS:
            return f"chunk_parts {need.parts} in a prefill (at most {_MOST_PARTS})"
    if need.padding == "gaps":
        return "padding with gaps"
    if need.padding and not need.sinks:
        # The tokens of a group that begins with padding could not be counted without a wait.
        return "padding without sinks"
    return None if need.paged or need.phase == "prefill" else "K/V without a cache"


def _triton_lacks(
    device: torch.device, dtype: torch.dtype, channels: int, heads: int = 1, group_size: int = 1
) -> str | None:
    """Say what of a layer, rather than of a call, the Triton kernels do not cover."""
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"K/V on {device.type} (a CUDA device is needed)"
    if dtype not in _TRITON_DTYPES:
        return f"K/V of {_name(dtype)} (bfloat16, float16 or float32)"
    if channels > _MOST_CHANNELS:
        return f"head_dim {channels} (at most {_MOST_CHANNELS})"
    if heads > _MOST_HEADS:
        return f"{heads} query heads a KV head (at most {_MOST_HEADS})"
    if group_size & (group_size - 1):
        return f"group_size {group_size} (a power of two)"
    return None if _has_triton() else "a machine without Triton (pip install triton)"


def _native_covers(need: Need) -> str | None:
    if need.device.type != "cpu":
        return f"K/V on {need.device.type} (a CPU is needed)"
    if need.dtype != torch.float32 or need.query_dtype != torch.float32:
        wrong = need.dtype if need.dtype != torch.float32 else need.query_dtype
        return f"{_name(wrong)} (float32 alone)"
    if not native.available():
        return "a machine without a C++ compiler (set CXX)"
    if need.phase == "dense":
        return None
    if need.summary != "lowbit":
        return f"{need.summary} summaries"
    if need.shared:
        return "queries that share a routed set"
    if need.chunks:
        return "the chunk stage"
    if need.tail:
        return "a tail estimate"
    if need.padding:
        return "padding"
    if not need.plain:
        return "soft-cap or attention sinks"
    if need.recorded:
        return "recorded routes"
    return None if need.paged else "K/V without a cache"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _interpreted() -> bool:
    """Say whether Triton runs in its interpreter, on a CPU: for tests, and only if asked for by name."""
    return environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
