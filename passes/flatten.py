"""Flatten: the tensors inside of wrapper subclasses, such as quantised weights, as inputs of their own."""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["Leaf", "flatten", "inputs_of", "leaves_of", "unflatten"]

Leaf = tuple[int, tuple[str, ...]]
"""Number of an input and, for a tensor inside of it, the attributes that lead there."""


def inputs_of(graph: GraphModule) -> list[Any]:
    """Return the inputs that Dynamo traced a graph with."""
    return [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"]


def leaves_of(examples: Sequence[Any]) -> tuple[Leaf, ...]:
    """Return where the values are that a graph computes with.

    Parameters
    ----------
    examples : sequence
        Inputs of the graph; a wrapper subclass is one that has ``__tensor_flatten__``.

    Returns
    -------
    tuple of Leaf
        In the order of the inputs, those that are no wrapper subclass with an empty path.
    """
    return tuple((place, path) for place, value in enumerate(examples) for path in _paths(value))


def flatten(values: Sequence[Any], leaves: Iterable[Leaf]) -> list[Any]:
    """Return the values at the leaves."""
    return [reduce(getattr, path, values[place]) for place, path in leaves]


def unflatten(flat: Iterable[Any], examples: Sequence[Any]) -> list[Any]:
    """Build inputs like the examples out of the values at their leaves."""
    left = iter(flat)
    return [_rebuild(example, left) for example in examples]


def _paths(value: Any) -> Iterator[tuple[str, ...]]:
    if not is_traceable_wrapper_subclass(value):
        yield ()
        return
    for name in value.__tensor_flatten__()[0]:
        yield from ((name, *path) for path in _paths(getattr(value, name)))


def _rebuild(example: Any, left: Iterator[Any]) -> Any:
    if not is_traceable_wrapper_subclass(example):
        return next(left)
    names, context = example.__tensor_flatten__()
    inside = {name: _rebuild(getattr(example, name), left) for name in names}
    return type(example).__tensor_unflatten__(inside, context, example.size(), example.stride())
