"""Work out what the integer and bool tensors that build a mask hold, op by op."""

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from hga_compile.passes.aliasing import changed_in_place
from hga_compile.passes.index_algebra import Affine, AtMost, Lookup, Truth, Value, expression

__all__ = ["MaskValues", "NotUnderstood"]


class NotUnderstood(Exception):
    """An op, or the way it is used, is outside what can be proven."""


_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)
_Rule = Callable[["MaskValues", Node], Value]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def add(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


class MaskValues:
    """Formulas of the nodes of one graph; each node is worked out once.

    Parameters
    ----------
    graph : Graph
        As it is now: what is written in place there has no formula.
    """

    def __init__(self, graph: Graph) -> None:
        self._known: dict[Node, Value | NotUnderstood] = {}
        self._changed = changed_in_place(graph)

    def of(self, node: Any) -> Value:
        """Return what a node holds.

        Raises
        ------
        NotUnderstood
            Naming the first op that stands in the way.
        """
        if not isinstance(node, Node):
            raise NotUnderstood(f"a constant {node!r} where a tensor was expected")
        if node not in self._known:
            try:
                self._known[node] = self._checked(node)
            except NotUnderstood as unknown:
                self._known[node] = unknown
        known = self._known[node]
        if isinstance(known, NotUnderstood):
            raise known
        return known

    def _checked(self, node: Node) -> Value:
        if node in self._changed:
            raise NotUnderstood(f"{node}, whose memory is written in place")
        shape = _shape(node)
        try:
            found = self._work_out(node)
        except NotUnderstood:
            # A comparison of a table with a number, say, is a table again.
            if len(shape) != 2 or node.meta["val"].dtype not in _SOURCE_TYPES:
                raise
            found = _table(node)
        if isinstance(found, Affine) and node.meta["val"].dtype not in _EXACT_TYPES:
            raise NotUnderstood(f"positions as {node.meta['val'].dtype}, which may wrap")
        # The index of a dimension of size 1 is 0: stated, since broadcasting repeats it for other indices.
        single = [isinstance(size, int) and size == 1 for size in shape]
        return _remap(
            found,
            lambda a: Affine(
                tuple(_ZERO if one else c for one, c in zip(single, a.coefficients, strict=True)), a.constant
            ),
            len(shape),
        )

    def _work_out(self, node: Node) -> Value:
        rule = _RULES.get(str(node.target)) if node.op == "call_function" else None
        if rule is not None:
            return rule(self, node)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype in _SOURCE_TYPES:
            # Whatever made it, it is a table that later ops look up.
            return _table(node)
        raise NotUnderstood(f"{node.op} {node.target}")

    def integers(self, value: Any, what: str) -> Affine:
        """Return an operand as a formula: a tensor, a number or a symbolic size."""
        formula = expression(value)
        if formula is not None:
            return Affine((), formula)
        found = self.of(value)
        if not isinstance(found, Affine):
            raise NotUnderstood(f"{what} of {value}, which is no position")
        return found

    def truth(self, value: Any) -> Truth:
        """Return an operand as a bool tensor."""
        found = self.of(value)
        if isinstance(found, Lookup):
            return Truth(frozenset([found]), found.indices[0].rank if found.indices else 0)
        if isinstance(found, Truth):
            return found
        raise NotUnderstood(f"{value}, which is no truth value")


_SOURCE_TYPES = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.int8)
# Positions fit into these; of bool tensors only those that are False everywhere are numbers here.
_EXACT_TYPES = (torch.bool, torch.int64, torch.int32)


def _table(node: Node) -> Lookup:
    rank = len(_shape(node))
    return Lookup(node, tuple(_axis(rank, dim) for dim in range(rank)))


def _axis(rank: int, dim: int) -> Affine:
    return Affine(tuple(_ONE if place == dim else _ZERO for place in range(rank)), _ZERO)


def _shape(node: Node) -> Sequence[Any]:
    value = node.meta["val"]
    return tuple(value.shape)


