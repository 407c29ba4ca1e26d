"""Mean keys as group summaries, the paper's setting: one key-sized vector a group."""

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.configs.routing import Routing
from hga_compile.kernels.centres import BlockCentres
from hga_compile.kernels.coarse import TileKeys, exact
from hga_compile.kernels.dispatch import triton_serves
from hga_compile.kernels.gpu import store_means
from hga_compile.kernels.gpu_tiles import coarse_means
from hga_compile.kernels.summaries import Scorer, grown, register_summary

__all__ = ["MeanSummary"]


class MeanSummary:
    """Mean of the rotated (post-RoPE) keys of each group (see `summaries.Summary`).

    Parameters
    ----------
    group_size : int
        Tokens that one mean stands for.
    rows, dim : int
        KV heads times batch, channels of a head.
    dtype, device
        Of the keys; the means are kept in the same precision.
    kernels : {"auto", "triton", "native", "reference"}
        What makes the means.
    """

    def __init__(
        self,
        group_size: int,
        rows: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels = "auto",
    ) -> None:
        self.kernels = kernels
        self.group_size = group_size
        self.groups = 0
        self.centres: BlockCentres | None = None
        self.means = torch.empty(rows, 0, dim, dtype=dtype, device=device)

    @property
    def stored(self) -> tuple[Tensor, None]:
        """What kernels for a GPU score by: means, without scales."""
        return self.means, None

    def expect(self, tokens: int) -> None:
        """See `summaries.Summary`."""
        self.means = grown(self.means, self.groups, tokens // self.group_size, 1, slack=False)

    def append(self, keys: Tensor) -> None:
        """Summarise the keys of complete groups; ``[rows, tokens, dim]``."""
        new = keys.shape[1] // self.group_size
        self.means = grown(self.means, self.groups, self.groups + new, 1)
        if triton_serves(self.kernels, keys.device, keys.dtype, keys.shape[2]):
            store_means(keys, self.means, self.groups, self.group_size)
        else:
            means = keys.float().unflatten(1, (-1, self.group_size)).mean(2)
            self.means[:, self.groups : self.groups + new] = means.to(self.means.dtype)
        self.groups += new

    def truncate(self, groups: int) -> None:
        """Forget every group from number `groups` on."""
        self.groups = min(self.groups, groups)

    def scorer(self, groups: int) -> Scorer:
        """Return the scoring function of the first `groups` groups."""
        means = self.means[:, :groups].float().transpose(1, 2)

        def score(query: Tensor, limit: int) -> Tensor:
            rows, heads, queries, dim = query.shape
            flat = torch.bmm(query.reshape(rows, -1, dim), means[:, :, :limit])
            return flat.view(rows, heads, queries, limit, 1)

        return score

    def tile_keys(self, groups: int, starts: Tensor | None, fused: bool) -> TileKeys:
        """Return what tiles are routed by (see `summaries.Summary`): the means, as exact as they are."""
        means = coarse_means(self.means, groups) if fused else exact(self.means[:, :groups].float())
        return TileKeys(means, means)

    def turned(self, query: Tensor) -> Tensor:
        """Return queries as they are: means are not rotated."""
        return query

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows`."""
        self.means = self.means[rows.to(self.means.device)]

    def bytes_per_token(self) -> float:
        """Return the bytes of one token's share of a mean."""
        return self.means.shape[2] * self.means.element_size() / self.group_size

    def nbytes(self) -> int:
        """Return the bytes allocated."""
        return self.means.nbytes


@register_summary("mean")
def _make(routing: Routing, centre: Tensor, kernels: Kernels) -> MeanSummary:
    rows, dim = centre.shape
    return MeanSummary(routing.group_size, rows, dim, torch.bfloat16, centre.device, kernels)
