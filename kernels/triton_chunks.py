"""Triton: between the groups of kept chunks, counted one chunk after another, and those of the sequence."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.triton_score import Kept

__all__ = ["kept_spans", "sequence_groups"]

_BLOCK = 256


def kept_spans(kept: Kept, spans: Tensor, table: Tensor, rows_of_span: int) -> Tensor:
    """Make the lines by which groups are chosen among those of kept chunks, one a row.

    Entries past a row's own list of chunks become chunks past the window, where nothing is looked at.

    Parameters
    ----------
    kept : Kept
        The chunks; which of them hold sinks is a row's own.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    table : Tensor
        The same for chunks (see `gpu.ChunkSpans`).
    rows_of_span : int
        Rows that a line of `spans` is for.

    Returns
    -------
    Tensor
        ``[rows, SPAN]`` int32: nothing is listed but the groups that are chosen.
    """
    rows, entries = kept.chunks.shape
    lines = torch.empty(rows, spans.shape[1], dtype=torch.int32, device=spans.device)
    _spans[(rows,)](
        kept.chunks, spans, table, lines, entries, rows_of_span, SPAN=spans.shape[1], CHUNK=kept.groups,
        BLOCK=256, num_warps=1,
    )  # fmt: skip
    return lines


def sequence_groups(chosen: Tensor, kept: Kept, spans: Tensor, width: int, rows_of_span: int) -> Tensor:
    """List the groups of sinks, the chosen ones as the sequence counts them, and the window, ascending.

    Parameters
    ----------
    chosen : Tensor
        ``[rows, n]`` int32: groups of kept chunks, ascending, as many as a row's line of `spans` wants.
    kept : Kept
        The chunks.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    width : int
        Groups of the list.
    rows_of_span : int
        Rows that a line of `spans` is for.

    Returns
    -------
    Tensor
        ``[rows, width]`` int32, as `triton_select.select_groups` gives it.
    """
    rows, count = chosen.shape
    listed = torch.empty(rows, width, dtype=torch.int32, device=chosen.device)
    _list[(triton.cdiv(width, _BLOCK), rows)](
        chosen, kept.chunks, spans, listed, count, kept.chunks.shape[1], width, rows_of_span,
        SPAN=spans.shape[1], CHUNK=kept.groups, BLOCK=_BLOCK, num_warps=1,
    )  # fmt: skip
    return listed


@triton.jit(do_not_specialize=["entries", "rows_of_span"])
def _spans(
    kept, spans, table, lines, entries, rows_of_span, SPAN: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    sink_end, window, count = tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    span = table + row // rows_of_span * SPAN
    chosen, last = tl.load(span + 3), tl.load(span + 4)
    listed = chosen + last - tl.load(span + 2)
    before = 0
    begin = 0
    while begin < entries:
        entry = begin + tl.arange(0, BLOCK)
        chunk = tl.load(kept + row * entries + entry, mask=entry < listed, other=0)
        inside = tl.minimum(tl.maximum(sink_end - chunk * CHUNK, 0), CHUNK)
        before += tl.sum(tl.where(entry < listed, inside, 0), 0)
        past = tl.zeros([BLOCK], tl.int32) + last
        tl.store(kept + row * entries + entry, past, mask=(entry >= listed) & (entry < entries))
        begin += BLOCK
    end = chosen * CHUNK + window % CHUNK
    line = lines + row * SPAN
    tl.store(line, before)
    tl.store(line + 1, before)
    tl.store(line + 2, end)
    tl.store(line + 3, count)
    tl.store(line + 4, end)
    tl.store(line + 5, 0)


@triton.jit(do_not_specialize=["count", "entries", "width", "rows_of_span"])
def _list(
    chosen, kept, spans, listed, count, entries, width, rows_of_span, SPAN: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    sink_start, sink_end, window = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    own, last = tl.load(span + 3), tl.load(span + 4)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sinks = sink_end - sink_start
    number = place - sinks
    meant = (number >= 0) & (number < own)
    group = tl.load(chosen + row * count + number, mask=meant, other=0)
    chunk = tl.load(kept + row * entries + group // CHUNK, mask=meant, other=0)
    group = chunk * CHUNK + group % CHUNK
    group = tl.where(number < 0, sink_start + place, group)
    group = tl.where(number >= own, window + number - own, group)
    tl.store(listed + row * width + place, group, mask=(place < width) & (group < last))
