"""What fits: the longest context, and what would make a plan fit that does not."""

from __future__ import annotations

from dataclasses import dataclass

from hga_compile.configs.cards import GpuCard, ModelCard
from hga_compile.configs.catalogue import gpu_cards
from hga_compile.configs.profile import Profile
from hga_compile.tuning.memory import MemoryPlan, Place, layer_bytes, plan_memory

__all__ = ["TIERS", "Remedy", "fewest_ram_layers", "longest_context", "remedies", "with_tier"]

TIERS: tuple[Place, ...] = ("gpu", "host", "nvme")
# Contexts are told in steps of this, which is finer than anyone chooses.
_STEP = 1024
_MOST = 2**24


@dataclass(frozen=True)
class Remedy:
    """One change with which a plan fits."""

    change: str
    """What to write or do."""
    why: str
    """What it saves, or costs."""


def with_tier(profile: Profile, tier: Place) -> Profile:
    """Return the profile with its token K/V elsewhere; only in host RAM it keeps a hot cache."""
    update = {"tier": tier} if tier == "host" else {"tier": tier, "hot_cache": None}
    return profile.model_copy(update={"offload": profile.offload.model_copy(update=update)})


def longest_context(
    card: ModelCard, gpu: GpuCard, profile: Profile, *, batch: int = 1, step: int = 1024,
    weight_bytes: int | None = None, ram_layers: int = 0,
) -> int:  # fmt: skip
    """Return the longest context that fits, in tokens, a multiple of 1,024; 0: not even that much does.

    It may exceed what the checkpoint was made for (`card.context.max_tokens`).
    """

    def fits(context: int) -> bool:
        given = {"batch": batch, "step": step, "weight_bytes": weight_bytes, "ram_layers": ram_layers}
        return plan_memory(card, gpu, profile, context, **given).fits  # type: ignore[arg-type]  # one mapping for two types

    low, high = 0, _MOST
    if fits(high):
        return high
    while high - low > _STEP:
        middle = (low + high) // 2 // _STEP * _STEP
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fewest_ram_layers(
    card: ModelCard, gpu: GpuCard, profile: Profile, context: int, *, batch: int = 1, step: int = 1024,
    weight_bytes: int | None = None, margin: int = 0,
) -> int | None:  # fmt: skip
    """Return of how few decoder layers the weights must lie in host RAM for all to fit.

    `margin` bytes of the GPU are left free. None: no number of layers makes it fit.
    """

    def fits(layers: int) -> bool:
        given = {"batch": batch, "step": step, "weight_bytes": weight_bytes, "ram_layers": layers}
        plan = plan_memory(card, gpu, profile, context, **given)  # type: ignore[arg-type]  # one mapping for two types
        return plan.fits and plan.lacks("gpu") <= -margin

    if gpu.kind == "cpu":
        return 0 if fits(0) else None
    return next((layers for layers in range(card.geometry.layers + 1) if fits(layers)), None)


def remedies(
    card: ModelCard, gpu: GpuCard, profile: Profile, plan: MemoryPlan, *, batch: int = 1, step: int = 1024,
    weight_bytes: int | None = None, ram_layers: int = 0,
) -> list[Remedy]:  # fmt: skip
    """Return single changes with which the model fits at the plan's context, the least costly first."""
    if plan.fits:
        return []
    found, context = [], plan.context

    def fits(with_profile: Profile = profile, on: GpuCard = gpu, **other: int | None) -> bool:
        given: dict[str, int | None] = {"batch": batch, "step": step, "weight_bytes": weight_bytes}
        given |= {"ram_layers": ram_layers, **other}
        return plan_memory(card, on, with_profile, context, **given).fits  # type: ignore[arg-type]  # one mapping for three types

    for tier in TIERS[TIERS.index(plan.tier) + 1 :]:
        if gpu.kind == "cuda" and fits(with_tier(profile, tier)):
            found.append(Remedy(f"--tier {tier}", f"token K/V in {_name(tier)}"))
            break
    if step > 256 and fits(step=256):
        found.append(Remedy("--prefill-step 256", "smaller activations, a slower prefill"))
    if profile.routing.bits > 1 and fits(_with_bits(profile, 1)):
        found.append(Remedy("routing.bits: 1", "half of the index, at a cost in quality"))
    stored = card.geometry.parameters
    for bits in (8, 4):
        size = stored * bits // 8
        if size < (weight_bytes or card.weight_bytes()) and fits(weight_bytes=size):
            found.append(Remedy(f"weights in {bits} bits", f"{size / 2**30:.1f} GiB of weights"))
            break
    layers = fewest_ram_layers(card, gpu, profile, context, batch=batch, step=step, weight_bytes=weight_bytes)
    if layers is not None and layers > ram_layers:
        size = layers * layer_bytes(card, weight_bytes)
        slower = f"at least {1e3 * size / gpu.host_bandwidth.value:,.0f} ms more a pass"
        why = f"{size / 2**30:.1f} GiB of weights in host RAM, by accelerate; {slower}"
        found.append(Remedy(f"--ram-layers {layers}", why))
    longest = longest_context(
        card, gpu, profile, batch=batch, step=step, weight_bytes=weight_bytes, ram_layers=ram_layers
    )
    if longest:
        found.append(Remedy(f"--context {longest}", "the longest that fits as it is"))
    larger = [other for other in gpu_cards().values() if other.kind == "cuda" and other.usable > gpu.usable]
    for other in sorted(larger, key=lambda card: card.usable):
        if fits(on=other):
            found.append(Remedy(f"--gpu {other.name}", f"{other.memory.value / 2**30:.0f} GiB"))
            break
    return found


def _with_bits(profile: Profile, bits: int) -> Profile:
    routing = profile.routing.model_copy(update={"bits": bits})
    return profile.model_copy(update={"routing": routing})


def _name(tier: Place) -> str:
    return {"gpu": "GPU memory", "host": "host RAM", "nvme": "files on a drive"}[tier]
