import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.routing import Routing
from hga_compile.kernels.site import SiteConfig
from hga_compile.store import Held, LayerStore

SCALE = 0.3
TOKENS = 90


def site(tier: str = "host", **changes: object) -> SiteConfig:
    setting = {
        "budget": Budget(tokens=24),
        "window": Window(tokens=6),
        "centre_tokens": 8,
        "dense_below": 30,
        "chunk_size": 16,
    }
    return SiteConfig(0, tier, Routing(**(setting | changes)))


def rows(
    tokens: int = TOKENS, batch: int = 2, kv_heads: int = 2, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * 2, tokens, 8, generator=random)
    key = torch.randn(batch, kv_heads, tokens, 8, generator=random)
    value = torch.randn(batch, kv_heads, tokens, 6, generator=random)
    return query.to(device), key.to(device), value.to(device)


def cut(parts: tuple[Tensor, ...], begin: int, end: int) -> tuple[Tensor, ...]:
    return tuple(part[:, :, begin:end] for part in parts)


def attend(store: LayerStore, parts: tuple[Tensor, ...], begin: int, end: int, where: SiteConfig) -> Tensor:
    query, key, value = cut(parts, begin, end)
    return store.attend(query, key, value, end, None, SCALE, where)


def sliding(parts: tuple[Tensor, ...], window: int, mask: Tensor | None = None) -> Tensor:
    """Dense attention under a sliding mask; 0 for queries that see nothing."""
    query, key, value = parts
    number = torch.arange(key.shape[2], device=key.device)
    allowed = (number <= number[:, None]) & (number > number[:, None] - window)
    allowed = allowed[None, None] if mask is None else allowed & mask[:, None, None]
    out = scaled_dot_product_attention(query, key, value, allowed, scale=SCALE, enable_gqa=True)
    return out.masked_fill(~allowed.any(-1)[..., None], 0.0)


# --- put, full, truncate ---


@pytest.mark.parametrize("tier", [None, "gpu", "host", "nvme"])
@pytest.mark.parametrize("steps", [[90], [1] * 90, [64, 1, 25], [63, 2, 25]])
def test_gives_back_what_was_put(steps: list[int], tier: str | None, device: torch.device) -> None:
    _, key, value = rows(device=device)
    store, length = LayerStore(tier), 0
    for step in steps:
        begin, length = length, length + step
        store.put(*cut((key, value), begin, length), length)
        assert store.length == length
    got_key, got_value = store.full()
    assert torch.equal(got_key, key) and torch.equal(got_value, value)
    assert got_key.is_contiguous() and got_value.is_contiguous() and got_key.device == device


def test_rows_put_again_replace_what_was_there_and_all_behind_it() -> None:
    _, key, value = rows()
    store = LayerStore()
    store.put(key, value, TOKENS)
    store.put(-key[:, :, 40:50], -value[:, :, 40:50], 50)
    assert store.length == 50
    assert torch.equal(store.full()[0], torch.cat([key[:, :, :40], -key[:, :, 40:50]], 2))


def test_truncating_forgets_the_end() -> None:
    _, key, value = rows()
    store = LayerStore()
    store.put(key, value, TOKENS)
    for length in (100, 90, 33, 33, 1, 0):
        store.truncate(length)
        assert store.length == min(length, TOKENS)
        assert torch.equal(store.full()[1], value[:, :, :length])
    store.put(key[:, :, :5], value[:, :, :5], 5)
    assert torch.equal(store.full()[0], key[:, :, :5])


def test_says_that_nothing_is_stored() -> None:
    with pytest.raises(RuntimeError, match="no K/V is stored yet"):
        LayerStore().full()


