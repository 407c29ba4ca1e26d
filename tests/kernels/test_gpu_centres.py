"""Codes about centres that move, in Triton: against the reference, on a GPU and in the interpreter."""

import math
from importlib.util import find_spec

import pytest
import torch
from cases import left_padding, routing
from gpu_cases import CUDA, DTYPES, INTERPRETED, attention, converse, interpret, pages_of, token_marks
from torch import Tensor

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels import gpu
from hga_compile.kernels.centres import BlockCentres
from hga_compile.kernels.launch import Score, trying
from hga_compile.kernels.lowbit import _STEP, decode_keys, encode_keys
from hga_compile.kernels.plan import plan_queries
from hga_compile.kernels.rotation import rotation
from hga_compile.kernels.route import merge_votes
from hga_compile.kernels.scoring import Scoring


def centred(keys: Tensor, middle: Tensor) -> tuple[BlockCentres, Tensor]:
    """Centres of all blocks, and the keys rotated less their centre."""
    tokens, dim = keys.shape[1:]
    centres = BlockCentres(middle)
    begin, end = centres.missing(tokens)
    if end > begin:
        centres.append(keys[:, begin:end], None)
    rotated = (keys.float() - middle[:, None]) @ rotation(dim, keys.device)
    return centres, rotated - centres.of_tokens(0, tokens)


def drifting(place: torch.device, rows: int, tokens: int, dim: int) -> Tensor:
    drift = torch.linspace(0, 4, tokens, device=place)[:, None] * torch.randn(rows, 1, dim, device=place)
    return torch.randn(rows, tokens, dim, device=place) + drift


@pytest.mark.parametrize(("begin", "new"), [(0, 1), (127, 1), (128, 1), (300, 1), (120, 30), (250, 50)])
@pytest.mark.parametrize(("bits", "dim"), [(2, 64), (1, 20), (4, 16), (8, 80)])
def test_codes_of_few_keys_are_those_of_the_reference(place, bits, dim, begin, new):
    keys = drifting(place, 2, begin + new, dim)
    keys[0, -1] = 0.0
    centres, rotated = centred(keys, keys[:, :16].mean(1))
    want, want_scales = (part[..., begin:] for part in encode_keys(rotated, bits))
    codes = torch.full((2, 310, want.shape[1]), 7, dtype=torch.uint8, device=place).transpose(1, 2)
    scales = torch.full((2, 310), 7.0, dtype=torch.float16, device=place)
    gpu.encode(
        keys[:, begin:], keys[:, :16].mean(1), codes, scales, begin, bits, _STEP[bits], None, centres.values
    )
    # A value on the border of two levels may be rounded either way.
    assert float((codes[:, :, begin : begin + new] != want).float().mean()) < 0.02
    torch.testing.assert_close(scales[:, begin : begin + new], want_scales, rtol=0.02, atol=1e-3)
    assert bool((codes[:, :, :begin] == 7).all()) and bool((scales[:, begin + new :] == 7).all())


@pytest.mark.parametrize("begin", [0, 11, 64, 128])
@pytest.mark.parametrize(("bits", "dim"), [(1, 64), (2, 20), (2, 128), (4, 80), (8, 64)])
def test_codes_of_many_keys_are_those_of_the_reference(place, bits, dim, begin):
    new = 900 if CUDA else 210
    keys = drifting(place, 2, begin + new, dim).to(DTYPES[-1])
    keys[0, -70, 1] = math.inf
    middle = keys[:, :8].float().mean(1)
    centres, rotated = centred(keys, middle)
    want, want_scales = (part[..., begin:] for part in encode_keys(rotated, bits))
    codes = torch.full((2, begin + new + 9, want.shape[1]), 7, dtype=torch.uint8, device=place).transpose(
        1, 2
    )
    scales = torch.full((2, begin + new + 9), 7.0, dtype=torch.float16, device=place)
    gpu.encode(keys[:, begin:], middle, codes, scales, begin, bits, _STEP[bits], None, centres.values)
    own = slice(begin, begin + new)
    finite = torch.isfinite(want_scales)
    assert torch.equal(torch.isfinite(scales[:, own]), finite) and not bool(finite[0, -70])
    wrong = (codes[:, :, own] != want).float().mean(1)
    assert float(wrong[finite].mean()) < 0.01
    torch.testing.assert_close(scales[:, own][finite], want_scales[finite], rtol=0.02, atol=1e-3)
    assert bool((codes[:, :, begin + new :] == 7).all()) and bool((scales[:, :begin] == 7).all())


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("dim", [20, 64])
def test_the_centre_of_a_block_that_begins_is_that_of_the_reference(place, dim, size):
    keys, middle = drifting(place, 2, 300, dim), torch.randn(2, dim, device=place)
    keys[1, 130, 3] = math.nan
    pages = pages_of(keys, torch.randn(2, 300, dim, device=place), size).buffer
    want, _ = centred(keys, middle)
    got = torch.full((2, 4, dim), 7.0, dtype=torch.bfloat16, device=place)
    turned = middle @ rotation(dim, place)
    for tokens in (1, 128, 129, 130, 257):
        end = torch.tensor([tokens], dtype=torch.int32, device=place)
        gpu.follow_centre(pages, got, turned, end, size)
    # The last of 8 bits may be rounded either way.
    torch.testing.assert_close(got[:, 1:3].float(), want.values[:, 1:3].float(), rtol=2**-7, atol=1e-5)
    assert bool((got[:, [0, 3]] == 7).all())


