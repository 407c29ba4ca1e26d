"""Linear layers and mixtures of experts whose weights are kept in 8-bit floats, one scale a row.

What transformers and torchao have for this needs a package that fetches kernels, or covers no fused experts;
so a model that is built for a benchmark has its modules replaced by these. Activations stay in 16 bits, and
nothing but the weights is quantised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Experts8", "Linear8", "quantise", "random_weight"]

DTYPE = torch.float8_e4m3fn
_MOST = torch.finfo(DTYPE).max
# Rows of a decode step: for so few, reading the weight once a row is fastest.
FEW = 8
# Tokens of a step that run through the experts at a time: what lies between their products is kept small.
_TOKENS = 4096

torch.library.define("wholemodel::linear8", "(Tensor x, Tensor weight, Tensor scale) -> Tensor")
torch.library.define(
    "wholemodel::experts8",
    "(Tensor x, Tensor experts, Tensor shares, Tensor up, Tensor up_scale, Tensor down, Tensor down_scale)"
    " -> Tensor",
)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight ``[..., rows, channels]`` in 8-bit floats and its scales ``[..., rows]`` in float32."""
    scale = weight.float().abs().amax(-1).clamp(min=1e-12) / _MOST
    return (weight.float() / scale[..., None]).to(DTYPE), scale


def random_weight(shape: tuple[int, ...], device: torch.device, spread: float) -> tuple[Tensor, Tensor]:
    """Make a weight ``[..., rows, channels]`` of normal numbers in 8 bits, a little of it at a time.

    A model's own size in 16 bits is never held: 2**24 numbers are made and quantised, then the next.
    """
    rows = math.prod(shape[:-1])
    weight = torch.empty(rows, shape[-1], dtype=DTYPE, device=device)
    scale = torch.empty(rows, dtype=torch.float32, device=device)
    step = max(1, 2**24 // shape[-1])
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        part = torch.randn(end - begin, shape[-1], dtype=torch.float32, device=device) * spread
        weight[begin:end], scale[begin:end] = quantise(part)
    return weight.view(shape), scale.view(shape[:-1])


class Linear8(nn.Module):
    """A linear layer without bias, its weight ``[out, in]`` in 8 bits."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight, self.scale = nn.Buffer(weight), nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[..., in]``."""
        return torch.ops.wholemodel.linear8(x, self.weight, self.scale)  # type: ignore[no-any-return]


class Experts8(nn.Module):
    """A mixture's experts as transformers calls them: gate and up projections in one weight, SiLU between.

    Weights are ``[experts, 2 * inner, hidden]`` and ``[experts, hidden, inner]``.
    """

    def __init__(self, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.up, self.up_scale = nn.Buffer(up[0]), nn.Buffer(up[1])
        self.down, self.down_scale = nn.Buffer(down[0]), nn.Buffer(down[1])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run ``[tokens, hidden]`` through the experts ``[tokens, top_k]``, weighted."""
        weights = (self.up, self.up_scale, self.down, self.down_scale)
        return torch.ops.wholemodel.experts8(hidden_states, top_k_index, top_k_weights, *weights)  # type: ignore[no-any-return]


@torch.library.register_fake("wholemodel::linear8")
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("wholemodel::experts8")
def _(
    x: Tensor, experts: Tensor, shares: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.impl("wholemodel::linear8", ("CPU", "CUDA"))
def _linear8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if x.is_cuda and len(flat) <= FEW:
        from wholemodel.eight_bit_kernels import row_sums

        out = row_sums(flat, None, None, weight[None], scale[None])
    else:
        # A 16-bit copy of one layer's weight is small beside what a step of many tokens holds.
        out = (functional.linear(flat, weight.to(x.dtype)) * scale).to(x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


@torch.library.impl("wholemodel::experts8", ("CPU", "CUDA"))
def _experts8(
    x: Tensor, experts: Tensor, shares: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    x, experts, shares = x.contiguous(), experts.long().contiguous(), shares.contiguous()
    out = torch.empty_like(x)
    run = _on_gpu if x.is_cuda else _in_torch
    for begin in range(0, len(x), _TOKENS):
        own = slice(begin, begin + _TOKENS)
        out[own] = run(x[own], experts[own], shares[own], up, up_scale, down, down_scale)
    return out


def _on_gpu(
    x: Tensor, experts: Tensor, shares: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    from wholemodel.eight_bit_kernels import row_products, row_sums, tile_products

    (tokens, top_k), pairs = experts.shape, experts.flatten()
    if tokens <= FEW:
        inner = row_products(x, pairs, up, up_scale, top_k=top_k)
        return row_sums(inner, experts, shares, down, down_scale)
    inner = tile_products(x, pairs, None, up, up_scale, top_k=top_k)
    found = tile_products(inner, pairs, shares.flatten(), down, down_scale, top_k=1)
    return found.view(tokens, top_k, -1).sum(1)


def _in_torch(
    x: Tensor, experts: Tensor, shares: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """Run one expert after the other: what the kernels are compared with, and what runs on a CPU."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in experts.unique().tolist():
        token, place = (experts == expert).nonzero(as_tuple=True)
        gate, other = (x[token].float() @ up[expert].float().T * up_scale[expert]).chunk(2, -1)
        found = (functional.silu(gate) * other) @ down[expert].float().T * down_scale[expert]
        out.index_add_(0, token, found * shares[token, place, None].float())
    return out.to(x.dtype)
