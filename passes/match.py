"""Match: find attention sites in a pre-dispatch ATen graph and read off what they attend to."""

import math
import operator
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from hga_compile.kernels import ops
from hga_compile.passes.aliasing import changed_in_place
from hga_compile.passes.chains import Chain, find_chains
from hga_compile.passes.float_masks import visible_where
from hga_compile.passes.forms import RESHAPES, add_call, alike

__all__ = ["Site", "Unmatched", "find_attention"]

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_APPEND = torch.ops.hga.append.default
_SPREADS = (*RESHAPES, "aten.flatten.using_ints")
del ops  # imported for the registration of the ops
_FUSED = frozenset(
    f"aten.{name}.default" for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
)
_KEEPS = (torch.ops.aten.contiguous.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default)


@dataclass(frozen=True)
class Site:
    """One attention, `scaled_dot_product_attention` or written out, and where its operands come from."""

    node: Node
    """Its output."""
    query: Node
    key: Node
    """Before KV heads were repeated."""
    value: Node
    mask: Node | None
    """True where a key is visible, or a float mask that is not understood."""
    dropout: Any
    causal: bool
    """The `is_causal` argument."""
    scale: float | None
    """None where it is no number."""
    append: Node | None
    """The `hga::append` that K and V are the outputs of."""
    layer: int | None
    inside: frozenset[Node]
    """The nodes that it is made of."""
    softcap: float = 0.0
    """0: none."""
    sinks: Node | None = None
    """``[query_heads]`` logits."""
    order: tuple[int, ...] = (0, 1, 2, 3)
    """Permutation of ``[batch, heads, queries, dim]`` that the output is in."""
    weights_used: bool = False
    """Whether something else reads the attention weights."""

    @property
    def queries(self) -> Any:
        """Number of queries, an int or a SymInt."""
        return self.query.meta["val"].shape[2]

    @property
    def keys(self) -> Any:
        """Number of keys, an int or a SymInt."""
        return self.key.meta["val"].shape[2]

    @property
    def phase(self) -> str:
        """`decode` for one query, else `prefill`."""
        return _phase(self.queries)


@dataclass(frozen=True)
class Unmatched:
    """What holds an attention that no site was found for.

    An `hga::append` whose K and V no site reads, attention written out in an unknown form, or a fused layer.
    """

    node: Node
    layer: int | None
    detail: str = ""

    @property
    def phase(self) -> str:
        """`decode` for one new row, else `prefill`."""
        if self.node.target is not _APPEND:
            return "any"
        return _phase(self.node.args[0].meta["val"].shape[2])  # type: ignore[union-attr]


def find_attention(graph: Graph) -> tuple[list[Site], list[Unmatched]]:
    """Return every attention site, and what holds attention but is none, in the graph's order.

    Parameters
    ----------
    graph : Graph
        A private copy: views of operands may be added, which nothing reads yet.
    """
    changed = changed_in_place(graph)
    found, unknown = find_chains(graph, changed)
    chains = {chain.product: chain for chain in found}
    if chains:
        changed = changed_in_place(graph)  # the added views too
    attention = {*graph.find_nodes(op="call_function", target=_SDPA), *chains}
    nodes = [node for node in graph.nodes if node in attention]
    sites = [
        _read_chain(graph, chains[node], layer, changed)
        if node in chains
        else _read(graph, node, layer, changed)
        for node, layer in zip(nodes, _layers_of(nodes), strict=True)
    ]
    return sites, _unmatched(graph, sites, unknown)


def _unmatched(graph: Graph, sites: Sequence[Site], unknown: Sequence[Node]) -> list[Unmatched]:
    matched = {site.append for site in sites}
    details: dict[Node, str] = {}
    for node in graph.nodes:
        if node.target is _APPEND and node not in matched:
            details[node] = ""
        elif str(node.target) in _FUSED:
            details[node] = "a fused layer"
    details |= dict.fromkeys(unknown, "softmax of an unknown form")
    nodes = list(details)
    found = [
        Unmatched(node, layer, details[node]) for node, layer in zip(nodes, _layers_of(nodes), strict=True)
    ]
    # The softmax that reads a store is not another site.
    reading = {left.layer for left in found if left.node.target is _APPEND}
    return [left for left in found if left.node.target is _APPEND or left.layer not in reading]


def _phase(queries: Any) -> str:
    return "decode" if isinstance(queries, int) and queries == 1 else "prefill"


def _read_chain(graph: Graph, chain: Chain, layer: int | None, changed: Mapping[Node, Node]) -> Site:
    key, value = _before_repeat(chain.key, changed), _before_repeat(chain.value, changed)
    mask = chain.scores.bias
    if mask is None:
        with graph.inserting_before(chain.product):
            for part, visible in chain.scores.masks:
                straight = _visible(graph, part, visible)
                both = mask is not None
                mask = (
                    add_call(graph, torch.ops.aten.logical_and.default, mask, straight) if both else straight
                )
    return Site(
        node=chain.product,
        query=chain.query,
        key=key,
        value=value,
        mask=mask,
        dropout=chain.dropout,
        causal=False,
        scale=chain.scores.scale,
        append=_append_of(key, value, changed),
        layer=layer,
        inside=chain.inside,
        softcap=chain.scores.softcap,
        sinks=chain.scores.sinks,
        order=chain.order,
        weights_used=chain.weights_used,
    )


