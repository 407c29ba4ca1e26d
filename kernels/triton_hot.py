"""Triton: which slot of a pool each listed group is in, and what gives way to those in none."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.overlap import follow, overlap

__all__ = ["place_groups"]

_STEP = 1024


def place_groups(
    chosen: Tensor,
    spans: Tensor,
    table: Tensor,
    owners: Tensor,
    used: Tensor,
    clock: Tensor,
    counts: Tensor,
    group_size: int,
    rows_of_span: int,
) -> Tensor:
    """Look listed groups up, and give those that are not there slots that others give up.

    A slot gives way if its group was not listed since the hand last came by (a clock: near to the least
    recently used); slots of groups listed now never do.

    Parameters
    ----------
    chosen : Tensor
        ``[rows, width]`` int32, from `triton_select.select_groups`.
    spans : Tensor
        ``[batch or 1, SPAN]`` int32 (see `gpu.Spans`).
    table : Tensor
        ``[rows, groups]`` int32: a group's slot, -1 without; changed.
    owners, used : Tensor
        ``[rows, slots]`` int32: the group in a slot (-1: none), and when it was listed last; changed.
    clock : Tensor
        ``[rows, 3]`` int32: now, the hand, when it came by slot 0; changed.
    counts : Tensor
        ``[rows, 2]`` int64: hits and misses so far; changed.
    group_size : int
        Tokens of a group: only groups whose tokens are all there are kept.
    rows_of_span : int
        Rows that a line of `spans` is for.

    Returns
    -------
    Tensor
        ``[rows, width]`` int32: a slot; -1 for a group without one; ``-2 - slot`` for one whose page is to
        be written there. Entries past a row's own list are not written.
    """
    rows, width = chosen.shape
    entries, victims = torch.empty(2, rows, width, dtype=torch.int32, device=chosen.device).unbind()
    step = min(_STEP, max(32, triton.next_power_of_2(width)))
    _place[(rows,)](
        chosen, spans, table, owners, used, clock, counts, entries, victims, width, table.stride(0),
        owners.shape[1], rows_of_span, SPAN=spans.shape[1], GROUP=group_size, STEP=step, num_warps=8,
        **overlap(chosen.device),
    )  # fmt: skip
    return entries


@triton.jit(do_not_specialize=["width", "table_row", "slots", "rows_of_span"])
def _place(
    chosen, spans, table, owners, used, clock, counts, entries, victims, width, table_row, slots,
    rows_of_span,
    SPAN: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    span = spans + row // rows_of_span * SPAN
    listed = tl.load(span + 1) - tl.load(span) + tl.load(span + 3) + tl.load(span + 4) - tl.load(span + 2)
    complete = tl.load(span + 6) // GROUP
    follow(EARLY)
    chosen += row * width
    entries += row * width
    victims += row * width
    table += row * table_row
    owners += row * slots
    used += row * slots
    clock += row * 3
    counts += row * 2
    place = tl.arange(0, STEP)
    now, hand, came = tl.load(clock) + 1, tl.load(clock + 1), tl.load(clock + 2)
    missing = 0
    asked = 0
    begin = 0
    while begin < listed:
        inside = begin + place < listed
        group = tl.load(chosen + begin + place, mask=inside, other=0)
        kept = inside & (group < complete)
        slot = tl.load(table + group, mask=kept, other=-1)
        tl.store(used + slot, now, mask=slot >= 0)
        tl.store(entries + begin + place, slot, mask=inside)
        missing += tl.sum((kept & (slot < 0)).to(tl.int32), 0)
        asked += tl.sum(kept.to(tl.int32), 0)
        begin += STEP
    # What threads of this program have written is read by others of it.
    tl.debug_barrier()
    found = 0
    looked = 0
    while (found < missing) & (looked < 2 * slots):
        many = tl.minimum(STEP, slots - hand)
        at = hand + place
        seen = tl.load(used + at, mask=place < many, other=0x7FFFFFFF)
        # Once round, and nothing that was listed since is left but what is listed now.
        free = (place < many) & (seen < tl.where(looked < slots, came, now))
        rank = found + tl.cumsum(free.to(tl.int32), 0) - 1
        free = free & (rank < missing)
        old = tl.load(owners + at, mask=free, other=-1)
        same = tl.load(table + old, mask=free & (old >= 0), other=-1) == at
        tl.store(table + old, -1, mask=free & (old >= 0) & same)
        tl.store(victims + rank, at, mask=free)
        # Taken: it does not give way twice.
        tl.store(used + at, now, mask=free)
        taken = tl.sum(free.to(tl.int32), 0)
        # The hand stops behind the last one that it took.
        passed = tl.where(found + taken < missing, many, tl.max(tl.where(free, place + 1, 0), 0))
        found += taken
        looked += passed
        hand += passed
        came = tl.where(hand >= slots, now, came)
        hand = tl.where(hand >= slots, 0, hand)
        tl.debug_barrier()
    missing = 0
    begin = 0
    while begin < listed:
        inside = begin + place < listed
        group = tl.load(chosen + begin + place, mask=inside, other=0)
        slot = tl.load(entries + begin + place, mask=inside, other=0)
        miss = inside & (group < complete) & (slot < 0)
        rank = missing + tl.cumsum(miss.to(tl.int32), 0) - 1
        given = miss & (rank < found)
        slot = tl.load(victims + rank, mask=given, other=0)
        tl.store(table + group, slot, mask=given)
        tl.store(owners + slot, group, mask=given)
        tl.store(entries + begin + place, -2 - slot, mask=given)
        missing += tl.sum(miss.to(tl.int32), 0)
        begin += STEP
    tl.store(clock, now)
    tl.store(clock + 1, hand)
    tl.store(clock + 2, came)
    tl.store(counts, tl.load(counts) + (asked - missing))
    tl.store(counts + 1, tl.load(counts + 1) + missing)
