"""Pinned host RAM: pieces side by side, refusals at any of them, release of all of them."""

import gc
import mmap
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from store_cases import place_of

from hga_compile.store import Pages, host_memory, host_pins, host_range
from hga_compile.store.errors import StoreFullError
from hga_compile.store.host_memory import HostMemory
from hga_compile.store.host_pins import Pins
from hga_compile.store.host_range import HostRange

CPU = torch.device("cpu")
MIB = 2**20


class FakeCuda:
    """A CUDA runtime that keeps an account, and whose n-th call of a kind fails, once or from then on."""

    def __init__(self, fails: int = 0, name: str = "cudaHostRegister", lasting: bool = False) -> None:
        self.pinned: dict[int, int] = {}
        self.calls = 0
        self._fails, self._name, self._lasting = fails, name, lasting

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self._failing("cudaHostRegister"):
            return 2
        assert address % mmap.PAGESIZE == size % mmap.PAGESIZE == 0 < size and flags == 3
        for other, length in self.pinned.items():
            assert address + size <= other or other + length <= address, "pinned twice"
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]  # it must be there
        if self._failing("cudaHostUnregister"):
            raise RuntimeError("CUDA error: unspecified launch failure")
        return 0

    def _failing(self, name: str) -> bool:
        self.calls += name == self._name
        late = self.calls > self._fails if self._lasting else False
        return bool(self._fails) and name == self._name and (self.calls == self._fails or late)

    @property
    def bytes(self) -> int:
        return sum(self.pinned.values())


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostMemory]:
    """Return the process's count, made anew, with 64 MiB of RAM left, and pieces of 64 KiB."""
    gc.collect()
    memory = HostMemory(lambda: 64 * MIB)
    monkeypatch.setattr(host_memory, "HOST", memory)
    monkeypatch.setattr(host_pins, "PIECE", 2**16)
    yield memory
    gc.collect()
    assert memory.taken == 0


def pages_with(cuda: FakeCuda, **place: object) -> Pages:
    """Pages of the host tier whose memory is pinned by a fake."""
    made = Pages(2, 8, 8, 4, torch.float32, CPU, CPU, "auto", place_of("host", **place))
    made._range = HostRange(Pins(CPU, lambda: cuda))
    like = made._like

    def alike(rows: int) -> Pages:
        other = like(rows)
        other._range = HostRange(Pins(CPU, lambda: cuda))
        return other

    made._like = alike  # type: ignore[method-assign]
    return made


def rows(tokens: int) -> torch.Tensor:
    return torch.arange(2.0 * tokens * 8).view(2, tokens, 8)


def test_pieces_lie_side_by_side_at_addresses_that_stay(memory: HostMemory) -> None:
    cuda = FakeCuda()
    made, key = pages_with(cuda), rows(6000)
    made.write(key[:, :100], key[:, :100], 0)
    start, begin = made.buffer.data_ptr(), 100
    for end in (101, 900, 2000, 2001, 6000):
        made.write(key[:, begin:end], -key[:, begin:end], begin)
        begin = end
        assert made.buffer.data_ptr() == start, "kernels may have the address"
        at = start
        for address, size in sorted(cuda.pinned.items()):
            assert address == at and size <= 2**16
            at += size
        assert made.buffer.nbytes <= at - start < made.buffer.nbytes + mmap.PAGESIZE
        assert memory.taken == made.held().host == cuda.bytes
    assert torch.equal(made.read(0, 6000)[0], key) and len(cuda.pinned) > 10
    made.close()
    assert not cuda.pinned and memory.taken == 0


def test_one_copy_never_crosses_from_a_piece_into_the_next(memory: HostMemory) -> None:
    made = pages_with(FakeCuda())
    made.write(rows(6000), rows(6000), 0)
    parts = list(made._range.parts(60_000, 200_000))
    ends = {start + size for start, size in made._range.pins._pieces}
    base = made.buffer.data_ptr()
    assert (parts[0].start, parts[-1].stop) == (60_000, 200_000) and len(parts) >= 3
    assert all(one.stop == other.start and base + one.stop in ends for one, other in pairwise(parts))
    inside = [end - base for end in ends if 60_000 < end - base < 200_000]
    assert len(parts) == len(inside) + 1
    assert list(HostRange().parts(3, 9)) == [slice(3, 9)]
    made.close()


