"""What ``hga run`` runs with: what the user says, and for the rest what fits by the memory plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hga_compile.cli.output import size

if TYPE_CHECKING:
    import torch

    from hga_compile.configs.cards import GpuCard, ModelCard
    from hga_compile.configs.profile import Profile
    from hga_compile.tuning.defaults import Defaults

_STEP = 1024
# What libraries take besides PyTorch's own allocations, once a process has its context on the GPU.
_WORKSPACES = 256 * 2**20
_TIERS = {"gpu": "in GPU memory", "host": "in host RAM", "nvme": "on files"}


@dataclass(frozen=True)
class Wanted:
    """What the user says."""

    profile: Profile | None
    """None: dense."""
    tokens: int
    """Prompt and new tokens."""
    step: int | None
    """Prompt tokens of a forward pass; None: to be picked."""


@dataclass(frozen=True)
class Planned:
    """What is run with."""

    profile: Profile | None
    step: int
    max_memory: dict[int | str, int] | None = None
    """Where weights go, as accelerate takes it; None: all to the device."""
    fits: bool | None = None
    """Whether all fits by the plan; None: nothing was planned."""
    notes: tuple[str, ...] = ()
    """What the user is told."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        offload = None if self.profile is None else self.profile.offload
        return {
            "tier": None if offload is None else offload.home,
            "hot_cache": None if offload is None else offload.hot_cache,
            "prefill_step": self.step,
            "max_memory": self.max_memory,
            "fits": self.fits,
        }


def plan_run(config: Any, device: torch.device, dtype: torch.dtype, wanted: Wanted) -> Planned:
    """Pick what is left open: tier, hot cache, prefill step, and which weights stay in host RAM.

    Parameters
    ----------
    config
        The model's configuration, of transformers.
    device, dtype
        Where the model runs, and what its weights are loaded as.
    wanted
        What the user says; it is never changed.
    """
    from hga_compile.tuning.defaults import pick_defaults
    from hga_compile.tuning.target import TargetError, card_of_config

    as_is = Planned(wanted.profile, wanted.step or _STEP)
    gpu = _card_of(device)
    try:
        card = card_of_config(config.to_dict(), "model", "the model")
    except (TargetError, ValueError):
        return as_is  # nothing is known of such a model's memory
    if gpu is None or wanted.profile is None:
        return as_is
    weights = _weight_bytes(card, dtype)
    found = pick_defaults(card, gpu, wanted.profile, wanted.tokens, step=wanted.step, weight_bytes=weights)
    memory = found.plan.max_memory if found.plan.fits else None
    if memory is not None:
        memory = {device.index or 0 if place == 0 else place: held for place, held in memory.items()}
    return Planned(found.profile, found.step, memory, found.plan.fits, _notes(found, gpu))


def _weight_bytes(card: ModelCard, dtype: torch.dtype) -> int:
    # What is quantised stays as it is stored; all else is loaded as the dtype.
    quantised = card.weights.quantised != "none"
    return card.weight_bytes() if quantised else card.geometry.parameters * dtype.itemsize


def _card_of(device: torch.device) -> GpuCard | None:
    """Return the device's card with the memory that is free now; None for a GPU that nothing is known of."""
    from hga_compile.configs.catalogue import gpu_of_device
    from hga_compile.tuning.present import host_memory, present_device

    if device.type != "cuda":
        return present_device().model_copy(update={"kind": "cpu"})
    import torch

    name = torch.cuda.get_device_name(device)
    card = gpu_of_device(name) or present_device()
    if card.kind != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    own = {"memory": total, "reserved": total - free + _WORKSPACES, "host_memory": host_memory()}
    parts = {
        part: getattr(card, part).model_copy(update={"value": value, "source": "read from the device"})
        for part, value in own.items()
    }
    return card.model_copy(update=parts)


def _notes(found: Defaults, gpu: GpuCard) -> tuple[str, ...]:
    plan, offload = found.plan, found.profile.offload
    if not plan.fits:
        short = [
            f"{size(plan.lacks(place))} of {_name(place)}" for place in plan.room if plan.lacks(place) > 0
        ]
        return (f"note: {' and '.join(short)} too little by the plan; hga plan says what would make it fit",)
    if gpu.kind == "cpu":
        return ()  # it has one memory
    hot = f", hot cache {offload.hot_cache:.0%}" if offload.hot_cache else ""
    lines = [f"plan     K/V {_TIERS[offload.home]}{hot}, {found.step:,} prompt tokens a pass"]
    if found.ram_layers:
        held = sum(part.bytes for part in plan.parts if part.name == "weights in RAM")
        lines.append(f"plan     weights of {found.ram_layers} layers in host RAM ({size(held)}): slow")
    return tuple(lines)


def _name(place: str) -> str:
    return {"gpu": "GPU memory", "host": "RAM", "nvme": "room on the drive"}[place]
