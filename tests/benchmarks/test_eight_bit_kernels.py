"""The products with 8-bit weights in Triton: in its interpreter, and compiled for a GPU that is not there."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from wholemodel.eight_bit import _in_torch, random_weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
EXPERTS, HIDDEN, INNER, TOP = 5, 40, 24, 2


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter itself")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-k", "as_in_torch", __file__]
    environment, root = os.environ | {"TRITON_INTERPRET": "1"}, Path(__file__).parents[2]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout[-2000:]


@pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter"
)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("tiled", [False, True])
def test_experts_as_in_torch(tokens, tiled):
    from wholemodel import eight_bit_kernels as kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    up = random_weight((EXPERTS, 2 * INNER, HIDDEN), device, 0.3)
    down = random_weight((EXPERTS, HIDDEN, INNER), device, 0.3)
    x = torch.randn(tokens, HIDDEN, device=device)
    experts = torch.rand(tokens, EXPERTS, device=device).topk(TOP).indices
    shares = torch.rand(tokens, TOP, device=device)
    want = _in_torch(x, experts, shares, *up, *down)
    if tiled:
        inner = kernels.tile_products(x, experts.flatten(), None, *up, top_k=TOP)
        found = kernels.tile_products(inner, experts.flatten(), shares.flatten(), *down, top_k=1)
        got = found.view(tokens, TOP, -1).sum(1)
    else:
        inner = kernels.row_products(x, experts.flatten(), *up, top_k=TOP)
        got = kernels.row_sums(inner, experts, shares, *down)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter"
)
def test_a_linear_layer_as_in_torch():
    from wholemodel import eight_bit_kernels as kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight, scale = random_weight((19, HIDDEN), device, 0.3)
    x = torch.randn(3, HIDDEN, device=device)
    got = kernels.row_sums(x, None, None, weight[None], scale[None])
    torch.testing.assert_close(got, x @ (weight.float() * scale[:, None]).T, rtol=1e-3, atol=1e-4)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
def test_they_compile_for_a_gpu_at_the_models_own_size(monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    from wholemodel import eight_bit_kernels as kernels

    class Absent:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    made: list[tuple[str, Any]] = []

    def launch(self: Any, grid: Any) -> Any:
        def run(*given: Any, **named: Any) -> None:
            made.append((self.fn.__name__, self.run(*given, grid=grid, warmup=True, **named)))

        return run

    monkeypatch.setattr(type(driver), "active", Absent())
    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    experts, hidden, inner, top = 128, 2048, 768, 8

    def weight(rows, channels):
        return torch.empty(experts, rows, channels, dtype=torch.float8_e4m3fn), torch.empty(experts, rows)

    up, down = weight(2 * inner, hidden), weight(hidden, inner)
    for tokens in (1, 4096):
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
        ids, shares = (
            torch.zeros(tokens, top, dtype=torch.int64),
            torch.empty(tokens, top, dtype=torch.bfloat16),
        )
        if tokens == 1:
            kernels.row_sums(kernels.row_products(x, ids.flatten(), *up, top_k=top), ids, shares, *down)
            continue
        found = kernels.tile_products(x, ids.flatten(), None, *up, top_k=top)
        kernels.tile_products(found, ids.flatten(), shares.flatten(), *down, top_k=1)
    assert [name for name, _ in made] == ["_gated_rows", "_summed_rows", "_tiles", "_tiles"]
    # A large step runs in the matrix units.
    assert ["wgmma" in kernel.asm["ptx"] for _, kernel in made] == [False, False, True, True]
