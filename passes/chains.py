"""Match attention that is written out: product, scale, soft-cap, mask, softmax, product.

The anchor is the softmax. From there the chain is followed down to the product with V and up to the product
of Q and K. An op that is not understood ends it, and whatever is not proven stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from hga_compile.passes.forms import PRODUCTS, RESHAPES, SAME, NoChain, merges_heads
from hga_compile.passes.operands import query_and_key, value_and_order
from hga_compile.passes.scores import Scores

__all__ = ["Chain", "find_chains"]

_SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
_FAR = 12
"""Ops between softmax and product, at most."""


@dataclass(frozen=True)
class Chain:
    """One attention that is written out."""

    product: Node
    """Its output: the product with V."""
    query: Node
    """``[batch, heads, queries, dim]``, or of another rank where the chain does not tell."""
    key: Node
    """Likewise, as is `value`."""
    value: Node
    scores: Scores
    dropout: Any
    order: tuple[int, ...]
    """Permutation that brings ``[batch, heads, queries, dim]`` to the output's order."""
    inside: frozenset[Node]
    """All nodes of the chain, both products included."""
    weights_used: bool
    """Whether something beside the product reads scores or weights."""


def find_chains(graph: Graph, changed: Mapping[Node, Node]) -> tuple[list[Chain], list[Node]]:
    """Find every attention of a graph that is written out.

    Parameters
    ----------
    graph : Graph
        A private copy of pre-dispatch ATen: views of operands may be added to it, which nothing reads yet.
    changed : mapping
        From `aliasing.changed_in_place`.

    Returns
    -------
    tuple of list
        The chains, and the softmaxes between two products that are none.
    """
    chains, unknown = [], []
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target) not in _SOFTMAX:
            continue
        try:
            chains.append(_chain_of(graph, node, changed))
        except NoChain:
            if _between_products(node):
                unknown.append(node)
    return chains, unknown


def _chain_of(graph: Graph, softmax: Node, changed: Mapping[Node, Node]) -> Chain:
    rank = softmax.meta["val"].dim()
    if rank not in (3, 4) or softmax.args[1] not in (-1, rank - 1):
        raise NoChain
    below, scores = _down(softmax), Scores(changed)
    first = scores.follow(softmax.args[0], below.sliced)
    query, key = query_and_key(graph, first)
    value, order = value_and_order(graph, below.product)
    inside = frozenset([softmax, *below.inside, *scores.inside])
    leaks = any(user not in inside for node in inside if node is not below.product for user in node.users)
    chain = Chain(below.product, query, key, value, scores, below.dropout, order, inside, leaks)
    _check_writes(chain, first, changed)
    return chain


@dataclass
class _Below:
    """The way from a softmax down to the product with V."""

    product: Node
    inside: list[Node]
    dropout: Any
    sliced: bool


def _down(softmax: Node) -> _Below:
    node, sliced = softmax, False
    inside: list[Node] = []
    dropout: Any = 0.0
    while len(inside) < _FAR:
        onward = [user for user in node.users if _leads_on(user, node)]
        if len(onward) != 1:
            raise NoChain
        node = onward[0]
        inside.append(node)
        name = str(node.target)
        if name in PRODUCTS:
            return _Below(node, inside, dropout, sliced)
        if name == "aten.dropout.default" and node.args[2]:
            dropout = node.args[1]
        sliced |= name == "aten.slice.Tensor"
    raise NoChain


def _leads_on(user: Node, node: Node) -> bool:
    """Say whether an op takes attention weights on to their product with V."""
    name = str(user.target)
    if name in PRODUCTS:
        operands: Any = user.args[1] if name == "aten.einsum.default" else user.args
        return name != "aten.baddbmm.default" and operands[0] is node
    if name == "aten.slice.Tensor":
        dims = (-1, node.meta["val"].dim() - 1)
        return user.args[1] in dims and user.args[2:] in ((0, -1), (None, -1), (0, -1, 1))
    if name in RESHAPES:
        return merges_heads(node, user) or merges_heads(user, node)
    return (name in SAME or name == "aten.dropout.default") and user.args[0] is node


def _check_writes(chain: Chain, first: Node, changed: Mapping[Node, Node]) -> None:
    """Refuse operands that are written behind the product of Q and K: the rewritten op reads them later."""
    operands = [chain.query, chain.key, chain.value, *(mask for mask, _ in chain.scores.masks)]
    operands += [] if chain.scores.sinks is None else [chain.scores.sinks]
    late = any(node in changed and first < changed[node] for node in operands)
    # Within the chain an op may work in place: nothing else reads that memory.
    foreign = any(
        changed[node] not in chain.inside
        for node in chain.inside
        if node is not chain.product and node in changed
    )
    if late or foreign:
        raise NoChain


def _between_products(softmax: Node) -> bool:
    """Say whether a softmax is between two products, a few ops away from each."""
    try:
        _down(softmax)
    except NoChain:
        return False
    seen: Any = softmax
    for _ in range(_FAR):
        seen = next((arg for arg in seen.args if isinstance(arg, Node)), None)
        if seen is None or seen.op != "call_function":
            return False
        if str(seen.target) in PRODUCTS:
            return True
    return False
