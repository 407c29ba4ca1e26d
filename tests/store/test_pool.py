"""RAM as the cache of files: what is kept, what is given up, and what two files have of each other."""

import numpy as np
import pytest
import torch

from hga_compile.store.aligned import AlignedPages
from hga_compile.store.errors import StoreFullError
from hga_compile.store.pool import PagePool, shared_pool

PAGE = 2**15


def pool_of(slots: int) -> PagePool:
    return PagePool(PAGE, slots * PAGE, None)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def fill(pool: PagePool, residents, *pages: int) -> None:
    slots = pool.take(len(pages))
    assert len(slots) == len(pages)
    for slot, page in zip(slots, pages, strict=True):
        pool.memory.array[slot] = page % 251
    pool.publish(residents, numbers(*pages), slots)
    pool.unpin(slots)


def there(pool: PagePool, residents, *pages: int) -> list[bool]:
    slots = pool.find(residents, numbers(*pages))
    for slot, page in zip(slots, pages, strict=True):
        assert slot < 0 or (pool.memory.array[slot] == page % 251).all()
    pool.unpin(slots)
    return (slots >= 0).tolist()


def test_what_was_put_in_is_found() -> None:
    pool = pool_of(4)
    mine, other = pool.open(), pool.open()
    fill(pool, mine, 3, 700)
    fill(pool, other, 4)
    assert there(pool, mine, 3, 4, 700, 10_000) == [True, False, True, False]
    assert there(pool, other, 3, 4) == [False, True]
    assert pool.held(mine) == 2 * PAGE and pool.pinned == 0


def test_pages_that_were_used_stay_longer() -> None:
    pool = pool_of(4)
    mine = pool.open()
    fill(pool, mine, 0, 1, 2, 3)
    assert all(there(pool, mine, 0, 2))
    fill(pool, mine, 4, 5)
    assert there(pool, mine, 0, 1, 2, 3) == [True, False, True, False]
    # All others are new: those that were asked for have had their second chance, and go in turn.
    assert all(there(pool, mine, 0, 2, 4, 5))
    fill(pool, mine, 6)
    assert sum(there(pool, mine, 0, 2, 4, 5)) == 3


def test_a_routed_set_that_stays_the_same_is_read_once() -> None:
    pool, reads = pool_of(8), 0
    mine = pool.open()
    for step in range(50):
        for page in (1, 2, 3, 4, 100 + step):
            if not there(pool, mine, page)[0]:
                reads += 1
                fill(pool, mine, page)
    assert reads <= 50 + 4


def test_pinned_slots_are_not_given_up() -> None:
    pool = pool_of(3)
    mine = pool.open()
    fill(pool, mine, 0, 1, 2)
    pinned = pool.find(mine, numbers(0, 1))
    slots = pool.take(3)
    assert len(slots) == 1 and there(pool, mine, 0, 1, 2) == [True, True, False]
    assert len(pool.take(1)) == 0
    pool.unpin(slots)
    pool.unpin(pinned)
    assert len(pool.take(3)) == 3


@pytest.mark.parametrize("poison", [False, True])
def test_dropped_and_closed_pages_are_gone(poison: bool) -> None:
    pool = pool_of(4)
    mine, other = pool.open(), pool.open()
    fill(pool, mine, 1, 5)
    fill(pool, other, 5, 6)
    slots = pool.find(mine, numbers(5))
    pool.unpin(slots)
    pool.drop(mine, 5, poison)
    assert there(pool, mine, 1, 5) == [True, False] and there(pool, other, 5, 6) == [True, True]
    assert bool((pool.memory.array[slots[0]] == 0xFF).all()) == poison
    pool.close(mine, poison)
    assert pool.held(other) == 2 * PAGE
    fill(pool, other, 7, 8)
    assert there(pool, other, 5, 6, 7, 8) == [True] * 4


def test_a_pool_without_room_hands_out_nothing() -> None:
    pool = pool_of(0)
    mine = pool.open()
    assert len(pool.take(2)) == 0 and there(pool, mine, 0, 1) == [False, False]
    pool.close(mine)


def test_a_pool_takes_memory_as_it_needs_it() -> None:
    pool = PagePool(PAGE, 2**40, None)
    assert pool._ready == 0
    pool.unpin(pool.take(1))
    assert pool._ready * PAGE == pool._lease.held == 2**24


def test_ram_that_was_refused_is_not_asked_for_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, asked = PagePool(PAGE, 2**26, None), []

    def resize(count: int) -> None:
        asked.append(count)
        if len(asked) in (2, 3):
            raise StoreFullError("host RAM is full", count, 0, "offload.host_budget")

    monkeypatch.setattr(pool._lease, "resize", resize)
    mine = pool.open()
    for page in range(2000):
        fill(pool, mine, page)
    # 512 slots and no more, until it is tried a third time and goes on.
    assert asked == [2**24, 2**25, 2**25, 2**25, 3 * 2**24]
    monkeypatch.undo()


def test_room_that_the_system_does_not_have_is_refused() -> None:
    with pytest.raises(StoreFullError, match=r"host RAM is full.*offload\.nvme_cache"):
        AlignedPages(2**45, PAGE)


def test_files_with_the_same_settings_share_one() -> None:
    one = shared_pool(PAGE, 2**20, None)
    assert shared_pool(PAGE, 2**20, None) is one
    assert shared_pool(PAGE, 2**21, None) is not one and shared_pool(2 * PAGE, 2**20, None) is not one


def test_random_use_never_mixes_pages_up() -> None:
    random = np.random.default_rng(0)
    pool = pool_of(6)
    files = [pool.open() for _ in range(3)]
    for step in range(600):
        residents = files[random.integers(3)]
        wanted = np.unique(random.integers(0, 20, 4))
        slots = pool.find(residents, wanted)
        missing = wanted[slots < 0]
        taken = pool.take(len(missing))
        pool.memory.array[taken, 0] = missing[: len(taken)]
        pool.memory.array[taken, 1] = residents.number
        pool.publish(residents, missing[: len(taken)], taken)
        slots[np.flatnonzero(slots < 0)[: len(taken)]] = taken
        assert (pool.memory.array[slots[slots >= 0], 0] == wanted[slots >= 0]).all()
        assert (pool.memory.array[slots[slots >= 0], 1] == residents.number).all()
        pool.unpin(slots)
        assert pool.pinned == 0
        if step % 50 == 49:
            pool.drop(residents, 10)
            assert not any(there(pool, residents, *range(10, 20)))


def test_memory_is_viewed_as_what_pages_hold() -> None:
    pool = pool_of(2)
    typed = pool.memory.tensor(torch.bfloat16, 64, (3, 5))
    typed[1] = torch.arange(15).view(3, 5).to(torch.bfloat16)
    assert (
        pool.memory.array[1, 64:94].view(np.uint16).tolist() == typed[1].view(torch.uint16).flatten().tolist()
    )
    assert not pool.memory.array[1, :64].any() and not pool.memory.array[1, 94:].any()
