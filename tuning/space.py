"""The settings that are searched: from a trial's parameters to a profile, and back for those tried first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import LayerOverride, Routing

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["Params", "Space", "at_length"]

Params = dict[str, Any]

_FRACTIONS = (0.006, 0.12)
_WINDOWS = (0.04, 0.5)
# A budget's least number of tokens is its share of so many: that of the default profile is 256 at 3%.
_SHORT = 8192
# Shares of the mean budget that layers may get.
_LEVELS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
# What differs from the default in settings that are tried first.
_NEAR: tuple[Params, ...] = (
    {"group_size": 2},
    {"group_size": 1},
    {"budget": 0.06},
    {"group_size": 1, "centre": "block"},
)


@dataclass(frozen=True)
class Space:
    """What may be chosen.

    Attributes
    ----------
    base
        The profile that everything not searched is taken from.
    tiers
        Homes of the token K/V to choose from.
    sensitivities
        Of each layer, for budgets by layer; None: all layers get the same.
    layers
        Of the model.
    finish
        Gives a profile what follows from the rest of it: the hot cache that fits.
    """

    base: Profile
    tiers: tuple[str, ...]
    sensitivities: Mapping[int, float] | None = None
    layers: int = 0
    finish: Callable[[Profile], Profile] = lambda profile: profile

    def suggest(self, trial: Trial) -> Params:
        """Draw the parameters of a trial."""
        params: Params = {
            "budget": trial.suggest_float("budget", *_FRACTIONS, log=True),
            "summary": trial.suggest_categorical("summary", ["lowbit", "mean"]),
            "bits": trial.suggest_categorical("bits", [1, 2, 4]),
            "centre": trial.suggest_categorical("centre", ["first", "block"]),
            "group_size": trial.suggest_categorical("group_size", [1, 2, 4, 8, 16]),
            "chunk_stage": trial.suggest_categorical("chunk_stage", ["auto", "on"]),
            "chunk_parts": trial.suggest_categorical("chunk_parts", [1, 4]),
            "window": trial.suggest_float("window", *_WINDOWS, log=True),
            "vote": trial.suggest_categorical("vote", ["mass_sum", "mass_max"]),
        }
        if len(self.tiers) > 1:
            params["tier"] = trial.suggest_categorical("tier", list(self.tiers))
        if self.sensitivities is not None:
            params["skew"] = trial.suggest_float("skew", 0.0, 0.6)
        return params

    def starts(self) -> list[Params]:
        """Return what is tried first: the default and the paper's setting, in each tier, and near ones."""
        default = {
            "budget": 0.03, "summary": "lowbit", "bits": 2, "centre": "first", "group_size": 4,
            "chunk_stage": "auto", "chunk_parts": 4, "window": 0.1, "vote": "mass_sum",
        }  # fmt: skip
        paper = {**default, "summary": "mean", "group_size": 16, "chunk_stage": "on", "chunk_parts": 1}
        found = []
        others = ({**default, **change} for change in _NEAR)
        for start in (default, paper, *others):
            for tier in self.tiers:
                one = dict(start)
                if len(self.tiers) > 1:
                    one["tier"] = tier
                if self.sensitivities is not None:
                    one["skew"] = 0.0
                found.append(one)
        return found

    def defaults(self) -> list[Params]:
        """Return the default setting, in each tier."""
        return self.starts()[: len(self.tiers)]

    def describe(self) -> dict[str, str]:
        """Return each parameter and what it may be, for a reader."""
        found = {
            "routing.budget.fraction": f"{_FRACTIONS[0]:.1%} to {_FRACTIONS[1]:.0%}",
            "routing.summary": "lowbit, mean",
            "routing.bits": "1, 2, 4",
            "routing.centre": "first, block (of lowbit summaries)",
            "routing.group_size": "1, 2, 4, 8, 16",
            "routing.chunk_stage": "auto, on",
            "routing.chunk_parts": "1, 4",
            "routing.window.fraction": f"{_WINDOWS[0]:.0%} to {_WINDOWS[1]:.0%} of the budget",
            "routing.vote": "mass_sum, mass_max",
            "offload.tier": ", ".join(self.tiers),
        }
        if "host" in self.tiers:
            found["offload.hot_cache"] = "with K/V in host RAM, the largest that fits"
        if self.sensitivities is not None:
            found["routing.overrides"] = "budgets by layer, from even to by sensitivity"
        return found

    def profile(self, params: Params, name: str) -> Profile:
        """Return the profile of a trial's parameters."""
        budget = _budget(params["budget"])
        routing = self.base.routing.model_copy(
            update={
                "summary": params["summary"],
                "bits": params["bits"],
                # Means have no codes to centre.
                "centre": params["centre"] if params["summary"] == "lowbit" else "first",
                "group_size": params["group_size"],
                "chunk_stage": params["chunk_stage"],
                "chunk_parts": params["chunk_parts"],
                "budget": budget,
                "window": Window(fraction=round(params["window"], 3), tokens=16),
                "vote": params["vote"],
                "overrides": self._overrides(params),
            }
        )
        tier = params.get("tier", self.tiers[0])
        hot = self.base.offload.hot_cache if tier == "host" else None
        offload = self.base.offload.model_copy(update={"tier": tier, "hot_cache": hot})
        found = self.base.model_copy(update={"name": name, "routing": routing, "offload": offload})
        # Copies are not validated.
        return Profile.model_validate_json(self.finish(found).model_dump_json())

    def _overrides(self, params: Params) -> tuple[LayerOverride, ...]:
        """Give sensitive layers more and others less, the mean as it is, in a few levels."""
        skew = params.get("skew") or 0.0
        if not skew or not self.sensitivities:
            return ()
        weights = {layer: max(found, 1e-12) ** skew for layer, found in self.sensitivities.items()}
        mean = sum(weights.values()) / len(weights)
        level = {layer: _nearest(weight / mean) for layer, weight in weights.items()}
        # Rounding to levels moves the mean: all budgets are scaled back by the same factor.
        moved = sum(level.values()) / len(level)
        found = []
        for share in sorted(set(level.values())):
            wanted = _budget(params["budget"] * share / moved)
            if wanted != _budget(params["budget"]):
                layers = tuple(sorted(layer for layer, own in level.items() if own == share))
                found.append(LayerOverride(layers=layers, budget=wanted))
        return tuple(found)


def at_length(routing: Routing, length: int) -> Routing:
    """Return the routing with no budget above its share at a length.

    What is tuned for a long context and measured on a shorter text attends to the same share of it, not to
    the least number of tokens, which would flatter it.
    """

    def capped(budget: Budget) -> Budget:
        if budget.fraction is None or budget.tokens is None:
            return budget
        return Budget(
            fraction=budget.fraction, tokens=min(budget.tokens, max(32, round(budget.fraction * length)))
        )

    overrides = tuple(
        one if one.budget is None else one.model_copy(update={"budget": capped(one.budget)})
        for one in routing.overrides
    )
    return routing.model_copy(update={"budget": capped(routing.budget), "overrides": overrides})


def _budget(fraction: float) -> Budget:
    tokens = max(32, -(-round(fraction * _SHORT) // 16) * 16)
    return Budget(fraction=round(min(1.0, fraction), 4), tokens=tokens)


def _nearest(share: float) -> float:
    return min(_LEVELS, key=lambda level: abs(level / share - share / level))
