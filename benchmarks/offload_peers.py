"""What stands beside `offload.py`: dense attention in two places, and the rate of a disk."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from offload_layer import Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hga_compile.store.aligned import AlignedPages
from hga_compile.tuning.uncached import copies, microseconds

__all__ = ["dense", "disk_rate", "streamed"]


def streamed(pairs: Sequence[Tensor], query: Tensor, rounds: int) -> float:
    """Return the microseconds of dense attention to a layer's K/V that are copied from pinned memory.

    Parameters
    ----------
    pairs : sequence of Tensor
        ``[2, 1, kv_heads, tokens, dim]`` of each layer, pinned.
    query : Tensor
        ``[1, heads, 1, dim]``.
    rounds : int
        How often all layers are gone through.
    """
    device, side = query.device, torch.cuda.Stream()
    room = [torch.empty(pairs[0].shape, dtype=query.dtype, device=device) for _ in range(2)]
    ready, free = ([torch.cuda.Event() for _ in room] for _ in range(2))

    def send(number: int) -> None:
        with torch.cuda.stream(side):
            side.wait_event(free[number % 2])
            room[number % 2].copy_(pairs[number % len(pairs)], non_blocking=True)
            ready[number % 2].record(side)

    def run(layers: int) -> None:
        send(0)
        for number in range(layers):
            # As transformers does: the next layer's are on their way while this one is at work.
            send(number + 1)
            torch.cuda.current_stream().wait_event(ready[number % 2])
            key, value = room[number % 2].unbind()
            scaled_dot_product_attention(query, key, value, enable_gqa=True)
            free[number % 2].record()

    run(2)
    torch.cuda.synchronize()
    layers = rounds * len(pairs)
    begin = time.perf_counter()
    run(layers)
    torch.cuda.synchronize()
    # One more is copied than is used.
    return (time.perf_counter() - begin) * 1e6 / (layers + 1)


def dense(tokens: int, shape: Shape, device: torch.device) -> dict[str, float]:
    """Time dense attention: in GPU memory by cuDNN and flash, and streamed from pinned host memory."""
    whole = (2, 1, shape.kv_heads, tokens, shape.dim)
    size = 2 * shape.kv_heads * tokens * shape.dim * shape.dtype.itemsize
    query = torch.randn(1, shape.kv_heads * shape.heads, 1, shape.dim, dtype=shape.dtype, device=device)
    pairs = [torch.randn(whole, dtype=shape.dtype, device=device) for _ in range(copies(size))]
    inputs = [(query, *pair.unbind()) for pair in pairs]
    took = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            took[name] = microseconds(partial(scaled_dot_product_attention, enable_gqa=True), inputs)
    host = [pair.to("cpu").pin_memory() for pair in pairs[:2]]
    del pairs, inputs
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        took["streamed"] = streamed(host, query, max(2, 2**32 // size // len(host)))
    return took


def disk_rate(folder: str | None, size: int = 2**29, block: int = 2**20) -> float:
    """Measure bytes per second of direct reads of a file that lies in a folder, eight at a time."""
    memory = AlignedPages(size // block, block)
    memory.array[:] = torch.randint(0, 256, memory.array.shape, dtype=torch.uint8).numpy()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for number in range(memory.count):
            file.write(memory.view(number))
        file.flush()
        os.fsync(file.fileno())
        try:
            handle = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system without; what it keeps in RAM is given up then
            handle = os.open(file.name, os.O_RDONLY)
            os.posix_fadvise(handle, 0, size, os.POSIX_FADV_DONTNEED)
        try:
            with ThreadPoolExecutor(8) as pool:
                begin = time.perf_counter()
                list(pool.map(lambda n: os.preadv(handle, [memory.view(n)], n * block), range(memory.count)))
                return size / (time.perf_counter() - begin)
        finally:
            os.close(handle)
