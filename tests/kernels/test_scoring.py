"""Soft-cap and attention sinks: against float64, written as their papers have them."""

import pytest
import torch
from cases import Inputs, inputs, left_padding, opened, routing, site
from torch import Tensor
from torch.library import opcheck

from hga_compile.configs.budget import Budget
from hga_compile.kernels import ops

CAP = 2.0
FULL = routing(budget=Budget(fraction=1.0))
FORMS = {"cap": (CAP, False), "sinks": (0.0, True), "both": (CAP, True)}


def naive(given: Inputs, cap: float, logits: Tensor | None, visible: Tensor) -> Tensor:
    """Attention in float64; `visible` is broadcastable to ``[batch, heads, queries, tokens]``."""
    query, key, value = (part.double() for part in (given.query, given.key, given.value))
    times = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(times, 1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * given.scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores.masked_fill(~visible, -torch.inf)
    if logits is not None:
        column = logits.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return weights.nan_to_num(0.0) @ value


def logits_of(given: Inputs, sinks: bool) -> Tensor | None:
    return torch.linspace(-2, 3, given.query.shape[1], device=given.query.device) if sinks else None


def causal(given: Inputs) -> Tensor:
    tokens = given.tokens
    seen = torch.arange(tokens)[None] <= torch.arange(tokens)[:, None]
    return seen if given.mask is None else seen & given.mask.cpu()[:, None, None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("steps", [(130,), (100, 30), (128, 1, 1)], ids=str)
def test_full_budget_is_the_formula(
    form: str, padded: bool, steps: tuple[int, ...], device: torch.device
) -> None:
    cap, sinks = FORMS[form]
    mask = left_padding([130, 90], 130) if padded else None
    given = inputs(batch=2, mask=mask)
    logits = logits_of(given, sinks)
    want = naive(given, cap, logits, causal(given))
    given = given.to(device)
    logits = None if logits is None else logits.to(device)
    handle, length, parts = opened(given.key[:, :, :0], given.value[:, :, :0]), 0, []
    for step in steps:
        begin, length = length, length + step
        new = (part[:, :, begin:length] for part in (given.query, given.key, given.value))
        shown = None if given.mask is None else given.mask[:, :length]
        parts.append(ops.cached_attention(*new, handle, length, shown, given.scale, site(FULL), cap, logits))
    got = torch.cat(parts, 2).cpu().double()
    real = torch.ones(2, 1, 130, 1, dtype=torch.bool) if mask is None else mask[:, None, :, None]
    real = real.expand_as(got)
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_small_budget_is_the_formula_over_the_routed_tokens(form: str, device: torch.device) -> None:
    """Queries one by one and all at once: what is attended to is read off the record of routes."""
    import hga_compile

    cap, sinks = FORMS[form]
    given = inputs(batch=2)
    logits = logits_of(given, sinks)
    setting = routing()
    with hga_compile.record_routes() as records:
        got = ops.attention(
            *(part.to(device) for part in (given.query, given.key, given.value)),
            None, given.scale, site(setting), cap, None if logits is None else logits.to(device),
        ).cpu()  # fmt: skip
    groups = torch.cat([torch.nn.functional.pad(r.groups, (0, 33 - r.groups.shape[3])) for r in records], 2)
    tokens = groups.repeat_interleave(setting.group_size, -1)[..., :130]
    times = given.query.shape[1] // given.key.shape[1]
    visible = tokens.repeat_interleave(times, 1) & causal(given)
    assert 0 < visible.float().mean() < 0.4
    torch.testing.assert_close(got.double(), naive(given, cap, logits, visible), atol=2e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_window_is_the_formula(form: str, device: torch.device) -> None:
    cap, sinks = FORMS[form]
    given = inputs(batch=2)
    logits = logits_of(given, sinks)
    number = torch.arange(130)
    visible = causal(given) & (number[None] > number[:, None] - 20)
    on = given.to(device)
    handle = opened(on.key[:, :, :0], on.value[:, :, :0])
    sink = None if logits is None else logits.to(device)
    first, second = slice(0, 100), slice(100, 130)
    parts = [
        ops.window_attention(
            on.query[:, :, part], on.key[:, :, part], on.value[:, :, part], handle, part.stop, None, on.scale,
            20, cap, sink,
        )
        for part in (first, second)
    ]  # fmt: skip
    got = torch.cat(parts, 2).cpu().double()
    torch.testing.assert_close(got, naive(given, cap, logits, visible), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_low_precision_attention(dtype: torch.dtype) -> None:
    given = inputs(batch=2, dtype=dtype)
    logits = logits_of(given, True)
    want = naive(given, CAP, logits, causal(given))
    got = ops.attention(given.query, given.key, given.value, None, given.scale, site(FULL), CAP, logits)
    times = given.query.shape[1] // given.key.shape[1]
    key, value = (part.repeat_interleave(times, 1) for part in (given.key, given.value))
    scores = torch.tanh(given.query @ key.transpose(2, 3) * given.scale / CAP) * CAP
    scores = scores.masked_fill(~causal(given), -torch.inf)
    assert logits is not None
    column = logits.to(dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    eager = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ value
    assert (got.double() - want).abs().max() <= (eager.double() - want).abs().max()


def test_the_ops_are_registered_with_cap_and_sinks(device: torch.device) -> None:
    given = inputs(batch=2).to(device)
    logits = logits_of(given, True)
    whole = (given.query, given.key, given.value)
    opcheck(torch.ops.hga.attention.default, (*whole, None, given.scale, site(FULL), CAP, logits))
    for op, last in ((torch.ops.hga.cached_attention, site(FULL)), (torch.ops.hga.window_attention, 20)):
        handle = opened(given.key[:, :, :0], given.value[:, :, :0])
        opcheck(op.default, (*whole, handle, 130, None, given.scale, last, CAP, logits))


def test_a_tail_estimate_is_refused() -> None:
    given = inputs()
    with pytest.raises(ValueError, match="soft-cap or attention sinks"):
        ops.attention(
            given.query, given.key, given.value, None, given.scale, site(routing(tail="estimate")), CAP, None
        )
