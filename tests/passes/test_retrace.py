import torch
from attention_graphs import counted, dynamo_graph, dynamo_run, rows
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hga_compile.passes.retrace import retrace


def test_attention_is_one_node_and_inputs_and_outputs_stay():
    q, k, v = rows(6)
    new, (out, more) = dynamo_run(
        lambda q, k, v: (sdpa(q, k, v, is_causal=True), q + 1), q, k, v, use=retrace
    )
    assert counted(new, "aten.scaled_dot_product_attention") == 1
    torch.testing.assert_close(out, sdpa(q, k, v, is_causal=True))
    torch.testing.assert_close(more, q + 1)


def test_attention_inside_multi_head_attention_is_found():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.1).train()
    x = torch.randn(2, 5, 16)

    def self_attention(x):
        return attention(x, x, x, need_weights=False)[0]

    new = dynamo_graph(self_attention, x, use=retrace)
    assert counted(new, "aten.scaled_dot_product_attention") == 1


def test_names_of_modules_survive():
    block = torch.nn.Sequential(torch.nn.Linear(4, 4))
    new = dynamo_graph(lambda x: block(x), torch.ones(2, 4), use=retrace)
    paths = [str(node.meta.get("nn_module_stack")) for node in new.graph.nodes if node.op == "call_function"]
    assert any("block" in path for path in paths)


def test_dynamic_sizes_stay_dynamic():
    x = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(x, 0)
    new = dynamo_graph(lambda x: torch.arange(x.shape[0]) + x[:, 0], x, use=retrace)
    sizes = [
        node.meta["val"].shape
        for node in new.graph.nodes
        if node.op == "placeholder" and node.meta["val"] is not None and hasattr(node.meta["val"], "shape")
    ]
    assert any(isinstance(shape[0], torch.SymInt) for shape in sizes)


def masked_by(allowed):
    """Attention under a mask that a function of one row and one column makes."""

    def attend(q, k, v):
        places = torch.arange(q.shape[2])
        mask = torch.vmap(torch.vmap(allowed, (None, 0)), (0, None))(places, places)
        return sdpa(q, k, v, mask[None, None])

    return attend


def test_code_inside_a_vmap_is_traced_as_the_batched_ops():
    q, k, v = rows(6)

    def allowed(row, column):
        return (column <= row) & torch.ones((), dtype=torch.bool, device=row.device)

    new, out = dynamo_run(masked_by(allowed), q, k, v, use=retrace)
    assert counted(new, "aten.scaled_dot_product_attention") == counted(new, "aten.le") == 1
    assert "vmap" not in str(new.graph) and "batch_dim" not in str(new.graph)
    torch.testing.assert_close(out, sdpa(q, k, v, is_causal=True))


def test_two_vmaps_of_dynamic_sizes_are_traced():
    q, k, v = rows(6)
    for part in (q, k, v):
        torch._dynamo.mark_dynamic(part, 2)

    def attend(q, k, v):
        first = masked_by(lambda row, column: column <= row)(q, k, v)
        return masked_by(lambda row, column: (column <= row) | (column < 3))(first, k, v)

    new, out = dynamo_run(attend, q, k, v, use=retrace)
    assert counted(new, "aten.scaled_dot_product_attention") == counted(new, "aten.le") == 2
    torch.testing.assert_close(out, attend(q, k, v))


def test_a_constant_inside_a_vmap_becomes_one_of_the_graph():
    q, k, v = rows(6)
    new, out = dynamo_run(
        masked_by(lambda row, column: column <= row * torch.tensor(1)), q, k, v, use=retrace
    )
    assert counted(new, "aten.scaled_dot_product_attention") == 1 and "vmap" not in str(new.graph)
    torch.testing.assert_close(out, sdpa(q, k, v, is_causal=True))


def test_tensors_of_the_closure_are_no_reason_to_refuse():
    table = torch.arange(6)

    def use_table(x):
        return x * table + torch.tensor([1, 2, 3, 4, 5, 6])

    _, out = dynamo_run(use_table, torch.ones(6), use=retrace)
    torch.testing.assert_close(out, torch.arange(6) + torch.arange(1.0, 7.0))
