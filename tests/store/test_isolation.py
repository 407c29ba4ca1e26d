"""What one request stored is nothing to another: not while both run, not after one is reset or freed."""

import gc

import numpy as np
import pytest
import torch
from store_cases import attend, place_of, rows_of, run_steps, site_of
from torch import Tensor

from hga_compile.kernels.states import STATES
from hga_compile.store import LayerStore
from hga_compile.store.tier import Tier

TIERS = ("gpu", "host", "nvme")
CANARY = 1234.5678
STEPS = [180, 1, 70, 1, 1]


def marked(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Put the canary into every key and value."""
    query, key, value = (part.clone() for part in parts)
    key[..., 0], value[..., ::3] = CANARY, CANARY
    return query, key, value


def memory_of(pages: Tier) -> np.ndarray:
    """Return every byte of RAM that a tier reads from, whether it would or not."""
    if hasattr(pages, "buffer"):
        return pages.buffer.numpy().ravel()
    pool = pages._reader._pool.memory.array
    return np.concatenate([pages._tail.numpy().ravel(), np.ascontiguousarray(pool).view(np.float32).ravel()])


def canaries(memory: np.ndarray) -> int:
    return int((memory == np.float32(CANARY)).sum())


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("tier", TIERS)
def test_two_interleaved_requests_see_nothing_of_each_other(tier: str, kernels: str) -> None:
    mine, others = rows_of(sum(STEPS)), marked(rows_of(sum(STEPS), seed=1))
    site = site_of(tier, kernels)
    alone = run_steps(LayerStore(), mine, STEPS, site)
    store, other = LayerStore(), LayerStore()
    got, end = [], 0
    for step in STEPS:
        end += step
        attend(other, others, end - step, end, site)
        got.append(attend(store, mine, end - step, end, site))
        assert canaries(torch.cat([part.flatten() for part in store.full()]).numpy()) == 0
    assert all(torch.equal(one, two) for one, two in zip(got, alone, strict=True))
    groups = torch.arange(end // 4).expand(4, -1)
    assert canaries(store.pages.fetch(groups).numpy()) == 0
    assert canaries(other.pages.fetch(groups).numpy()) > 0  # it could be found


@pytest.mark.parametrize("how", ["close", "free", "truncate"])
@pytest.mark.parametrize("tier", TIERS)
def test_with_poison_nothing_is_left_of_what_was_given_up(tier: str, how: str) -> None:
    others = marked(rows_of(sum(STEPS), seed=1))
    site = site_of(tier, place=place_of(tier, poison=True))
    store, other = LayerStore(), LayerStore()
    run_steps(store, rows_of(sum(STEPS)), STEPS, site)
    run_steps(other, others, STEPS, site)
    pages = other.pages
    seen = memory_of(pages) if how == "truncate" or tier == "nvme" else pages.buffer.numpy()
    assert canaries(memory_of(pages)) > 0
    if how == "close":
        other.close()
    elif how == "free":
        raw = pages.buffer if hasattr(pages, "buffer") else None
        del pages, other
        gc.collect()
        seen = memory_of(store.pages) if raw is None else raw.numpy()
    else:
        other.truncate(0)
        seen = memory_of(pages)
    if tier == "nvme":
        seen = memory_of(store.pages)
    assert canaries(seen) == 0
    # The one that goes on is as it was.
    more = rows_of(sum(STEPS) + 1)
    want = run_steps(LayerStore(), more, [*STEPS, 1], site_of("host"))[-1]
    run_steps(fresh := LayerStore(), more, STEPS, site)
    assert torch.equal(attend(fresh, more, sum(STEPS), sum(STEPS) + 1, site), want)


@pytest.mark.parametrize("tier", TIERS)
def test_with_poison_results_are_the_same(tier: str) -> None:
    """Whatever is read without having been written would be NaN."""
    parts = rows_of(sum(STEPS))
    poisoned = site_of(tier, place=place_of(tier, poison=True))
    store, want = LayerStore(), run_steps(LayerStore(), parts, STEPS, site_of("gpu"))
    for _ in range(2):
        got = run_steps(store, parts, STEPS, poisoned)
        assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
        store.truncate(0)


@pytest.mark.parametrize("tier", TIERS)
def test_a_request_that_takes_the_place_of_another_reads_its_own(tier: str) -> None:
    """The same layer, shorter than it was: what lay behind is never routed to."""
    mine, others = rows_of(sum(STEPS)), marked(rows_of(400, seed=1))
    site, store = site_of(tier), LayerStore()
    run_steps(store, others, [399, 1], site)
    store.truncate(0)
    got = run_steps(store, mine, STEPS, site)
    want = run_steps(LayerStore(), mine, STEPS, site)
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
    assert canaries(torch.cat([part.flatten() for part in store.full()]).numpy()) == 0


def test_a_handle_that_was_given_up_leads_nowhere() -> None:
    handle = STATES.open()
    run_steps(STATES.get(handle), rows_of(50), [50], site_of("host"))
    STATES.close(handle)
    STATES.collect()
    with pytest.raises(RuntimeError, match="start with a new cache"):
        STATES.get(handle)
    # Its number is not given to the next one.
    assert int(STATES.open()) > int(handle)
