"""Triton: new K/V rows to their pages, in GPU memory or in pinned host memory, without a wait."""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["store_rows"]


def store_rows(pages: Tensor, key: Tensor, value: Tensor, begin: int, group_size: int) -> None:
    """Write K/V rows as tokens ``begin, begin + 1, ...``.

    Parameters
    ----------
    pages : Tensor
        ``[groups, rows, group_size * (dim + v_dim)]`` (see `store.pages.Pages`); memory that the GPU reaches.
    key, value : Tensor
        ``[rows, n, dim]`` and ``[rows, n, v_dim]``, dtype of the pages.
    begin, group_size : int
        Token of the first row; tokens of a group.
    """
    rows, new, dim = key.shape
    v_dim = value.shape[2]
    _store[(new, rows)](
        pages, key, *key.stride(), value, *value.stride(), begin, rows,
        DIM=dim, V_DIM=v_dim, GROUP=group_size, PADDED=triton.next_power_of_2(max(dim, v_dim)), num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "rows"])
def _store(
    pages, key, key_row, key_token, key_channel, value, value_row, value_token, value_channel, begin, rows,
    DIM: tl.constexpr, V_DIM: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0).to(tl.int64)
    token = begin + number
    page = pages + (token // GROUP * rows + row) * (GROUP * (DIM + V_DIM))
    channel = tl.arange(0, PADDED)
    given = tl.load(key + row * key_row + number * key_token + channel * key_channel, mask=channel < DIM)
    tl.store(page + token % GROUP * DIM + channel, given, mask=channel < DIM)
    given = tl.load(value + row * value_row + number * value_token + channel * value_channel, mask=channel < V_DIM)
    tl.store(page + GROUP * DIM + token % GROUP * V_DIM + channel, given, mask=channel < V_DIM)
