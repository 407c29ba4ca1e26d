"""Hierarchical Global Attention for pretrained transformers: `torch.compile(model, backend="hga")`."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hga_compile.cache import CacheMemory, HGACache, cache_memory
    from hga_compile.configs.loader import load_profile
    from hga_compile.configs.profile import Profile
    from hga_compile.reporting import Report, record_routes, report, reset_report

__all__ = [
    "CacheMemory",
    "HGACache",
    "Profile",
    "Report",
    "__version__",
    "cache_memory",
    "load_profile",
    "record_routes",
    "report",
    "reset_report",
]

try:
    __version__ = version("hga-compile")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

# Imported on first use: the command line must not load torch to print its help.
_HOMES = {
    "CacheMemory": "cache",
    "HGACache": "cache",
    "cache_memory": "cache",
    "load_profile": "configs.loader",
    "Profile": "configs.profile",
    "Report": "reporting",
    "record_routes": "reporting",
    "report": "reporting",
    "reset_report": "reporting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
