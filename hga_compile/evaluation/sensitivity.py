"""Which layers need a larger budget: from what each costs by itself to budgets with the same total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from hga_compile.configs.budget import Budget
from hga_compile.configs.loader import resolve_profile
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import Routing
from hga_compile.evaluation.rows import Row

Costs = Mapping[int, Mapping[float, float]]
"""KL in nats by layer and multiple of its budget."""


def scaled(budget: Budget, factor: float) -> Budget:
    """Return a budget `factor` times as large; a share ends at 1.

    >>> scaled(Budget(fraction=0.03, tokens=256), 2)
    Budget(fraction=0.06, tokens=512)
    """
    fraction = None if budget.fraction is None else min(1.0, round(budget.fraction * factor, 6))
    tokens = None if budget.tokens is None else max(1, round(budget.tokens * factor))
    return Budget(fraction=fraction, tokens=tokens)


def layer_rows(profile: Profile, layers: Sequence[int], count: int, factors: Sequence[float]) -> list[Row]:
    """Return a row for each layer and multiple of its budget.

    Parameters
    ----------
    profile
        Whose routing is measured; its dense layers are left out.
    layers
        Layers with full attention.
    count
        Layers of the model.
    factors
        Multiples of the budget.
    """
    rows = []
    for layer in layers:
        if profile.routing.is_dense(layer, count):
            continue
        own = profile.routing.for_layer(layer, count)
        for factor in factors:
            budget = scaled(own.budget, factor)
            routing = own.model_copy(update={"budget": budget, "prefill": "routed", "prefill_tile": 1})
            section = routing.model_dump(mode="json")
            name = f"layer {layer}, budget x {factor:g}"
            options = {"layer": layer, "factor": factor, "routing": routing}
            rows.append(Row(name, options, f"{name} {routing!r}", section))
    return rows


def curves(summary: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return layer, factor, length and distances of every row, as a result has them."""
    made = {row.name: row for row in rows}
    found = []
    for entry in summary:
        row = made.get(entry["row"])
        if row is not None:
            where = {"layer": row.options["layer"], "factor": row.options["factor"]}
            keys = ("length", "documents", "kl", "delta_nll", "top1", "attended")
            found.append(where | {key: entry[key] for key in keys})
    return found


def allocate(costs: Costs, mean: float = 1.0) -> dict[int, float]:
    """Choose a multiple of the budget for each layer with the least sum of costs.

    Costs of layers are taken as independent, which small ones nearly are. Starting from the least factor
    everywhere, the step that saves most for its tokens is taken, until none fits the mean.

    Parameters
    ----------
    costs
        KL by layer and factor.
    mean
        What the mean of the factors may be at most.

    Raises
    ------
    ValueError
        If the least factors are above the mean already.
    """
    chosen = {layer: min(by_factor) for layer, by_factor in costs.items()}
    room = mean * len(costs) - sum(chosen.values())
    if room < -1e-9:
        raise ValueError(f"the least factor must be at most the mean {mean:g}, got {min(chosen.values()):g}")
    while True:
        best, gain = None, 0.0
        for layer, by_factor in costs.items():
            here = chosen[layer]
            for factor, cost in by_factor.items():
                step = factor - here
                if 0 < step <= room + 1e-9 and (by_factor[here] - cost) / step > gain:
                    best, gain = (layer, factor), (by_factor[here] - cost) / step
        if best is None:
            return chosen
        room -= best[1] - chosen[best[0]]
        chosen[best[0]] = best[1]


