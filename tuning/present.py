"""The device of this machine as a card: read through the driver's management library, or the CPU."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from typing import Any

from hga_compile.configs.cards import ByteFigure, Figure, GpuCard

__all__ = ["host_memory", "present_device"]

_NVML = "NVML of the present device"
# Lanes of a streaming multiprocessor, by the major number of its compute capability.
_LANES = {7: 64, 8: 128, 9: 128, 10: 128, 12: 128}
_PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9, 6: 121.0e9}


def present_device() -> GpuCard:
    """Return the first CUDA device as a card, and this machine's CPU where there is none.

    Rates that the driver does not give follow from what it does: bandwidth from the memory's clock and width,
    16-bit matrix products from cores and clock (1,024 operations a clock and SM at capability 8, 4,096 at 9).
    """
    found = _from_nvml()
    return _cpu() if found is None else found


def host_memory() -> int:
    """Return the bytes of RAM that processes here may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):
            continue
    return total


def _from_nvml() -> GpuCard | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if pynvml.nvmlDeviceGetCount() == 0:
            return None
        return _card(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _card(nvml: Any, device: Any) -> GpuCard:
    name = nvml.nvmlDeviceGetName(device)
    name = name.decode() if isinstance(name, bytes) else name
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    major = nvml.nvmlDeviceGetCudaComputeCapability(device)[0]
    cores = nvml.nvmlDeviceGetNumGpuCores(device) / _LANES.get(major, 128)
    clock = 1e6 * nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM)
    # Two transfers a clock of the memory, over the width of its bus.
    rate = 2e6 * nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_MEM)
    bandwidth = rate * nvml.nvmlDeviceGetMemoryBusWidth(device) / 8
    lanes, generation = (
        nvml.nvmlDeviceGetMaxPcieLinkWidth(device),
        nvml.nvmlDeviceGetMaxPcieLinkGeneration(device),
    )
    products = cores * clock * (4096 if major in (9, 10) else 1024)
    return GpuCard(
        name="present",
        device_names=(name,),
        memory=ByteFigure(value=memory.total, source=_NVML),
        # What others hold now is not to be had, on top of what a process itself takes.
        reserved=ByteFigure(value=memory.used + 768 * 2**20, source=f"{_NVML}: in use, and 768 MiB"),
        bandwidth=Figure(value=bandwidth, source=_NVML),
        matrix_rate=Figure(value=products, source=f"{_NVML}: cores, clock and capability"),
        cores=Figure(value=cores, source=_NVML),
        clock=Figure(value=clock, source=_NVML),
        cache=ByteFigure(value=32 * 2**20, source="assumption: NVML does not give the cache"),
        host_bandwidth=Figure(value=_PCIE.get(generation, 15.75e9) * lanes / 16, source=_NVML),
        **_machine(),
    )


def _cpu() -> GpuCard:
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    processor = platform.processor() or platform.machine()
    known = "assumption: what the catalogue's CPU has"
    return GpuCard(
        name="cpu",
        kind="cpu",
        memory=ByteFigure(value=host_memory(), source="reported by the system"),
        reserved=ByteFigure(value=2**30, source="assumption: Python, PyTorch and the system"),
        bandwidth=Figure(value=11e9 * cores, source=f"{known}, for each core"),
        matrix_rate=Figure(value=80e9 * cores, source=f"{known}, for each core"),
        cores=Figure(value=cores, source=f"reported by the system ({processor})"),
        clock=Figure(value=2.5e9, source=known),
        cache=ByteFigure(value=32 * 2**20, source=known),
        host_bandwidth=Figure(value=11e9 * cores, source=f"{known}: its own memory"),
        **_machine(),
    )


def _machine() -> dict[str, Any]:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return {
        "host_memory": ByteFigure(value=host_memory(), source="reported by the system"),
        "nvme": ByteFigure(value=max(1, free), source="reported by the system: free in the temporary folder"),
        "nvme_bandwidth": Figure(value=1.2e9, source="assumption: measured on another machine's drive"),
    }
