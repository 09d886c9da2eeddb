"""Real block devices as swap devices; needs root to make them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support.blockdevices import EXTENTS, SIZE, as_root
from vswapd_blockdev.checked import CheckedDevice
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, LockedError, OpenError
from vswapd_blockdev.header import DATA_OFFSET, parse_header
from vswapd_blockdev.swapfile import SwapFile


def _put(device: str, place: int, data: bytes) -> None:
    with open(device, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, place)
        os.fsync(file.fileno())


def _all(device: str) -> bytes:
    with open(device, "rb", buffering=0) as file:
        return os.pread(file.fileno(), SIZE, 0)


def test_takes_its_size(loop_device: str) -> None:
    """Without a size a block device is used to its end, with a header; with one, up to there."""
    device = SwapFile.open(loop_device)
    assert device.extents == EXTENTS
    device.close()
    assert parse_header(_all(loop_device)[:BLOCK_BYTES]).extents == EXTENTS
    device = SwapFile.open(loop_device, size=SIZE - EXTENT_BYTES)
    assert device.extents == EXTENTS - 1
    device.close()
    with pytest.raises(OpenError, match=f"has {SIZE} bytes, less than"):
        SwapFile.open(loop_device, size=SIZE + 1)


def test_links_are_how_block_devices_are_named(loop_device: str, tmp_path: Path) -> None:
    """A link to a block device, like those in /dev/disk, is followed, and is its path."""
    link = tmp_path / "by-id"
    link.symlink_to(loop_device)
    device = SwapFile.open(str(link))
    assert device.path == str(link)
    with pytest.raises(OpenError, match="in use"):
        SwapFile.open(loop_device)
    device.close()


def test_one_that_a_dying_process_still_has_is_locked(loop_device: str) -> None:
    """Whoever opens it again may wait for that, as with a file: its pages are not lost."""
    device = SwapFile.open(loop_device, boot_id=b"x" * 16)
    with pytest.raises(LockedError, match="is in use"):
        SwapFile.reopen(loop_device, extents=EXTENTS, boot_id=b"x" * 16, encrypted=False)
    device.close()
    SwapFile.reopen(loop_device, extents=EXTENTS, boot_id=b"x" * 16, encrypted=False).close()


@pytest.mark.parametrize("place", [510, 65600, (1 << 20) - 1, SIZE - 4096])
def test_never_overwrites_data(loop_device: str, place: int) -> None:
    """A mark where partition tables, file systems and RAID have theirs: refused, not changed."""
    _put(loop_device, place // 512 * 512, bytes(place % 512) + b"\x55" + bytes(511 - place % 512))
    before = _all(loop_device)
    with pytest.raises(OpenError, match="blkdiscard --zeroout"):
        SwapFile.open(loop_device)
    assert _all(loop_device) == before


def test_somebody_used_it_since(loop_device: str) -> None:
    """A mark behind an old header of ours means that the device is somebody else's now."""
    SwapFile.open(loop_device).close()
    _put(loop_device, 4096, b"\xfc\x4e\x2b\xa9" * 128)
    with pytest.raises(OpenError, match="not ours"):
        SwapFile.open(loop_device)


def test_erased_as_the_error_says(loop_device: str) -> None:
    """What the refusal tells to do makes the device usable."""
    _put(loop_device, 0, b"x" * 512)
    with pytest.raises(OpenError, match="blkdiscard --zeroout"):
        SwapFile.open(loop_device)
    as_root("blkdiscard", "--zeroout", loop_device)
    SwapFile.open(loop_device).close()


def test_mounted(loop_device: str, tmp_path: Path) -> None:
    """A mounted device is refused as in use."""
    as_root("mkfs.ext4", "-q", loop_device)
    where = tmp_path / "mounted"
    where.mkdir()
    as_root("mount", loop_device, str(where))
    try:
        with pytest.raises(OpenError, match="is in use: mounted"):
            SwapFile.open(loop_device)
    finally:
        subprocess.run(["umount", str(where)], check=True)
    with pytest.raises(OpenError, match="not ours"):
        SwapFile.open(loop_device)


def test_discard(loop_device: str, tmp_path: Path) -> None:
    """Discarded extents go back to whatever lies below; the others stay."""
    device = CheckedDevice(SwapFile.open(loop_device))
    for extent in range(EXTENTS):
        device.write(extent, 0, b"\x01" * EXTENT_BYTES)
    device.discard(1, 2)
    raw = _all(loop_device)
    for extent in (0, 3, 4, 5):
        begin = DATA_OFFSET + extent * EXTENT_BYTES
        assert raw[begin : begin + EXTENT_BYTES] == b"\x01" * EXTENT_BYTES
    assert not any(raw[DATA_OFFSET + EXTENT_BYTES : DATA_OFFSET + 3 * EXTENT_BYTES])
    device.close()
