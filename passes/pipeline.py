"""The passes in order: retrace, match, decide, rewrite, clean up."""

import copy
import logging
import time
from dataclasses import dataclass, field

from torch._dynamo.utils import counters
from torch._logging._internal import trace_structured
from torch.fx import GraphModule

from hga_compile.configs.errors import ProfileError
from hga_compile.configs.profile import Profile
from hga_compile.configs.routing import Routing
from hga_compile.kernels.site import SiteConfig
from hga_compile.passes.decide import Plan, decide
from hga_compile.passes.decision import Decision, Reason
from hga_compile.passes.mask_values import MaskValues
from hga_compile.passes.match import find_sites, find_unmatched
from hga_compile.passes.retrace import retrace
from hga_compile.passes.rewrite import rewrite

__all__ = ["Rewritten", "StrictError", "rewrite_graph"]

log = logging.getLogger(__name__)


class StrictError(RuntimeError):
    """With `compile.strict`, an attention site that would stay dense."""


@dataclass(frozen=True)
class Rewritten:
    """Outcome of the passes on one graph."""

    graph: GraphModule
    decisions: tuple[Decision, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each pass."""


def rewrite_graph(graph: GraphModule, profile: Profile, layers: int | None = None) -> Rewritten:
    """Run all passes on a Dynamo graph.

    Parameters
    ----------
    graph : GraphModule
        As Dynamo hands it to a backend; not changed.
    profile : Profile
        Settings.
    layers : int or None
        Layers of the model, where known: the graph may hold a part of it. None: as many as the graph has.

    Returns
    -------
    Rewritten
        The new graph, in pre-dispatch ATen, and what was decided about every site.

    Raises
    ------
    ProfileError
        Settings for a layer that the model does not have.
    StrictError
        `compile.strict` and a site that stays dense for a reason other than the profile's own.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[name] = seconds.get(name, 0.0) + now - started
        started = now

    new = copy.copy(retrace(graph))
    # What nothing reads must not look like another reader.
    new.graph.eliminate_dead_code()
    lap("retrace")
    sites = find_sites(new.graph)
    lap("match")
    numbers = [number if site.layer is None else site.layer for number, site in enumerate(sites)]
    layers = max(layers or 0, *(number + 1 for number in numbers)) if sites else 0
    if sites:
        _check_layers(profile.routing, layers)
    values = MaskValues(new.graph)
    plans = [
        decide(site, number, layers, profile.routing, values)
        for site, number in zip(sites, numbers, strict=True)
    ]
    lap("decide")
    decisions = tuple(plan.decision for plan in plans) + tuple(
        Decision(left.node.name, left.layer, left.phase, Reason.NOT_MATCHED, left.detail)
        for left in find_unmatched(new.graph, sites)
    )
    if profile.compile.strict:
        _be_strict(decisions)
    tier = "gpu" if profile.offload.tier == "gpu" else "host"
    rewritten = 0
    for plan, number in zip(plans, numbers, strict=True):
        if not _changes(plan):
            continue
        rewrite(new, plan, SiteConfig(number, tier, profile.routing.for_layer(number, layers)))
        rewritten += 1
    # Masks that nothing reads any more go with this.
    new.graph.eliminate_dead_code()
    new.graph.lint()
    new.recompile()
    lap("rewrite")
    counters["hga"]["graphs"] += 1
    counters["hga"]["sites"] += len(sites)
    counters["hga"]["rewritten"] += rewritten
    for decision in decisions:
        counters["hga"][decision.reason.name.lower()] += 1
    log.info("rewrote %d of %d attention sites in %.2f s", rewritten, len(sites), sum(seconds.values()))
    log.debug("%s", new.graph)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "hga_rewritten_graph", "encoding": "string"},
        payload_fn=lambda: new.print_readable(print_output=False),
    )
    return Rewritten(new, decisions, seconds)


def _check_layers(routing: Routing, layers: int) -> None:
    """Refuse settings for layers that the model does not have."""
    try:
        routing.is_dense(0, layers)
        routing.for_layer(0, layers)
    except ValueError as error:
        raise ProfileError(str(error)) from None


def _changes(plan: Plan) -> bool:
    return plan.decision.routed or plan.window is not None


def _be_strict(decisions: tuple[Decision, ...]) -> None:
    allowed = (Reason.ROUTED, Reason.CONFIGURED, Reason.SLIDING_WINDOW)
    for decision in decisions:
        if decision.reason not in allowed:
            raise StrictError(
                f"attention site {decision.site} (layer {decision.layer}, {decision.phase}) stays dense: "
                f"{decision.reason.value}{f' ({decision.detail})' if decision.detail else ''}; "
                "turn compile.strict off to allow it"
            )
