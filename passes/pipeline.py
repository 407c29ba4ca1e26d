"""The passes in order: retrace, match, decide, rewrite, clean up."""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
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
from hga_compile.passes.match import Site, Unmatched, find_attention
from hga_compile.passes.retrace import retrace
from hga_compile.passes.rewrite import rewrite

__all__ = ["PASSES", "Rewritten", "StrictError", "Work", "rewrite_graph"]

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


@dataclass
class Work:
    """One graph on its way through the passes."""

    graph: GraphModule
    profile: Profile
    layers: int = 0
    """Of the model: as many as it says, or as the graph has."""
    layer: int | None = None
    """Number of the layer that the graph is a part of, where a graph break left no more than one."""
    sites: list[Site] = field(default_factory=list)
    unmatched: list[Unmatched] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    decisions: tuple[Decision, ...] = ()
    rewritten: int = 0

    def numbers(self) -> list[int]:
        """Return the layer's number of each site; the site's own where nothing tells."""
        return [number if site.layer is None else site.layer for number, site in enumerate(self.sites)]


class Retrace:
    """Bring Dynamo's graph to pre-dispatch ATen; from here on the graph is a private copy."""

    def __call__(self, work: Work) -> None:
        work.graph = copy.copy(retrace(work.graph))
        # What nothing reads must not look like another reader.
        work.graph.graph.eliminate_dead_code()


class Match:
    """Find the attention sites, and what holds attention but is none."""

    def __call__(self, work: Work) -> None:
        work.sites, work.unmatched = find_attention(work.graph.graph)
        if len(work.sites) == 1 and work.sites[0].layer is None:
            work.sites = [replace(work.sites[0], layer=work.layer)]


class Decide:
    """Decide about every site, with a reason."""

    def __call__(self, work: Work) -> None:
        numbers, routing = work.numbers(), work.profile.routing
        if work.sites:
            work.layers = max(work.layers, *(number + 1 for number in numbers))
            _check_layers(routing, work.layers)
        values = MaskValues(work.graph.graph)
        work.plans = [
            decide(site, number, work.layers, routing, values)
            for site, number in zip(work.sites, numbers, strict=True)
        ]
        work.decisions = tuple(plan.decision for plan in work.plans) + tuple(
            Decision(left.node.name, left.layer, left.phase, Reason.NOT_MATCHED, left.detail)
            for left in work.unmatched
        )
        if work.profile.compile.strict:
            _be_strict(work.decisions)


class Rewrite:
    """Put hga's ops in the place of what is proven."""

    def __call__(self, work: Work) -> None:
        kernels = work.profile.compile.kernels
        place = work.profile.offload
        # From the last one: what a site reads may be what an earlier one returns, which is replaced then.
        for plan, number in reversed(list(zip(work.plans, work.numbers(), strict=True))):
            if not plan.decision.routed and plan.window is None:
                continue
            routing = work.profile.routing.for_layer(number, work.layers)
            rewrite(work.graph, plan, SiteConfig(number, place.home, routing, kernels, place))
            work.rewritten += 1
        if kernels != "auto":
            # What stays dense moves its rows by them too.
            for node in work.graph.graph.nodes:
                if node.target in (torch.ops.hga.open.default, torch.ops.hga.append.default):
                    node.kwargs = node.kwargs | {"kernels": kernels}


class Clean:
    """Drop what nothing reads any more, masks above all, and check the graph."""

    def __call__(self, work: Work) -> None:
        work.graph.graph.eliminate_dead_code()
        work.graph.graph.lint()
        work.graph.recompile()


PASSES: tuple[Callable[[Work], None], ...] = (Retrace(), Match(), Decide(), Rewrite(), Clean())
"""In this order."""


def rewrite_graph(
    graph: GraphModule, profile: Profile, layers: int | None = None, layer: int | None = None
) -> Rewritten:
    """Run all passes on a Dynamo graph.

    What they did is counted in ``torch._dynamo.utils.counters["hga"]``. Graphs before and after are logged at
    debug level (``TORCH_LOGS="+hga_compile.passes"``) and as an artifact of ``TORCH_TRACE``. The settings of
    a site are part of the new graph, and so of every compile cache's key.

    Parameters
    ----------
    graph : GraphModule
        As Dynamo hands it to a backend; not changed.
    profile : Profile
        Settings.
    layers : int or None
        Layers of the model, where known: the graph may hold a part of it. None: as many as the graph has.
    layer : int or None
        Number of the layer, where the graph is a part of one and does not tell itself.

    Returns
    -------
    Rewritten
        The new graph, in pre-dispatch ATen, and what was decided about every site. It takes the leaves of
        the old one's inputs (see `flatten`), which are the same but for tensor subclasses.

    Raises
    ------
    ProfileError
        Settings for a layer that the model does not have.
    StrictError
        `compile.strict` and a site that stays dense for a reason other than the profile's own.
    """
    work, seconds = Work(graph, profile, layers or 0, layer), {}
    log.debug("before:\n%s", graph.graph)
    for step in PASSES:
        started = time.perf_counter()
        step(work)
        seconds[type(step).__name__.lower()] = time.perf_counter() - started
    _count(work, seconds)
    log.info(
        "rewrote %d of %d attention sites in %.2f s", work.rewritten, len(work.sites), sum(seconds.values())
    )
    log.debug("after:\n%s", work.graph.graph)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "hga_rewritten_graph", "encoding": "string"},
        payload_fn=lambda: work.graph.print_readable(print_output=False),
    )
    return Rewritten(work.graph, work.decisions, seconds)


def _count(work: Work, seconds: dict[str, float]) -> None:
    counts = counters["hga"]
    counts["graphs"] += 1
    counts["sites"] += len(work.sites)
    counts["rewritten"] += work.rewritten
    counts["microseconds"] += round(1e6 * sum(seconds.values()))
    for decision in work.decisions:
        counts[decision.reason.name.lower()] += 1


def _check_layers(routing: Routing, layers: int) -> None:
    """Refuse settings for layers that the model does not have."""
    try:
        routing.is_dense(0, layers)
        routing.for_layer(0, layers)
    except ValueError as error:
        raise ProfileError(str(error)) from None


def _be_strict(decisions: tuple[Decision, ...]) -> None:
    allowed = (Reason.ROUTED, Reason.CONFIGURED, Reason.SLIDING_WINDOW)
    for decision in decisions:
        if decision.reason not in allowed:
            raise StrictError(
                f"attention site {decision.site} (layer {decision.layer}, {decision.phase}) stays dense: "
                f"{decision.reason.value}{f' ({decision.detail})' if decision.detail else ''}; "
                "turn compile.strict off to allow it"
            )
