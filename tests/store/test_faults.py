"""Every call to the file system fails, once and from then on: the right output or a typed error, no leak."""

import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from store_cases import FaultyIO, attend, error_of, open_files, place_of, rows_of, run_steps, short, site_of
from torch import Tensor

from hga_compile.kernels.ledger import LEDGER
from hga_compile.store import LayerStore, StoreError
from hga_compile.store.errors import CorruptPageError, StoreFullError, StoreIOError
from hga_compile.store.storage_io import StorageIO

# A prefill of several blocks, a step that completes one, steps that read, a step back, and on again.
STEPS = [130, 1, 49, 1, 1]
TOKENS = sum(STEPS)
BACK = 100
FAULTS = {
    "ENOSPC": error_of(errno.ENOSPC),
    "EIO": error_of(errno.EIO),
    "EINTR": error_of(errno.EINTR),
    "EINVAL": error_of(errno.EINVAL),
    "short": short,
}
PARTS = rows_of(TOKENS, batch=1)


class Talk:
    """A layer that takes its steps, and can take the one that failed again.

    With `attends` it routes and attends; else it stores, and reads groups, the same ones every time.
    """

    def __init__(self, folder: Path, io: StorageIO, attends: bool = True) -> None:
        self.attends = attends
        # One thread: the n-th call is then the same one in every run.
        place = place_of("nvme", nvme_folder=str(folder), nvme_threads=1, nvme_cache=56_000)
        self.site, self.store = site_of("nvme", place=place), LayerStore("nvme", place, io)
        self.store.expect(4, 0)
        self.outs: list[Tensor] = []
        self.todo = [(sum(STEPS[:n]), sum(STEPS[: n + 1])) for n in range(len(STEPS))]
        self.todo.append((BACK, BACK + 30))

    def go_on(self) -> None:
        while self.todo:
            begin, end = self.todo[0]
            if self.attends:
                self.outs.append(attend(self.store, PARTS, begin, end, self.site))
            else:
                self.store.put(PARTS[1][:, :, begin:end], PARTS[2][:, :, begin:end], end)
                self.outs.append(self.store.pages.fetch(torch.arange(0, end // 4, 3).expand(2, -1)))
            self.todo.pop(0)
        if len(self.outs) == len(STEPS) + 1:
            self.outs.append(self.store.full()[1])

    def close(self) -> None:
        pages = self.store.pages
        if pages is not None:
            pool, number = pages._reader._pool, pages._reader._residents.number
            pages._reader.wait()
            assert pool.pinned == 0
            self.store.close()
            assert number not in pool._residents and number not in pool._owner
        self.store.close()


def faultless(folder: Path, attends: bool) -> tuple[list[Tensor], int]:
    """Return the output without faults, and how many calls it takes."""
    io = FaultyIO(0, error_of(errno.EIO))
    talk = Talk(folder, io, attends)
    talk.go_on()
    assert talk.store.pages.traffic.reads > 10 and talk.store.pages.traffic.prefetched > 0
    talk.close()
    return talk.outs, io.calls


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Tensor], int]:
    """Return what `faultless` finds."""
    torch.set_num_threads(1)
    return faultless(tmp_path_factory.mktemp("right"), True)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_nth_call_fails(fault: str, lasting: bool, tmp_path: Path) -> None:
    # Routing reads by the same calls; of one fault it is shown, for it takes long.
    attends = fault == "EIO" and not lasting
    expected, calls = faultless(tmp_path, attends)
    gc.collect()
    files, errors = open_files(), set()
    for number in range(1, calls + 1):
        io = FaultyIO(number, FAULTS[fault], lasting)
        talk = Talk(tmp_path, io, attends)
        try:
            talk.go_on()
        except StoreError as error:
            errors.add(type(error))
            assert "offload." in str(error) and "\n" not in str(error)
            if isinstance(error, StoreFullError):
                assert error.need > 0 and error.free >= 0 and error.knob.startswith("offload.")
            # What was stored before is still there: with the fault gone the same step goes through.
            io._number = -1
            io._lasting = False
            talk.go_on()
        assert all(torch.equal(one, other) for one, other in zip(talk.outs, expected, strict=True)), number
        talk.close()
        del talk
        assert open_files() == files, number
    # Folders that a failing call left are swept away by the next store.
    talk = Talk(tmp_path, StorageIO(), attends)
    talk.go_on()
    talk.close()
    assert all(torch.equal(one, other) for one, other in zip(talk.outs, expected, strict=True))
    assert os.listdir(tmp_path) == []
    if fault == "short":
        assert errors == set()
    else:
        assert errors == {StoreIOError} | ({StoreFullError} if fault == "ENOSPC" else set())


def test_short_transfers_are_gone_on_with(right: tuple[list[Tensor], int], tmp_path: Path) -> None:
    io = FaultyIO(1, short, lasting=True, only=("read", "write"))
    talk = Talk(tmp_path, io)
    talk.go_on()
    assert io.failed > 100
    assert all(torch.equal(one, other) for one, other in zip(talk.outs, right[0], strict=True))
    talk.close()


def test_a_full_device_says_what_is_needed_and_what_is_free(tmp_path: Path) -> None:
    talk = Talk(tmp_path, FaultyIO(1, error_of(errno.ENOSPC), lasting=True, only=("allocate",)))
    with pytest.raises(
        StoreFullError, match=r"nvme tier is full: got a need for .* bytes.*nvme_folder"
    ) as got:
        talk.go_on()
    assert got.value.need >= 2 * 2 * 2**15 and got.value.free > 0
    assert talk.store.length == 0
    talk.close()


@pytest.mark.parametrize("call", ["read", "write"])
def test_refused_direct_calls_go_through_the_page_cache_and_are_counted(
    call: str, right: tuple[list[Tensor], int], tmp_path: Path
) -> None:
    LEDGER.reset()
    talk = Talk(tmp_path, FaultyIO(1, error_of(errno.EINVAL), only=(call,)))
    talk.go_on()
    assert all(torch.equal(one, other) for one, other in zip(talk.outs, right[0], strict=True))
    assert [text for text in LEDGER.fallbacks() if "O_DIRECT" in text]
    talk.close()


def test_a_file_system_without_o_direct_is_counted(right: tuple[list[Tensor], int], tmp_path: Path) -> None:
    LEDGER.reset()
    talk = Talk(tmp_path, FaultyIO(1, error_of(errno.EINVAL), only=("reopen",)))
    talk.go_on()
    assert all(torch.equal(one, other) for one, other in zip(talk.outs, right[0], strict=True))
    assert [text for text in LEDGER.fallbacks() if "O_DIRECT" in text]
    talk.close()


# --- what a device does without an error ---


def descriptor(talk: Talk) -> tuple[int, int, int]:
    """Return the file, the size of a page, and the number of pages on it."""
    file = talk.store.pages._file
    return file._file._plain, file._file.page_bytes, file.watermark * file.rows


def forget(talk: Talk) -> None:
    """Drop every page from RAM."""
    talk.store.pages._reader.drop(0)


@pytest.fixture
def talk(tmp_path: Path):
    talk = Talk(tmp_path, StorageIO())
    talk.todo = talk.todo[:1]
    talk.go_on()
    forget(talk)
    yield talk
    talk.close()


@pytest.mark.parametrize("at", [0, 20, 33, 50, 51, 64, 20000, 64 + 15 * 2048 - 1])
def test_a_flipped_bit_is_found(talk: Talk, at: int) -> None:
    fd, size, _ = descriptor(talk)
    place = size + at
    byte = os.pread(fd, 1, place)
    os.pwrite(fd, bytes([byte[0] ^ 16]), place)
    with pytest.raises(CorruptPageError, match=r"nvme_folder"):
        talk.store.full()
    forget(talk)
    os.pwrite(fd, byte, place)
    assert torch.equal(talk.store.full()[0], PARTS[1][:, :, : STEPS[0]])


def test_swapped_pages_are_found(talk: Talk) -> None:
    fd, size, pages = descriptor(talk)
    one, other = os.pread(fd, size, 0), os.pread(fd, size, (pages - 1) * size)
    os.pwrite(fd, other, 0)
    os.pwrite(fd, one, (pages - 1) * size)
    with pytest.raises(CorruptPageError, match=r"is not the one that was written: got .*block 1.*block 0"):
        talk.store.full()


def test_a_lost_write_is_found(talk: Talk) -> None:
    """What lay there before belongs to the same page, and its checksum fits."""
    fd, size, pages = descriptor(talk)
    before = os.pread(fd, size * pages, 0)
    talk.store.put(PARTS[1][:, :, 30:125], PARTS[2][:, :, 30:125], 125)
    forget(talk)
    assert torch.equal(talk.store.full()[0], PARTS[1][:, :, :125])
    os.pwrite(fd, before, 0)
    forget(talk)
    with pytest.raises(CorruptPageError, match=r"generation 1.*generation 2"):
        talk.store.full()


def test_another_stores_page_is_found(talk: Talk, tmp_path: Path) -> None:
    other = Talk(tmp_path, StorageIO())
    other.todo = other.todo[:1]
    other.go_on()
    fd, size, pages = descriptor(talk)
    os.pwrite(fd, os.pread(descriptor(other)[0], size * pages, 0), 0)
    with pytest.raises(CorruptPageError, match="store"):
        talk.store.full()
    other.close()


def test_a_truncated_file_is_found(talk: Talk) -> None:
    fd, size, _ = descriptor(talk)
    os.ftruncate(fd, size + 5000)
    with pytest.raises(CorruptPageError, match="cut short"):
        talk.store.full()


def test_a_page_that_was_never_written_is_never_read(talk: Talk) -> None:
    pages = talk.store.pages
    last = torch.full((2, 1), TOKENS // 4)
    with pytest.raises(StoreError, match="groups must have been written, got 45 to 45"):
        pages.fetch(last)
    with pytest.raises(StoreError, match="groups must have been written"):
        pages.fetch(torch.tensor([[-1], [0]]))
    # Nor is one whose tokens were given up.
    talk.store.truncate(40)
    with pytest.raises(StoreError, match=r"groups must have been written, got 10 to 10"):
        pages.fetch(torch.full((2, 1), 10))
    assert torch.equal(talk.store.full()[0], PARTS[1][:, :, :40])


def test_a_damaged_page_that_was_read_ahead_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
    talk = Talk(tmp_path, StorageIO())
    talk.todo = talk.todo[:2]
    talk.go_on()
    fd, size, pages = descriptor(talk)
    whole = os.pread(fd, size * pages, 0)
    os.pwrite(fd, bytes(size * pages), 0)
    forget(talk)
    talk.todo = [(131, 132)]
    with pytest.raises(CorruptPageError):
        talk.go_on()
    os.pwrite(fd, whole, 0)
    talk.go_on()
    fresh = LayerStore()
    want = run_steps(fresh, PARTS, [130, 1, 1], site_of("host"))
    assert torch.equal(talk.outs[-1], want[-1])
    talk.close()
