"""K/V in 8 bits: how far from what they stand for, and what the kernels read."""

import math
from importlib.util import find_spec

import pytest
import torch
from gpu_cases import DTYPES, INTERPRETED, interpret
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels import gpu
from hga_compile.kernels.fp8 import EXTRA, blank, decode_pages, decode_pair, encode_pair
from hga_compile.kernels.hot import HotCache
from hga_compile.kernels.plan import plan_queries


def back(rows: Tensor) -> Tensor:
    """Code and decode rows, as keys and as values, which must not differ."""
    key, value = decode_pair(*encode_pair(rows, rows), rows.dtype)
    assert key.dtype == rows.dtype and torch.equal(key.nan_to_num(0), value.nan_to_num(0))
    return key


def within(rows: Tensor) -> None:
    """The bound that the documents give, and no slack."""
    wide = rows.double()
    bound = torch.maximum(wide.abs() / 16, wide.abs().amax(-1, keepdim=True) / 229376)
    # A type with subnormal numbers of its own rounds to these once more.
    bound += torch.finfo(rows.dtype).smallest_normal * torch.finfo(rows.dtype).eps
    assert bool(((back(rows).double() - wide).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 447.9, 3e4, 1e30])
def test_every_number_is_within_the_bound(dtype, scale):
    if not 1e-7 < scale < 6e4 and dtype == torch.float16:
        return within((torch.randn(50, 64) / 8 * 6e4).to(dtype))
    rows = torch.randn(200, 64) * torch.exp(3 * torch.randn(200, 1)) * scale
    within((rows.clamp(-6e4, 6e4) if dtype == torch.float16 else rows).to(dtype))
    return None


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=9))
def test_any_row(numbers):
    rows = torch.tensor([numbers])
    within(rows)
    assert torch.equal(back(back(rows)), back(rows)), "coding again changes nothing"


def test_the_bound_is_met_by_some_number():
    # Halfway between two codes, in a row whose largest number is just above half of the range.
    rows = torch.tensor([[448.0, 17.0, 1 + 1 / 16], [225.0, 2.0**-10, 3 * 2.0**-10]])
    got = back(rows)
    assert got[0].tolist() == [448.0, 16.0, 1.0]
    assert got[1].tolist() == [224.0, 0.0, 4 * 2.0**-10]
    assert 1 / 16 / (1 + 1 / 16) > 0.058 and (225 / 2.0**-10) / 229376 > 1.0


def test_the_ends_of_each_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        most = torch.finfo(dtype).max
        got = back(torch.tensor([[most, -most, 0.0, -0.0]], dtype=dtype))
        assert bool(got.isfinite().all()) and float(got[0, 0]) >= most * 15 / 16
        assert got[0, 2:].tolist() == [0.0, 0.0] and math.copysign(1, float(got[0, 3])) == -1
    assert not back(torch.zeros(3, 5)).any()


def test_what_is_not_finite_is_nan_and_the_rest_of_its_row_is_not():
    got = back(torch.tensor([[math.nan, 2.0, -1.0], [math.inf, 2.0, -math.inf]]))
    assert got.isnan().tolist() == [[True, False, False], [True, False, True]]
    assert got[0, 1:].tolist() == [2.0, -1.0] and float(got[1, 1]) == 2.0


def test_poison_is_nan():
    assert math.isnan(blank(torch.float16)) and blank(torch.uint8) == 255
    pages = torch.full((3, 4 * (8 + 6 + EXTRA)), 255, dtype=torch.uint8)
    assert bool(decode_pages(pages, 4, 8, torch.float32).isnan().all())


def coded_pages(key: Tensor, value: Tensor, size: int = 4) -> tuple[Tensor, Tensor]:
    """Pages ``[groups, rows, page]`` of coded rows, and of what they stand for."""
    parts = [part.unflatten(1, (-1, size)).transpose(0, 1).flatten(2) for part in encode_pair(key, value)]
    pages = torch.cat(parts, -1).contiguous()
    return pages, decode_pages(pages, size, key.shape[2], key.dtype)


def test_whole_pages_are_decoded():
    key, value = torch.randn(2, 12, 8), torch.randn(2, 12, 6)
    pages, plain = coded_pages(key, value)
    want = [part.unflatten(1, (-1, 4)).transpose(0, 1).flatten(2) for part in (back(key), back(value))]
    assert pages.shape == (3, 2, 4 * 18) and torch.equal(plain, torch.cat(want, -1))


# --- Triton ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (20, 12), (128, 64)])
def test_coded_pages_are_attended_to_as_what_they_stand_for(place, dtype, dim, v_dim):
    """The same bits as with decoded pages, in slots of a hot cache too."""
    from hga_compile.kernels.triton_attend import attend_listed

    rows, tokens, routing = 2, 200, Routing(group_size=4, budget=Budget(tokens=60), dense_below=0)
    spread = torch.exp(4 * torch.randn(rows, tokens, 1))
    key = (torch.randn(rows, tokens, dim) * spread).to(dtype).to(place)
    value = (torch.randn(rows, tokens, v_dim) * spread.flip(1)).to(dtype).to(place)
    value[0, 7, 3] = torch.nan
    pages, plain = coded_pages(key, value)
    spans = gpu.spans_of(routing, plan_queries(routing, tokens - 2, 1, None), None, place)
    begin, end, window, count, last, *_ = spans.table[0].tolist()
    query = torch.randn(rows, 3, dim).to(dtype).to(place)
    named = {
        "group_size": 4, "scale": 0.1, "softcap": 0.0, "rows_of_span": rows,
        "kv_heads": rows,
    }  # fmt: skip
    hot = HotCache(rows, pages.shape[2], 0.6, torch.uint8, place)
    for _ in range(3):
        chosen = torch.zeros(rows, spans.width, dtype=torch.int32)
        for row in range(rows):
            drawn = (torch.randperm(window - end)[:count] + end).sort().values
            chosen[row] = torch.tensor([*range(begin, end), *drawn.tolist(), *range(window, last)])
        chosen = chosen.to(place)
        want = attend_listed(plain, chosen, spans.table, query, None, **named)
        got = attend_listed(pages, chosen, spans.table, query, None, **named)
        entries = hot.place(chosen, spans.table, tokens - 1, 4, rows)  # makes the pool
        near = hot.pool, entries
        cached = attend_listed(pages, chosen, spans.table, query, None, hot=near, **named)
        for other in (got, cached):
            assert torch.equal(other.nan_to_num(9.0), want.nan_to_num(9.0))
    assert hot.misses() > 0
    hot.forget(0, poison=True)
    assert bool((hot.pool == 255).all())


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_small_set_in_the_interpreter():
    interpret(__file__, "coded_pages")
