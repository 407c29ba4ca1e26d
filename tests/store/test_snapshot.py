"""Files of tensors: read back as they were written, in their place at once or not at all, damage told."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_cases import FaultyIO, error_of, open_files, short
from torch import Tensor

from hga_compile.store.errors import SnapshotError, StoreError, StoreFullError, StoreIOError
from hga_compile.store.snapshot import DTYPES, Entry, SnapshotReader, SnapshotWriter
from hga_compile.store.storage_io import StorageIO

IO = StorageIO()
FACTS = {"format": 1, "key": {"model": "é"}}


def tensors_of() -> dict[str, Tensor]:
    found = {name: torch.randn(7, 3, 5).mul(100).to(dtype) for name, dtype in DTYPES.items()}
    return found | {"empty": torch.zeros(0, 3)}


def write(path: Path, tensors: dict[str, Tensor], io: StorageIO = IO) -> None:
    entries = {name: Entry(part.dtype, tuple(part.shape)) for name, part in tensors.items()}
    with SnapshotWriter(str(path), entries, FACTS, io) as writer:
        for begin in (0, 4):
            for name, part in tensors.items():
                writer.write(name, part[begin : 4 if begin == 0 else None])


def read(path: Path, io: StorageIO = IO) -> dict[str, Tensor]:
    with SnapshotReader(str(path), io) as reader:
        assert reader.facts == FACTS
        return {name: torch.cat([*reader.pieces(name, 2), reader.whole(name)[:0]]) for name in reader.entries}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        part.dtype == other[name].dtype and torch.equal(part, other[name]) for name, part in one.items()
    )


def test_what_was_written_is_read_and_other_tools_can_read_it(tmp_path: Path) -> None:
    tensors, before = tensors_of(), open_files()
    write(tmp_path / "one", tensors)
    assert same(read(tmp_path / "one"), tensors)
    assert same(load_file(tmp_path / "one"), tensors)
    assert os.listdir(tmp_path) == ["one"] and open_files() == before
    assert os.stat(tmp_path / "one").st_mode & 0o777 == 0o600


def test_a_file_that_is_given_up_leaves_the_old_one(tmp_path: Path) -> None:
    tensors = tensors_of()
    write(tmp_path / "one", tensors)
    with pytest.raises(ZeroDivisionError), SnapshotWriter(str(tmp_path / "one"), {}, {}, IO):
        1 / 0  # noqa: B018 - what raises is not the writer's
    assert same(read(tmp_path / "one"), tensors) and os.listdir(tmp_path) == ["one"]


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EINTR, errno.EINVAL, 0])
def test_the_nth_call_of_writing_fails(number: int, lasting: bool, tmp_path: Path) -> None:
    fault = error_of(number) if number else short
    old, new, before = tensors_of(), tensors_of(), open_files()
    write(tmp_path / "one", old)
    counted = FaultyIO(0, fault)
    write(tmp_path / "two", new, counted)
    failed = set()
    for call in range(1, counted.calls + 1):
        try:
            write(tmp_path / "one", new, FaultyIO(call, fault, lasting))
            assert same(read(tmp_path / "one"), new)
            write(tmp_path / "one", old)
        except StoreError as error:
            failed.add(type(error))
            assert "(path)" in str(error) and "\n" not in str(error)
            assert same(read(tmp_path / "one"), old)
        assert open_files() == before
        # A lasting fault keeps the draft from being unlinked too: it is no saved cache, and has another name.
        left = {name for name in os.listdir(tmp_path) if name not in ("one", "two")}
        assert not left or (lasting and all(name.startswith(".one.") for name in left))
        for name in left:
            (tmp_path / name).unlink()
    wanted = {0: set(), errno.ENOSPC: {StoreFullError}}
    assert failed == wanted.get(number, {StoreIOError})


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR, 0])
def test_the_nth_call_of_reading_fails(number: int, lasting: bool, tmp_path: Path) -> None:
    fault = error_of(number) if number else short
    tensors, before = tensors_of(), open_files()
    write(tmp_path / "one", tensors)
    counted = FaultyIO(0, fault)
    read(tmp_path / "one", counted)
    for call in range(1, counted.calls + 1):
        try:
            assert same(read(tmp_path / "one", FaultyIO(call, fault, lasting)), tensors)
        except StoreError as error:
            assert number and "(path)" in str(error)
        except OSError:
            pytest.fail("an error of the file system must be told as one of the store")
        assert open_files() == before


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    tensors = {"one": torch.randn(3, 4), "two": torch.randn(2, 2)}
    write(tmp_path / "one", tensors)
    raw = bytearray((tmp_path / "one").read_bytes())
    for at in range(len(raw)):
        raw[at] ^= 4
        (tmp_path / "one").write_bytes(raw)
        raw[at] ^= 4
        in_header = at < len(raw) - sum(part.nbytes for part in tensors.values())
        try:
            with SnapshotReader(str(tmp_path / "one"), IO) as reader:
                found = {name: reader.whole(name) for name in reader.entries}
        except SnapshotError:
            continue
        # What may pass are other names and facts, which whoever loads them compares with what they must be.
        assert in_header and all(torch.equal(part, tensors.get(name, part)) for name, part in found.items())


@pytest.mark.parametrize("size", [0, 4, 8, 30, 200, -1])
def test_a_cut_file_is_refused(size: int, tmp_path: Path) -> None:
    write(tmp_path / "one", tensors_of())
    raw = (tmp_path / "one").read_bytes()
    (tmp_path / "one").write_bytes(raw[:size])
    with pytest.raises(SnapshotError, match=r"must be a whole saved cache.*save it anew"):
        read(tmp_path / "one")
    (tmp_path / "one").write_bytes(raw + b"0")
    with pytest.raises(SnapshotError, match="must be a whole saved cache"):
        read(tmp_path / "one")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("__metadata__"),
        lambda header: header["__metadata__"].update(hga="[]"),
        lambda header: header["F32"].update(shape=[-7, 3, -5]),
        lambda header: header["F32"].update(shape=[7.0, 3, 5]),
        lambda header: header["F32"].update(dtype="object"),
        lambda header: header["F32"].update(data_offsets=[0, 420]),
        lambda header: header.update(F32=3),
        lambda header: header["__metadata__"].update(hga=json.dumps({"facts": FACTS, "crc32c": {}})),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(change, tmp_path: Path) -> None:
    write(tmp_path / "one", tensors_of())
    raw = (tmp_path / "one").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (tmp_path / "one").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.raises(SnapshotError):
        read(tmp_path / "one")


def test_no_file_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="must be a saved cache, got No such file"):
        read(tmp_path / "absent")
    (tmp_path / "text").write_text("A long text about something else. " * 50)
    with pytest.raises(SnapshotError, match="must be a whole saved cache"):
        read(tmp_path / "text")
    torch.save({"x": torch.zeros(3)}, tmp_path / "pickle")
    with pytest.raises(SnapshotError):
        read(tmp_path / "pickle")
    with pytest.raises(StoreIOError, match="could not be saved"):
        write(tmp_path / "absent" / "one", tensors_of())
