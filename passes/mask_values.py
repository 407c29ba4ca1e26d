"""Work out what the integer and bool tensors that build a mask hold, op by op."""

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from hga_compile.passes.aliasing import changed_in_place
from hga_compile.passes.index_algebra import (
    Affine,
    AtMost,
    Either,
    Lookup,
    Number,
    Quotient,
    Same,
    Sum,
    Truth,
    Value,
    Zero,
    expression,
    lookups,
)

__all__ = ["MaskValues", "NotUnderstood"]


class NotUnderstood(Exception):
    """An op, or the way it is used, is outside what can be proven."""


_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)
_Rule = Callable[["MaskValues", Node], Value]
_RULES: dict[str, _Rule] = {}
_FALSE = Truth(frozenset([Either(frozenset())]))


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
        exact = _EXACT_TYPES if isinstance(found, Affine) else (torch.int64,)
        if isinstance(found, (Affine, Sum, Quotient)) and node.meta["val"].dtype not in exact:
            raise NotUnderstood(f"positions as {node.meta['val'].dtype}, which may wrap")
        # The index of a dimension of size 1 is 0: stated, since broadcasting repeats it for other indices.
        single = [isinstance(size, int) and size == 1 for size in shape]
        return found.mapped(
            lambda a: Affine(
                tuple(_ZERO if one else c for one, c in zip(single, a.coefficients, strict=True)), a.constant
            )
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

    def number(self, value: Any, rank: int) -> Number:
        """Return an operand of an op whose result has `rank` dimensions as a number."""
        formula = expression(value)
        # Numbers are converted to the type of what they are compared with: -1 is 255 among bytes.
        found: Value = self.of(value) if formula is None else Affine((), formula)
        if formula is None:
            wraps = value.meta["val"].dtype not in _EXACT_TYPES
        else:
            wraps = formula.is_number and abs(formula) >= 2**31
        if isinstance(found, Truth) or wraps:
            raise NotUnderstood(f"{value}, which is no number or may wrap")
        return found.mapped(lambda a: a.widened(rank))

    def sum(self, value: Any, rank: int) -> Sum:
        """Return an operand likewise as a formula with look-ups."""
        found = self.number(value, rank)
        if isinstance(found, Quotient):
            raise NotUnderstood(f"{value}, which was divided")
        return Sum.of(found, rank)

    def truth(self, value: Any, rank: int | None = None) -> Truth:
        """Return an operand as a bool tensor, broadcast to `rank` dimensions."""
        found = self.of(value)
        if isinstance(found, Lookup):
            found = Truth(frozenset([found]))
        elif isinstance(found, Affine) and found.is_constant and found.constant == 0:
            found = _FALSE
        if not isinstance(found, Truth):
            raise NotUnderstood(f"{value}, which is no truth value")
        return found if rank is None else found.mapped(lambda a: a.widened(rank))


_SOURCE_TYPES = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.int8)
# Positions fit into these, and comparing keeps their values; of bool tensors only those that are False
# everywhere are formulas here.
_EXACT_TYPES = (torch.bool, torch.int64, torch.int32)


def _table(node: Node) -> Lookup:
    rank = len(_shape(node))
    return Lookup(node, tuple(_axis(rank, dim) for dim in range(rank)))


def _axis(rank: int, dim: int) -> Affine:
    return Affine(tuple(_ONE if place == dim else _ZERO for place in range(rank)), _ZERO)


def _refuse_table(node: Node, *operands: Number) -> None:
    """Refuse to work out a comparison of two dimensions that is better taken for a table of its own.

    Of tables ``[batch, tokens]`` it makes another one; of two places in one ``[tokens]`` it makes a mask.
    """
    found = set().union(*map(lookups, operands))
    mask = len(found) == 2 and all(len(lookup.indices) == 1 for lookup in found)
    if len(_shape(node)) == 2 and found and not mask:
        raise NotUnderstood(f"{node.target} of a table")


def _shape(node: Node) -> Sequence[Any]:
    value = node.meta["val"]
    return tuple(value.shape)


