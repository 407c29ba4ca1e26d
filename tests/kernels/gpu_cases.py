"""What the tests of the Triton kernels share: where they run, and plain forms of what they do."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import inputs, run_steps
from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels import call as call_module
from hga_compile.kernels import decode, dispatch, gpu, lowbit, mean
from hga_compile.kernels import steps as steps_module
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.lowbit import decode_keys, encode_keys
from hga_compile.kernels.rotation import rotation
from hga_compile.kernels.scoring import Scoring
from hga_compile.store.pages import Pages

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
# What the interpreter has no room or no arithmetic for: numpy knows no bfloat16.
large = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


def pages_of(key: Tensor, value: Tensor, size: int, home: str | None = None) -> Pages:
    there = torch.device(home) if home else key.device
    pages = Pages(key.shape[0], key.shape[2], value.shape[2], size, key.dtype, key.device, there)
    pages.write(key, value, 0)
    return pages


def coded(key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes with bytes innermost and slack behind, scales, and the rotated keys that they stand for."""
    rows, tokens, dim = key.shape
    codes, scales = encode_keys(key.float() @ rotation(dim, key.device), bits)
    wide = torch.full((rows, tokens + 7, codes.shape[1]), 255, dtype=torch.uint8, device=key.device)
    wide[:, :tokens] = codes.transpose(1, 2)
    return wide.transpose(1, 2), scales, decode_keys(codes, scales, bits, dim).double()


def token_marks(groups: Tensor, listed: Tensor, size: int, tokens: int, starts: Tensor) -> Tensor:
    """Mark the tokens of listed groups, ``[rows, tokens]``; checks that the lists ascend."""
    inside = torch.arange(groups.shape[1], device=groups.device) < listed
    assert bool(((groups[:, 1:] > groups[:, :-1]) | ~inside[:, 1:]).all())
    marks = torch.zeros(len(groups), -(-tokens // size), dtype=torch.int32, device=groups.device)
    marks.scatter_add_(1, groups.long().masked_fill(~inside, 0), inside.int())
    marks = (marks > 0).repeat_interleave(size, 1)[:, :tokens]
    return marks & (torch.arange(tokens, device=groups.device) >= starts)


def attention(
    query: Tensor, key: Tensor, value: Tensor, marks: Tensor, scale: float, scoring: Scoring
) -> Tensor:
    """Attention to marked tokens in the dtype that it is given."""
    scores = query @ key.transpose(1, 2) * scale
    if scoring.softcap:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.masked_fill(~marks[:, None], -math.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.to(scores).view(-1, query.shape[1], 1)
        sinks = sinks.repeat(len(query) // len(sinks), 1, 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1] @ value
    return torch.softmax(scores, -1).nan_to_num() @ value


def counts() -> tuple[int, int, int, float]:
    """What the ledger has of decoding."""
    use = LEDGER.uses()[0, "decode"]
    return use.attended, use.visible, use.scored, use.summary_bytes


def converse(
    place: torch.device, monkeypatch: pytest.MonkeyPatch, setting: Routing, **shape: Any
) -> list[dict[str, Any]]:
    """Run a conversation in Triton and in plain torch: answers, routes and counts are the same.

    Returns what the kernels' steps were given.
    """
    given = inputs(**shape)
    steps = (given.tokens - 2, 1, 1)
    with LEDGER.recording() as plain:
        want = run_steps(setting, given, steps)
    used = counts()
    LEDGER.reset()
    taken: list[dict[str, Any]] = []

    def step(*given: Any, **named: Any) -> Any:
        taken.append(named | {"spans": given[4]})
        return gpu.decode_step(*given, **named)

    monkeypatch.setattr(decode, "decode_step", step)
    if not CUDA:
        # The interpreter cuts to bfloat16 where all else rounds: means are made by the reference.
        monkeypatch.setattr(dispatch, "preferred", lambda kernels, device: "triton")
        for module in (call_module, steps_module, lowbit):
            monkeypatch.setattr(module, "preferred", dispatch.preferred)
        monkeypatch.setattr(mean, "triton_serves", lambda *given: False)
    with LEDGER.recording() as ours:
        got = run_steps(setting, given.to(place), steps)
    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-5)
    assert counts() == used
    for one, other in zip(plain[-2:], ours[-2:], strict=True):
        assert torch.equal(one.groups, other.groups)
    return taken


def interpret(file: str, names: str) -> None:
    """Run tests of a file in Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", names]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=500
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
