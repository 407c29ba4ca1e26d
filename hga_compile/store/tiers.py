"""Makes the tier that a layer's K/V live in, and moves them from one to another."""

import torch

from hga_compile.configs.profile import Kernels, Offload
from hga_compile.kernels.fp8 import EXTRA
from hga_compile.store.fp8_pages import Fp8Pages
from hga_compile.store.nvme import NvmePages
from hga_compile.store.pages import Pages
from hga_compile.store.storage_io import StorageIO
from hga_compile.store.tier import Home, Tier

__all__ = ["is_at", "make_tier", "moved"]

# Bytes that are on their way from one tier to another at once.
_PIECE = 2**26


def make_tier(
    home: Home,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    compute: torch.device,
    kernels: Kernels,
    place: Offload,
    layer: int = 0,
    io: StorageIO | None = None,
) -> Tier:
    """Return an empty tier.

    Parameters
    ----------
    home : {"gpu", "host", "nvme"}
        `gpu` is where the K/V come from, which may be a CPU.
    shape : tuple of int
        Rows, channels of a key, channels of a value, tokens of a group.
    dtype, compute
        Of the K/V.
    kernels : {"auto", "triton", "native", "reference"}
        What moves rows.
    place : Offload
        Budgets, folder, sizes.
    layer : int
        Number of the layer.
    io : StorageIO or None
        File system of the `nvme` tier; None: the operating system's.
    """
    if place.kv_dtype == "fp8":
        rows, dim, v_dim, group_size = shape
        plain = place.model_copy(update={"kv_dtype": "model"})
        coded = (rows, dim, v_dim + EXTRA, group_size)
        return Fp8Pages(make_tier(home, coded, torch.uint8, compute, kernels, plain, layer, io), dtype)
    if home == "nvme":
        return NvmePages(*shape, dtype, compute, kernels, place, layer, io)
    device = torch.device("cpu") if home == "host" else compute
    return Pages(*shape, dtype, compute, device, kernels, place)


def is_at(tier: Tier, home: Home, place: Offload) -> bool:
    """Say whether K/V of a tier live where `home` says, and in the form that `place` says."""
    if isinstance(tier, Fp8Pages) != (place.kv_dtype == "fp8"):
        return False
    tier = tier.coded if isinstance(tier, Fp8Pages) else tier
    if isinstance(tier, Pages):
        return home != "nvme" and tier.home == (torch.device("cpu") if home == "host" else tier.compute)
    return home == "nvme"


def moved(
    tier: Tier,
    home: Home,
    group_size: int,
    tokens: int,
    place: Offload,
    layer: int = 0,
    io: StorageIO | None = None,
) -> Tier:
    """Return another tier, or groups of another size, with the first `tokens` tokens; `tier` stays as it is.

    Raises
    ------
    StoreError
        The other tier has no room, or a file failed.
    """
    shape = (tier.rows, tier.dim, tier.v_dim, group_size)
    other = make_tier(home, shape, tier.dtype, tier.compute, tier.kernels, place, layer, io)
    row = tier.rows * (tier.dim + tier.v_dim) * tier.dtype.itemsize
    step = max(1, _PIECE // row)
    try:
        if tokens:
            other.reserve(tokens)
        for begin in range(0, tokens, step):
            other.write(*tier.read(begin, min(tokens, begin + step)), begin)
    except BaseException:
        other.close()
        raise
    return other
