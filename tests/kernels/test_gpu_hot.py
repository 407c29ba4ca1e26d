"""Triton: pages of recently listed groups in slots on the GPU."""

from importlib.util import find_spec

import pytest
import torch
from gpu_cases import INTERPRETED, interpret, pages_of

import hga_compile
from hga_compile.configs.budget import Budget
from hga_compile.configs.profile import Offload
from hga_compile.configs.routing import Routing
from hga_compile.kernels import gpu
from hga_compile.kernels.hot import HotCache
from hga_compile.kernels.plan import plan_queries
from hga_compile.kernels.site import SiteConfig
from hga_compile.store import LayerStore

ROUTING = Routing(group_size=4, budget=Budget(fraction=0.2, tokens=12), dense_below=0)


class Steps:
    """Steps of one layer whose lists are drawn, with and without slots."""

    def __init__(self, place, share, rows=2, tokens=400, dim=16, dtype=torch.float16, home=None):
        self.place, self.rows = place, rows
        self.key, self.value = torch.randn(2, rows, tokens, dim, device=place).to(dtype).unbind()
        self.hot = HotCache(rows, 8 * dim, share, dtype, place)
        self.home = home

    def step(self, length, pool=None):
        """Attend from one query to groups drawn from `pool`; return the list and the slots."""
        from hga_compile.kernels.triton_attend import attend_listed

        pages = pages_of(self.key[:, :length], self.value[:, :length], 4, self.home).buffer
        plan = plan_queries(ROUTING, length - 1, 1, None)
        spans = gpu.spans_of(ROUTING, plan, None, self.place)
        begin, end, window, count, last, *_ = spans.table[0].tolist()
        pool = torch.arange(end, window) if pool is None else pool
        chosen = torch.full((self.rows, spans.width), 10**6, dtype=torch.int32)
        for row in range(self.rows):
            drawn = pool[torch.randperm(len(pool))[:count]].sort().values
            listed = [*range(begin, end), *drawn.tolist(), *range(window, last)]
            chosen[row, : len(listed)] = torch.tensor(listed)
        query = torch.randn(self.rows, 3, self.key.shape[2], device=self.place).to(self.key.dtype)
        chosen = chosen.to(self.place)
        given = {
            "group_size": 4, "scale": 0.3, "softcap": 0.0, "rows_of_span": self.rows,
            "kv_heads": self.rows,
        }  # fmt: skip
        entries = self.hot.place(chosen, spans.table, length, 4, self.rows)
        got = attend_listed(pages, chosen, spans.table, query, None, hot=(self.hot.pool, entries), **given)
        assert torch.equal(got, attend_listed(pages, chosen, spans.table, query, None, **given))
        self.check(pages, length)
        return chosen.cpu(), entries.cpu()

    def check(self, pages, length):
        """Every group that the table has in a slot is there, whole, and alone."""
        table, owners = self.hot.table.cpu(), self.hot.owners.cpu()
        for row in range(self.rows):
            groups = (table[row] >= 0).nonzero()[:, 0]
            slots = table[row, groups].long()
            assert len(set(slots.tolist())) == len(slots)
            assert torch.equal(owners[row, slots].long(), groups)
            assert bool((groups < length // 4).all())
            assert torch.equal(
                self.hot.pool[row, slots.to(self.place)], pages[groups.to(pages.device), row].to(self.place)
            )


def test_the_same_bits_as_without_whatever_is_kept(place):
    steps = Steps(place, 0.5)
    for length in (300, 301, 302, 303, 304, 305, 340, 341, 400):
        steps.step(length)


def test_what_was_listed_is_a_hit_and_what_was_not_is_none(place):
    steps = Steps(place, 1.0)
    pool = torch.arange(3, 25)
    first, entries = steps.step(300, pool)
    assert bool((entries < 0).all()) and steps.hot.misses() == 2 * first.shape[1]
    assert int(steps.hot.counts[:, 0].sum()) == 0
    again, entries = steps.step(300, torch.tensor(sorted(set(first[0].tolist()) & set(pool.tolist()))))
    assert torch.equal(again[0], first[0])
    assert bool((entries[0] >= 0).all())


def test_a_group_that_is_not_full_is_not_kept(place):
    steps = Steps(place, 1.0)
    for _ in range(2):
        _, entries = steps.step(303)
        assert entries[:, -1].tolist() == [-1, -1]
    _, entries = steps.step(304)
    assert bool((entries[:, -1] < -1).all()), "its last token has come"


def test_slots_of_what_is_listed_now_never_give_way(place):
    steps = Steps(place, 0.3)
    for _ in range(12):
        chosen, entries = steps.step(400)
        kept = [
            group for row in range(2) for group in chosen[row].tolist() if steps.hot.table[row, group] >= 0
        ]
        assert len(kept) >= 2 * min(chosen.shape[1], steps.hot.slots)
        assert bool((entries[entries < -1] <= -2).all())


def test_more_groups_than_slots(place):
    steps = Steps(place, 0.02)
    for _ in range(3):
        chosen, entries = steps.step(400)
        assert steps.hot.slots == 2 < chosen.shape[1]
        assert int((entries == -1).sum()) >= 2 * (chosen.shape[1] - 4)


def test_what_was_not_listed_for_long_gives_way_first(place):
    steps = Steps(place, 0.4)
    often, seldom = torch.arange(4, 20), torch.arange(20, 90)
    steps.step(400, often)
    before = steps.hot.misses()
    for _ in range(6):
        steps.step(400, seldom)
        steps.step(400, often)
    # Those that every other step lists stay: each such step misses few.
    _, entries = steps.step(400, often)
    assert int((entries < 0).sum()) <= entries.numel() // 8, (before, steps.hot.misses())


def test_what_is_in_slots_stays_as_there_come_to_be_more(place):
    steps = Steps(place, 0.3)
    pool = torch.arange(3, 14)
    first, _ = steps.step(300, pool)
    slots = steps.hot.slots
    for length in (304, 340, 400):
        before = steps.hot.misses()
        chosen, entries = steps.step(length, pool)
        for row in range(2):
            again = torch.isin(chosen[row], first[row]) & (chosen[row] < 14)
            assert bool((entries[row][again] >= 0).all()) and bool(again.any())
        assert steps.hot.misses() - before < chosen.numel() // 2
    assert steps.hot.slots > slots


def test_forgotten_groups_are_read_again(place):
    steps = Steps(place, 1.0)
    steps.step(400)
    steps.key[:, 200:] += 1
    steps.hot.forget(50)
    assert bool((steps.hot.table[:, 50:] == -1).all()) and bool((steps.hot.table[:, :50] >= 0).any())
    steps.step(400)
    steps.hot.forget(50, poison=True)
    assert bool((steps.hot.table == -1).all()) and bool(torch.isnan(steps.hot.pool).all())
    steps.step(400)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_conversation_has_the_same_bits_with_slots_and_without(dtype):
    device = torch.device("cuda", 0)
    routing = Routing(budget=Budget(fraction=0.1, tokens=64), dense_below=64, centre_tokens=64)
    sites = [
        SiteConfig(0, "host", routing, "triton", Offload(tier="host", hot_cache=share))
        for share in (None, 0.3)
    ]
    stores = [LayerStore(), LayerStore()]
    query, key, value = (torch.randn(1, heads, 900, 64, device=device, dtype=dtype) for heads in (6, 2, 2))
    hga_compile.reset_report()
    begin, checked = 0, 0
    for end in (700, *range(701, 760), 800, *range(801, 830)):
        parts = query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end]
        outs = [
            store.attend(*parts, end, None, 0.125, site) for store, site in zip(stores, sites, strict=True)
        ]
        assert torch.equal(*outs), end
        begin, checked = end, checked + 1
    hot = stores[1].pages.hot
    assert stores[0].pages.hot is None and hot.misses() > 0 and checked > 80
    total = hga_compile.report().totals("decode")
    assert total.misses == hot.misses() and total.hits == int(hot.counts[:, 0].sum()) > 0
    held = stores[1].pages.held()
    assert held.accelerator == hot.nbytes() > 0
    stores[1].truncate(720)
    stores[0].truncate(720)
    outs = [
        store.attend(query[:, :, :1], key[:, :, 800:801], value[:, :, 800:801], 721, None, 0.125, site)
        for store, site in zip(stores, sites, strict=True)
    ]
    assert torch.equal(*outs)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_small_set_in_the_interpreter():
    interpret(__file__, "hit or forgotten or full")