@pytest.mark.parametrize("tail", ["drop", "estimate"])
@pytest.mark.parametrize("length", [0, 9, 20, 45, 80])
def test_going_back_and_on_is_as_if_never_been_further(length: int, tail: str, device: torch.device) -> None:
    where = site(tail=tail, chunk_stage="on")
    first, other = rows(device=device), rows(device=device, seed=1)
    store = LayerStore()
    attend(store, first, 0, 60, where)
    attend(store, first, 60, 90, where)
    store.truncate(length)
    fresh = LayerStore()
    if length:
        attend(fresh, first, 0, length, where)
    for begin, end in ((length, length + 5), (length + 5, length + 6), (length + 6, 90)):
        got, want = attend(store, other, begin, end, where), attend(fresh, other, begin, end, where)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


# --- sites and tiers ---


def test_a_site_finds_what_was_put_before_in_any_page_size_and_tier(device: torch.device) -> None:
    parts = rows(device=device)
    want = attend(LayerStore(), parts, 0, TOKENS, site())[:, :, 60:]
    for before, tier in (
        (None, "host"),
        ("host", "gpu"),
        ("gpu", "host"),
        ("host", "nvme"),
        ("nvme", "host"),
        (None, "nvme"),
    ):
        store = LayerStore(before)
        store.put(*cut(parts[1:], 0, 60), 60)
        got = attend(store, parts, 60, TOKENS, site(tier))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert torch.equal(store.full()[0], parts[1])


def test_another_routing_makes_another_index() -> None:
    parts = rows()
    store = LayerStore()
    attend(store, parts, 0, 60, site())
    for where in (site(group_size=8), site(bits=8), site(summary="mean"), site(budget=Budget(tokens=90))):
        got = attend(store, parts, 60, TOKENS, where)
        fresh = LayerStore()
        fresh.put(*cut(parts[1:], 0, 60), 60)
        torch.testing.assert_close(got, attend(fresh, parts, 60, TOKENS, where), rtol=0, atol=1e-6)


# --- batches ---


@pytest.mark.parametrize("order", [[1, 0], [1, 1], [0, 0, 1, 1, 0], [1]])
@pytest.mark.parametrize("tail", ["drop", "estimate"])
def test_sequences_are_selected_with_all_that_belongs_to_them(
    order: list[int], tail: str, device: torch.device
) -> None:
    where = site(tail=tail, chunk_stage="on")
    parts = rows(device=device)
    chosen = tuple(part[order] for part in parts)
    for at in (20, 70):
        store, fresh = LayerStore(), LayerStore()
        attend(store, parts, 0, at, where)
        store.select_batch(torch.tensor(order, device=device))
        attend(fresh, chosen, 0, at, where)
        assert torch.equal(store.full()[0], chosen[1][:, :, :at])
        for begin, end in ((at, at + 1), (at + 1, TOKENS)):
            got, want = attend(store, chosen, begin, end, where), attend(fresh, chosen, begin, end, where)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_selecting_a_batch_of_nothing_stored_is_fine() -> None:
    store = LayerStore()
    store.select_batch(torch.tensor([1, 0]))
    store.put(*rows()[1:], TOKENS)
    with pytest.raises((IndexError, RuntimeError)):
        store.select_batch(torch.tensor([0, 5]))


# --- copies ---


@pytest.mark.parametrize("tail", ["drop", "estimate"])
@pytest.mark.parametrize("at", [5, 20, 60])
def test_a_clone_goes_on_as_the_original_would(at: int, tail: str, device: torch.device) -> None:
    where = site(tail=tail, chunk_stage="on")
    parts, other = rows(device=device), rows(device=device, seed=1)
    store, want = LayerStore(), LayerStore()
    for each in (store, want):
        attend(each, parts, 0, at, where)
    clone, ahead = store.clone(), store.clone()
    assert (clone.length, clone.nbytes()[0], clone.nbytes()[2]) == (at, store.nbytes()[0], store.nbytes()[2])
    # One copy runs ahead on other tokens: nobody else must notice.
    attend(ahead, other, at, TOKENS, where)
    for begin, end in ((at, at + 1), (at + 1, TOKENS)):
        expected = attend(want, parts, begin, end, where)
        for each in (clone, store):
            torch.testing.assert_close(attend(each, parts, begin, end, where), expected, rtol=0, atol=1e-6)