def _visible(graph: Graph, mask: Node, visible: bool) -> Node:
    """Return a bool mask in four dimensions, True where a key is visible."""
    if not visible:
        inverted = str(mask.target) in ("aten.bitwise_not.default", "aten.logical_not.default")
        mask = mask.args[0] if inverted else add_call(graph, torch.ops.aten.logical_not.default, mask)  # type: ignore[assignment]
    while mask.meta["val"].dim() < 4:
        mask = add_call(graph, torch.ops.aten.unsqueeze.default, mask, 0)
    return mask


def _read(graph: Graph, node: Node, layer: int | None, changed: Mapping[Node, Node]) -> Site:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    query, key, value = given["query"], given["key"], given["value"]
    key, value = _before_repeat(key, changed), _before_repeat(value, changed)
    scale = given["scale"]
    if scale is None:
        channels = query.meta["val"].shape[-1]
        scale = 1 / math.sqrt(channels) if isinstance(channels, int) else None
    elif not isinstance(scale, (int, float)):
        scale = None
    mask = given["attn_mask"]
    if mask is not None:
        added = mask.meta["val"].dtype is not torch.bool
        bools = visible_where(mask, query.meta["val"].dtype, changed) if added else (mask, True)
        if bools is not None:
            with graph.inserting_before(node):
                mask = _visible(graph, *bools)
    return Site(
        node=node,
        query=query,
        key=key,
        value=value,
        mask=mask,
        dropout=given["dropout_p"],
        causal=bool(given["is_causal"]),
        scale=scale,
        append=_append_of(key, value, changed),
        layer=layer,
        inside=frozenset([node]),
    )


def _append_of(key: Node, value: Node, changed: Mapping[Node, Node]) -> Node | None:
    """Return the append whose first output is `key` and whose second is `value`.

    None also where its inputs are written in place afterwards: it cannot be moved to the attention then.
    """
    for place, node in enumerate((key, value)):
        if node.target is not operator.getitem or node.args[1] != place:
            return None
    source = key.args[0]
    if not isinstance(source, Node) or source.target is not _APPEND or value.args[0] is not source:
        return None
    writers = [changed[row] for row in source.args[:2] if isinstance(row, Node) and row in changed]
    return None if any(source < writer for writer in writers) else source


def _before_repeat(node: Node, changed: Mapping[Node, Node]) -> Node:
    """Step back over `repeat_kv`: expand and reshape, or repeat_interleave, of the head dimension.

    The node itself where that is something else, or where memory on the way is written in place.
    """
    source = _unrepeated(node)
    step: Any = node
    while step is not source and step not in changed:
        step = step.args[0]
    return node if step in changed else source


def _unrepeated(node: Node) -> Any:
    start = node = _unwrapped(node)
    if str(node.target) == "aten.repeat_interleave.self_int":
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        source, rank = node.args[0], node.meta["val"].dim()
        return _unwrapped(source) if dim in (1, 1 - rank) and isinstance(source, Node) else start
    if str(node.target) not in _SPREADS:
        return start
    middle = _unwrapped(node.args[0])
    if str(middle.target) != "aten.expand.default":
        return start
    inner = _unwrapped(middle.args[0])
    if str(inner.target) != "aten.unsqueeze.default" or inner.args[1] not in (2, -3):
        return start
    source = _unwrapped(inner.args[0])
    before, spread, after = (part.meta["val"].shape for part in (source, middle, node))
    # [b, heads, n, d] -> [b, heads, times, n, d] -> [b, heads * times, n, d], and nothing else.
    if len(before) != 4 or len(spread) != 5 or len(after) != 4:
        return start
    kept = alike(before, (spread[0], spread[1], spread[3], spread[4]))
    merged = alike(after, (spread[0], spread[1] * spread[2], spread[3], spread[4]))
    return source if kept and merged else start


def _unwrapped(node: Any) -> Any:
    """Step back over ops that change nothing: copies and slices of everything."""
    while isinstance(node, Node) and (
        node.target in _KEEPS or (str(node.target) == "aten.slice.Tensor" and _whole_slice(node))
    ):
        node = node.args[0]
    return node


def _whole_slice(node: Node) -> bool:
    """Say whether a slice keeps everything."""
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    return bool(start in (None, 0) and end in (None, 2**63 - 1) and step == 1)


def _layers_of(nodes: Sequence[Node]) -> list[int | None]:
    """Read the numbers of the layers from the paths of the modules that ran the nodes.

    Of several numbers in a path the layer's is the first that differs between nodes whose paths are alike
    otherwise: `parts.1.model.layers.0.attn` and `parts.1.model.layers.1.attn`.
    """
    paths = [_path_of(node) for node in nodes]
    alike: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    for names, numbers in paths:
        alike[names].add(numbers)
    layers: list[int | None] = []
    for names, numbers in paths:
        columns = zip(*alike[names], strict=True)
        place = next((place for place, column in enumerate(columns) if len(set(column)) > 1), 0)
        layers.append(numbers[place] if numbers else None)
    return layers


def _path_of(node: Node) -> tuple[str, tuple[int, ...]]:
    """Return the innermost module path that has a number: the path without its numbers, and those."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed([entry for entry in stack.values() if isinstance(entry, tuple)]):
        # What precedes is the expression for the model itself, such as L['args'][0].
        inside = re.sub(r"^\w+(\[[^]]*\])+", "", str(path))
        numbers = re.findall(_NUMBER, inside)
        if numbers:
            return re.sub(_NUMBER, "#", inside), tuple(map(int, numbers))
    return "", ()


_NUMBER = r"(?:\.|\[)'?(\d+)'?(?=\.|\]|$)"
