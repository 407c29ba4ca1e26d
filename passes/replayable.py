"""Which decode graphs can be recorded as one CUDA graph: only ops with K/V depend on the length."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hga_compile.kernels.site import SiteConfig

__all__ = ["Affine", "StepForm", "StepSite", "lengths_on_device", "step_form"]


@dataclass(frozen=True)
class Affine:
    """A number of a call: that of an input, and a constant added to it."""

    source: int
    """Number of the input."""
    offset: int

    def of(self, inputs: Any) -> int:
        """Return the number in a call with these inputs."""
        return int(inputs[self.source]) + self.offset


@dataclass(frozen=True)
class StepSite:
    """One routed attention of a decode graph."""

    handle: int
    """Number of the input that is its handle."""
    length: Affine
    config: SiteConfig


@dataclass(frozen=True)
class StepForm:
    """What a decode graph holds that changes from step to step."""

    sites: tuple[StepSite, ...]
    masks: tuple[int, ...]
    """Numbers of the inputs that say which tokens are real; such a step is for those without padding."""
    constants: tuple[int, ...]
    """Numbers of the inputs that are numbers in CPU tensors: kernels are launched with their values."""
    outputs: tuple[Affine | None, ...]
    """A number for each output; None: a tensor, or nothing."""
    single: bool
    """Whether the graph returns one value rather than several."""


def lengths_on_device(graph: GraphModule) -> None:
    """Have what adds a length to a tensor in a decode graph add one that `kernels.ops.number_on` gives.

    A model that is given no positions counts them so. Nothing else changes.

    Parameters
    ----------
    graph : GraphModule
        From `pipeline.rewrite_graph`; changed.
    """
    numbers = _affine(graph)
    sites = [node for node in graph.graph.nodes if node.target is torch.ops.hga.cached_attention.default]
    lengths = {numbers.get(node.args[4]) for node in sites}
    length = lengths.pop() if len(lengths) == 1 else None
    if length is None or any(node.args[0].meta["val"].shape[2] != 1 for node in sites):
        return
    for node in list(graph.graph.nodes):
        if node.target is not torch.ops.aten.add.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        tensor, added = node.args
        number = numbers.get(added)
        whole = isinstance(_value(tensor), Tensor) and _value(tensor).dtype == torch.int64
        if number is None or number.source != length.source or not whole or _grows(_value(tensor)):
            continue
        with graph.graph.inserting_before(node):
            # The position of the step's token is one less than the length with it.
            given = (added, number.offset - length.offset + 1, tensor)
            new = graph.graph.call_function(torch.ops.hga.number_on.default, given)
        new.meta["val"] = _value(tensor).new_empty((), dtype=torch.int64)
        node.args = (tensor, new)
    graph.recompile()


def step_form(graph: GraphModule) -> StepForm | str | None:
    """Look through a rewritten graph.

    Parameters
    ----------
    graph : GraphModule
        From `pipeline.rewrite_graph`.

    Returns
    -------
    StepForm, str or None
        Why it cannot be recorded, as text; None: it is no decode graph at all.
    """
    targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    cached = torch.ops.hga.cached_attention.default
    sites = [node for node in graph.graph.nodes if node.target is cached]
    if not sites or any(node.args[0].meta["val"].shape[2] != 1 for node in sites):
        return None
    if all(isinstance(node.args[4], int) for node in sites):
        return None  # a graph of one length
    known = {cached, torch.ops.hga.number_on.default}
    others = {target for target in targets if getattr(target, "namespace", "") == "hga"} - known
    if others:
        return f"a layer that runs {', '.join(sorted(str(target) for target in others))}"
    masks = _mask_nodes(graph)
    if any(node.args[5] is not None and node.args[5] not in masks for node in sites):
        return "a mask of keys that is worked out in the graph"
    numbers = _numbers(graph, masks)
    if isinstance(numbers, str):
        return numbers
    number_of = {node: i for i, node in enumerate(_placeholders(graph))}
    found = []
    for node in sites:
        handle, length = node.args[3], numbers.get(node.args[4])
        if handle not in number_of or length is None:
            return "a length or a cache that is worked out in the graph"
        found.append(StepSite(number_of[handle], length, SiteConfig.from_text(node.args[7])))
    result = graph.graph.output_node().args[0]
    values = (result,) if isinstance(result, Node) else result
    if not isinstance(values, tuple | list):
        return "an output that is neither tensor nor number"
    outputs = []
    for value in values:
        number = numbers.get(value) if isinstance(value, Node) else None
        tensor = isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)
        if number is None and not tensor and value is not None:
            return "an output that is neither tensor nor number"
        outputs.append(number)
    given = tuple(number_of[node] for node in masks if node in number_of)
    constants = tuple(number for node, number in number_of.items() if _is_constant(node))
    return StepForm(tuple(found), given, constants, tuple(outputs), isinstance(result, Node))


def _placeholders(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _mask_nodes(graph: GraphModule) -> set[Node]:
    """Return masks of keys that are inputs, and views of them: nothing but attention reads them."""
    cached, aten = torch.ops.hga.cached_attention.default, torch.ops.aten
    views = (aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.unsqueeze.default)
    masks: set[Node] = set()
    for node in graph.graph.nodes:
        value = _value(node)
        if not _grows(value) or not isinstance(value, Tensor) or value.dtype.is_floating_point:
            continue
        if node.op == "placeholder" or (node.target in views and node.args[0] in masks):
            masks.add(node)
    while True:
        # A view that something else reads makes what it is a view of unfit too.
        read = {
            node
            for node in masks
            if any(
                user not in masks
                and not (user.target is cached and user.args.count(node) == 1 and user.args[5] is node)
                for user in node.users
            )
        }
        if not read:
            return masks
        masks -= read


def _numbers(graph: GraphModule, masks: set[Node]) -> dict[Any, Affine] | str:
    """Return the numbers of the graph that vary, or what else of it varies with them."""
    numbers, cached = _affine(graph), torch.ops.hga.cached_attention.default
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or node in masks:
            if node not in masks and node.op == "placeholder" and _grows(_value(node)) and node.users:
                return "a tensor that grows with the sequence"
            continue
        used = [source for source in node.all_input_nodes if source in numbers]
        if node.target is cached:
            if any(source is not node.args[4] for source in used):
                return "a number that attention reads"
        elif node.target is torch.ops.hga.number_on.default:
            continue
        elif used and node not in numbers:
            return f"{node.target} of a length"
        elif _reads_constant(node):
            continue
        elif not used and isinstance(_value(node), torch.SymInt | torch.SymFloat | torch.SymBool):
            return f"{node.target}, a number that the CPU must know"
        if _grows(_value(node)):
            return "a tensor that grows with the sequence"
        if _writes_input(node):
            return f"{node.target} into an input"
    return numbers


def _affine(graph: GraphModule) -> dict[Any, Affine]:
    """Return the numbers among the inputs, and those that are one of them and a constant."""
    numbers: dict[Any, Affine] = {}
    for i, node in enumerate(_placeholders(graph)):
        if isinstance(_value(node), torch.SymInt | int):
            numbers[node] = Affine(i, 0)
    for node in graph.graph.nodes:
        used = [source for source in node.all_input_nodes if source in numbers]
        if node.op == "call_function" and used and (added := _added(node, used)) is not None:
            former = numbers[used[0]]
            numbers[node] = Affine(former.source, former.offset + added)
    return numbers


def _is_constant(node: Node) -> bool:
    """Whether an input is a number in a CPU tensor, as Dynamo gives a model's float with ``dynamic=True``."""
    value = _value(node)
    number = isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu"
    return node.op == "placeholder" and number and all(_reads_constant(user) for user in node.users)


