"""Reads, writes and discards of a swap file, and what goes wrong with them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vswapd_blockdev.checked import CheckedDevice
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, ReadError, WriteError
from vswapd_blockdev.header import DATA_OFFSET
from vswapd_blockdev.swapfile import SwapFile

SIZE = DATA_OFFSET + 6 * EXTENT_BYTES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "swap"


@pytest.fixture
def device(path: Path) -> Iterator[CheckedDevice]:
    checked = CheckedDevice(SwapFile.open(str(path), size=SIZE))
    yield checked
    checked.close()


def test_where_extents_lie(device: CheckedDevice, path: Path) -> None:
    """Extent n lies n + 1 extents from the beginning of the file."""
    device.write(2, BLOCK_BYTES, b"\x07" * BLOCK_BYTES)
    raw = path.read_bytes()
    begin = DATA_OFFSET + 2 * EXTENT_BYTES + BLOCK_BYTES
    assert raw[begin : begin + BLOCK_BYTES] == b"\x07" * BLOCK_BYTES
    assert not any(raw[BLOCK_BYTES:begin])
    assert not any(raw[begin + BLOCK_BYTES :])


def test_discard_gives_space_back(device: CheckedDevice, path: Path) -> None:
    """Discarded extents become holes; the file keeps its length."""
    for extent in range(6):
        device.write(extent, 0, b"\x01" * EXTENT_BYTES)
    before = path.stat()
    device.discard(1, 3)
    after = path.stat()
    assert after.st_size == before.st_size == SIZE
    assert (before.st_blocks - after.st_blocks) * 512 == 3 * EXTENT_BYTES
    assert device.read(2, 0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
    assert device.read(4, 0, BLOCK_BYTES) == b"\x01" * BLOCK_BYTES


def test_discard_can_be_left_out(path: Path) -> None:
    """With `discard=False` the space stays reserved."""
    device = SwapFile.open(str(path), size=SIZE, discard=False)
    before = path.stat().st_blocks
    device.discard(0, 6)
    assert path.stat().st_blocks == before
    assert not device.discards
    device.close()


def test_discard_never_fails(device: CheckedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot punch holes is no error."""
    asked = []

    def cannot(fd: int, offset: int, length: int) -> None:
        asked.append((offset, length))
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    assert isinstance(device.device, SwapFile)
    monkeypatch.setattr(device.device, "_discard", cannot)
    device.write(1, 0, b"\x01" * BLOCK_BYTES)
    device.discard(1, 2)
    assert asked == [(DATA_OFFSET + EXTENT_BYTES, 2 * EXTENT_BYTES)]
    device.write(1, 0, b"\x02" * BLOCK_BYTES)
    assert device.read(1, 0, BLOCK_BYTES) == b"\x02" * BLOCK_BYTES


@pytest.mark.parametrize("left", [0, DATA_OFFSET + 5 * EXTENT_BYTES, SIZE - BLOCK_BYTES, SIZE - 5])
def test_truncated_from_outside(device: CheckedDevice, path: Path, left: int) -> None:
    """Reading what somebody cut off is an error, never zeros; what is left can be read."""
    device.write(5, 0, b"\x01" * EXTENT_BYTES)
    os.truncate(path, left)
    with pytest.raises(ReadError, match="was it truncated"):
        device.read(5, 0, EXTENT_BYTES)
    if left > DATA_OFFSET:
        assert device.read(0, 0, BLOCK_BYTES) == bytes(BLOCK_BYTES)


def test_writing_after_a_truncation(device: CheckedDevice, path: Path) -> None:
    """A write behind the new end makes the file long enough again for its own blocks."""
    os.truncate(path, 0)
    device.write(3, 0, b"\x09" * EXTENT_BYTES)
    assert device.read(3, 0, EXTENT_BYTES) == b"\x09" * EXTENT_BYTES
    with pytest.raises(ReadError):
        device.read(4, 0, BLOCK_BYTES)


def _in_pieces(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Make the system read and write at most `most` bytes per call."""
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: write(fd, data[:most], position))
    monkeypatch.setattr(
        os, "preadv", lambda fd, rooms, position: read(fd, [rooms[0][:most]], position)
    )


@pytest.mark.parametrize("most", [BLOCK_BYTES, 5 * BLOCK_BYTES])
def test_short_reads_and_writes_go_on(
    device: CheckedDevice, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Reads and writes that the system cuts short between blocks are continued."""
    data = os.urandom(EXTENT_BYTES)
    _in_pieces(monkeypatch, most)
    device.write(1, 0, data)
    assert device.read(1, 0, EXTENT_BYTES) == data


@pytest.mark.parametrize("given", [0, 100])
def test_reads_and_writes_that_stop_are_errors(
    device: CheckedDevice, monkeypatch: pytest.MonkeyPatch, given: int
) -> None:
    """Nothing at all, or a part of a block, is an error: it would never end."""
    monkeypatch.setattr(os, "pwrite", lambda *_: given)
    monkeypatch.setattr(os, "preadv", lambda *_: given)
    with pytest.raises(WriteError):
        device.write(0, 0, bytes(EXTENT_BYTES))
    with pytest.raises(ReadError):
        device.read(0, 0, EXTENT_BYTES)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINVAL, errno.EBADF])
def test_errors_of_the_system(
    device: CheckedDevice, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """An error of a system call is a ReadError or WriteError that tells it; the next call works."""

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        patch.setattr(os, "preadv", fail)
        with pytest.raises(WriteError, match=os.strerror(code)):
            device.write(0, 0, bytes(BLOCK_BYTES))
        with pytest.raises(ReadError, match=os.strerror(code)):
            device.read(0, 0, BLOCK_BYTES)
    device.write(0, 0, b"\x03" * BLOCK_BYTES)
    assert device.read(0, 0, BLOCK_BYTES) == b"\x03" * BLOCK_BYTES


def test_unaligned_data_is_copied(device: CheckedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where O_DIRECT refuses a buffer for where it lies, its bytes go through an aligned one."""
    real = os.pwrite
    refused: list[int] = []

    def picky(fd: int, data: memoryview, position: int) -> int:
        if memoryview(data).obj is source:
            refused.append(position)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, data, position)

    if not device.direct:
        pytest.skip("no O_DIRECT here")
    monkeypatch.setattr(os, "pwrite", picky)
    source = os.urandom(2 * BLOCK_BYTES)
    device.write(0, 0, source)
    assert refused == [DATA_OFFSET]
    assert device.read(0, 0, len(source)) == source


def test_closed_descriptor_is_not_used_again(device: CheckedDevice, path: Path) -> None:
    """After `close` a stray call cannot hit another file that got the same descriptor."""
    below = device.device
    device.close()
    with path.with_name("other").open("w+b", buffering=0):
        with pytest.raises(WriteError):
            below.write(0, 0, b"\x01" * BLOCK_BYTES)
        with pytest.raises(ReadError):
            below.read(0, 0, BLOCK_BYTES)
        below.discard(0)
    assert path.with_name("other").read_bytes() == b""
