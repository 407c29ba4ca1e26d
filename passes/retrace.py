"""Normalise: bring a Dynamo graph to ATen ops before any of them is decomposed."""

from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hga_compile.passes.dispatched import without_dispatched
from hga_compile.passes.flatten import Leaf, flatten, inputs_of, leaves_of, unflatten
from hga_compile.passes.vmaps import without_vmap

__all__ = ["RetraceError", "retrace"]


class RetraceError(RuntimeError):
    """The traced graph would not run."""


def retrace(graph: GraphModule) -> GraphModule:
    """Trace a Dynamo graph again, to pre-dispatch ATen.

    There `scaled_dot_product_attention` is one node whatever it will decompose to, and the ops that build
    masks and repeat KV heads have few forms.

    Parameters
    ----------
    graph : GraphModule
        As Dynamo hands it to a backend; not changed.

    Returns
    -------
    GraphModule
        With the same outputs, and for inputs the leaves of the graph's (see `flatten`): most often the same.

    Raises
    ------
    RetraceError
        A graph with code that only exists while it is traced, such as the inside of a transform other than
        `vmap`, or one that returns wrapper subclasses.
    """
    context = TracingContext.try_get()
    inputs = inputs_of(graph)
    leaves = leaves_of(inputs)
    flat = flatten(inputs, leaves)

    examples = (node.meta.get("example_value") for node in graph.graph.nodes)
    fake = next(
        (value.fake_mode for value in (*flat, *examples) if isinstance(value, torch._subclasses.FakeTensor)),
        None,
    )
    if fake is None or context is None:
        return _sound(make_fx(_unwrapped(graph, inputs, leaves), pre_dispatch=True)(*flat))
    # Two fake modes in one trace are refused; Dynamo's own is the one that its values carry.
    previous, context.fake_mode = context.fake_mode, fake
    try:
        with fake, torch.fx.traceback.preserve_node_meta():
            plain = without_dispatched(without_vmap(graph, _traced_below), _traced_below)
            inputs = inputs_of(plain)
            return _traced(_unwrapped(plain, inputs, leaves_of(inputs)), flat, pre_dispatch=True)
    finally:
        context.fake_mode = previous


def _unwrapped(graph: GraphModule, inputs: list[Any], leaves: tuple[Leaf, ...]) -> Callable[..., Any]:
    """Return a function of the leaves of a graph's inputs that runs the graph."""

    def run(*flat: Any) -> Any:
        nested = unflatten(flat, inputs)
        outputs = torch.fx.Interpreter(graph).run(*nested)
        if any(is_traceable_wrapper_subclass(value) for value in pytree.tree_leaves(outputs)):
            raise RetraceError("an output is a wrapper subclass")
        # Only writes to the tensors themselves reach the caller's.
        if any(now is not before for now, before in zip(flatten(nested, leaves), flat, strict=True)):
            raise RetraceError("a tensor inside of a wrapper subclass is replaced")
        return outputs

    return run


def _traced(function: Callable[..., Any], inputs: list[Any], pre_dispatch: bool = False) -> GraphModule:
    tracer = make_fx(function, tracing_mode="real", pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)
    return _sound(tracer(*inputs))


def _traced_below(function: Callable[..., Any], inputs: list[Any]) -> GraphModule:
    """Trace below the level of transforms and subclasses, of symbolic sizes too."""
    with enable_python_dispatcher():
        return _traced(function, inputs)


def _sound(graph: GraphModule) -> GraphModule:
    """Refuse a graph that holds tensors of a transform or of tracing as constants."""
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, str(node.target), None)
        if not isinstance(value, torch.Tensor):
            continue
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
        if wrapped or isinstance(value, torch._subclasses.FakeTensor):
            raise RetraceError(f"{node.target} is a tensor of {'a transform' if wrapped else 'tracing'}")
    return graph