def suggest(
    runs: Sequence[Mapping[str, Any]], rows: Sequence[Row], routing: Routing, count: int
) -> dict[str, Any]:
    """Return per-layer overrides for the same mean budget, in the form of `routing.overrides`.

    Every text weighs the same, however far its layers are from dense. What a choice is worth is measured on
    the texts that it was not made on, each left out once.

    Parameters
    ----------
    runs
        Of a study of `rows`.
    rows
        From `layer_rows`; the factor 1 is among them.
    routing
        Of the profile.
    count
        Layers of the model.

    Returns
    -------
    dict
        `factors` by layer, `overrides`, the `ranking` of layers by what they cost; sums of the layers' KL
        with and without the choice, on the texts it was made on (`sum_of_kl`, `sum_of_kl_now`) and on those
        left out (`held_out`; None for a single text).
    """
    texts = _by_text(runs, rows)
    factors = allocate(_mean(texts))
    groups: dict[Budget, list[int]] = {}
    for layer, factor in sorted(factors.items()):
        if factor != 1.0:
            groups.setdefault(scaled(routing.for_layer(layer, count).budget, factor), []).append(layer)
    kept = [override.model_dump(mode="json", exclude_none=True) for override in routing.overrides]
    new = [{"layers": layers, "budget": budget.model_dump(mode="json")} for budget, layers in groups.items()]
    now = _mean_of([_total(costs, None) for costs in texts])
    mean = _mean(texts)
    return {
        "factors": {str(layer): factor for layer, factor in sorted(factors.items())},
        "overrides": kept + new,
        "ranking": sorted(mean, key=lambda layer: -mean[layer][1.0]),
        "sum_of_kl": _mean_of([_total(costs, factors) for costs in texts]),
        "sum_of_kl_now": now,
        "held_out": None if len(texts) < 2 else {"sum_of_kl": _held_out(texts), "sum_of_kl_now": now},
    }


def _by_text(runs: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[Costs]:
    """Return the KL of each text by layer and factor; lengths are averaged."""
    made = {row.name: row for row in rows}
    values: dict[str, dict[int, dict[float, list[float]]]] = {}
    for run in runs:
        row = made.get(run["row"])
        if row is not None:
            layer, factor = cast(int, row.options["layer"]), cast(float, row.options["factor"])
            by_layer = values.setdefault(run["text"], {})
            by_layer.setdefault(layer, {}).setdefault(factor, []).append(run["kl"])
    return [
        {layer: {f: _mean_of(kl) for f, kl in by_factor.items()} for layer, by_factor in by_layer.items()}
        for by_layer in values.values()
    ]


def _mean(texts: Sequence[Costs]) -> Costs:
    """Average texts, each as shares of its own sum."""
    sums = [_total(costs, None) or 1.0 for costs in texts]
    return {
        layer: {f: _mean_of([t[layer][f] / s for t, s in zip(texts, sums, strict=True)]) for f in by_factor}
        for layer, by_factor in texts[0].items()
    }


def _held_out(texts: Sequence[Costs]) -> float:
    """Return the mean sum of the KL of texts under what was chosen on all the others."""
    found = []
    for number, costs in enumerate(texts):
        others = [*texts[:number], *texts[number + 1 :]]
        found.append(_total(costs, allocate(_mean(others))))
    return _mean_of(found)


def _total(costs: Costs, factors: Mapping[int, float] | None) -> float:
    return sum(by_factor[1.0 if factors is None else factors[layer]] for layer, by_factor in costs.items())


def _mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def with_overrides(profile: Profile, overrides: Sequence[Mapping[str, Any]]) -> Profile:
    """Return the profile with other overrides, validated."""
    document = profile.model_dump(mode="json")
    document["routing"]["overrides"] = [dict(override) for override in overrides]
    document |= {"name": f"{profile.name}-layers", "description": f"{profile.name}, a budget for each layer."}
    return resolve_profile({"profile": document}, {})


def flat(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `curves` as rows of a CSV."""
    rows = []
    for entry in found:
        row: dict[str, Any] = {key: entry[key] for key in ("layer", "factor", "length", "documents")}
        for key in ("kl", "delta_nll", "top1", "attended"):
            row |= {
                key: entry[key]["mean"],
                f"{key}_low": entry[key]["low"],
                f"{key}_high": entry[key]["high"],
            }
        rows.append(row)
    return rows
