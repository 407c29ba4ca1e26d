"""Level 1: summaries of chunks and the choice of the chunks whose groups are scored."""

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.kernels.coarse import Coarse
from hga_compile.kernels.mean import MeanSummary

__all__ = ["ChunkSummary"]


class ChunkSummary:
    """Means of equal parts of each complete chunk; a chunk's score is that of its best part.

    One part is the paper's chunk mean. Several keep what a single mean of 64 keys washes out.

    Parameters
    ----------
    chunk_size, parts : int
        Tokens of a chunk and means that stand for it; `parts` divides `chunk_size`.
    rows, dim : int
        KV heads times batch, channels of a head.
    device : torch.device
        Where the summaries live.
    kernels : {"auto", "triton", "native", "reference"}
        What makes the means.
    """

    def __init__(
        self,
        chunk_size: int,
        parts: int,
        rows: int,
        dim: int,
        device: torch.device,
        kernels: Kernels = "auto",
    ) -> None:
        self.chunk_size, self.parts = chunk_size, parts
        self.part_means = MeanSummary(chunk_size // parts, rows, dim, torch.bfloat16, device, kernels)

    @property
    def chunks(self) -> int:
        """Complete chunks summarised so far."""
        return self.part_means.groups // self.parts

    @property
    def means(self) -> Tensor:
        """``[rows, chunks * parts, dim]``: those of all chunks, and slack."""
        return self.part_means.means

    def append(self, keys: Tensor) -> None:
        """Summarise ``[rows, tokens, dim]`` keys of complete chunks."""
        self.part_means.append(keys)

    def truncate(self, chunks: int) -> None:
        """Forget every chunk from number `chunks` on."""
        self.part_means.truncate(chunks * self.parts)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows`."""
        self.part_means.select_rows(rows)

    def scores(self, query: Tensor, limit: int) -> Tensor:
        """Score the first `limit` chunks: ``[rows, heads, queries, dim]`` to ``[..., limit, 1]``."""
        parts = limit * self.parts
        part = self.part_means.scorer(parts)(query, parts)
        return part.view(*part.shape[:3], limit, self.parts).amax(-1, keepdim=True)

    def tile_parts(self, chunks: int, fused: bool) -> Coarse:
        """Return what tiles keep the first `chunks` chunks by, ``[rows, chunks * parts, padded]``.

        With `fused` it is made for the kernels of `gpu_tiles`, else for `tiles.shared_groups`.
        """
        return self.part_means.tile_keys(chunks * self.parts, None, fused).means

    def nbytes(self) -> int:
        """Return the bytes allocated."""
        return self.part_means.nbytes()

    def bytes_per_token(self) -> float:
        """Return the bytes of one token's share of the chunk summaries in one row."""
        return self.part_means.bytes_per_token()
