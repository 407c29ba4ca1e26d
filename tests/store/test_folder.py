"""Where files are made, and what processes that die, fork or run side by side leave and see of them."""

import fcntl
import os
import signal
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import pytest
import torch
from store_cases import open_files, place_of, rows_of, run_steps, site_of

from hga_compile.store import LayerStore, NvmePages
from hga_compile.store.errors import StoreBusyError, StoreFolderError, StoreForkedError
from hga_compile.store.folder import open_nameless, sweep
from hga_compile.store.storage_io import StorageIO

IO = StorageIO()


def pages_in(folder: Path) -> NvmePages:
    place = place_of("nvme", nvme_folder=str(folder))
    return NvmePages(2, 64, 64, 4, torch.float32, torch.device("cpu"), "auto", place)


def filled(folder: Path, tokens: int = 200) -> tuple[NvmePages, torch.Tensor]:
    pages = pages_in(folder)
    key = torch.randn(2, tokens, 64)
    pages.write(key, -key, 0)
    return pages, key


def forked(work: Callable[[Callable[[str], None]], None]) -> tuple[int, TextIO]:
    """Run `work` in a process of its own; return its number, and what it says line by line."""
    said, say = os.pipe()
    process = os.fork()
    if process:
        os.close(say)
        return process, os.fdopen(said)
    # Nothing of pytest may run here.
    try:
        work(lambda text: os.write(say, f"{text}\n".encode()))
    except BaseException as error:
        os.write(say, f"{error!r}\n".encode())
    os._exit(0)


def test_a_file_has_no_name_and_nobody_else_may_open_it(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int, int]] = []

    class Watching(StorageIO):
        def unlink(self, name: str, folder: int | None) -> None:
            assert folder is not None
            seen.append((name, os.fstat(folder).st_mode, os.stat(name, dir_fd=folder).st_mode, folder))
            super().unlink(name, folder)

    plain, direct = open_nameless(str(tmp_path), Watching())
    assert [(stat.S_IMODE(folder), stat.S_IMODE(file)) for _, folder, file, _ in seen] == [(0o700, 0o600)]
    assert os.fstat(plain).st_nlink == 0
    assert fcntl.fcntl(plain, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert os.listdir(tmp_path) == []
    for fd in (plain, direct):
        if fd is not None:
            os.close(fd)


def test_closing_gives_room_and_descriptors_back(tmp_path: Path) -> None:
    before = open_files()
    pages, _ = filled(tmp_path)
    assert len(open_files()) > len(before) and pages.held().nvme > 0
    pages.close()
    assert open_files() == before and pages.held().nvme == 0
    pages.close()
    pages, _ = filled(tmp_path)
    del pages
    assert open_files() == before


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    for name in ("link", "link/"):
        with pytest.raises(StoreFolderError, match=r"got a symbolic link \(offload.nvme_folder\)"):
            pages_in(f"{tmp_path}/{name}")


def test_a_folder_that_everybody_may_write_to_is_refused_unless_it_is_sticky(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StoreFolderError, match=r"got mode 777, expected 700 or a sticky folder"):
        pages_in(tmp_path)
    tmp_path.chmod(0o1777)
    pages_in(tmp_path).close()
    tmp_path.chmod(0o700)


def test_no_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreFolderError, match="got none there"):
        pages_in(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(StoreFolderError, match="got no folder"):
        pages_in(tmp_path / "file")


def test_a_swapped_folder_is_refused(tmp_path: Path) -> None:
    """Somebody puts a link in the place of the folder that was just made."""

    class Swapping(StorageIO):
        def make_folder(self, parent: str) -> str:
            path = super().make_folder(parent)
            os.rmdir(path)
            (tmp_path / "elsewhere").mkdir(exist_ok=True)
            os.symlink("elsewhere", path)
            return path

    with pytest.raises(RuntimeError, match="nvme_folder"):
        open_nameless(str(tmp_path), Swapping())
    assert os.listdir(tmp_path / "elsewhere") == []


def test_the_default_is_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "link"))
    place = place_of("nvme")
    pages = NvmePages(1, 64, 64, 4, torch.float32, torch.device("cpu"), "auto", place)
    assert str(tmp_path / "real") in os.readlink(f"/proc/self/fd/{pages._file._file._plain}")
    pages.close()


# --- what is left ---


def orphan(folder: Path, files: tuple[str, ...] = ("pages",), mode: int = 0o700) -> Path:
    path = Path(tempfile.mkdtemp(prefix="hga-", dir=folder))
    for name in files:
        (path / name).touch()
    path.chmod(mode)
    return path