def check(
    place: torch.device,
    rows: int = 2,
    heads: int = 3,
    dim: int = 16,
    tokens: int = 500,
    dtype: torch.dtype = torch.float32,
    size: int = 4,
    bits: int = 2,
    vote: str = "mass_sum",
    pads: list[int] | None = None,
) -> None:
    """Run a step; it attends, exactly, to the groups with the most votes by codes and centres."""
    setting = Routing(
        group_size=size, bits=bits, vote=vote, budget=Budget(fraction=0.1, tokens=max(24, 3 * size)),
        dense_below=0, centre_tokens=8, centre="block",
    )  # fmt: skip
    key = drifting(place, rows, tokens, dim).to(dtype)
    value = torch.randn(rows, tokens, dim, device=place).to(dtype)
    query = torch.randn(rows, heads, dim, device=place).to(dtype)
    centres, rotated = centred(key, key[:, :8].float().mean(1))
    made, scales = encode_keys(rotated, bits)
    codes = torch.full((rows, tokens + 7, made.shape[1]), 255, dtype=torch.uint8, device=place)
    codes[:, :tokens] = made.transpose(1, 2)
    starts = torch.tensor(pads or [0])[:, None]
    plan = plan_queries(setting, tokens - 1, 1, torch.arange(tokens) >= starts if pads else None)
    lines = len(plan.window)
    spans, scale = gpu.spans_of(setting, plan, starts if pads else None, place), dim**-0.5
    out, groups = gpu.decode_step(
        pages_of(key, value, size).buffer, codes.transpose(1, 2), scales, query, spans, length=tokens,
        routing=setting, scale=scale, kv_heads=rows // lines, centres=centres.values,
    )  # fmt: skip
    marks = token_marks(groups, spans.listed(rows), size, tokens, spans.starts(rows))
    keys = decode_keys(made, scales, bits, dim).double() + centres.of_tokens(0, tokens).double()
    scores = (query.double() * scale) @ rotation(dim, place).double() @ keys.transpose(1, 2)
    known = plan.last_window
    votes = scores[:, :, : known * size].unflatten(-1, (known, size))[:, :, None]
    number = torch.arange(known)
    seen = ((number >= plan.sink_start) & (number < plan.window)).repeat_interleave(rows // lines, 0)
    votes = merge_votes(votes.clone(), seen[:, None].to(place), vote)[:, 0]
    for row in range(rows):
        line = row // (rows // lines)
        first, window = int(plan.sink_end[line]), int(plan.window[line])
        padded = torch.nn.functional.pad(marks[row], (0, -tokens % size))
        chosen = padded.unflatten(0, (-1, size)).any(1)[first:window]
        assert int(chosen.sum()) == int(spans.table[line, 3])
        if 0 < int(chosen.sum()) < window - first:
            best = votes[row, first:window]
            # Which of two groups with nearly equal votes is taken does not matter here.
            assert float(best[chosen].min()) >= float(best[~chosen].max()) * (1 - 2e-3)
    want = attention(query.double(), key.double(), value.double(), marks, scale, Scoring())
    eager = attention(query, key, value, marks, scale, Scoring())
    bound = (eager.double() - want).abs().max() * 1.5 + 4 * torch.finfo(torch.float32).eps * want.abs().max()
    assert (out.double() - want).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 20, 64])
def test_a_step_goes_by_codes_and_centres(place, dtype, dim):
    check(place, dtype=dtype, dim=dim)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("vote", ["mass_sum", "mass_max"])
def test_every_width_of_codes_and_every_vote_with_centres(place, bits, vote):
    check(place, bits=bits, vote=vote)


@pytest.mark.parametrize("tokens", [64, 128, 256, 512])
def test_blocks_of_any_size_know_their_centres(place, tokens):
    with trying(Score(tokens, 1584, 4)):
        check(place, heads=5, tokens=900)


@pytest.mark.parametrize("tokens", [64, 256])
def test_blocks_that_are_summed_together_know_their_centres(place, tokens):
    with trying(Score(tokens, 4, 4)):
        check(place, heads=5, tokens=900)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_every_group_size_with_centres(place, size):
    check(place, size=size, tokens=700)


@pytest.mark.parametrize("heads", [1, 9, 16])
def test_every_number_of_heads_with_centres(place, heads):
    check(place, heads=heads, tokens=385)


def test_rows_with_padding_and_centres(place):
    check(place, rows=6, pads=[0, 137, 451])


@pytest.mark.parametrize(
    "changes",
    [{}, {"group_size": 1}, {"chunk_stage": "on"}, {"chunk_stage": "on", "chunk_size": 48, "chunk_parts": 3}],
    ids=str,
)
@pytest.mark.parametrize("pads", [None, [330, 190]], ids=["whole", "left"])
def test_a_conversation_is_that_of_the_reference(place, monkeypatch, changes, pads):
    mask = None if pads is None else left_padding(pads, 330)
    if "chunk_stage" in changes and pads:
        pytest.skip("chunks that may hold too few groups of a padded row")
    # The prefill of so few tokens is dense.
    setting = routing(centre="block", dense_below=329, centre_tokens=16, **changes)
    setting = setting.model_copy(update={"dense_below": 100, "prefill": "dense"})
    taken = converse(
        place, monkeypatch, setting, tokens=330, batch=1 if pads is None else 2, kv_heads=2, heads=2, dim=16,
        mask=mask,
    )  # fmt: skip
    assert len(taken) == 2 and all(step["centres"] is not None for step in taken)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("names", ["codes_of", "not codes_of and not together"])
def test_in_the_interpreter(names):
    interpret(__file__, names)
