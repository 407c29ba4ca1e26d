"""Hot cache: pages of recently routed groups in slots on the GPU, so that only misses cross PCIe.

Lookup, choice of what gives way, and fetching all run on the GPU, without a wait; attention reads hits from
their slots and misses from pinned host memory, and puts these into slots as it goes.
"""

from typing import Any

import torch
from torch import Tensor

from hga_compile.kernels.fp8 import blank
from hga_compile.kernels.ledger import LEDGER

__all__ = ["HotCache"]


class HotCache:
    """Slots of one layer.

    Parameters
    ----------
    rows, page : int
        KV heads times batch; values of a page.
    share : float
        Of the groups that a row keeps in slots, above 0 and at most 1.
    dtype : torch.dtype
        Of the K/V.
    device : torch.device
        The GPU.
    """

    def __init__(self, rows: int, page: int, share: float, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.page, self.share = rows, page, share
        self.dtype, self.device = dtype, device
        self._kept = 0
        """Groups that may be in slots: those from here on are in none."""
        self.slots = 0
        """Of one row."""
        kind: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.pool = torch.empty(rows, 0, page, dtype=dtype, device=device)
        """``[rows, slots, page]``."""
        self.owners = torch.empty(rows, 0, **kind)
        """``[rows, slots]`` int32: the group in a slot, -1 without."""
        self.used = torch.empty(rows, 0, **kind)
        """``[rows, slots]`` int32: when its group was listed last, -1 without."""
        self.clock = torch.zeros(rows, 3, **kind)
        """``[rows, 3]`` int32: now, the hand, when it came by slot 0."""
        self.counts = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        """``[rows, 2]`` int64: hits and misses so far."""
        self._layer: int | None = None
        self.table = torch.full((rows, 0), -1, dtype=torch.int32, device=device)
        """``[rows, groups]`` int32: a group's slot, -1 without."""

    def place(self, chosen: Tensor, spans: Tensor, length: int, group_size: int, rows_of_span: int) -> Tensor:
        """Give listed groups slots (see `triton_hot.place_groups`).

        Parameters
        ----------
        chosen, spans : Tensor
            As `triton_hot.place_groups` takes them.
        length, group_size : int
            Tokens to make room for, those of `spans` at least; tokens of a group.
        rows_of_span : int
            Rows that a line of `spans` is for.

        Returns
        -------
        Tensor
            ``[rows, width]`` int32: a slot of the row, or less than 0.
        """
        from hga_compile.kernels.triton_hot import place_groups

        groups = -(-length // group_size)
        wanted = max(1, int(groups * self.share))
        if wanted > self.slots:
            self._grow(max(wanted, self.slots + self.slots // 4))
        if groups > self.table.shape[1]:
            table = torch.full(
                (self.rows, groups + groups // 4 + 64), -1, dtype=torch.int32, device=self.device
            )
            table[:, : self.table.shape[1]] = self.table
            self.table = table
        self._kept = max(self._kept, length // group_size)
        return place_groups(
            chosen, spans, self.table, self.owners, self.used, self.clock, self.counts, group_size,
            rows_of_span,
        )  # fmt: skip

    def forget(self, group: int, poison: bool = False) -> None:
        """Give up groups from number `group` on: their tokens are about to change.

        With `poison`, all that is kept is given up and overwritten with NaN.
        """
        if group < self._kept:
            if poison:
                self.pool.fill_(blank(self.dtype))
            self.table[:, 0 if poison else group :] = -1
            self._kept = group

    def misses(self) -> int:
        """Return how many groups were fetched so far; waits for the GPU."""
        return int(self.counts[:, 1].sum())

    def report_as(self, layer: int) -> None:
        """Have the ledger count hits and misses from now on, as those of a layer's decode steps."""
        if layer != self._layer:
            told = (0, 0) if self._layer is None else self.counts.sum(0).tolist()
            self._layer = layer
            LEDGER.count_on_device(layer, self, self.counts, told)

    def nbytes(self) -> int:
        """Return the bytes allocated."""
        parts = (self.pool, self.table, self.owners, self.used, self.clock, self.counts)
        return sum(part.nbytes for part in parts)

    def _grow(self, slots: int) -> None:
        """Have more slots; what is in those there are stays in them."""
        for name, blank_slot in (("pool", None), ("owners", -1), ("used", -1)):
            old = getattr(self, name)
            new = old.new_empty(self.rows, slots, *old.shape[2:])
            new[:, : self.slots] = old
            if blank_slot is not None:
                new[:, self.slots :] = blank_slot
            setattr(self, name, new)
        self.slots = slots
