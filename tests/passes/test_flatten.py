import torch
from torch.testing._internal.two_tensor import TwoTensor

from hga_compile.passes.flatten import flatten, leaves_of, unflatten


def test_inputs_without_subclasses_are_their_own_leaves():
    values = [torch.ones(2), torch.nn.Parameter(torch.ones(2)), 3, None]
    leaves = leaves_of(values)
    assert leaves == ((0, ()), (1, ()), (2, ()), (3, ()))
    flat = flatten(values, leaves)
    assert all(one is other for one, other in zip(flat, values, strict=True))
    nested = unflatten(flat, values)
    assert all(one is other for one, other in zip(nested, values, strict=True))


def test_a_subclass_inside_of_a_subclass_is_taken_apart_and_put_together():
    a, b, c, d = (torch.full((2, 3), float(number)) for number in range(4))
    values = [d, TwoTensor(TwoTensor(a, b), c), 5]
    leaves = leaves_of(values)
    assert leaves == ((0, ()), (1, ("a", "a")), (1, ("a", "b")), (1, ("b",)), (2, ()))
    flat = flatten(values, leaves)
    assert all(one is other for one, other in zip(flat, [d, a, b, c, 5], strict=True))
    _, again, _ = unflatten([d, *(part + 1 for part in (a, b, c)), 5], values)
    assert isinstance(again, TwoTensor) and isinstance(again.a, TwoTensor) and again.shape == (2, 3)
    assert [float(part[0, 0]) for part in (again.a.a, again.a.b, again.b)] == [1, 2, 3]


def test_the_same_tensor_in_two_inputs_is_two_leaves():
    shared = torch.ones(2)
    values = [TwoTensor(shared, shared.clone()), shared]
    flat = flatten(values, leaves_of(values))
    assert len(flat) == 3 and flat[0] is flat[2] is shared
