"""Bytes of one layer's K/V and index, as the store and the index allocate them, slack included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hga_compile.configs.profile import Offload
from hga_compile.configs.routing import CENTRE_BLOCK, Routing
from hga_compile.kernels.stretch import BEYOND, room_of

__all__ = [
    "Filed",
    "arrivals",
    "capacity",
    "file_sizes",
    "hot_bytes",
    "index_bytes",
    "page_bytes",
    "stored_bytes",
]


def arrivals(context: int, step: int, decoded: int = 256) -> tuple[int, ...]:
    """Return the tokens stored after each forward pass: a prompt in steps, and the last ones one by one.

    Parameters
    ----------
    context : int
        Tokens in the end.
    step : int
        Prompt tokens of a forward pass.
    decoded : int
        Tokens after the prompt; buffers that the prompt filled grow once more for them.
    """
    prompt = max(1, context - decoded)
    return (*range(step, prompt, step), *range(prompt, context + 1))


def capacity(entries: Iterable[int], first: int = 0, least: int = 64, most: int | None = None) -> int:
    """Return what a growing buffer has room for (see `kernels.summaries.grown` and `store.pages.Pages`).

    Parameters
    ----------
    entries : iterable of int
        Entries that it had to hold, one time after the other.
    first : int
        Entries that it is made for at once; 0: as many as are there, and slack.
    least : int
        Slack at least.
    most : int or None
        Slack at most, where `first` was not enough.
    """
    have = 0
    for used in entries:
        if used > have:
            slack = first if first and not have else have + have // 4 + least
            if have and most is not None:
                slack = min(slack, used + most)
            have = max(used, slack)
    return have


def stored_bytes(offload: Offload, row_bytes: int, dim: int) -> int:
    """Return the bytes in which one token's key and value of one row are stored.

    Parameters
    ----------
    offload : Offload
        Whether in 8 bits.
    row_bytes : int
        In the dtype of the model.
    dim : int
        Channels of a key, and of a value.
    """
    if offload.kv_dtype == "model":
        return row_bytes
    from hga_compile.kernels.fp8 import EXTRA

    return 2 * dim + EXTRA


def page_bytes(
    tokens: Sequence[int], rows: int, row_bytes: int, group_size: int, reserved: int = 0, host: bool = True
) -> int:
    """Return the bytes of one layer's pages.

    Parameters
    ----------
    tokens : sequence of int
        Tokens stored after each forward pass.
    rows : int
        KV heads times batch.
    row_bytes : int
        One token's key and value of one row.
    group_size : int
        Tokens of a page.
    reserved : int
        `offload.reserve_tokens`; 0: null.
    host : bool
        Whether they lie in host RAM.
    """
    groups, first = (-(-count // group_size) for count in tokens), -(-reserved // group_size)
    most = BEYOND // group_size if reserved and host else None
    return capacity(groups, first, most=most) * group_size * rows * row_bytes


def index_bytes(
    routing: Routing, tokens: Sequence[int], rows: int, heads: int, dim: int, reserved: int = 0
) -> int:
    """Return the bytes of one layer's index.

    Parameters
    ----------
    routing : Routing
        Of the layer.
    tokens : sequence of int
        Tokens stored after each forward pass.
    rows, heads, dim : int
        KV heads times batch, query heads of one, channels.
    reserved : int
        `offload.reserve_tokens`; 0: null.
    """
    # The index is made in the first pass that routes.
    tokens = [count for count, alone in _routed(routing, tokens) if alone or routing.prefill == "routed"]
    if not tokens:
        return 0
    group, chunk = routing.group_size, routing.chunk_size
    room = room_of(reserved)
    if routing.summary == "lowbit":
        packed, coded = -(-dim * routing.bits // 8), [count - count % group for count in tokens]
        found = rows * (capacity((room, *coded), room) * (packed + 2) + dim * 4)
        if routing.centre == "block":
            known = (-(-count // CENTRE_BLOCK) for count in (room, *coded))
            blocks = capacity((1, *known), first=1, least=4)
            found += rows * blocks * dim * 2
    else:
        found = rows * capacity((count // group for count in (room, *tokens)), room // group) * dim * 2
    chunks = [count // chunk for count in tokens if routing.uses_chunks(count)]
    if chunks:
        found += rows * capacity(count * routing.chunk_parts for count in chunks) * dim * 2
    if routing.tail == "estimate":
        expanded = capacity(count // chunk for count in tokens)
        found += rows * heads * 4 * (expanded * (1 + 2 * dim) + dim)
    return found


def hot_bytes(share: float, routing: Routing, tokens: Sequence[int], rows: int, row_bytes: int) -> int:
    """Return the bytes of one layer's hot cache on the GPU (`kernels.hot.HotCache`).

    Parameters
    ----------
    share : float
        `offload.hot_cache`.
    routing : Routing
        Of the layer.
    tokens : sequence of int
        Tokens stored after each forward pass; passes of one token use the cache.
    rows, row_bytes
        As for `page_bytes`.
    """
    size, slots, table = routing.group_size, 0, 0
    lengths = [count for count, alone in _routed(routing, tokens) if alone]
    if not lengths:
        return 0
    for length in lengths:
        groups = -(-length // size)
        wanted = max(1, int(groups * share))
        if wanted > slots:
            slots = max(wanted, slots + slots // 4)
        if groups > table:
            table = groups + groups // 4 + 64
    pool, owners, used, clock = slots * size * row_bytes, slots * 4, slots * 4, 3 * 4 + 2 * 8
    return rows * (pool + owners + used + table * 4 + clock)


@dataclass(frozen=True)
class Filed:
    """What one layer takes in the tier `nvme`."""

    page: int
    """Bytes of a page: what is read and written at once, and a slot of the RAM cache."""
    file: int
    """Bytes set aside on the file system."""
    tail: int
    """Bytes in RAM for the last, incomplete block."""


def file_sizes(tokens: Sequence[int], rows: int, row_bytes: int, group_size: int, offload: Offload) -> Filed:
    """Return what one layer takes in the tier `nvme` (`store.nvme.NvmePages`).

    Parameters
    ----------
    tokens, rows, row_bytes, group_size
        As for `page_bytes`.
    offload : Offload
        Size of pages, and tokens to reserve.
    """
    from hga_compile.store.page_file import ALIGNMENT
    from hga_compile.store.page_format import HEADER_BYTES
    from hga_compile.store.reader import BATCH_BYTES

    group = group_size * row_bytes
    page = max(offload.nvme_page, HEADER_BYTES + group)
    page += -page % ALIGNMENT
    groups = (page - HEADER_BYTES) // group
    span, batch = groups * group_size, max(1, BATCH_BYTES // (rows * page))
    have, done = (offload.reserve_tokens or 0) // span * rows, 0
    for count in tokens:
        # A batch of blocks at a time, each of which may set aside more.
        while done < count // span:
            done = min(done + batch, count // span)
            if done * rows > have:
                have = max(done * rows, have + have // 4)
    return Filed(page, have * page, rows * groups * group)


def _routed(routing: Routing, tokens: Sequence[int]) -> list[tuple[int, bool]]:
    """Return the passes in which a query may be routed: tokens stored after each, and whether it has one."""
    dense = max(routing.centre_tokens, routing.dense_below)
    found, before = [], 0
    for count in tokens:
        if count > dense and routing.budget.tokens_for(count) < count:
            found.append((count, count - before == 1))
        before = count
    return found