def test_growth_needs_its_own_bytes_only(memory: HostMemory) -> None:
    cuda, row = FakeCuda(), 2 * 16 * 4
    made, key = pages_with(cuda, host_budget=4400 * row), rows(4400)
    made.write(key[:, :3000], key[:, :3000], 0)
    for at in range(3000, 4300):
        made.write(key[:, at : at + 1], key[:, at : at + 1], at)
    assert memory.taken <= 4400 * row
    with pytest.raises(StoreFullError, match=r"budget for K/V is used up.*\(offload\.host_budget\)"):
        made.write(key[:, :200], key[:, :200], 4300)
    assert torch.equal(made.read(0, 4300)[0], key[:, :4300])
    made.close()


def test_what_is_given_up_is_unpinned_by_the_piece(memory: HostMemory) -> None:
    cuda, key = FakeCuda(), rows(4000)
    made = pages_with(cuda)
    made.write(key, key, 0)
    before = cuda.bytes
    made.truncate(1000)
    assert made.buffer.nbytes <= cuda.bytes <= made.buffer.nbytes + 2**16 < before
    assert memory.taken == cuda.bytes == made.held().host
    assert torch.equal(made.read(0, 1000)[0], key[:, :1000])
    made.write(key[:, 1000:], -key[:, 1000:], 1000)
    assert torch.equal(made.read(1000, 4000)[1], -key[:, 1000:]) and memory.taken == cuda.bytes
    made.truncate(0)
    assert not cuda.pinned and memory.taken == 0


def scenario(made: Pages) -> None:
    """Grow, shrink, reorder, copy and grow again, each once more if it fails."""
    key = rows(6000)
    steps = (
        lambda: made.write(key[:, :1500], key[:, :1500], 0),
        lambda: made.write(key[:, 1500:3000], key[:, 1500:3000], 1500),
        lambda: made.truncate(500),
        lambda: made.write(key[:, 500:2500], key[:, 500:2500], 500),
        lambda: made.select_rows(torch.tensor([1, 0])),
        lambda: made.clone().close(),
        lambda: made.write(key[:, 2500:].flip(0), key[:, 2500:].flip(0), 2500),
    )
    for step in steps:
        before = None if made.buffer.numel() == 0 else made.buffer.clone()
        try:
            step()
        except StoreFullError as error:
            assert "host RAM could not be pinned (RAM, not GPU memory, is short; cuda" in str(error)
            assert error.knob == "offload.host_budget" and error.need > 0
            assert before is None or torch.equal(made.buffer, before)
            step()
    got = made.read(0, 6000)
    assert torch.equal(got[0], key.flip(0)) and torch.equal(got[1], key.flip(0))


@pytest.mark.slow
def test_a_refusal_at_any_piece_leaves_what_was_there(memory: HostMemory) -> None:
    failed = 0
    counting = FakeCuda(10**9)
    made = pages_with(counting)
    scenario(made)
    made.close()
    for number in range(1, counting.calls + 1):
        cuda = FakeCuda(number)
        made = pages_with(cuda)
        scenario(made)
        gc.collect()  # copies that failed
        assert memory.taken == made.held().host == cuda.bytes
        made.close()
        assert not cuda.pinned and memory.taken == 0
        failed += cuda.calls > counting.calls
    assert failed == counting.calls > 20, "each refusal was met by another call"


def test_a_refusal_that_lasts_is_an_error_each_time_and_nothing_stays_pinned(memory: HostMemory) -> None:
    cuda, key = FakeCuda(8, lasting=True), rows(6000)
    made = pages_with(cuda)
    made.write(key[:, :1000], key[:, :1000], 0)
    held = cuda.bytes
    for _ in range(3):
        with pytest.raises(StoreFullError, match="RAM, not GPU memory"):
            made.write(key[:, 1000:], key[:, 1000:], 1000)
        assert cuda.bytes == memory.taken == held
    assert torch.equal(made.read(0, 1000)[0], key[:, :1000])
    del made  # as garbage
    gc.collect()
    assert not cuda.pinned and memory.taken == 0


def test_what_cannot_be_unpinned_is_logged_and_counts_no_more(
    memory: HostMemory, caplog: pytest.LogCaptureFixture
) -> None:
    cuda, key = FakeCuda(2, "cudaHostUnregister"), rows(3000)
    made = pages_with(cuda)
    made.write(key, key, 0)
    made.close()
    assert memory.taken == 0
    assert "65536 bytes of host RAM stay pinned: CUDA error: unspecified launch failure" in caplog.text


