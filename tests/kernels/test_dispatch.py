"""Which kernels run a call: by device, by name, and what happens where they do not cover it."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from cases import inputs, left_padding, opened, routing, run_steps, run_whole, site, store_of

from hga_compile.configs.profile import Offload
from hga_compile.kernels import dispatch, lowbit, native, ops
from hga_compile.kernels.dispatch import KernelError, Need, choose, covers, give_up, preferred, triton_serves
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.lowbit import LowBitSummary
from hga_compile.store.pages import Pages
from hga_compile.store.tiers import moved

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
compiled = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")


@pytest.fixture
def with_triton(monkeypatch):
    """Whatever is installed here: nothing is launched."""
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def need(**changes: Any) -> Need:
    kind: dict[str, Any] = {"device": CUDA, "dtype": torch.bfloat16, "query_dtype": torch.bfloat16}
    kind |= {"channels": 128, "heads": 8, "group_size": 4, "phase": "decode"}
    return Need(**(kind | changes))


def cpu_need(**changes: Any) -> Need:
    return need(**({"device": CPU, "dtype": torch.float32, "query_dtype": torch.float32} | changes))


@pytest.mark.parametrize(
    ("kernels", "device", "way"),
    [
        ("auto", "cuda", "triton"),
        ("auto", "cpu", "native"),
        ("auto", "mps", "reference"),
        ("auto", "meta", "reference"),
        ("triton", "cpu", "triton"),
        ("native", "cuda", "native"),
        ("reference", "cuda", "reference"),
        ("reference", "cpu", "reference"),
    ],
)
def test_auto_goes_by_the_device_and_a_name_by_itself(kernels, device, way):
    assert preferred(kernels, torch.device(device)) == way


def test_a_covered_decode_step_runs_in_triton(with_triton):
    assert choose("auto", need()) == choose("triton", need()) == "triton"
    assert choose("auto", need(padding="left", plain=False, recorded=True)) == "triton"
    assert choose("auto", need(summary="mean", chunks=True, tail=True)) == "triton"
    assert choose("auto", need(phase="prefill", shared=True, paged=False)) == "triton"
    assert choose("auto", need(phase="prefill", shared=True, summary="mean", chunks=True)) == "triton"
    assert choose("auto", need(phase="prefill", shared=True, tail=True)) == "triton"
    assert LEDGER.fallbacks() == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": CPU}, "K/V on cpu (a CUDA device is needed)"),
        ({"dtype": torch.float64}, "K/V of float64 (bfloat16, float16 or float32)"),
        ({"channels": 320}, "head_dim 320 (at most 256)"),
        ({"heads": 65}, "65 query heads a KV head (at most 64)"),
        ({"group_size": 12}, "group_size 12 (a power of two)"),
        (
            {"phase": "prefill"},
            "a prefill of queries with routed sets of their own (routing.prefill_tile)",
        ),
        (
            {"phase": "prefill", "shared": True, "chunks": True, "parts": 256},
            "chunk_parts 256 in a prefill (at most 128)",
        ),
        ({"padding": "gaps"}, "padding with gaps"),
        ({"padding": "left", "sinks": False}, "padding without sinks"),
        ({"paged": False}, "K/V without a cache"),
    ],
)
def test_what_triton_does_not_cover(with_triton, changes, reason):
    wanted = need(**changes)
    assert covers("triton", wanted) == reason
    with pytest.raises(KernelError) as caught:
        choose("triton", wanted)
    assert str(caught.value) == (
        f"Triton kernels do not cover {reason}, got kernels triton, expected auto or reference, which run "
        "such calls in plain torch (compile.kernels)"
    )
    assert LEDGER.fallbacks() == {}
    if wanted.device == CUDA:
        assert [choose("auto", wanted) for _ in range(3)] == ["reference"] * 3
        assert LEDGER.fallbacks() == {f"Triton kernels do not cover {reason}: plain torch": 3}


def test_a_machine_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(
        KernelError, match=r"a machine without Triton \(pip install triton\), got kernels triton"
    ):
        choose("triton", need())
    assert choose("auto", need()) == "reference" and len(LEDGER.fallbacks()) == 1


@compiled
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": CUDA}, "K/V on cuda (a CPU is needed)"),
        ({"dtype": torch.bfloat16}, "bfloat16 (float32 alone)"),
        ({"query_dtype": torch.float16}, "float16 (float32 alone)"),
        ({"summary": "mean"}, "mean summaries"),
        ({"chunks": True}, "the chunk stage"),
        ({"tail": True}, "a tail estimate"),
        ({"padding": "left"}, "padding"),
        ({"plain": False}, "soft-cap or attention sinks"),
        ({"recorded": True}, "recorded routes"),
        ({"paged": False}, "K/V without a cache"),
    ],
)
def test_what_the_native_kernels_do_not_cover(changes, reason):
    wanted = cpu_need(**changes)
    assert covers("native", wanted) == reason
    with pytest.raises(KernelError, match="got kernels native, expected auto or reference"):
        choose("native", wanted)
    if wanted.device == CPU:
        assert choose("auto", wanted) == "reference"
        assert LEDGER.fallbacks() == {f"C++ kernels do not cover {reason}: plain torch": 1}


@compiled
def test_native_kernels_run_decode_and_prefill_on_a_cpu():
    for phase in ("decode", "prefill"):
        assert choose("auto", cpu_need(phase=phase)) == choose("native", cpu_need(phase=phase)) == "native"


def test_a_machine_without_a_compiler_cannot_run_native(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(KernelError, match=r"a machine without a C\+\+ compiler \(set CXX\)"):
        choose("native", cpu_need())


def test_reference_covers_everything_and_is_no_fallback():
    assert choose("reference", need(channels=999, phase="prefill", paged=False)) == "reference"
    assert choose("auto", need(device=torch.device("mps"))) == "reference"
    assert LEDGER.fallbacks() == {}


def test_a_dense_call_asks_for_a_covered_layer_alone(with_triton):
    assert covers("triton", need(phase="dense", summary="mean", tail=True, paged=False)) is None
    assert covers("triton", need(phase="dense", channels=320)) == "head_dim 320 (at most 256)"


def test_giving_up_is_counted_or_refused():
    give_up("auto", "native", "a reason")
    assert LEDGER.fallbacks() == {"C++ kernels do not cover a reason: plain torch": 1}
    with pytest.raises(KernelError, match="a reason, got kernels native"):
        give_up("native", "native", "a reason")


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_neither_store_nor_index_uses_triton_but_where_it_is_wanted(with_triton, kernels):
    assert triton_serves("auto", CUDA, torch.bfloat16, 128) and triton_serves(
        "triton", CUDA, torch.float16, 64
    )
    assert not triton_serves(kernels, CUDA, torch.bfloat16, 128)
    assert not triton_serves("auto", CUDA, torch.bfloat16, 320)
    assert not triton_serves("auto", CPU, torch.float32, 64)


def test_codes_lie_as_the_kernels_that_read_them_want(monkeypatch):
    monkeypatch.setattr(lowbit, "triton_serves", lambda kernels, *given: kernels in ("auto", "triton"))
    centre = torch.zeros(1, 8)
    for kernels, last in (("auto", True), ("triton", True), ("native", False), ("reference", False)):
        assert LowBitSummary(routing(), centre, kernels)._codes.shape == ((1, 0, 2) if last else (1, 2, 0))


def test_pages_keep_their_kernels(monkeypatch):
    pages = Pages(1, 8, 8, 4, torch.float32, CPU, CPU, "reference")
    pages.write(torch.zeros(1, 9, 8), torch.zeros(1, 9, 8), 0)
    assert pages.clone().kernels == moved(pages, "host", 16, 9, Offload()).kernels == "reference"
    pages.use("auto")
    assert pages.kernels == "auto"


@pytest.fixture
def no_kernels(monkeypatch):
    """Every way out of plain torch is an error."""

    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(native, "_library", refuse)
    for name in ("scan_scores", "routed_steps"):
        monkeypatch.setattr(lowbit, name, refuse)


@pytest.mark.parametrize("changes", [{}, {"summary": "mean"}, {"chunk_stage": "on"}, {"tail": "estimate"}])
def test_reference_is_plain_torch_and_gives_what_the_kernels_give(changes, request):
    given, steps = inputs(), (100, *[1] * 10, 20)
    want = run_steps(routing(**changes), given, steps)
    request.getfixturevalue("no_kernels")
    LEDGER.reset()
    got = run_steps(routing(**changes), given, steps, kernels="reference")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    whole = run_whole(routing(**changes), given, kernels="reference")
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)
    assert LEDGER.fallbacks() == {}


@compiled
def test_native_by_name_gives_what_auto_gives_and_counts_nothing():
    given, steps = inputs(), (100, *[1] * 30)
    want = run_steps(routing(), given, steps)
    assert torch.equal(run_steps(routing(), given, steps, kernels="native"), want)
    assert LEDGER.fallbacks() == {}


@compiled
def test_native_by_name_is_refused_where_auto_counts():
    given = inputs(mask=left_padding([130, 20], 130), batch=2)
    run_steps(routing(), given, (100, *[1] * 30))
    assert LEDGER.fallbacks() == {"C++ kernels do not cover padding: plain torch": 31}
    with pytest.raises(KernelError, match="C\\+\\+ kernels do not cover padding, got kernels native"):
        run_steps(routing(), given, (100, *[1] * 30), kernels="native")
    with pytest.raises(KernelError, match="K/V without a cache"):
        run_whole(routing(), inputs(), kernels="native")


@compiled
def test_a_score_that_is_not_finite_leaves_the_kernels():
    given = inputs()
    given.key[0, 0, 50, 3] = torch.inf
    run_steps(routing(), given, (100, *[1] * 30))
    assert "C++ kernels do not cover a score that is not finite: plain torch" in LEDGER.fallbacks()
    with pytest.raises(KernelError, match="a score that is not finite"):
        run_steps(routing(), given, (100, *[1] * 30), kernels="native")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("tokens", [20, 130])
def test_triton_by_name_needs_a_cuda_device_however_short_the_call(monkeypatch, tokens):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match=r"K/V on cpu \(a CUDA device is needed\), got kernels triton"):
        run_whole(routing(), inputs(tokens=tokens), kernels="triton")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_interpreter_serves_triton_on_a_cpu_by_name_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", cpu_need()) == "triton"
    assert preferred("auto", CPU) == "native" and not triton_serves("auto", CPU, torch.float32, 16)


def test_a_store_goes_over_to_the_kernels_of_its_site():
    given = inputs()
    handle = opened(given.key[:, :, :100], given.value[:, :, :100])
    store = store_of(handle)
    assert store.pages is not None and store.pages.kernels == "auto"
    rows = [part[:, :, 100:101] for part in (given.query, given.key, given.value)]
    ops.cached_attention(*rows, handle, 101, None, given.scale, site(routing(), kernels="reference"))
    assert store.pages.kernels == store.index.kernels == "reference"
    first = store.index
    ops.cached_attention(*rows, handle, 101, None, given.scale, site(routing()))
    assert store.index is not first and store.index.kernels == "auto"
    ops.append(*rows[1:], handle, 101, kernels="reference")
    assert store.pages.kernels == "reference" and store.clone().pages.kernels == "reference"
