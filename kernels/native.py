"""Routed attention in C++ for CPUs: built once by the machine's own compiler, kept in the user's cache."""

import ctypes
import hashlib
import logging
import os
import platform
import secrets
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from platformdirs import user_cache_dir
from torch import Tensor

from hga_compile.kernels.centres import BLOCK_TOKENS

__all__ = [
    "Span",
    "attend_pages",
    "available",
    "routed_groups",
    "routed_steps",
    "scan_scores",
]

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("decode.cpp")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-Wno-psabi",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-pthread",
)
_SECONDS = 120


class Span(NamedTuple):
    """Groups of one unpadded query: sinks, those to choose from, and the window, which ends the sequence."""

    sink_start: int
    sink_end: int
    window: int
    """First group of the window: groups before it are routed over."""
    chosen: int
    """Groups to choose from `sink_end` on."""
    length: int
    """Tokens of the sequence."""


def available() -> bool:
    """Say whether the library is there; builds it where it is not, once."""
    return _library() is not None


def scan_scores(
    codes: Tensor, scales: Tensor, query: Tensor, bits: int, centres: Tensor | None = None
) -> Tensor | None:
    """Score low-bit keys.

    Parameters
    ----------
    codes : Tensor
        ``[rows, bytes, tokens]`` uint8 on the CPU, tokens contiguous (see `lowbit.encode_keys`).
    scales : Tensor
        ``[rows, tokens]`` float32, contiguous.
    query : Tensor
        ``[rows, heads, dim]`` float32, rotated.
    bits : int
        1, 2, 4 or 8.
    centres : Tensor or None
        ``[rows, >= blocks, dim]`` bfloat16: what the keys of each block are coded about (see `centres`);
        None: all are coded about one centre.

    Returns
    -------
    Tensor or None
        ``[rows, heads, tokens]`` float32; None without a compiler, and where a score is not finite.
    """
    library = _library()
    if library is None:
        return None
    (rows, heads, dim), tokens = query.shape, scales.shape[1]
    query, scales = query.contiguous(), scales.contiguous()
    scores = torch.empty(rows, heads, tokens, device="cpu", dtype=torch.float32)
    broken = library.hga_scores(
        codes.data_ptr(), codes.stride(0), codes.stride(1), scales.data_ptr(), *_moved(centres, tokens),
        query.data_ptr(), scores.data_ptr(), rows, heads, dim, bits, tokens,
    )  # fmt: skip
    return None if broken else scores


def attend_pages(
    pages: Tensor, groups: Tensor, query: Tensor, tokens: int, group_size: int, scale: float
) -> Tensor | None:
    """Attend from one query a row to the tokens of groups, read where they lie.

    Parameters
    ----------
    pages : Tensor
        ``[groups, rows, group_size * (dim + v_dim)]`` float32 on the CPU (see `store.pages.Pages`).
    groups : Tensor
        ``[rows, n]`` int64.
    query : Tensor
        ``[rows, heads, dim]`` float32.
    tokens : int
        Tokens of these groups that exist: fewer than ``n * group_size`` where the last group is incomplete.
    group_size : int
        Tokens of a group.
    scale : float
        Softmax scale.

    Returns
    -------
    Tensor or None
        ``[rows, heads, v_dim]``; None without a compiler.
    """
    library = _library()
    if library is None:
        return None
    rows, heads, dim = query.shape
    v_dim = pages.shape[2] // group_size - dim
    groups, query = groups.contiguous(), query.contiguous()
    out = torch.empty(rows, heads, v_dim, device="cpu", dtype=torch.float32)
    library.hga_attend(
        pages.data_ptr(), groups.data_ptr(), query.data_ptr(), out.data_ptr(), rows, heads, dim, v_dim,
        group_size, groups.shape[1], tokens, scale,
    )  # fmt: skip
    return out


