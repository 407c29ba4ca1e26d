"""Normalise: bring a Dynamo graph to ATen ops before any of them is decomposed."""

from typing import Any

import torch
from torch._guards import TracingContext
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

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
        With the same inputs and outputs.

    Raises
    ------
    RetraceError
        A graph with code that only exists while it is traced, such as the inside of another transform.
    """
    context = TracingContext.try_get()
    inputs: list[Any] = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
    examples = (node.meta.get("example_value") for node in graph.graph.nodes)
    fake = next(
        (value.fake_mode for value in examples if isinstance(value, torch._subclasses.FakeTensor)), None
    )
    if fake is None or context is None:
        return _sound(make_fx(torch.fx.Interpreter(graph).run, pre_dispatch=True)(*inputs))
    # Two fake modes in one trace are refused; Dynamo's own is the one that its values carry.
    previous, context.fake_mode = context.fake_mode, fake
    try:
        with fake, torch.fx.traceback.preserve_node_meta():
            return _traced(without_vmap(graph, _traced), inputs, pre_dispatch=True)
    finally:
        context.fake_mode = previous


def _traced(graph: GraphModule, inputs: list[Any], pre_dispatch: bool = False) -> GraphModule:
    tracer = make_fx(
        torch.fx.Interpreter(graph).run,
        tracing_mode="real",
        pre_dispatch=pre_dispatch,
        _allow_non_fake_inputs=True,
    )
    return _sound(tracer(*inputs))


def _sound(graph: GraphModule) -> GraphModule:
    """Refuse a graph that holds tensors of a transform or of tracing as constants."""
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, str(node.target), None)
        if not isinstance(value, torch.Tensor):
            continue
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
        if wrapped or isinstance(value, torch._subclasses.FakeTensor):
            raise RetraceError(f"{node.target} is a tensor of {'vmap' if wrapped else 'tracing'}")
    return graph
