"""What can fit at all, before anything is tried: by tier and context, and what binds where nothing does."""

from __future__ import annotations

from dataclasses import dataclass

from hga_compile.configs.cards import GpuCard, ModelCard
from hga_compile.configs.profile import Profile
from hga_compile.tuning.fit import TIERS, longest_context, with_tier
from hga_compile.tuning.memory import MemoryPlan, Place, plan_memory

__all__ = ["Cell", "Infeasible", "contexts", "possible_tiers", "table"]

GIB = 2**30
SEARCHED = ("gpu", "host")
"""Tiers whose decode steps are measured or modelled."""
NAMES: dict[Place, str] = {"gpu": "GPU memory", "host": "host RAM", "nvme": "the drive"}


class Infeasible(RuntimeError):  # an outcome rather than a mistake
    """Nothing fits; the message names what binds."""


@dataclass(frozen=True)
class Cell:
    """What one tier takes at one context, with the default setting."""

    tier: Place
    context: int
    fits: bool
    gpu_bytes: int
    host_bytes: int
    longest: int
    searched: bool
    """Whether `hga-tune` can tell its time: there is no model of the tier nvme."""


def contexts(context: int) -> list[int]:
    """Return the contexts of the table: a quarter, half, all and twice of the wanted one."""
    return [max(1024, part) for part in (context // 4, context // 2, context, 2 * context)]


def table(card: ModelCard, gpu: GpuCard, base: Profile, context: int) -> list[Cell]:
    """Return what fits, by tier and context."""
    found = []
    for tier in TIERS if gpu.kind == "cuda" else TIERS[:1]:
        profile = with_tier(base, tier)
        longest = longest_context(card, gpu, profile)
        for tokens in contexts(context):
            plan = plan_memory(card, gpu, profile, tokens)
            used = (plan.used("gpu"), plan.used("host"))
            found.append(Cell(tier, tokens, plan.fits, *used, longest, tier in SEARCHED))
    return found


def possible_tiers(
    card: ModelCard, gpu: GpuCard, base: Profile, context: int, wanted: tuple[str, ...], batch: int = 1
) -> tuple[str, ...]:
    """Return the tiers in which some setting of the space fits.

    Parameters
    ----------
    card, gpu, base, context, batch
        What is tuned for.
    wanted
        Tiers to look at.

    Raises
    ------
    Infeasible
        None; the message names the constraint that binds in the nearest miss.
    """
    found, misses = [], list[MemoryPlan]()
    routing = base.routing.model_copy(update={"bits": 1, "chunk_stage": "auto"})
    for tier in wanted:
        update = {"offload": base.offload.model_copy(update={"tier": tier}), "routing": routing}
        plan = plan_memory(card, gpu, base.model_copy(update=update), context, batch=batch)
        if plan.fits:
            found.append(tier)
        misses.append(plan)
    if found:
        return tuple(found)
    nearest = min(misses, key=lambda plan: plan.lacks(plan.binding) / max(1, plan.room[plan.binding]))
    place = nearest.binding
    largest = max((part for part in nearest.parts if part.place == place), key=lambda part: part.bytes)
    needs, room = nearest.used(place) / GIB, nearest.room[place] / GIB
    what = f"tier {nearest.tier}, {context:,} tokens, 1-bit index"
    part = f"the largest part is {largest.name}, {largest.bytes / GIB:.1f} GiB"
    raise Infeasible(
        f"nothing fits: {NAMES[place]} of {gpu.name} binds, {needs:.1f} GiB are needed and {room:.1f} GiB "
        f"are there ({what}; {part}); try a shorter --context or another --gpu; "
        f"`hga plan {card.name} --gpu {gpu.name} --context {context}` says what would make it fit"
    )
