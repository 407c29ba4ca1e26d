"""The torch.compile backend "hga"."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.sym_node import SymNode

from hga_compile import replay
from hga_compile.configs.errors import ProfileError
from hga_compile.configs.loader import resolve_profile
from hga_compile.configs.profile import Profile
from hga_compile.hooks import install_hooks
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.states import STATES
from hga_compile.made_for import check_made_for
from hga_compile.passes.decision import Decision, Reason
from hga_compile.passes.flatten import flatten, inputs_of, leaves_of
from hga_compile.passes.pipeline import StrictError, rewrite_graph
from hga_compile.passes.replayable import StepForm, lengths_on_device, step_form
from hga_compile.reporting import note_graph
from hga_compile.tracing import model_layers, traced_config, traced_layer

__all__ = ["hga"]

log = logging.getLogger(__name__)

# Modes under which Inductor records CUDA graphs of its own: one cannot be recorded within another.
_GRAPH_MODES = ("reduce-overhead", "max-autotune")

# torch.compile loads this module when it looks the backend up, before anything is traced: the one right time.
install_hooks()


def hga(
    graph: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., Any]:
    """Compile a graph with routed attention.

    Registered as ``backend="hga"`` of `torch.compile`; not called by hand.

    Parameters
    ----------
    graph : GraphModule
        From Dynamo.
    example_inputs : sequence
        Its inputs.
    mode : str or None
        A mode of the inner Inductor, such as ``max-autotune-no-cudagraphs``; ignored by other inner backends.
    options : mapping or None
        `profile` and single settings (see docs/profiles.md).

    Returns
    -------
    callable
        The compiled graph.

    Raises
    ------
    ProfileError
        Unknown or invalid options, or a profile made for another model.
    StrictError
        With `compile.strict`, a site that stays dense.
    """
    profile = resolve_profile(options)
    _check_offload(profile)
    check_made_for(profile, traced_config(), _device_of(example_inputs))
    if _needs_grad(graph):
        decisions = _dense_sites(graph, Reason.REQUIRES_GRAD, "call under torch.no_grad()")
        _finish(decisions, profile)
        return _inner(graph, example_inputs, profile, mode)
    try:
        rewritten = rewrite_graph(graph, profile, model_layers(), traced_layer())
    except (ProfileError, StrictError):
        raise
    except Exception as error:
        # Whatever cannot be traced again runs as Dynamo made it, with every site dense.
        log.warning("graph left as it is: %s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(10))
        detail = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        _finish(_dense_sites(graph, Reason.RETRACE_FAILED, detail), profile)
        return _inner(graph, example_inputs, profile, mode)
    note_graph(rewritten.decisions)
    _warn_static(rewritten.decisions)
    leaves = leaves_of(inputs_of(graph))
    opens = any(node.target is torch.ops.hga.open.default for node in rewritten.graph.graph.nodes)
    nested = any(path for _, path in leaves)
    flat = flatten(example_inputs, leaves) if nested else example_inputs
    recorded = _may_record(profile, mode, _device_of(flat))
    if recorded:
        lengths_on_device(rewritten.graph)
    call = _inner(rewritten.graph, flat, profile, mode)
    call = _clearing(call) if opens else call
    call = _replaying(call, rewritten.graph) if recorded else call
    return (lambda *inputs: call(*flatten(inputs, leaves))) if nested else call


def _may_record(profile: Profile, mode: str | None, device: torch.device) -> bool:
    """Whether steps of decode graphs are to be recorded and replayed."""
    own = profile.compile.inner == "inductor" and mode in _GRAPH_MODES
    return profile.compile.cuda_graph and not own and replay.RECORDER.serves(device)


def _replaying(call: Callable[..., Any], graph: GraphModule) -> Callable[..., Any]:
    """Have steps of a decode graph recorded and replayed."""
    form = step_form(graph)
    if isinstance(form, str):
        LEDGER.count_fallback(f"decode steps are not one CUDA graph: {form}")
    return replay.Replay(call, form) if isinstance(form, StepForm) else call


def _clearing(call: Callable[..., Any]) -> Callable[..., Any]:
    """Have a graph that fails give up the stores that it opened: no cache has got their handles."""

    def run(*inputs: Any) -> Any:
        with STATES.watch() as opened:
            try:
                return call(*inputs)
            except BaseException:
                for handle in opened:
                    STATES.close(handle)
                raise

    return run


def _finish(decisions: list[Decision], profile: Profile) -> None:
    note_graph(decisions)
    if profile.compile.strict and decisions:
        raise StrictError(
            f"{len(decisions)} attention sites stay dense: {decisions[0].reason.value} "
            f"({decisions[0].detail}); turn compile.strict off to allow it"
        )


def _inner(
    graph: GraphModule, example_inputs: Sequence[Any], profile: Profile, mode: str | None
) -> Callable[..., Any]:
    """Hand the graph to the backend that compiles everything but the attention."""
    inner = profile.compile.inner
    inputs = [_canonical(value) for value in example_inputs]
    if inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = list_mode_options(mode) if mode not in (None, "default") else {}
        # Handles are CPU tensors, which Inductor's own CUDA graphs refuse graph by graph.
        patches.pop("triton.cudagraphs", None)
        return compile_fx(graph, inputs, config_patches=patches)  # type: ignore[return-value] # the other kinds are for export
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(inner)(graph, inputs)


def _canonical(value: Any) -> Any:
    """Write a length as the symbol that stands for it.

    Every layer counts its own tokens; guards make the counts one symbol, but inputs still name the others,
    which Inductor then uses without defining them.
    """
    if not isinstance(value, torch.SymInt):
        return value
    node = value.node
    if not isinstance(node, SymNode) or node._expr == node.expr:
        return value
    return torch.SymInt(SymNode(node.expr, node.shape_env, int, node.hint))


def _check_offload(profile: Profile) -> None:
    """Refuse settings that nothing serves, rather than ignore them."""
    offload = profile.offload
    if offload.hot_cache is not None and offload.home != "host":
        raise ProfileError(
            f"offload.hot_cache keeps copies of K/V that lie in host RAM, got {offload.hot_cache} with "
            f"offload.tier {offload.home!r}, expected tier 'host' (offload.tier) or null (offload.hot_cache)"
        )


def _device_of(example_inputs: Sequence[Any]) -> torch.device:
    """Return the first accelerator of the inputs; the CPU where they have none."""
    devices = [value.device for value in example_inputs if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _needs_grad(graph: GraphModule) -> bool:
    if not torch.is_grad_enabled():
        return False
    inputs = inputs_of(graph)
    values = (*inputs, *flatten(inputs, leaves_of(inputs)))
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _dense_sites(graph: GraphModule, reason: Reason, detail: str) -> list[Decision]:
    """Name the attention sites of a graph that was not retraced, or the graph itself if none is known."""
    attention = (torch.nn.functional.scaled_dot_product_attention, torch.ops.higher_order.flex_attention)
    calls = (node for node in graph.graph.nodes if node.op == "call_function")
    names = [node.name for node in calls if node.target in attention]
    if reason is Reason.RETRACE_FAILED and not names:
        names = ["graph"]
    return [Decision(name, None, "any", reason, detail) for name in names]


def _warn_static(decisions: Sequence[Decision]) -> None:
    if any(d.reason is Reason.SINGLE_QUERY and d.detail == "a static cache" for d in decisions):
        warnings.warn(
            'backend "hga" got a static cache, whose attention stays dense. Write '
            'model.compile(backend="hga") and generate() without cache_implementation, or pass '
            "past_key_values=HGACache(model.config)",
            stacklevel=2,
        )
