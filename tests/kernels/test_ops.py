"""The ops as torch sees them: schema, fakes, running twice, dynamic shapes, and what they refuse."""

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import Inputs, inputs, left_padding, routing, site, store_of
from torch import Tensor
from torch.library import opcheck

from hga_compile.kernels.states import STATES

HGA = torch.ops.hga
TEXT = site(routing())
WINDOW = 20


def opened(given: Inputs, tokens: int) -> Tensor:
    return cases.opened(given.key[:, :, :tokens], given.value[:, :, :tokens])


def rows(given: Inputs, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        given.query[:, :, begin:end],
        given.key[:, :, begin:end],
        given.value[:, :, begin:end],
    )


def calls(given: Inputs) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each op with arguments of a prefill, of a step in the middle, and of one token."""
    size = list(given.key[:, :, :100].shape)
    end = given.tokens
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "attention": (HGA.attention, (given.query, given.key, given.value, given.mask, given.scale, TEXT)),
        "attention, last": (
            HGA.attention,
            (given.query[:, :, -7:], given.key, given.value, given.mask, given.scale, TEXT),
        ),
        "read": (
            HGA.read,
            (opened(given, 100), size, given.value.shape[3], given.key.dtype, given.key.device),
        ),
    }
    for name, begin in (("prefill", 0), ("middle", 100), ("one", end - 1)):
        query, key, value = rows(given, begin, end)
        found[f"append, {name}"] = (HGA.append, (key, value, opened(given, begin), end))
        found[f"cached, {name}"] = (
            HGA.cached_attention,
            (query, key, value, opened(given, begin), end, given.mask, given.scale, TEXT),
        )
        found[f"window, {name}"] = (
            HGA.window_attention,
            (query, key, value, opened(given, begin), end, given.mask, given.scale, WINDOW),
        )
    return found


NAMES = list(calls(inputs(tokens=101)))
CASES: dict[str, Callable[[], Inputs]] = {
    "plain": inputs,
    "padded": lambda: inputs(batch=2, dtype=torch.bfloat16, v_dim=24, mask=left_padding([130, 90], 130)),
}


def as_models_give_them(given: Inputs) -> Inputs:
    """Lay Q, K and V out as ``[batch, tokens, heads, dim]`` in memory."""
    query, key, value = (
        part.transpose(1, 2).contiguous().transpose(1, 2) for part in (given.query, given.key, given.value)
    )
    return Inputs(query, key, value, given.scale, given.mask)


@pytest.mark.parametrize(
    ("name", "case"),
    [*((name, "padded") for name in NAMES), ("attention", "plain"), ("cached, one", "plain")],
)
def test_is_registered_as_it_behaves(name: str, case: str, device: torch.device) -> None:
    op, arguments = calls(as_models_give_them(CASES[case]()).to(device))[name]
    opcheck(op.default, arguments)


@pytest.mark.parametrize("tokens", [0, 40])
def test_open_is_registered_as_it_behaves(tokens: int, device: torch.device) -> None:
    key, value = (part[:, :, :tokens] for part in (inputs().to(device).key, inputs().to(device).value))
    # Every run makes another handle. Handles are names, not quantities: any two of them are as good.
    handle = torch.zeros(1, dtype=torch.int64)
    opcheck(HGA.open.default, (key, value, handle), atol=1e18, rtol=1.0)
    first, second = (cases.opened(key, value) for _ in range(2))
    assert int(first) != int(second) and store_of(first).length == tokens


def snapshot(handle: Tensor) -> tuple[int, list[Tensor]]:
    store = store_of(handle)
    kept = store.full() if store.recent is None else (store.recent.key, store.recent.value)
    return store.length, [part.clone() for part in kept if part is not None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_running_twice_changes_nothing(case: Callable[[], Inputs], name: str, device: torch.device) -> None:
    given = case().to(device)
    op, arguments = calls(given)[name]
    handles = [part for part in arguments if isinstance(part, Tensor) and part.dtype == torch.int64]
    first = op(*arguments)
    before = [snapshot(handle) for handle in handles]
    inputs_before = [part.clone() for part in arguments if isinstance(part, Tensor)]
    second = op(*arguments)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    for (length, kept), handle in zip(before, handles, strict=True):
        assert snapshot(handle)[0] == length
        for old, new in zip(kept, snapshot(handle)[1], strict=True):
            assert torch.equal(old[:, :, -WINDOW + 1 :], new[:, :, -WINDOW + 1 :])
    for old, new in zip(inputs_before, (part for part in arguments if isinstance(part, Tensor)), strict=True):
        assert torch.equal(old, new)


def test_results_do_not_change_with_the_store(device: torch.device) -> None:
    # One row and no more than a page: the rows lie in memory as they are returned.
    given = inputs(tokens=40, kv_heads=1, heads=1).to(device)
    handle = opened(given, 0)
    key, _ = HGA.append(given.key[:, :, :20], given.value[:, :, :20], handle, 20)
    again, _ = HGA.read(handle, [1, 1, 20, 16], 16, torch.float32, device)
    kept = key.clone()
    HGA.append(given.key[:, :, 20:], given.value[:, :, 20:], handle, 20)
    assert torch.equal(key, kept) and torch.equal(again, kept)
    key.fill_(7.0)
    assert torch.equal(store_of(handle).full()[0], given.key[:, :, 20:])


def test_stored_rows_do_not_change_with_the_operands(device: torch.device) -> None:
    for op in (HGA.cached_attention, HGA.window_attention):
        given = inputs().to(device)
        handle = opened(given, 0)
        last = TEXT if op is HGA.cached_attention else WINDOW
        key, value = given.key[:, :, :100].clone(), given.value[:, :, :100].clone()
        op(given.query[:, :, :100], key, value, handle, 100, None, given.scale, last)
        key.fill_(torch.nan)
        value.fill_(torch.nan)
        out = op(*rows(given, 100, 130), handle, 130, None, given.scale, last)
        assert torch.isfinite(out).all()


def step(given: Inputs, handle: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    query, key, value = rows(given, begin, end)
    out = HGA.cached_attention(query, key, value, handle, end, None, given.scale, TEXT)
    return out * 2, HGA.append(key, value, handle, end)[0] * 2


def test_one_graph_serves_every_length() -> None:
    given = inputs()
    compiled = torch.compile(
        lambda query, key, value, handle, end: (
            HGA.cached_attention(query, key, value, handle, end, None, given.scale, TEXT) * 2,
            HGA.append(key, value, handle, end)[0] * 2,
        ),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    eager, traced = opened(given, 0), opened(given, 0)
    for begin, end, stance in ((0, 50, "default"), (50, 80, "default"), (80, 114, "fail_on_recompile")):
        want = step(given, eager, begin, end)
        with torch.compiler.set_stance(stance):
            got = compiled(*rows(given, begin, end), traced, end)
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_a_graph_keeps_ops_whose_results_nobody_reads() -> None:
    given = inputs()

    def two_steps(handle: Tensor) -> Tensor:
        HGA.append(given.key[:, :, :60], given.value[:, :, :60], handle, 60)
        HGA.append(given.key[:, :, 60:], given.value[:, :, 60:], handle, 130)
        return handle + 0

    for backend in ("aot_eager", "aot_eager_decomp_partition"):
        handle = opened(given, 0)
        torch.compile(two_steps, backend=backend, fullgraph=True)(handle)
        assert torch.equal(store_of(handle).full()[0], given.key)
    torch._dynamo.reset()


def test_goes_on_after_inference_mode(device: torch.device) -> None:
    given = inputs().to(device)
    for text in (TEXT, site(routing(tail="estimate", chunk_stage="on"))):
        want = HGA.attention(given.query, given.key, given.value, None, given.scale, text)
        for modes in ([True, False, True, False], [False, True, False, True]):
            handle = opened(given, 0)
            parts = []
            for inside, (begin, end) in zip(modes, ((0, 70), (70, 100), (100, 129), (129, 130)), strict=True):
                with torch.inference_mode(inside), torch.no_grad():
                    query, key, value = (part * 1 for part in rows(given, begin, end))
                    parts.append(
                        HGA.cached_attention(query, key, value, handle, end, None, given.scale, text)
                    )
                    store_of(handle).select_batch(torch.tensor([0]))
            torch.testing.assert_close(
                torch.cat([part.clone() for part in parts], 2), want, rtol=0, atol=1e-5
            )


def test_a_window_goes_on_after_inference_mode() -> None:
    given = inputs()
    handle = opened(given, 0)
    for inside, (begin, end) in ((True, (0, 70)), (False, (70, 71)), (True, (71, 130))):
        with torch.inference_mode(inside):
            HGA.window_attention(*rows(given, begin, end), handle, end, None, given.scale, WINDOW)


def test_there_is_no_backward() -> None:
    given = inputs(tokens=60)
    query = given.query.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"has no backward.*torch\.no_grad"):
        HGA.attention(query, given.key, given.value, None, given.scale, TEXT)
    with torch.no_grad():
        assert not HGA.attention(query, given.key, given.value, None, given.scale, TEXT).requires_grad


def test_a_freed_handle_is_refused() -> None:
    given = inputs()
    handle = opened(given, 100)
    STATES.close(handle)
    opened(given, 0)
    query, key, value = rows(given, 100, 130)
    for call in (
        lambda: HGA.append(key, value, handle, 130),
        lambda: HGA.cached_attention(query, key, value, handle, 130, None, 1.0, TEXT),
        lambda: HGA.window_attention(query, key, value, handle, 130, None, 1.0, WINDOW),
        lambda: HGA.read(handle, [1, 2, 100, 16], 16, torch.float32, torch.device("cpu")),
    ):
        with pytest.raises(RuntimeError, match="is gone"):
            call()


@pytest.mark.parametrize("name", ["append", "cached", "window"])
def test_rows_that_do_not_fit_are_refused_and_change_nothing(name: str) -> None:
    given = inputs(batch=2)
    query, key, value = rows(given, 100, 130)

    def call(query: Tensor, key: Tensor, value: Tensor, length: int) -> object:
        if name == "append":
            return HGA.append(key, value, handle, length)
        if name == "cached":
            return HGA.cached_attention(query, key, value, handle, length, None, given.scale, TEXT)
        return HGA.window_attention(query, key, value, handle, length, None, given.scale, WINDOW)

    wrong = {
        "a gap": (query, key, value, 131),
        "more rows than tokens": (query, key, value, 29),
        "another dtype": (query.double(), key.double(), value.double(), 130),
        "another dtype of the values": (query, key, value.half(), 130),
        "another batch": (query[:1], key[:1], value[:1], 130),
        "other heads": (query, key[:, :1], value[:, :1], 130),
        "other key channels": (query[..., :8], key[..., :8], value, 130),
        "other value channels": (query, key, value[..., :8], 130),
        "more values than keys": (query, key[:, :, :29], value, 129),
        "fewer values than keys": (query, key, value[:, :, :1], 130),
        "values of one sequence": (query, key, value[:1], 130),
    }
    for what, arguments in wrong.items():
        handle = opened(given, 0)
        call(given.query[:, :, :100], given.key[:, :, :100], given.value[:, :, :100], 100)
        kept = snapshot(handle)
        with pytest.raises(RuntimeError, match=r"got|expected"):
            call(*arguments)
            pytest.fail(f"{what} was taken")
        assert snapshot(handle)[0] == kept[0]
        for old, new in zip(kept[1], snapshot(handle)[1], strict=True):
            assert torch.equal(old, new), what
        call(query, key, value, 130)


def test_the_first_rows_must_belong_together() -> None:
    given = inputs()
    for bad in (given.value[:, :1], given.value[:, :, :1], given.value.half()):
        before = STATES.count()
        with pytest.raises(RuntimeError, match="values must match their keys"):
            cases.opened(given.key, bad)
        assert STATES.count() == before
        handle = opened(given, 0)
        with pytest.raises(RuntimeError, match="values must match their keys"):
            HGA.append(given.key, bad, handle, 130)
        # What was refused leaves no trace: rows of any other shape may still be the first.
        other = inputs(batch=2, dim=20, kv_heads=3)
        HGA.append(other.key, other.value, handle, 130)


def test_a_window_needs_its_own_queries_and_a_whole_mask() -> None:
    given = inputs(batch=2, heads=2)
    handle = opened(given, 0)
    query, key, value = rows(given, 0, 40)
    for bad in (query[:, :, :20], query[:, :3], query[:1], given.query[:, :, :80]):
        with pytest.raises(RuntimeError, match="queries must be the new rows' own"):
            HGA.window_attention(bad, key, value, handle, 40, None, 1.0, WINDOW)
    with pytest.raises(ValueError, match="key_mask must cover every key, got 39 columns and 40 tokens"):
        HGA.window_attention(query, key, value, handle, 40, torch.ones(2, 39).bool(), 1.0, WINDOW)
    HGA.window_attention(query, key, value, handle, 40, torch.ones(2, 40).bool(), 1.0, WINDOW)


def test_a_window_cannot_give_back_what_it_has_forgotten() -> None:
    given = inputs()
    handle = opened(given, 100)
    HGA.window_attention(*rows(given, 100, 130), handle, 130, None, given.scale, WINDOW)
    for call in (
        lambda: HGA.append(given.key[:, :, :1], given.value[:, :, :1], handle, 131),
        lambda: HGA.read(handle, [1, 2, 130, 16], 16, torch.float32, torch.device("cpu")),
        lambda: HGA.cached_attention(*rows(given, 0, 1), handle, 131, None, 1.0, TEXT),
    ):
        with pytest.raises(RuntimeError, match="keeps only its window of 20 tokens"):
            call()


def test_reading_checks_what_the_cache_believes() -> None:
    given = inputs()
    handle = opened(given, 100)
    with pytest.raises(
        RuntimeError, match=r"must be \[1, 2, 99, 16\] as the cache counts, got \[1, 2, 100, 16\]"
    ):
        HGA.read(handle, [1, 2, 99, 16], 16, torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="no K/V is stored yet"):
        HGA.read(opened(given, 0), [1, 2, 0, 16], 16, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("grad", [False, True])
def test_two_stores_opened_alike_in_one_graph_are_two(grad: bool) -> None:
    """AOT merges equal calls in graphs with gradients."""
    given = inputs()

    def two(key: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        handles, outs = [], []
        for factor in (1, 2):
            handle = torch.empty(1, dtype=torch.int64)
            HGA.open(key[:, :, :0], value[:, :, :0], handle)
            outs.append(HGA.append(key * factor, value * factor, handle, key.shape[2])[0] @ weight)
            handles.append(handle)
        return (*handles, *outs)

    torch._dynamo.reset()
    weight = torch.randn(given.key.shape[3], 4, requires_grad=grad)
    compiled = torch.compile(two, backend="aot_eager_decomp_partition", fullgraph=True)
    one, other, small, large = compiled(given.key, given.value, weight)
    assert int(one) != int(other)
    assert torch.equal(2 * small, large)
    assert torch.equal(2 * store_of(one).full()[0], store_of(other).full()[0])
