"""Centres that move: the keys of a block are coded about the mean of the block before it.

Rotary embedding turns the mean of a head's keys along with the position: about the mean of the keys just
before it, less of a key is left to be coded than about the mean of the first ones. That mean is known when
a block begins, so codes never change. As centres differ, a score is that of a key's code and the query's
product with the centre.

A centre is kept as what lies between it and the mean of the first keys, which all scores leave out: rotated
as the keys are, in bfloat16. That of the first block is 0.
"""

import torch
from torch import Tensor

from hga_compile.configs.routing import CENTRE_BLOCK
from hga_compile.kernels.rotation import rotation

__all__ = ["BLOCK_TOKENS", "BlockCentres", "block_centres"]

BLOCK_TOKENS = CENTRE_BLOCK
"""Keys of a block, counted from the first position."""
# Blocks that room is made for beyond those that are there, and a quarter.
_SLACK = 4


def block_centres(keys: Tensor, counted: Tensor | None, middle: Tensor) -> Tensor:
    """Return the centres of the blocks that follow on whole blocks.

    Parameters
    ----------
    keys : Tensor
        ``[rows, n * BLOCK_TOKENS, dim]``.
    counted : Tensor or None
        ``[rows, n * BLOCK_TOKENS]`` bool: keys that are no padding; None: all.
    middle : Tensor
        ``[rows, dim]`` float32: the mean of the first keys.

    Returns
    -------
    Tensor
        ``[rows, n, dim]`` bfloat16, rotated, less `middle`; 0 after a block without a key.
    """
    # A broken key would break the codes of a whole block and could not be told from them any more.
    usable = torch.isfinite(keys).all(-1)
    if counted is not None:
        usable = usable & counted
    kept = keys.masked_fill(~usable[..., None], 0.0).unflatten(1, (-1, BLOCK_TOKENS))
    # In float64, which Metal lacks, sums do not depend on their order, nor centres on the steps' sizes.
    wide = torch.float32 if keys.device.type == "mps" else torch.float64
    total = kept.sum(2, dtype=wide)
    count = usable.unflatten(1, (-1, BLOCK_TOKENS)).sum(2)[..., None]
    moved = (total / count.clamp(min=1) - middle.to(wide)[:, None]).masked_fill(count == 0, 0.0)
    turned = moved @ rotation(keys.shape[2], keys.device).to(wide)
    most = torch.finfo(torch.bfloat16).max
    centres: Tensor = turned.clamp(-most, most).bfloat16()
    return centres


class BlockCentres:
    """Centres of the blocks of one layer, in order.

    Parameters
    ----------
    middle : Tensor
        ``[rows, dim]`` float32: the mean of the first keys.
    """

    def __init__(self, middle: Tensor) -> None:
        self.middle = middle
        self.blocks = 1
        """Blocks whose centre is known."""
        self.values = torch.zeros(len(middle), 1, middle.shape[1], dtype=torch.bfloat16, device=middle.device)
        """``[rows, blocks, dim]`` bfloat16, contiguous: those known, and slack."""

    def missing(self, end: int) -> tuple[int, int]:
        """Return the tokens, begin and end, whose keys make the centres of all tokens before `end`."""
        return (self.blocks - 1) * BLOCK_TOKENS, max(0, -(-end // BLOCK_TOKENS) - 1) * BLOCK_TOKENS

    def append(self, keys: Tensor, counted: Tensor | None) -> None:
        """Add the centres of the blocks after those of `keys` (see `block_centres`), which follow on."""
        made = block_centres(keys, counted, self.middle)
        self.reserve((self.blocks + made.shape[1]) * BLOCK_TOKENS)
        self.values[:, self.blocks : self.blocks + made.shape[1]] = made
        self.blocks += made.shape[1]

    def reserve(self, tokens: int) -> None:
        """Make room for the blocks of `tokens` tokens."""
        rows, room, dim = self.values.shape
        wanted = -(-tokens // BLOCK_TOKENS)
        if wanted > room:
            # Slack holds numbers: it may be multiplied, though nothing is made of it.
            larger = self.values.new_zeros(rows, max(wanted, room + room // 4 + _SLACK), dim)
            larger[:, : self.blocks] = self.values[:, : self.blocks]
            self.values = larger

    def know(self, tokens: int) -> None:
        """Count the centres of the blocks of `tokens` tokens, which a kernel has made, as known."""
        self.blocks = -(-tokens // BLOCK_TOKENS)

    def truncate(self, tokens: int) -> None:
        """Forget the blocks that begin at token number `tokens` or later."""
        self.blocks = min(self.blocks, max(1, -(-tokens // BLOCK_TOKENS)))

    def of_tokens(self, begin: int, end: int) -> Tensor:
        """Return the centre of each of the tokens ``begin <= token < end``, ``[rows, n, dim]`` float32."""
        token = torch.arange(begin, end, device=self.values.device)
        return self.values[:, token // BLOCK_TOKENS].float()

    def add_scores(self, scores: Tensor, turned: Tensor) -> None:
        """Add the products with the centres to the scores of the first tokens.

        Parameters
        ----------
        scores : Tensor
            ``[rows, lines, tokens]`` float32; changed.
        turned : Tensor
            ``[rows, lines, dim]`` float32: the queries, rotated as the keys are.
        """
        tokens = scores.shape[2]
        whole = tokens // BLOCK_TOKENS
        products = turned @ self.values[:, : -(-tokens // BLOCK_TOKENS)].float().transpose(1, 2)
        inside = scores[:, :, : whole * BLOCK_TOKENS].unflatten(-1, (whole, BLOCK_TOKENS))
        inside += products[:, :, :whole, None]
        scores[:, :, whole * BLOCK_TOKENS :] += products[:, :, whole:]

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows` (int64 indices)."""
        self.middle, self.values = self.middle[rows], self.values[rows]

    def bytes_per_token(self) -> float:
        """Return the bytes that one token's share of a centre takes."""
        return self.values.shape[2] * self.values.element_size() / BLOCK_TOKENS

    def nbytes(self) -> int:
        """Return the bytes allocated."""
        return self.values.nbytes
