"""Triton: K/V rows to and from their pages, in GPU memory or in pinned host memory, without a wait."""

import triton
import triton.language as tl
from torch import Tensor

from hga_compile.kernels.overlap import follow, overlap

__all__ = ["load_rows", "store_rows"]


def store_rows(pages: Tensor, key: Tensor, value: Tensor, begin: int | Tensor, group_size: int) -> None:
    """Write K/V rows as tokens ``begin, begin + 1, ...``.

    Parameters
    ----------
    pages : Tensor
        ``[groups, rows, group_size * (dim + v_dim)]`` (see `store.pages.Pages`); memory that the GPU reaches.
    key, value : Tensor
        ``[rows, n, dim]`` and ``[rows, n, v_dim]``, dtype of the pages.
    begin : int or Tensor
        Token of the first row. A tensor, int32 on the GPU, tells the tokens there are with these, first.
    group_size : int
        Tokens of a group.
    """
    _move(pages, key, value, begin, group_size, True)


def load_rows(
    pages: Tensor, key: Tensor, value: Tensor, begin: int, group_size: int, first_row: int = 0
) -> None:
    """Read the K/V rows of the tokens ``begin, begin + 1, ...`` into `key` and `value`.

    Parameters
    ----------
    pages, key, value, begin, group_size
        As `store_rows` takes them.
    first_row : int
        Row of the pages that `key` and `value` begin with; they may be of some rows.
    """
    _move(pages, key, value, begin, group_size, False, first_row)


def _move(
    pages: Tensor, key: Tensor, value: Tensor, begin: int | Tensor, group_size: int, store: bool,
    first_row: int = 0,
) -> None:  # fmt: skip
    rows, new, dim = key.shape
    v_dim = value.shape[2]
    begin, end = (0, begin) if isinstance(begin, Tensor) else (begin, None)
    _copy[(new, rows)](
        pages, key, *key.stride(), value, *value.stride(), begin, end, new, pages.shape[1], first_row,
        DIM=dim, V_DIM=v_dim, GROUP=group_size, PADDED=triton.next_power_of_2(max(dim, v_dim)), STORE=store,
        num_warps=1, **overlap(key.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "new", "rows", "first_row"])
def _copy(
    pages, key, key_row, key_token, key_channel, value, value_row, value_token, value_channel, begin, end,
    new, rows, first_row,
    DIM: tl.constexpr, V_DIM: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, STORE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    row = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0).to(tl.int64)
    if end is not None:
        begin = tl.load(end).to(tl.int64) - new
    token = begin + number
    page = pages + (token // GROUP * rows + first_row + row) * (GROUP * (DIM + V_DIM))
    channel = tl.arange(0, PADDED)
    key_at = key + row * key_row + number * key_token + channel * key_channel
    of_page = token % GROUP * DIM + channel
    if STORE:
        tl.store(page + of_page, tl.load(key_at, mask=channel < DIM), mask=channel < DIM)
    else:
        tl.store(key_at, tl.load(page + of_page, mask=channel < DIM), mask=channel < DIM)
    value_at = value + row * value_row + number * value_token + channel * value_channel
    of_page = GROUP * DIM + token % GROUP * V_DIM + channel
    if STORE:
        tl.store(page + of_page, tl.load(value_at, mask=channel < V_DIM), mask=channel < V_DIM)
    else:
        tl.store(value_at, tl.load(page + of_page, mask=channel < V_DIM), mask=channel < V_DIM)
