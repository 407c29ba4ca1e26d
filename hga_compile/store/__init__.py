"""Where token K/V live, per layer of a cache: in GPU memory, in host RAM, or on files."""

from hga_compile.store.errors import StoreError
from hga_compile.store.layer import LayerStore
from hga_compile.store.nvme import NvmePages
from hga_compile.store.pages import Pages
from hga_compile.store.tier import Held, Tier

__all__ = ["Held", "LayerStore", "NvmePages", "Pages", "StoreError", "Tier"]
