"""Where token K/V lives: pages in host RAM or on the accelerator, per layer of a cache."""

from hga_compile.store.layer import LayerStore
from hga_compile.store.pages import Pages

__all__ = ["LayerStore", "Pages"]
