"""The changes to torch and transformers that make one line enough; all of them, and how to take them back.

1. `DYNAMIC_LAYER_TYPE_MAPPING`: dynamic caches are made of hga's layers, which are the stock ones until a
   graph of backend "hga" updates them.
2. `OptimizedModule.generate`: with `torch.compile(model, backend="hga")`, generation calls the compiled model
   (plain torch hands `generate` to the module inside, which then runs uncompiled).
"""

from collections.abc import Callable
from typing import Any

from torch._dynamo.eval_frame import OptimizedModule, innermost_backend
from transformers import cache_utils

from hga_compile.cache import HGALayer, HGASlidingLayer

__all__ = ["install_hooks", "remove_hooks"]

_LAYERS = {"full_attention": HGALayer, "sliding_attention": HGASlidingLayer}
_ABSENT = object()
_stock: dict[str, Any] = {}


def install_hooks() -> None:
    """Install both changes; once is enough, more does no harm."""
    if _stock:
        return
    mapping = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    for kind, layer in _LAYERS.items():
        _stock[kind] = mapping.get(kind, _ABSENT)
        mapping[kind] = layer
    _stock["generate"] = OptimizedModule.__dict__.get("generate", _ABSENT)
    type.__setattr__(OptimizedModule, "generate", property(_generate_of))


def remove_hooks() -> None:
    """Take both changes back; layers made meanwhile go on working."""
    if not _stock:
        return
    mapping = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    for kind in _LAYERS:
        before = _stock.pop(kind)
        if before is _ABSENT:
            mapping.pop(kind, None)
        else:
            mapping[kind] = before
    before = _stock.pop("generate")
    if before is _ABSENT:
        type.__delattr__(OptimizedModule, "generate")
    else:
        type.__setattr__(OptimizedModule, "generate", before)


def _generate_of(compiled: Any) -> Callable[..., Any]:
    """Return the `generate` of a compiled module; an AttributeError where the module inside has none."""
    inside = compiled._orig_mod
    generate = inside.generate
    if not _is_hga(compiled):
        return generate  # type: ignore[no-any-return]

    def generate_compiled(*args: Any, **kwargs: Any) -> Any:
        before = inside._compiled_call_impl
        inside._compiled_call_impl = compiled.dynamo_ctx(inside._call_impl)
        try:
            return inside.generate(*args, **kwargs)
        finally:
            inside._compiled_call_impl = before

    return generate_compiled


def _is_hga(compiled: Any) -> bool:
    backend = innermost_backend(compiled.dynamo_ctx.callback)
    name = getattr(backend, "compiler_name", None) or getattr(backend, "__name__", None)
    return name == "hga"
