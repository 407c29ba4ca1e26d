"""Match: find attention sites in a pre-dispatch ATen graph and read off what they attend to."""

import math
import operator
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = ["Site", "find_sites"]

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_APPEND = torch.ops.hga.append.default
_KEEPS = (torch.ops.aten.contiguous.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default)


@dataclass(frozen=True)
class Site:
    """One `scaled_dot_product_attention` node and where its operands come from."""

    node: Node
    query: Node
    key: Node
    """Before KV heads were repeated."""
    value: Node
    mask: Node | None
    dropout: Any
    causal: bool
    """The `is_causal` argument."""
    scale: float | None
    """None where it is no number."""
    append: Node | None
    """The `hga::append` that K and V are the outputs of."""
    layer: int | None

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
        return "decode" if isinstance(self.queries, int) and self.queries == 1 else "prefill"


def find_sites(graph: Graph) -> list[Site]:
    """Return every attention site, in the order in which the graph runs."""
    return [_read(node) for node in graph.find_nodes(op="call_function", target=_SDPA)]


def _read(node: Node) -> Site:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    query, key, value = given["query"], given["key"], given["value"]
    key, value = _before_repeat(key), _before_repeat(value)
    scale = given["scale"]
    if scale is None:
        channels = query.meta["val"].shape[-1]
        scale = 1 / math.sqrt(channels) if isinstance(channels, int) else None
    elif not isinstance(scale, (int, float)):
        scale = None
    return Site(
        node=node,
        query=query,
        key=key,
        value=value,
        mask=given["attn_mask"],
        dropout=given["dropout_p"],
        causal=bool(given["is_causal"]),
        scale=scale,
        append=_append_of(key, value),
        layer=_layer_of(node),
    )


def _append_of(key: Node, value: Node) -> Node | None:
    """Return the append whose first output is `key` and whose second is `value`."""
    for place, node in enumerate((key, value)):
        if node.target is not operator.getitem or node.args[1] != place:
            return None
    source = key.args[0]
    return source if isinstance(source, Node) and source.target is _APPEND and value.args[0] is source else None


def _before_repeat(node: Node) -> Node:
    """Step back over `repeat_kv`: expand and reshape, or repeat_interleave, of the head dimension."""
    while node.target in _KEEPS:
        node = node.args[0]  # type: ignore[assignment]
    if str(node.target) == "aten.repeat_interleave.self_int":
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        return node.args[0] if dim == 1 else node  # type: ignore[return-value]
    if str(node.target) not in ("aten.reshape.default", "aten.view.default", "aten._unsafe_view.default"):
        return node
    middle = node.args[0]
    while isinstance(middle, Node) and middle.target in _KEEPS:
        middle = middle.args[0]
    if not (isinstance(middle, Node) and str(middle.target) == "aten.expand.default"):
        return node
    inner = middle.args[0]
    while isinstance(inner, Node) and str(inner.target) == "aten.slice.Tensor" and _whole_slice(inner):
        inner = inner.args[0]
    if not (isinstance(inner, Node) and str(inner.target) == "aten.unsqueeze.default" and inner.args[1] == 2):
        return node
    source = inner.args[0]
    while isinstance(source, Node) and str(source.target) == "aten.slice.Tensor" and _whole_slice(source):
        source = source.args[0]
    if not isinstance(source, Node):
        return node
    before, spread, after = (part.meta["val"].shape for part in (source, middle, node))
    # [b, heads, n, d] -> [b, heads, times, n, d] -> [b, heads * times, n, d], and nothing else.
    if len(before) != 4 or len(spread) != 5 or len(after) != 4:
        return node
    kept = (before[0], before[1], before[2], before[3]) == (spread[0], spread[1], spread[3], spread[4])
    merged = (after[0], after[1], after[2], after[3]) == (
        spread[0],
        spread[1] * spread[2],
        spread[3],
        spread[4],
    )
    return source if kept and merged else node


def _whole_slice(node: Node) -> bool:
    """Say whether a slice keeps everything."""
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    return start in (None, 0) and (end is None or end == 2**63 - 1) and step == 1


def _layer_of(node: Node) -> int | None:
    """Read the number of the layer from the path of the module that ran the node."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed([entry for entry in stack.values() if isinstance(entry, tuple)]):
        numbers = re.findall(r"(?:\.|\[)'?(\d+)'?(?=\.|\]|$)", str(path))
        if numbers:
            return int(numbers[0])
    return None