def _number(value: Any, what: str) -> Any:
    formula = expression(value)
    if formula is None:
        raise NotUnderstood(f"{what} {value}")
    return formula


def _remap(value: Value, change: Callable[[Affine], Affine], rank: int) -> Value:
    """Apply an index change to every formula inside a value."""
    if isinstance(value, Affine):
        return change(value)
    if isinstance(value, Lookup):
        return Lookup(value.source, tuple(change(index) for index in value.indices))
    facts = frozenset(
        AtMost(change(fact.formula))
        if isinstance(fact, AtMost)
        else Lookup(fact.source, tuple(change(index) for index in fact.indices))
        for fact in value.facts
    )
    return Truth(facts, rank)


@_rule("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(values: MaskValues, node: Node) -> Value:
    start = _ZERO if str(node.target) == "aten.arange.default" else _number(node.args[0], "arange start")
    step = _ONE
    if str(node.target) == "aten.arange.start_step" and len(node.args) > 2:
        step = _number(node.args[2], "arange step")
    if node.meta["val"].dtype not in _SOURCE_TYPES:
        raise NotUnderstood("arange of floats")
    return Affine((step,), start)


@_rule("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar")
def _add(values: MaskValues, node: Node) -> Value:
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        raise NotUnderstood("add with alpha")
    sign = -1 if "sub" in str(node.target) else 1
    left, right = (values.integers(arg, "sum") for arg in node.args[:2])
    return left.plus(right, sign)


@_rule("aten.mul.Tensor", "aten.mul.Scalar")
def _mul(values: MaskValues, node: Node) -> Value:
    left, right = (values.integers(arg, "product") for arg in node.args[:2])
    if any(c != 0 for c in right.coefficients):
        left, right = right, left
    if any(c != 0 for c in right.coefficients):
        raise NotUnderstood("product of two positions")
    return left.widened(max(left.rank, right.rank)).times(right.constant)


@_rule("aten.unsqueeze.default")
def _unsqueeze(values: MaskValues, node: Node) -> Value:
    rank = len(_shape(node))
    dim = int(node.args[1]) % rank  # type: ignore[arg-type]
    return _remap(
        values.of(node.args[0]),
        lambda a: Affine((*a.coefficients[:dim], _ZERO, *a.coefficients[dim:]), a.constant),
        rank,
    )


@_rule("aten.squeeze.dim", "aten.select.int")
def _drop(values: MaskValues, node: Node) -> Value:
    source = node.args[0]
    assert isinstance(source, Node)
    shape = _shape(source)
    dim = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    index = _ZERO
    if "select" in str(node.target):
        index = _number(node.args[2], "select")
        if index.is_negative is not False:
            raise NotUnderstood("select from the end")
    elif shape[dim] != 1:
        return values.of(source)
    return _remap(
        values.of(source),
        lambda a: Affine(
            (*a.coefficients[:dim], *a.coefficients[dim + 1 :]),
            sympy.expand(a.constant + a.coefficients[dim] * index),
        ),
        len(shape) - 1,
    )


@_rule("aten.expand.default")
def _expand(values: MaskValues, node: Node) -> Value:
    source = node.args[0]
    assert isinstance(source, Node)
    before, rank = _shape(source), len(_shape(node))

    def change(formula: Affine) -> Affine:
        kept = (
            _ZERO if isinstance(size, int) and size == 1 else coefficient
            for size, coefficient in zip(before, formula.coefficients, strict=True)
        )
        return Affine(tuple(kept), formula.constant).widened(rank)

    return _remap(values.of(source), change, rank)


@_rule("aten.view.default", "aten.reshape.default")
def _view(values: MaskValues, node: Node) -> Value:
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = _shape(source), _shape(node)
    real = [(dim, size) for dim, size in enumerate(before) if not (isinstance(size, int) and size == 1)]
    wanted = [(dim, size) for dim, size in enumerate(after) if not (isinstance(size, int) and size == 1)]
    if len(real) != len(wanted) or any(a[1] != b[1] for a, b in zip(real, wanted, strict=True)):
        raise NotUnderstood("view that merges or splits dimensions")

    def change(formula: Affine) -> Affine:
        coefficients = [_ZERO] * len(after)
        for (old, _), (new, _) in zip(real, wanted, strict=True):
            coefficients[new] = formula.coefficients[old]
        return Affine(tuple(coefficients), formula.constant)

    return _remap(values.of(source), change, len(after))


@_rule("aten.slice.Tensor")
def _slice(values: MaskValues, node: Node) -> Value:
    source = node.args[0]
    assert isinstance(source, Node)
    rank = len(_shape(source))
    dim, start, step = (
        node.args[place] if len(node.args) > place else default
        for place, default in ((1, 0), (2, None), (4, 1))
    )
    if step != 1:
        raise NotUnderstood("slice with a step")
    dim = int(dim) % rank  # type: ignore[arg-type]
    begin = _ZERO if start is None else _number(start, "slice")
    if begin.is_negative is not False:
        raise NotUnderstood("slice from the end")
    return _remap(
        values.of(source),
        lambda a: Affine(a.coefficients, sympy.expand(a.constant + a.coefficients[dim] * begin)),
        rank,
    )


@_rule(
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.to.device",
    "aten._to_copy.default",
    "aten.alias.default",
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.detach.default",
    "aten.lift_fresh_copy.default",
)
def _same(values: MaskValues, node: Node) -> Value:
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if before not in _SOURCE_TYPES or after not in _SOURCE_TYPES:
        # A float tensor made bool or int is a table of its own.
        if after in _SOURCE_TYPES:
            return _table(node)
        raise NotUnderstood(f"conversion to {after}")
    if after is before or before is torch.bool:
        return values.of(source)
    found = values.of(source)
    if after is torch.bool and isinstance(found, Affine):
        raise NotUnderstood("positions as truth values")
    # Narrowing an integer table could wrap; as a truth value it is looked up itself.
    if isinstance(found, Lookup) and after is not torch.bool and after is not torch.int64:
        return _table(node)
    return found


@_rule("aten.new_ones.default", "aten.ones.default", "aten.ones_like.default", "aten.full.default")
def _constant(values: MaskValues, node: Node) -> Value:
    rank, dtype = len(_shape(node)), node.meta["val"].dtype
    fill = node.args[1] if str(node.target) == "aten.full.default" else 1
    if dtype is torch.bool and fill in (True, 1):
        return Truth(frozenset(), rank)
    if dtype in _SOURCE_TYPES and dtype is not torch.bool:
        return Affine((_ZERO,) * rank, _number(fill, "fill"))
    raise NotUnderstood(f"{node.target} of {dtype} with {fill!r}")


@_rule(
    *(f"aten.{name}.{kind}" for name in ("le", "lt", "ge", "gt", "eq", "ne") for kind in ("Tensor", "Scalar"))
)
def _compare(values: MaskValues, node: Node) -> Value:
    name = str(node.target).split(".")[1]
    left, right = (values.integers(arg, "comparison") for arg in node.args[:2])
    if name in ("ge", "gt"):
        left, right, name = right, left, {"ge": "le", "gt": "lt"}[name]
    difference = left.plus(right, -1)
    constant = all(c == 0 for c in difference.coefficients) and difference.constant.is_number
    if name in ("eq", "ne"):
        if not constant:
            raise NotUnderstood(f"{name} of positions")
        # False is the number 0, which a cumulative sum adds up; True is no fact at all.
        if (difference.constant == 0) == (name == "eq"):
            return Truth(frozenset(), difference.rank)
        return Affine((_ZERO,) * difference.rank, _ZERO)
    if name == "lt":
        difference = difference.plus(Affine((), _ONE))
    if constant and difference.constant <= 0:
        return Truth(frozenset(), difference.rank)
    return Truth(frozenset([AtMost(difference)]), difference.rank)


@_rule("aten.__and__.Tensor", "aten.bitwise_and.Tensor", "aten.logical_and.default")
def _and(values: MaskValues, node: Node) -> Value:
    # On integers `&` works bit by bit: 1 & 2 is 0 although both are true.
    if "logical" not in str(node.target) and node.meta["val"].dtype is not torch.bool:
        raise NotUnderstood(f"{node.target} of integers")
    return values.truth(node.args[0]).both(values.truth(node.args[1]))


@_rule("aten.logical_not.default", "aten.bitwise_not.default")
def _not(values: MaskValues, node: Node) -> Value:
    if node.meta["val"].dtype is not torch.bool:
        raise NotUnderstood(f"{node.target} of integers")
    facts = values.truth(node.args[0]).facts
    (fact,) = facts if len(facts) == 1 else (None,)
    if not isinstance(fact, AtMost):
        raise NotUnderstood("the opposite of more than one inequality")
    # Not f <= 0 is f >= 1, which is 1 - f <= 0.
    formula = fact.formula.times(-_ONE).plus(Affine((), _ONE))
    return Truth(frozenset([AtMost(formula)]), formula.rank)


@_rule("aten.diff.default")
def _diff(values: MaskValues, node: Node) -> Value:
    order = node.args[1] if len(node.args) > 1 else 1
    rank = len(_shape(node))
    dim = int(node.args[2]) % rank if len(node.args) > 2 else rank - 1  # type: ignore[arg-type]
    prepend = node.args[3] if len(node.args) > 3 else None
    append = node.args[4] if len(node.args) > 4 else None
    found = values.integers(node.args[0], "difference")
    if order != 1 or append is not None or found.rank != rank:
        raise NotUnderstood("diff of another form")
    step = found.coefficients[dim]
    if prepend is not None:
        before = values.integers(prepend, "difference").widened(rank)
        if not isinstance(prepend, Node) or _shape(prepend)[dim] != 1:
            raise NotUnderstood("diff after more than one entry")
        # The prepended entry must continue the sequence backwards.
        here = Affine(
            tuple(_ZERO if place == dim else c for place, c in enumerate(found.coefficients)), found.constant
        )
        gap = here.plus(
            Affine(
                tuple(_ZERO if place == dim else c for place, c in enumerate(before.coefficients)),
                before.constant,
            ),
            -1,
        )
        if any(c != 0 for c in gap.coefficients) or sympy.expand(gap.constant - step) != 0:
            raise NotUnderstood("diff whose first entry breaks the sequence")
    return Affine((_ZERO,) * rank, step)


@_rule("aten.cumsum.default")
def _cumsum(values: MaskValues, node: Node) -> Value:
    found = values.of(node.args[0])
    if isinstance(found, Affine) and all(c == 0 for c in (*found.coefficients, found.constant)):
        return found
    raise NotUnderstood("cumulative sum")


@_rule("aten.index.Tensor")
def _index(values: MaskValues, node: Node) -> Value:
    source, indices = node.args
    assert isinstance(source, Node) and isinstance(indices, Sequence)
    if len(indices) != len(_shape(source)) or any(index is None for index in indices):
        raise NotUnderstood("index that keeps a dimension")
    places = tuple(values.integers(index, "index") for index in indices)
    rank = len(_shape(node))
    places = tuple(place.widened(rank) for place in places)
    for place in places:
        # A negative index would count from the end.
        if not all(part.is_nonnegative for part in (*place.coefficients, place.constant)):
            raise NotUnderstood("index that may be negative")
    found = values.of(source)
    if isinstance(found, Affine):
        return found.at(places).widened(rank)
    if isinstance(found, Lookup):
        return Lookup(found.source, tuple(inner.at(places).widened(rank) for inner in found.indices))
    facts = frozenset(
        AtMost(fact.formula.at(places).widened(rank))
        if isinstance(fact, AtMost)
        else Lookup(fact.source, tuple(inner.at(places).widened(rank) for inner in fact.indices))
        for fact in found.facts
    )
    return Truth(facts, rank)