def _number(value: Any, what: str) -> Any:
    formula = expression(value)
    if formula is None:
        raise NotUnderstood(f"{what} {value}")
    return formula


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
    sign, rank = -1 if "sub" in str(node.target) else 1, len(_shape(node))
    left, right = (values.sum(arg, rank) for arg in node.args[:2])
    return left.plus(right, sign).simplest()


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
    return values.of(node.args[0]).mapped(
        lambda a: Affine((*a.coefficients[:dim], _ZERO, *a.coefficients[dim:]), a.constant)
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
    return values.of(source).mapped(
        lambda a: Affine(
            (*a.coefficients[:dim], *a.coefficients[dim + 1 :]),
            sympy.expand(a.constant + a.coefficients[dim] * index),
        )
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

    return values.of(source).mapped(change)


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

    return values.of(source).mapped(change)


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
    return values.of(source).mapped(
        lambda a: Affine(a.coefficients, sympy.expand(a.constant + a.coefficients[dim] * begin))
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
    if after is torch.bool and isinstance(found, (Affine, Sum, Quotient)):
        raise NotUnderstood("positions as truth values")
    if isinstance(found, Lookup) and after is torch.bool:
        return Truth(frozenset([found]))  # as a number it is another table: 2 became 1
    # Narrowing an integer table could wrap.
    if isinstance(found, Lookup) and after is not torch.int64:
        return _table(node)
    return found


@_rule(
    "aten.full.default",
    *(f"aten.{name}.default" for kind in ("ones", "zeros") for name in (f"new_{kind}", kind, f"{kind}_like")),
)
def _constant(values: MaskValues, node: Node) -> Value:
    name, dtype = str(node.target), node.meta["val"].dtype
    fill = node.args[1] if name == "aten.full.default" else int("ones" in name)
    if dtype is torch.bool and fill in (True, 1):
        return Truth()
    # False is the number 0.
    formula = _ZERO if fill in (False, 0) else expression(fill)
    if formula is None or dtype not in _SOURCE_TYPES or (dtype is torch.bool and formula != 0):
        raise NotUnderstood(f"{node.target} of {dtype} with {fill!r}")
    return Affine((_ZERO,) * len(_shape(node)), formula)


@_rule(*(f"aten.{name}.{kind}" for name in ("le", "lt", "ge", "gt") for kind in ("Tensor", "Scalar")))
def _compare(values: MaskValues, node: Node) -> Value:
    name, rank = str(node.target).split(".")[1], len(_shape(node))
    left, right = (values.sum(arg, rank) for arg in node.args[:2])
    if name in ("ge", "gt"):
        left, right, name = right, left, {"ge": "le", "gt": "lt"}[name]
    difference = left.plus(right, -1)
    if name == "lt":
        difference = difference.plus(Sum(Affine((), _ONE)))
    _refuse_table(node, left, right)
    constant = _constant_of(difference)
    if constant is not None and constant <= 0:
        return Truth()
    return Truth(frozenset([AtMost(difference)]))


@_rule(*(f"aten.{name}.{kind}" for name in ("eq", "ne") for kind in ("Tensor", "Scalar")))
def _equal(values: MaskValues, node: Node) -> Value:
    rank, wanted = len(_shape(node)), "eq" in str(node.target)
    left, right = (values.number(arg, rank) for arg in node.args[:2])
    _refuse_table(node, left, right)
    if isinstance(left, Quotient) and isinstance(right, Quotient) and wanted:
        return Truth() if left == right else Truth(frozenset([Same(frozenset([left, right]))]))
    difference = values.sum(node.args[0], rank).plus(values.sum(node.args[1], rank), -1)
    constant = _constant_of(difference)
    if constant is not None:
        # False is the number 0, which a cumulative sum adds up; True is no fact at all.
        return Truth() if (constant == 0) == wanted else Affine((_ZERO,) * rank, _ZERO)
    if not wanted:
        raise NotUnderstood(f"{node.target} of positions")
    return Truth(frozenset([Zero(difference)]))


def _constant_of(formula: Sum) -> Any:
    """Return the number that all entries are equal to, or None."""
    known = not formula.lookups and formula.affine.is_constant and formula.affine.constant.is_number
    return formula.affine.constant if known else None


@_rule(
    "aten.floor_divide.default", "aten.floor_divide.Scalar", "aten.div.Tensor_mode", "aten.div.Scalar_mode"
)
def _divide(values: MaskValues, node: Node) -> Value:
    divisor = node.args[1]
    floors = "floor_divide" in str(node.target) or node.kwargs.get("rounding_mode") == "floor"
    if not floors or not isinstance(divisor, int) or divisor < 1:
        raise NotUnderstood(f"{node.target} of another form")
    return Quotient(values.sum(node.args[0], len(_shape(node))), divisor)


@_rule("aten.__and__.Tensor", "aten.bitwise_and.Tensor", "aten.logical_and.default")
def _and(values: MaskValues, node: Node) -> Value:
    left, right = _truths(values, node)
    return left.both(right)


@_rule("aten.__or__.Tensor", "aten.bitwise_or.Tensor", "aten.logical_or.default")
def _or(values: MaskValues, node: Node) -> Value:
    left, right = _truths(values, node)
    return left.either(right)


def _truths(values: MaskValues, node: Node) -> tuple[Truth, Truth]:
    # On integers `&` works bit by bit: 1 & 2 is 0 although both are true.
    if "logical" not in str(node.target) and node.meta["val"].dtype is not torch.bool:
        raise NotUnderstood(f"{node.target} of integers")
    rank = len(_shape(node))
    return values.truth(node.args[0], rank), values.truth(node.args[1], rank)


@_rule("aten.logical_not.default", "aten.bitwise_not.default")
def _not(values: MaskValues, node: Node) -> Value:
    if node.meta["val"].dtype is not torch.bool:
        raise NotUnderstood(f"{node.target} of integers")
    facts = values.truth(node.args[0]).facts
    (fact,) = facts if len(facts) == 1 else (None,)
    if not isinstance(fact, AtMost):
        raise NotUnderstood("the opposite of more than one inequality")
    # Not f <= 0 is f >= 1, which is 1 - f <= 0.
    return Truth(frozenset([AtMost(fact.formula.times(-_ONE).plus(Sum(Affine((), _ONE))))]))


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
    return values.of(source).mapped(lambda a: a.at(places).widened(rank))
