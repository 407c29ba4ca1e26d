"""Settings that follow from how much memory there is: tier, hot cache and prefill step of one context."""

from __future__ import annotations

from dataclasses import dataclass

from hga_compile.configs.cards import GpuCard, ModelCard
from hga_compile.configs.profile import Profile
from hga_compile.tuning.fit import TIERS, fewest_ram_layers, with_tier
from hga_compile.tuning.memory import MemoryPlan, Place, plan_memory

__all__ = ["HOT_SHARES", "STEPS", "Defaults", "pick_defaults", "with_hot_cache"]

# A tenth of the tokens holds 94% of what a step is routed to, a twentieth 85%, 3% of them 71%. A
# cache smaller than the routed set holds little of it.
HOT_SHARES = (0.1, 0.05, 0.03)
STEPS = (4096, 2048, 1024, 512, 256)
# Shares of the GPU that the plan leaves free: allocators round up, and free memory lies in pieces. The second
# is for where nothing fits with the first.
_MARGINS = (0.02, 0.005)


@dataclass(frozen=True)
class Defaults:
    """What was picked, and the plan that it fits by."""

    profile: Profile
    """With its tier and hot cache."""
    step: int
    """Prompt tokens of a forward pass."""
    plan: MemoryPlan
    ram_layers: int = 0
    """Decoder layers whose weights have to lie in host RAM."""


def pick_defaults(
    card: ModelCard,
    gpu: GpuCard,
    profile: Profile,
    context: int,
    *,
    batch: int = 1,
    step: int | None = None,
    weight_bytes: int | None = None,
) -> Defaults:
    """Pick what the caller leaves open, so that the model fits at the context.

    The first of these that fits, with a margin: K/V in GPU memory, in host RAM with a hot cache, in host RAM
    without one, on files; each with the largest prefill step that goes with it, a step below 1,024 only
    where no hot cache is left to give up. Where nothing does, as few layers as possible have their weights in
    host RAM. What a profile sets itself (a tier other than ``auto``, a hot cache) stays.

    Parameters
    ----------
    card, gpu, profile
        What runs, where, and how.
    context : int
        Tokens of each sequence in the end.
    batch : int
        Sequences.
    step : int or None
        Prompt tokens of a forward pass; None: to be picked.
    weight_bytes : int or None
        Of the checkpoint as it is loaded; None: as the catalogue says.

    Returns
    -------
    Defaults
        If nothing fits, what comes nearest to it: `Defaults.plan` says so.
    """

    def planned(candidate: Profile, tokens: int, layers: int = 0) -> Defaults:
        given = {"batch": batch, "step": tokens, "weight_bytes": weight_bytes, "ram_layers": layers}
        plan = plan_memory(card, gpu, candidate, context, **given)  # type: ignore[arg-type]  # one mapping for two types
        return Defaults(candidate, tokens, plan, layers)

    def lacking(found: Defaults) -> int:
        return sum(max(0, found.plan.lacks(place)) for place in found.plan.room)

    margins = [int(gpu.usable * share) for share in _MARGINS]
    nearest: Defaults | None = None
    tiers = _tiers(profile, gpu)
    tried: list[Defaults] = []
    for tier in tiers:
        if tier == "nvme" and nearest is not None and nearest.plan.lacks("host") <= 0:
            break  # it is GPU memory that is short, and files take as much of it
        placed = profile if len(tiers) == 1 else with_tier(profile, tier)
        for share in _shares(placed, gpu):
            candidate = _with_share(placed, share)
            # Smaller steps cost prefill; a hot cache is worth more than they are.
            steps = STEPS[:3] if share and profile.offload.hot_cache is None else STEPS
            steps = steps if gpu.kind == "cuda" else STEPS[2:]  # on a CPU larger steps are no faster
            for tokens in steps if step is None else (step,):
                found = planned(candidate, tokens)
                tried.append(found)
                if _leaves(found.plan, margins[0]):
                    return found
                if nearest is None or tier != nearest.plan.tier or lacking(found) <= lacking(nearest):
                    nearest = found
    for found in tried:
        if _leaves(found.plan, margins[1]):
            return found
    assert nearest is not None  # there is a tier, and it has a step
    given = {"batch": batch, "step": nearest.step, "weight_bytes": weight_bytes, "margin": margins[0]}
    layers = fewest_ram_layers(card, gpu, nearest.profile, context, **given)  # type: ignore[arg-type]  # likewise
    return nearest if not layers else planned(nearest.profile, nearest.step, layers)


def with_hot_cache(card: ModelCard, gpu: GpuCard, profile: Profile, context: int) -> Profile:
    """Return the profile with the largest hot cache of `HOT_SHARES` that fits, if it may have one.

    Parameters
    ----------
    card, gpu, profile
        What runs, where, and how. A profile that has a hot cache, or K/V elsewhere than in host RAM, stays.
    context : int
        Tokens of each sequence.
    """
    for share in _shares(profile, gpu) if profile.offload.hot_cache is None else ():
        found = _with_share(profile, share)
        if _leaves(plan_memory(card, gpu, found, context), int(gpu.usable * _MARGINS[0])):
            return found
    return profile


def _with_share(profile: Profile, share: float | None) -> Profile:
    return profile.model_copy(update={"offload": profile.offload.model_copy(update={"hot_cache": share})})


def _leaves(plan: MemoryPlan, margin: int) -> bool:
    """Say whether a plan fits and leaves so many bytes of the GPU free."""
    return plan.fits and plan.lacks("gpu") <= -margin


def _tiers(profile: Profile, gpu: GpuCard) -> tuple[Place, ...]:
    if gpu.kind == "cpu" or profile.offload.tier != "auto":
        return (profile.offload.home,)
    # A hot cache that was asked for is for K/V in host RAM.
    return ("host",) if profile.offload.hot_cache is not None else TIERS


def _shares(profile: Profile, gpu: GpuCard) -> tuple[float | None, ...]:
    asked = profile.offload.hot_cache
    if asked is not None or gpu.kind == "cpu" or profile.offload.home != "host":
        return (asked,)
    return (*HOT_SHARES, None)