def test_orphans_are_swept_away_and_nothing_else(tmp_path: Path) -> None:
    gone = [orphan(tmp_path), orphan(tmp_path, ())]
    kept = [orphan(tmp_path, ("pages", "notes.txt")), orphan(tmp_path, mode=0o755), tmp_path / "other"]
    kept[2].mkdir()
    (kept[2] / "pages").touch()
    (tmp_path / "hga-link").symlink_to("other")
    (tmp_path / "hga-file").touch()
    locked = orphan(tmp_path)
    fd = os.open(locked, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert sweep(str(tmp_path), IO) == 2
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in (*kept, locked / "pages", tmp_path / "hga-link", kept[2] / "pages"))
    os.close(fd)
    assert sweep(str(tmp_path), IO) == 1 and not locked.exists()


def test_folders_that_others_keep_locking_are_told(tmp_path: Path) -> None:
    class Locked(StorageIO):
        def lock(self, fd: int) -> None:
            raise BlockingIOError

    before = open_files()
    with pytest.raises(StoreBusyError, match=r"no folder could be locked.*nvme_folder"):
        open_nameless(str(tmp_path), Locked())
    assert open_files() == before and os.listdir(tmp_path) == []


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(tmp_path: Path) -> None:
    class Swept(StorageIO):
        def open_folder(self, path: str) -> int:
            fd = super().open_folder(path)
            if not self.done and path.startswith(str(tmp_path)):
                self.done = True
                os.rmdir(path)
            return fd

        done = False

    fds = open_nameless(str(tmp_path), Swept())
    assert fds[0] > 0
    for fd in fds:
        if fd is not None:
            os.close(fd)


# --- processes ---


class Stopping(StorageIO):
    """Says where it is, and waits there for ever."""

    def __init__(self, say: Callable[[str], None], at: str) -> None:
        self.say, self.at = say, at

    def unlink(self, name: str, folder: int | None) -> None:
        self.stop("unlink")
        super().unlink(name, folder)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.stop("write")
        return super().write(fd, buffers, offset)

    def stop(self, where: str) -> None:
        if where == self.at:
            self.say("here")
            signal.pause()


def prefill(folder: Path, say: Callable[[str], None], at: str) -> None:
    store = LayerStore(io=Stopping(say, at))
    # One thread: signals are waited for in the first one only.
    place = place_of("nvme", nvme_folder=str(folder), nvme_threads=1)
    outs = run_steps(store, rows_of(400), [400], site_of("nvme", place=place))
    say(str(float(outs[0].double().sum())))
    store.close()


def test_killed_processes_leave_nothing_to_the_next_one(tmp_path: Path) -> None:
    expected = run_steps(LayerStore(), rows_of(400), [400], site_of("host"))[0]
    stopped = [forked(lambda say, at=at: prefill(tmp_path, say, at)) for at in ("unlink", "write")]
    assert [pipe.readline() for _, pipe in stopped] == ["here\n", "here\n"]
    # One is stopped between making its file and unlinking it: its folder is there, and locked.
    assert len(os.listdir(tmp_path)) == 1
    assert sweep(str(tmp_path), IO) == 0
    # Another process in the same folder, all the while, is not disturbed.
    process, pipe = forked(lambda say: prefill(tmp_path, say, "nowhere"))
    assert pipe.readline() == f"{float(expected.double().sum())}\n"
    os.waitpid(process, 0)
    for process, _ in stopped:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    # The unlinked file went with its process; what was not yet unlinked goes with the next store.
    assert len(os.listdir(tmp_path)) == 1
    pages, key = filled(tmp_path)
    assert os.listdir(tmp_path) == []
    assert torch.equal(pages.read(0, 200)[0], key)


def test_a_forked_process_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    pages, key = filled(tmp_path)

    def go_on(say: Callable[[str], None]) -> None:
        for call in (lambda: pages.write(key[:, :1], key[:, :1], 200), lambda: pages.read(0, 200)):
            try:
                call()
                say("went through")
            except StoreForkedError as error:
                say(str(error))
        pages.close()
        fresh, other = filled(tmp_path)
        say(str(torch.equal(fresh.read(0, 200)[0], other)))

    process, pipe = forked(go_on)
    *lines, fresh = pipe.read().splitlines()
    os.waitpid(process, 0)
    assert len(lines) == 2 and fresh == "True"
    assert all("start with a new cache after a fork" in line for line in lines)
    assert torch.equal(pages.read(0, 200)[0], key)
    pages.write(key[:, :100], key[:, :100], 200)
    assert torch.equal(pages.read(200, 300)[0], key[:, :100])