def test_two_stores_never_meet(device: torch.device) -> None:
    first, second = rows(device=device), rows(device=device, seed=1)
    # Tiles of queries that share what they are routed to begin where a step does.
    where = site(prefill_tile=1)
    want = [attend(LayerStore(), parts, 0, TOKENS, where) for parts in (first, second)]
    one, two = LayerStore(), LayerStore()
    got: list[list[Tensor]] = [[], []]
    for begin, end in ((0, 50), (50, 70), (70, 71), (71, 90)):
        got[0].append(attend(one, first, begin, end, where))
        got[1].append(attend(two, second, begin, end, where))
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(torch.cat(mine, 2), expected, rtol=0, atol=1e-6)


# --- memory ---


def test_accounts_for_its_memory(device: torch.device) -> None:
    store = LayerStore()
    assert store.nbytes() == Held()
    parts = rows(device=device)
    attend(store, parts, 0, 20, site())
    accelerator, index, host, _ = store.nbytes()
    assert accelerator == 0 and index == 0
    assert host >= 2 * 2 * 20 * (8 + 6) * 4
    attend(store, parts, 20, TOKENS, site())
    accelerator, index, host, _ = store.nbytes()
    assert accelerator == 0 and index > 0
    assert host == store.pages.held().host >= 2 * 2 * TOKENS * (8 + 6) * 4
    assert index == store.index.nbytes()
    if device.type == "cuda":
        attend(store, parts, 80, TOKENS, site("gpu"))
        assert store.nbytes()[0] > 0 and store.nbytes()[2] == 0


def test_memory_is_near_what_the_tokens_take() -> None:
    store = LayerStore()
    attend(store, rows(4000, batch=1), 0, 4000, site())
    exact = 2 * 4000 * (8 + 6) * 4
    assert exact <= store.nbytes()[2] <= 1.3 * exact
    # 2 bits a channel, and a scale of 2 bytes a token.
    assert store.nbytes()[1] <= 1.3 * 2 * 4000 * (2 + 2) + 1000


# --- sliding windows ---


@pytest.mark.parametrize("window", [1, 2, 7, 20, 200])
@pytest.mark.parametrize("steps", [[90], [1] * 90, [30, 1, 1, 58], [5, 40, 45], [19, 1, 2, 3, 65]])
@pytest.mark.parametrize("padded", [False, True])
def test_a_window_is_dense_attention_under_a_sliding_mask(
    window: int, steps: list[int], padded: bool, device: torch.device
) -> None:
    parts = rows(device=device)
    mask = None
    if padded:
        mask = torch.arange(TOKENS, device=device) >= torch.tensor([[0], [37]], device=device)
    store, length, got = LayerStore(), 0, []
    for step in steps:
        begin, length = length, length + step
        now = None if mask is None else mask[:, :length]
        got.append(store.attend_window(*cut(parts, begin, length), length, now, SCALE, window))
        assert store.length == length
    torch.testing.assert_close(torch.cat(got, 2), sliding(parts, window, mask), rtol=0, atol=1e-5)


def test_a_window_keeps_what_it_needs_and_no_more() -> None:
    parts, store = rows(), LayerStore()
    size = 2 * 2 * (8 + 6) * 4
    store.attend_window(*cut(parts, 0, 60), 60, None, SCALE, 20)
    assert store.nbytes() == Held(accelerator=(19 + 16) * size)
    for end in range(61, 91):
        store.attend_window(*cut(parts, end - 1, end), end, None, SCALE, 20)
        assert store.nbytes() == Held(accelerator=20 * size)
    assert torch.equal(store.recent.key, parts[1][:, :, 70:])
    # It is memory of its own: neither a view of the operands nor of a longer run.
    assert store.recent.key.untyped_storage().nbytes() == 2 * 2 * 20 * 8 * 4


