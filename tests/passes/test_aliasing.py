import pytest
import torch
from attention_graphs import traced

from hga_compile.passes.aliasing import changed_in_place

X = torch.zeros(2, 3, 4)


def changed(function, *inputs):
    """Names of the ops' results and inputs whose memory is written."""
    return {str(node.target) for node in changed_in_place(traced(function, *inputs).graph)}


def test_a_graph_without_writes_has_none():
    assert changed(lambda x: x.transpose(0, 1).reshape(-1) + 1, X) == set()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[0],
        lambda x: x.transpose(0, 1),
        lambda x: x.view(6, 4),
        lambda x: x.reshape(6, 4),
        lambda x: x.flatten(),
        lambda x: x.unsqueeze(0).expand(2, -1, -1, -1)[0],
        lambda x: x.split(1)[1],
        lambda x: x.unbind(0)[0],
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float32),
        lambda x: x.detach(),
        lambda x: x.squeeze(0).narrow(1, 0, 2),
    ],
)
def test_a_write_to_a_view_is_a_write_to_what_it_views(view):
    def function(x):
        y = x + 1
        view(y).add_(1)
        return y * 2

    assert "aten.add.Tensor" in changed(function, X)


def test_a_write_to_the_whole_reaches_its_views():
    def function(x):
        y = x + 1
        z = y[0]
        y.zero_()
        return z

    assert {"aten.add.Tensor", "aten.select.int"} <= changed(function, X)


def test_a_copy_is_another_memory():
    def function(x):
        y = x.clone()
        y.add_(1)
        return x * 1, y

    assert changed(function, X) == {"aten.clone.default", "aten.add_.Tensor"}


def test_a_list_of_written_tensors_counts():
    def function(x, y):
        torch._foreach_add_([x, y], 1.0)
        return x, y

    found = changed_in_place(traced(function, X, X.clone()).graph)
    assert {node.op for node in found} >= {"placeholder"}


def test_the_last_writer_is_named():
    def function(x):
        y = x.clone()
        y[0].add_(1)
        y[1].mul_(2)
        return y

    graph = traced(function, X).graph
    found = changed_in_place(graph)
    (clone,) = graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    assert "mul_" in str(found[clone].target)


def test_an_append_writes_to_its_handle_alone():
    def function(k, v, handle):
        return torch.ops.hga.append(k, v, handle, 3)

    k = torch.zeros(1, 2, 3, 4)
    found = changed_in_place(traced(function, k, k.clone(), torch.zeros(1, dtype=torch.int64)).graph)
    assert [node.name for node in found] == ["handle_1"] or len(found) == 1