def test_addresses_that_are_used_up_are_left_for_others(
    memory: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_range, "_SPAN", 2**17)
    for number in (0, 3, 5, 9):
        cuda, key = FakeCuda(number), rows(3000)
        made = pages_with(cuda)
        made.write(key[:, :900], key[:, :900], 0)
        for _ in range(2):
            try:
                made.write(key[:, 900:], key[:, 900:], 900)
                break
            except StoreFullError:
                assert torch.equal(made.read(0, 900)[0], key[:, :900])
                assert cuda.bytes == memory.taken == made.held().host
        assert torch.equal(made.read(0, 3000)[0], key) and cuda.bytes == memory.taken
        made.close()
        assert not cuda.pinned


def test_a_forked_process_leaves_the_pins_to_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, key = FakeCuda(), rows(100)
    made = pages_with(cuda, poison=True)
    made.write(key, key, 0)
    pinned = dict(cuda.pinned)
    monkeypatch.setattr(host_pins.os, "getpid", lambda: -1)
    made.close()
    assert cuda.pinned == pinned


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class TestOnGpu:
    pytestmark = gpu

    def pages(self, monkeypatch: pytest.MonkeyPatch) -> Pages:
        monkeypatch.setattr(host_memory, "HOST", HostMemory(lambda: 2**32))
        device = torch.device("cuda", torch.cuda.current_device())
        return Pages(2, 64, 64, 4, torch.bfloat16, device, CPU, "triton")

    def test_kernels_read_across_the_borders_of_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hga_compile.kernels.gpu import load_rows, store_rows

        made = self.pages(monkeypatch)
        device = made.compute
        key, value = torch.randn(2, 2, 5000, 64, device=device).bfloat16().unbind()
        start = None
        for begin, end in ((0, 700), (700, 701), (701, 5000)):
            made.write(key[:, begin:end], value[:, begin:end], begin)
            start = made.buffer.data_ptr() if start is None else start
            assert made.buffer.data_ptr() == start and made.buffer.is_pinned()
        # 64 KiB are 64 tokens: every second read of 3 crosses a border somewhere.
        for begin in range(60, 4900, 61):
            got = torch.empty(2, 2, 8, 64, device=device, dtype=torch.bfloat16).unbind()
            load_rows(made.buffer, *got, begin, 4)
            assert torch.equal(got[0], key[:, begin : begin + 8])
            assert torch.equal(got[1], value[:, begin : begin + 8])
        # Many at once: the copy engine goes from piece to piece.
        for begin, end in ((0, 5000), (3, 4999), (1000, 1400)):
            got = made.read(begin, end)
            assert torch.equal(got[0], key[:, begin:end]) and torch.equal(got[1], value[:, begin:end])
        store_rows(made.buffer, value[:, 4000:4060], key[:, 4000:4060], 4000, 4)
        torch.cuda.synchronize()
        assert torch.equal(made.read(3999, 4060)[0][:, 1:], value[:, 4000:4060])
        made.close()

    def test_graphs_go_on_as_it_grows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hga_compile.kernels.gpu import load_rows

        made = self.pages(monkeypatch)
        key = torch.randn(2, 5000, 64, device=made.compute).bfloat16()
        made.write(key[:, :100], key[:, :100], 0)
        got = torch.empty(2, 2, 8, 64, device=made.compute, dtype=torch.bfloat16).unbind()
        load_rows(made.buffer, *got, 90, 4)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            load_rows(made.buffer, *got, 90, 4)
        got[0].zero_()
        made.write(key[:, 100:], key[:, 100:], 100)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got[0], key[:, 90:98])
        made.close()

    def test_pins_are_released_and_a_refusal_leaves_no_error_behind(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = self.pages(monkeypatch)
        key = torch.randn(2, 3000, 64, device=made.compute).bfloat16()
        made.write(key, key, 0)
        made.truncate(100)
        address = made.buffer.data_ptr()
        cudart = torch.cuda.cudart()
        assert int(cudart.cudaHostRegister(address, mmap.PAGESIZE, 3)) != 0, "is pinned already"
        # What that left behind must not be found by a launch, as `Pins` sees to for its own.
        made._range.pins._clear_error()  # type: ignore[union-attr]
        torch.ones(3, device=made.compute).sum().item()
        made.write(key, key, 0)
        made.close()
        held = HostRange(Pins(made.compute))
        held.resized(2**20, 0)
        assert held.bytes.is_pinned()
        held.close()
        assert not torch.zeros(1).is_pinned()
