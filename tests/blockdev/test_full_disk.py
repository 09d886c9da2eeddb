"""Swap files on file systems without room; needs root to make small ones."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from support.blockdevices import MakeDisk
from vswapd_blockdev.checked import CheckedDevice
from vswapd_blockdev.device import EXTENT_BYTES, OpenError, WriteError
from vswapd_blockdev.sealed import SealedDevice
from vswapd_blockdev.swapfile import SwapFile

MIB = 1 << 20
DISK = 24 * MIB
DATA = b"\x2a" * EXTENT_BYTES


def fill(where: Path) -> None:
    """Take what is left of a disk, down to the last block."""
    filler = os.open(where / "filler", os.O_WRONLY | os.O_CREAT)
    for size in (MIB, 4096):
        _write_until_full(filler, os.urandom(size))
    os.fsync(filler)
    os.close(filler)


def _write_until_full(filler: int, data: bytes) -> None:
    try:
        while os.write(filler, data):
            pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_refused_at_swapon(make_disk: MakeDisk, kind: str) -> None:
    """A file that does not fit is refused at once; none stays, and nothing of the room is gone."""
    disk = make_disk(kind, DISK)
    free = os.statvfs(disk).f_bfree
    with pytest.raises(OpenError, match="no room for"):
        SwapFile.open(str(disk / "swap"), size=2 * DISK)
    assert not (disk / "swap").exists()
    assert os.statvfs(disk).f_bfree == free


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_existing_file_that_cannot_grow(make_disk: MakeDisk, kind: str) -> None:
    """An earlier swap file that cannot get the size asked for stays as long as it was."""
    disk = make_disk(kind, DISK)
    path = disk / "swap"
    SwapFile.open(str(path), size=2 * MIB).close()
    fill(disk)
    with pytest.raises(OpenError, match="no room for"):
        SwapFile.open(str(path), size=16 * MIB)
    assert path.stat().st_size == 2 * MIB
    SwapFile.open(str(path)).close()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_space_is_reserved(make_disk: MakeDisk, kind: str) -> None:
    """Every extent can be written even if the disk is full by then: its space was taken before."""
    disk = make_disk(kind, DISK)
    device = CheckedDevice(SealedDevice(SwapFile.open(str(disk / "swap"), size=8 * MIB)))
    fill(disk)
    for extent in range(device.extents):
        device.write(extent, 0, DATA)
    for extent in range(device.extents):
        assert device.read(extent, 0, EXTENT_BYTES) == DATA
    device.close()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_discarded_space_may_be_gone(make_disk: MakeDisk, kind: str) -> None:
    """A discarded extent that the disk has no room for is a WriteError, and hits no other."""
    disk = make_disk(kind, DISK)
    device = CheckedDevice(SwapFile.open(str(disk / "swap"), size=4 * MIB))
    for extent in range(device.extents):
        device.write(extent, 0, DATA)
    device.discard(3, 4)
    fill(disk)
    with pytest.raises(WriteError, match="No space left"):
        device.write(5, 0, DATA)
    device.write(7, 0, DATA[::-1])
    for extent in (*range(3), *range(7, device.extents)):
        assert device.read(extent, 0, EXTENT_BYTES) == DATA
    (disk / "filler").unlink()
    device.write(5, 0, DATA)
    assert device.read(5, 0, EXTENT_BYTES) == DATA
    device.close()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_kept_space_stays(make_disk: MakeDisk, kind: str) -> None:
    """Without discards, an extent that was given up can be written again on a full disk."""
    disk = make_disk(kind, DISK)
    device = CheckedDevice(SwapFile.open(str(disk / "swap"), size=4 * MIB, discard=False))
    device.write(3, 0, DATA)
    device.discard(0, device.extents)
    fill(disk)
    for extent in range(device.extents):
        device.write(extent, 0, DATA)
    device.close()