def _reads_constant(node: Node) -> bool:
    """Whether a node takes such a number out of an input."""
    source = node.args[0] if node.target is torch.ops.aten.item.default else None
    return isinstance(source, Node) and source.op == "placeholder" and _value(source).device.type == "cpu"


def _added(node: Node, used: list[Node]) -> int | None:
    """Return what a node adds to the one number that it uses; None if it does something else."""
    parts: tuple[Any, ...] = node.args
    if node.target is torch.sym_sum and len(parts) == 1 and isinstance(parts[0], tuple | list):
        parts = tuple(parts[0])
    elif node.target is operator.sub and isinstance(parts[1], int):
        parts = (parts[0], -parts[1])
    elif node.target is not operator.add:
        return None
    rest = [part for part in parts if isinstance(part, int)]
    if len(used) != 1 or len(rest) != len(parts) - 1 or used[0] not in parts:
        return None
    return sum(rest)


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _grows(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list) else (value,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return any(not isinstance(size, int) for part in tensors for size in part.shape)


def _writes_input(node: Node) -> bool:
    """Whether an op other than hga's writes to what a call is given."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or getattr(node.target, "namespace", "") == "hga":
        return False
    written = [
        node.args[i]
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write and i < len(node.args)
    ]
    return any(isinstance(part, Node) and part.op == "placeholder" for part in written)
