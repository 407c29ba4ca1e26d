"""Three tiers, one interface: the same routed sets give the same bits, whatever K/V lie in."""

import pytest
import torch
from store_cases import attend, place_of, rows_of, run_steps, site_of
from torch import Tensor

from hga_compile.store import LayerStore
from hga_compile.store.tiers import make_tier

TIERS = ("gpu", "host", "nvme")
STEPS = [200, 1, 1, 39, 1, 1, 1, 96, 1, 1]
TOKENS = sum(STEPS)


def outputs(
    tier: str, kernels: str, parts: tuple[Tensor, ...], mask: Tensor | None, **routing
) -> list[Tensor]:
    store = LayerStore()
    outs = run_steps(store, parts, STEPS, site_of(tier, kernels, **routing), mask)
    assert store.pages.traffic.reads > 0 if tier == "nvme" else True
    return outs


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"group_size": 16, "chunk_size": 32},
        {"summary": "mean"},
        {"chunk_stage": "on", "chunk_parts": 2},
        {"tail": "estimate"},
        {"prefill_tile": 16},
        {"prefill": "dense"},
    ],
)
def test_every_tier_gives_the_same_bits(kernels: str, routing: dict[str, object]) -> None:
    parts = rows_of(TOKENS)
    results = [outputs(tier, kernels, parts, None, **routing) for tier in TIERS]
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("gaps", [False, True])
def test_so_it_does_with_padding(kernels: str, gaps: bool) -> None:
    parts = rows_of(TOKENS)
    mask = torch.arange(TOKENS) >= torch.tensor([[0], [77]])
    if gaps:
        mask[0, 30:35] = False
    results = [outputs(tier, kernels, parts, mask) for tier in TIERS]
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_it_does_in_half_precision(dtype: torch.dtype) -> None:
    parts = tuple(part.to(dtype) for part in rows_of(TOKENS))
    results = [outputs(tier, "auto", parts, None) for tier in TIERS]
    for one, *others in zip(*results, strict=True):
        assert one.dtype == dtype and all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_comes_back_as_it_went_in(kernels: str, bad: float) -> None:
    parts = rows_of(TOKENS)
    parts[1][0, 0, 100, 3] = bad
    parts[2][1, 1, 203] = -bad
    results = [outputs(tier, kernels, parts, None) for tier in TIERS]
    for one, *others in zip(*results, strict=True):
        assert not one.isfinite().all() or one.shape[2] == 1
        for other in others:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_everything_else_a_layer_does_is_the_same_in_every_tier() -> None:
    parts, other = rows_of(TOKENS), rows_of(TOKENS, seed=1)
    found: dict[str, list[Tensor]] = {}
    for tier in TIERS:
        site, store = site_of(tier), LayerStore()
        outs = found[tier] = run_steps(store, parts, [230, 1], site)
        store.truncate(190)
        outs.append(attend(store, other, 190, 250, site))
        copied = store.clone()
        assert type(copied.pages) is type(store.pages)
        outs.append(attend(copied, other, 250, 251, site))
        store.select_batch(torch.tensor([1, 1, 0]))
        chosen = tuple(part[[1, 1, 0]] for part in parts)
        outs.append(attend(store, chosen, 250, 251, site))
        outs.extend(store.full())
        store.truncate(0)
        outs.append(attend(store, chosen, 0, 100, site))
    for tier in TIERS[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found["gpu"], found[tier], strict=True))


def test_a_layer_says_where_its_bytes_are() -> None:
    parts = rows_of(1000)
    exact = 2 * 2 * 2 * 1000 * 64 * 4
    store = LayerStore()
    run_steps(store, parts, [1000], site_of("nvme"))
    held = store.nbytes()
    assert held.accelerator == 0 and held.nvme > 0.9 * exact
    # The last block of each row, and as many pages as the profile allows RAM.
    assert held.host <= 4 * 2**15 + place_of("nvme").nvme_cache
    store.close()
    assert store.nbytes().nvme == 0


@pytest.mark.parametrize("kv_dtype", ["model", "fp8"])
@pytest.mark.parametrize("tier", ["gpu", "host", "nvme"])
@pytest.mark.parametrize(("begin", "end"), [(0, 130), (3, 5), (90, 260), (7, 7)])
def test_reading_into_memory_gives_what_reading_gives(tier, kv_dtype, begin, end):
    made = make_tier(
        tier, (3, 8, 6, 4), torch.float32, torch.device("cpu"), "auto", place_of(tier, kv_dtype=kv_dtype)
    )
    made.write(torch.randn(3, 260, 8), torch.randn(3, 260, 6), 0)
    wide = torch.full((3, 300, 8), 7.0), torch.full((3, 300, 6), 7.0)
    into = tuple(part[:, 20 : 20 + end - begin] for part in wide)
    made.read(begin, end, into)
    for part, got, want in zip(wide, into, made.read(begin, end), strict=True):
        assert torch.equal(got, want)
        assert bool((part[:, :20] == 7).all() and (part[:, 20 + end - begin :] == 7).all())
    made.close()
