import torch
from tiny_models import Pair, make_model, tokens

from hga_compile.tracing import model_layers, traced_for_hga


class Asks(torch.nn.Module):
    """Adds 1 where hga is tracing."""

    def forward(self, x):
        return x + 1 if torch.compiler.is_compiling() and traced_for_hga() else x


ZERO = torch.zeros(1)


def asked(model, **compiled):
    torch._dynamo.reset()
    return float(torch.compile(model, **compiled)(ZERO))


def test_only_hga_is_hga():
    def mine(graph, example_inputs):
        return graph.forward

    assert asked(Asks(), backend="hga", options={"inner": "eager"}) == 1
    assert asked(Asks(), backend="hga", options={"inner": "eager"}, fullgraph=True, dynamic=True) == 1
    assert [asked(Asks(), backend=backend) for backend in ("eager", "aot_eager", mine)] == [0, 0, 0]


def test_the_other_ways_to_compile_are_seen_through():
    from hga_compile.backend import hga

    model = Asks()
    torch._dynamo.reset()
    model.compile(backend="hga", options={"inner": "eager"})
    assert float(model(ZERO)) == 1
    torch._dynamo.reset()
    assert float(torch.compile(Asks().__call__, backend="hga", options={"inner": "eager"})(ZERO)) == 1

    def hga_eager(graph, example_inputs):
        return hga(graph, example_inputs, options={"inner": "eager"})

    # A function around the backend is another backend: caches stay stock, results stay right.
    assert asked(Asks(), backend=hga_eager) == 0


def test_nothing_is_traced_where_dynamo_does_not():
    assert traced_for_hga() is False
    assert model_layers() is None
    assert float(torch.export.export(Asks(), (ZERO,)).module()(ZERO)) == 0
    assert float(torch.export.export(Asks(), (ZERO,), strict=True).module()(ZERO)) == 0


def test_the_number_of_layers_comes_from_the_configuration(recompile, monkeypatch):
    found = []
    monkeypatch.setattr("hga_compile.backend.model_layers", lambda: found.append(model_layers()) or found[-1])
    model = make_model("llama")
    Pair(model).compiled(tokens(1, 6))
    torch._dynamo.reset()
    Pair(torch.nn.Linear(2, 2)).compiled(torch.ones(1, 2))
    assert found == [2, None]