def routed_steps(
    pages: Tensor,
    codes: Tensor,
    scales: Tensor,
    turned: Tensor,
    query: Tensor,
    spans: Tensor,
    *,
    bits: int,
    group_size: int,
    vote: str,
    scale: float,
    centres: Tensor | None = None,
) -> Tensor | None:
    """Route queries by low-bit keys and attend, each on its own: `scan_scores`, votes, `attend_pages`.

    Parameters
    ----------
    pages : Tensor
        As `attend_pages` takes them.
    codes, scales : Tensor
        As `scan_scores` takes them, of the groups before the last window at least.
    turned : Tensor
        ``[rows, queries, heads, dim]`` float32: the queries scaled and rotated as the keys are.
    query : Tensor
        ``[rows, queries, heads, dim]`` float32, as they are.
    spans : Tensor
        ``[queries, 5]`` int64 on the CPU: a `Span` a query.
    bits, group_size, vote
        Settings of the layer.
    scale : float
        Softmax scale.
    centres : Tensor or None
        As `scan_scores` takes them.

    Returns
    -------
    Tensor or None
        ``[rows, queries, heads, v_dim]``; None without a compiler, and where a score is not finite.
    """
    library = _library()
    if library is None:
        return None
    rows, queries, heads, dim = query.shape
    v_dim = pages.shape[2] // group_size - dim
    turned, query, scales, spans = (part.contiguous() for part in (turned, query, scales, spans))
    out = torch.empty(rows, queries, heads, v_dim, device="cpu", dtype=torch.float32)
    # A single query is done before other threads have started.
    threads = torch.get_num_threads() if queries > 1 else 1
    broken = library.hga_steps(
        pages.data_ptr(), codes.data_ptr(), codes.stride(0), codes.stride(1), scales.data_ptr(),
        scales.stride(0), *_moved(centres, int(spans[:, 2].max()) * group_size), turned.data_ptr(),
        query.data_ptr(), out.data_ptr(), spans.data_ptr(), rows, queries, heads, dim, v_dim, group_size,
        bits, vote == "mass_max", scale, threads,
    )  # fmt: skip
    return None if broken else out


def routed_groups(
    codes: Tensor,
    scales: Tensor,
    turned: Tensor,
    span: Tensor,
    *,
    bits: int,
    group_size: int,
    vote: str,
    centres: Tensor | None = None,
) -> Tensor | None:
    """List the groups that `routed_steps` attends to from one query a row.

    Parameters
    ----------
    codes, scales, bits, group_size, vote, centres
        As `routed_steps` takes them.
    turned : Tensor
        ``[rows, heads, dim]`` float32: the query scaled and rotated as the keys are.
    span : Tensor
        ``[5]`` int64 on the CPU: a `Span`.

    Returns
    -------
    Tensor or None
        ``[rows, n]`` int64: sinks, chosen groups ascending, window; None without a compiler, and where a
        score is not finite.
    """
    library = _library()
    if library is None:
        return None
    rows, heads, dim = turned.shape
    turned, scales, span = turned.contiguous(), scales.contiguous(), span.contiguous()
    plan = Span(*span.tolist())
    chosen = max(0, min(plan.chosen, plan.window - plan.sink_end))
    width = plan.sink_end - plan.sink_start + chosen + -(-plan.length // group_size) - plan.window
    groups = torch.empty(rows, width, device="cpu", dtype=torch.int64)
    broken = library.hga_routes(
        codes.data_ptr(), codes.stride(0), codes.stride(1), scales.data_ptr(), scales.stride(0),
        *_moved(centres, plan.window * group_size), turned.data_ptr(), span.data_ptr(), groups.data_ptr(),
        rows, width, heads, dim, group_size, bits, vote == "mass_max",
    )  # fmt: skip
    return None if broken else groups


def _moved(centres: Tensor | None, tokens: int) -> tuple[int | None, int]:
    """Return where centres lie that move, and how far apart their rows do; None where there are none."""
    if centres is None:
        return None, 0
    # Nothing is read past what is there.
    assert centres.is_contiguous() and centres.dtype == torch.bfloat16
    assert centres.shape[1] * BLOCK_TOKENS >= tokens
    return centres.data_ptr(), centres.stride(0)


@cache
def _library() -> ctypes.CDLL | None:
    """Return the built library; None, logged once, where it cannot be built."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning("decoding on this CPU scans its index in plain torch, which is slower: %s", error)
        return None
    pointer, long, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    real = ctypes.c_float
    scores: list[Any] = [pointer, long, long, *[pointer] * 2, long, *[pointer] * 2]
    library.hga_scores.argtypes = [*scores, long, *[short] * 3, long]
    library.hga_attend.argtypes = [*[pointer] * 4, long, *[short] * 4, long, long, real]
    library.hga_attend.restype = None
    tensors: list[Any] = [*[pointer] * 2, *[long] * 2, pointer, long, pointer, long, *[pointer] * 4]
    library.hga_steps.argtypes = [*tensors, *[long] * 2, *[short] * 6, real, short]
    scan: list[Any] = [pointer, *[long] * 2, pointer, long, pointer, long, *[pointer] * 3]
    library.hga_routes.argtypes = [*scan, *[long] * 2, *[short] * 5]
    return library


def _built() -> Path:
    """Return the path of the library for this source, compiler and processor, built if need be."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (set CXX)")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_SECONDS
    ).stdout
    key = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor()]))
    folder = Path(user_cache_dir("hga-compile")) / "native"
    target = folder / f"decode-{key.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = folder / f".{target.name}.{secrets.token_hex(4)}"
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(draft)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}")
        # Another process may have built the same in the meantime: either file will do.
        draft.replace(target)
    return target


def _processor() -> bytes:
    """Return what decides which instructions a library for "this machine" may hold."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return " ".join([platform.machine(), platform.processor(), *sorted(found)]).encode()
