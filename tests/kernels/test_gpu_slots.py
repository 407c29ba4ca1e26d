"""Triton: attention that finds pages through a table of slots."""

from importlib.util import find_spec

import pytest
import torch
from gpu_cases import DTYPES, INTERPRETED, interpret, large, pages_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hga_compile.configs.budget import Budget
from hga_compile.configs.profile import Offload
from hga_compile.configs.routing import Routing
from hga_compile.kernels import gpu
from hga_compile.kernels.plan import plan_queries
from hga_compile.kernels.site import SiteConfig
from hga_compile.store import LayerStore


def check(
    place: torch.device,
    rows: int = 2,
    heads: int = 3,
    dim: int = 16,
    v_dim: int = 16,
    tokens: int = 500,
    dtype: torch.dtype = torch.float32,
    size: int = 4,
    pads: list[int] | None = None,
    home: str | None = None,
) -> None:
    """A pool that holds the listed groups alone, in any order, gives the same bits as all pages do."""
    from hga_compile.kernels.triton_attend import attend_listed

    routing = Routing(group_size=size, budget=Budget(fraction=0.2, tokens=3 * size + 20), dense_below=0)
    key = torch.randn(rows, tokens, dim, device=place).to(dtype)
    value = torch.randn(rows, tokens, v_dim, device=place).to(dtype)
    query = torch.randn(rows, heads, dim, device=place).to(dtype)
    kept = pages_of(key, value, size, home)
    pages = kept.buffer if kept.gpu_pages is None else kept.gpu_pages
    starts = torch.tensor(pads)[:, None] if pads else None
    mask = None if starts is None else torch.arange(tokens) >= starts
    plan = plan_queries(routing, tokens - 1, 1, mask)
    spans = gpu.spans_of(routing, plan, starts, place)
    lines, span = len(spans.table), spans.table.cpu().repeat_interleave(rows // len(spans.table), 0)
    groups = -(-tokens // size)
    chosen = torch.full((rows, spans.width), 10**6, dtype=torch.int32)
    slots = torch.full((rows, groups + 3), 10**6, dtype=torch.int32)
    pool = torch.full((rows * groups + 9, pages.shape[2]), torch.nan, dtype=dtype)
    free = iter(torch.randperm(len(pool)).tolist())
    for row, (begin, end, window, count, last, *_) in enumerate(span.tolist()):
        picked = (torch.randperm(window - end)[:count] + end).sort().values.tolist()
        listed = [*range(begin, end), *picked, *range(window, last)]
        chosen[row, : len(listed)] = torch.tensor(listed)
        for group in listed:
            slots[row, group] = slot = next(free)
            pool[slot] = pages[group, row]
    given = {
        "group_size": size, "scale": 0.3, "softcap": 0.0, "rows_of_span": rows // lines,
        "kv_heads": rows // lines,
    }  # fmt: skip
    where = torch.device(home) if home else place
    pool = pool.pin_memory() if home and place.type == "cuda" else pool.to(where)
    chosen, slots = chosen.to(place), slots.to(place)
    want = attend_listed(pages, chosen, spans.table, query, None, **given)
    assert torch.equal(attend_listed(pool, chosen, spans.table, query, None, slots=slots, **given), want)
    assert bool(torch.isfinite(want).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "v_dim"), [(1, 64, 64), (4, 80, 80), (8, 128, 64), (3, 20, 12)])
def test_a_pool_gives_the_same_bits(place, dtype, heads, dim, v_dim):
    check(place, heads=heads, dim=dim, v_dim=v_dim, dtype=dtype)


@pytest.mark.parametrize("size", [1, 16])
def test_every_group_size(place, size):
    check(place, size=size)


def test_rows_with_padding(place):
    check(place, rows=6, pads=[0, 137, 451])


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=st.integers(1, 4), heads=st.integers(1, 9), tokens=st.integers(60, 900))
def test_any_shape(place, rows, heads, tokens):
    check(place, rows=rows, heads=heads, tokens=tokens)


@pytest.mark.parametrize(("tail", "pads"), [("drop", [0, 90]), ("estimate", None)])
def test_pages_that_are_fetched_give_the_same_bits(place, tail, pads):
    tokens, outs = 300, {}
    query, key, value = (torch.randn(2, heads, tokens, 32, device=place) for heads in (4, 2, 2))
    mask = (
        None if pads is None else torch.arange(tokens, device=place) >= torch.tensor(pads).to(place)[:, None]
    )
    for tier in ("gpu", "host", "nvme"):
        # A place for four pages in RAM: most are read from the file.
        where = Offload(tier=tier, nvme_cache=2**17)
        routing = Routing(budget=Budget(tokens=40), dense_below=0, centre_tokens=8, chunk_size=16, tail=tail)
        site, store = SiteConfig(0, tier, routing, "triton", where), LayerStore(tier, where)
        store.put(key[:, :, :298], value[:, :, :298], 298, "triton")
        outs[tier] = [
            store.attend(*(part[:, :, at : at + 1] for part in (query, key, value)), at + 1, mask, 0.3, site)
            for at in range(298, tokens)
        ]
    assert store.pages.traffic.reads > 0
    for one, *others in zip(*outs.values(), strict=True):
        assert bool(one.isfinite().all()) and all(torch.equal(one, other) for other in others)


@pytest.mark.gpu
@large
@pytest.mark.parametrize("home", [None, "cpu"])
def test_many_tokens(place, home):
    check(place, rows=8, heads=8, dim=128, v_dim=128, tokens=20_001, dtype=torch.bfloat16, home=home)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_small_set_in_the_interpreter():
    interpret(__file__, "bits or padding or shape or fetched")
