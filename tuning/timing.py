"""The time of one layer's decode step on the present device: random K/V, for time does not depend on them."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from hga_compile.configs.routing import CENTRE_BLOCK, Routing
from hga_compile.tuning.hardware import Step
from hga_compile.tuning.uncached import copies, microseconds

__all__ = ["measured_us", "present_is"]


def present_is(device: torch.device, names: tuple[str, ...]) -> bool:
    """Say whether a CUDA device is the GPU that a card names."""
    if device.type != "cuda":
        return False
    from hga_compile.configs.catalogue import gpu_of_device

    name = torch.cuda.get_device_name(device)
    known = gpu_of_device(name)
    return name in names or (known is not None and known.device_names == names)


def measured_us(step: Step, device: torch.device) -> float:
    """Return the microseconds of a decode step, routing included: the median, on a CPU the least of many.

    Parameters
    ----------
    step : Step
        On CUDA in 16-bit floats, replayed from a CUDA graph; on a CPU in 32-bit ones.
    device : torch.device
        Where it runs.
    """
    with torch.no_grad():
        return _on_gpu(step, device) if device.type == "cuda" else _on_cpu(step)


def _on_gpu(step: Step, device: torch.device) -> float:
    from hga_compile.kernels import gpu
    from hga_compile.kernels.plan import plan_queries

    routing, size, dim, rows = step.routing, step.routing.group_size, step.dim, step.rows
    groups, dtype = step.groups, torch.bfloat16
    # Pinned memory is a device's: on another one its pages are plain.
    pinned = step.tier != "gpu" and torch.cuda.is_available()
    home = device if step.tier == "gpu" else torch.device("cpu")
    pages = torch.empty(groups, rows, size * 2 * dim, dtype=dtype, device=home, pin_memory=pinned)
    for part in pages.split(4096):  # noise made on the CPU would take minutes
        part.copy_(torch.randn(part.shape, dtype=dtype, device=device))
    first = _summaries(step, device, dtype)
    size_of = sum(part.nbytes for part in first if part is not None)
    # Each with an index of its own, which routes to other pages too: as of layers, none is in the cache.
    inputs = [first, *(_summaries(step, device, dtype) for _ in range(copies(size_of) - 1))]
    centres = None
    if routing.centre == "block":
        centres = torch.randn(rows, -(-step.tokens // CENTRE_BLOCK), dim, dtype=dtype, device=device)
    parts = None
    if routing.uses_chunks(step.tokens):
        shape = (rows, step.tokens // routing.chunk_size * routing.chunk_parts, dim)
        parts = torch.randn(shape, dtype=dtype, device=device)
    query = torch.randn(rows, step.heads, dim, dtype=dtype, device=device)
    spans = gpu.spans_of(routing, plan_queries(routing, step.tokens - 1, 1, None), None, device)

    def run(codes: Tensor, scales: Tensor | None) -> object:
        return gpu.decode_step(
            pages, codes, scales, query, spans, length=step.tokens, routing=routing, scale=dim**-0.5,
            kv_heads=rows, parts=parts, centres=centres,
        )  # fmt: skip

    return microseconds(run, inputs)


def _summaries(step: Step, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    routing, rows, dim = step.routing, step.rows, step.dim
    if routing.summary == "mean":
        return torch.randn(rows, step.groups, dim, dtype=dtype, device=device), None
    tokens = step.groups * routing.group_size
    shape = (rows, tokens, -(-dim * routing.bits // 8))
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).transpose(1, 2)
    return codes, torch.rand(rows, tokens, device=device).half() + 0.5


def _on_cpu(step: Step, times: int = 32) -> float:
    from hga_compile.kernels.site import SiteConfig
    from hga_compile.store import LayerStore

    site = SiteConfig(0, "host", _alone(step.routing))
    key, value = torch.randn(2, 1, step.rows, step.tokens, step.dim)
    query = torch.randn(1, step.rows * step.heads, 1, step.dim)
    store = LayerStore("host")
    body = step.tokens - 1
    store.put(key[:, :, :body], value[:, :, :body], body)
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        # The last token again and again: what is stored behind it is forgotten.
        store.attend(query, key[:, :, body:], value[:, :, body:], step.tokens, None, step.dim**-0.5, site)
        took.append(time.perf_counter() - begin)
    # The first one makes the index. Other processes only ever add to the time: the least is the step's own.
    return min(took[2:]) * 1e6


def _alone(routing: Routing) -> Routing:
    """Route the one query by itself, as a decoded token is."""
    return routing.model_copy(update={"prefill": "routed", "prefill_tile": 1})
