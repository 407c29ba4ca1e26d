"""Weights that are wrapper subclasses of tensors, as quantisation makes them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

import hga_compile
from hga_compile import backend
from hga_compile.passes.decision import Reason

HEADS, DIM = 2, 8
HIDDEN = HEADS * DIM
OPTIONS = {"inner": "eager", "routing.budget": {"fraction": 1.0, "tokens": None}, "routing.dense_below": 0}

pytestmark = pytest.mark.usefixtures("recompile")


class Scaled(Tensor):
    """A matrix of codes and a scale for each row; only `linear` knows how to compute with it."""

    def __new__(cls, codes: Tensor, scale: Tensor) -> Tensor:
        return cls._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inside, context, size, stride):
        return cls(**inside)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is linear:
            x, weight = args
            codes = weight.codes if isinstance(weight.codes, Scaled) else weight.codes.to(x.dtype)
            return linear(x, codes) * weight.scale.flatten()
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes.detach(), args[0].scale.detach())
        raise NotImplementedError(func)


class Dispatched(Scaled):
    """The same for code below autograd alone, which a trace before dispatch does not reach."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*(arg.codes * arg.scale if isinstance(arg, cls) else arg for arg in args))


def int8(rows: int, kind: type[Scaled] = Scaled) -> Scaled:
    return kind(torch.randint(-127, 127, (rows, HIDDEN), dtype=torch.int8), torch.rand(rows, 1) / 127)


class Attention(nn.Module):
    def __init__(self, qkv: Scaled) -> None:
        super().__init__()
        self.qkv, self.out = qkv, nn.Parameter(int8(HIDDEN), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = linear(x, self.qkv).unflatten(-1, (3, HEADS, DIM)).transpose(1, 3)
        mixed = scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        return linear(mixed.transpose(1, 2).flatten(2), self.out)


def compare(plain, *batches, **options):
    """Run compiled and uncompiled, and return the decisions."""
    compiled = torch.compile(plain, backend="hga", options=OPTIONS | options)
    for x in batches:
        torch.testing.assert_close(compiled(x), plain(x), atol=1e-5, rtol=1e-5)
    return {site.reason for site in hga_compile.report().sites}


def rows(*lengths: int) -> list[Tensor]:
    return [torch.randn(2, length, HIDDEN) for length in lengths]


@pytest.mark.parametrize(
    "inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_attention_between_nested_weights_is_routed_at_any_length(inner):
    model = Attention(Scaled(int8(3 * HIDDEN), torch.rand(3 * HIDDEN, 1)))
    assert compare(model, *rows(12, 17, 23), inner=inner) == {Reason.ROUTED}


def test_what_has_no_such_weights_runs_what_the_inner_compiler_made(monkeypatch):
    inner, made, returned = backend._inner, [], []

    def compile_inner(*given):
        made.append(inner(*given))
        return made[-1]

    def compile_whole(graph, inputs):
        returned.append(backend.hga(graph, inputs, options=OPTIONS))
        return returned[-1]

    monkeypatch.setattr(backend, "_inner", compile_inner)
    q, k, v = torch.randn(3, 1, HEADS, 12, DIM)
    torch.compile(scaled_dot_product_attention, backend=compile_whole)(q, k, v, is_causal=True)
    assert len(made) == 1 and returned[0] is made[0]
    torch.compile(Attention(int8(3 * HIDDEN)), backend=compile_whole)(*rows(12))
    assert len(made) == 2 and returned[1] is not made[1]


def test_other_weights_of_the_same_kind_are_not_constants_of_the_graph():
    model = Attention(int8(3 * HIDDEN))
    compiled = torch.compile(model, backend="hga", options=OPTIONS)
    (x,) = rows(12)
    before = compiled(x)
    model.qkv.codes.neg_()
    model.qkv.scale.mul_(0.5)
    with torch.compiler.set_stance("fail_on_recompile"):
        after = compiled(x)
    torch.testing.assert_close(after, model(x))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inputs_of_any_size_may_be_such_tensors(inner):
    model = Attention(int8(3 * HIDDEN))

    def attend(x):
        return model(x.codes * x.scale)

    batches = [Scaled(x, torch.rand(2, x.shape[1], 1)) for x in rows(12, 17, 23)]
    assert compare(attend, *batches, inner=inner) == {Reason.ROUTED}


def test_a_graph_that_returns_such_a_tensor_is_dense():
    model = Attention(int8(3 * HIDDEN))
    compiled = torch.compile(lambda x: Scaled(model(x), x), backend="hga", options=OPTIONS)
    (x,) = rows(12)
    got = compiled(x)
    assert isinstance(got, Scaled)
    torch.testing.assert_close(got.codes, model(x))
    (site,) = hga_compile.report().sites
    assert site.reason == Reason.RETRACE_FAILED and "an output is a wrapper subclass" in site.detail


class Rescaled(Scaled):
    """Its `mul_` puts another tensor in the place of the scale."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.mul_:
            args[0].scale = args[0].scale * args[1]
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


def test_a_graph_that_puts_another_tensor_inside_is_dense():
    model, weight = Attention(int8(3 * HIDDEN)), int8(HIDDEN, Rescaled)

    def attend(x, weight):
        return model(linear(x, weight.mul_(2)))

    (x,) = rows(12)
    expected = model(2 * linear(x, weight))
    got = torch.compile(attend, backend="hga", options=OPTIONS)(x, weight)
    torch.testing.assert_close(got, expected)
    (site,) = hga_compile.report().sites
    assert site.reason == Reason.RETRACE_FAILED and "replaced" in site.detail


@pytest.mark.parametrize(
    "inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_attention_between_tensors_that_act_in_dispatch_alone_is_routed(inner):
    model = Attention(int8(3 * HIDDEN, Dispatched))
    assert compare(model, *rows(12, 17, 23), inner=inner) == {Reason.ROUTED}


def test_attention_over_tensors_that_act_in_dispatch_alone_is_dense():
    codes = torch.randint(-127, 127, (3, 1, HEADS, 12, DIM), dtype=torch.int8)
    qkv = [Dispatched(part, torch.rand(1, HEADS, 12, 1) / 127) for part in codes]

    def attend(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    expected = attend(*(part.codes * part.scale for part in qkv))
    got = torch.compile(attend, backend="hga", options=OPTIONS)(*qkv)
    torch.testing.assert_close(got, expected)
    (site,) = hga_compile.report().sites
    assert site.reason == Reason.RETRACE_FAILED and "act in dispatch alone" in site.detail


@pytest.mark.gradients
def test_a_gradient_for_a_tensor_inside_keeps_attention_dense():
    codes, scale = int8(3 * HIDDEN).codes, torch.rand(3 * HIDDEN, 1, requires_grad=True)
    model = Attention(Scaled(codes, scale))
    assert not model.qkv.requires_grad
    (x,) = rows(12)
    (expected,) = torch.autograd.grad(model(x).sum(), scale)
    compiled = torch.compile(model, backend="hga", options=OPTIONS)
    (got,) = torch.autograd.grad(compiled(x).sum(), scale)
    torch.testing.assert_close(got, expected)
    assert {site.reason for site in hga_compile.report().sites} == {Reason.REQUIRES_GRAD}