def test_a_short_sequence_is_kept_whole() -> None:
    parts, store = rows(), LayerStore()
    store.attend_window(*cut(parts, 0, 10), 10, None, SCALE, 20)
    assert torch.equal(store.recent.key, parts[1][:, :, :10])


@pytest.mark.parametrize("before", [0, 5, 19, 20, 60])
def test_rows_stored_as_a_whole_become_a_window(before: int, device: torch.device) -> None:
    parts = rows(device=device)
    want = sliding(parts, 20)
    store = LayerStore("host")
    if before:
        store.put(*cut(parts[1:], 0, before), before)
    for begin, end in ((before, before + 1), (before + 1, TOKENS)):
        got = store.attend_window(*cut(parts, begin, end), end, None, SCALE, 20)
        torch.testing.assert_close(got, want[:, :, begin:end], rtol=0, atol=1e-5)
    assert store.pages is None


@pytest.mark.parametrize("step", [1, 3, 16])
def test_a_window_can_take_its_last_step_back(step: int) -> None:
    parts, other = rows(), rows(seed=1)
    store = LayerStore()
    store.attend_window(*cut(parts, 0, 60), 60, None, SCALE, 20)
    store.attend_window(*cut(other, 60, 60 + step), 60 + step, None, SCALE, 20)
    store.truncate(60)
    assert store.length == 60
    got = store.attend_window(*cut(parts, 60, TOKENS), TOKENS, None, SCALE, 20)
    torch.testing.assert_close(got, sliding(parts, 20)[:, :, 60:], rtol=0, atol=1e-5)


def test_a_window_refuses_to_go_back_further_than_it_remembers() -> None:
    parts, store = rows(), LayerStore()
    store.attend_window(*cut(parts, 0, 60), 60, None, SCALE, 20)
    store.truncate(44)  # the last 16 of a prefill are remembered
    with pytest.raises(RuntimeError, match="window of 20 cannot go back from 44 to 43"):
        store.truncate(43)
    assert store.length == 44
    got = store.attend_window(*cut(parts, 44, TOKENS), TOKENS, None, SCALE, 20)
    torch.testing.assert_close(got, sliding(parts, 20)[:, :, 44:], rtol=0, atol=1e-5)
    store.truncate(0)
    assert store.length == 0
    got = store.attend_window(*cut(parts, 0, TOKENS), TOKENS, None, SCALE, 20)
    torch.testing.assert_close(got, sliding(parts, 20), rtol=0, atol=1e-5)


def test_a_short_window_layer_can_go_back_anywhere() -> None:
    parts, store = rows(), LayerStore()
    store.attend_window(*cut(parts, 0, 18), 18, None, SCALE, 20)
    store.truncate(3)
    got = store.attend_window(*cut(parts, 3, TOKENS), TOKENS, None, SCALE, 20)
    torch.testing.assert_close(got, sliding(parts, 20)[:, :, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [[1, 0], [0, 0, 1]])
def test_a_window_selects_sequences_and_is_copied(order: list[int]) -> None:
    parts, store = rows(), LayerStore()
    store.attend_window(*cut(parts, 0, 60), 60, None, SCALE, 20)
    clone = store.clone()
    store.select_batch(torch.tensor(order))
    chosen = tuple(part[order] for part in parts)
    got = store.attend_window(*cut(chosen, 60, TOKENS), TOKENS, None, SCALE, 20)
    torch.testing.assert_close(got, sliding(chosen, 20)[:, :, 60:], rtol=0, atol=1e-5)
    got = clone.attend_window(*cut(parts, 60, TOKENS), TOKENS, None, SCALE, 20)
    torch.testing.assert_close(got, sliding(parts, 20)[:, :, 60:], rtol=0, atol=1e-5)
