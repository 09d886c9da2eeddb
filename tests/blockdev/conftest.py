"""Devices of every kind, and file systems of their own, for the tests of the block devices."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.blockdevices import EXTENTS, SIZE, MakeDisk, as_root
from vswapd_blockdev.checked import CheckedDevice
from vswapd_blockdev.device import BlockDevice
from vswapd_blockdev.faulty import FaultyDevice
from vswapd_blockdev.memory import MemoryDevice
from vswapd_blockdev.sealed import SealedDevice
from vswapd_blockdev.swapfile import SwapFile


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A real block device of SIZE bytes, all zeros."""
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate(SIZE)
    name = as_root("losetup", "--find", "--show", str(backing))
    yield name
    subprocess.run(["losetup", "--detach", name], check=True)


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """Mounts a small file system of a kind, `tmpfs` or `ext4`, and says where."""
    mounted: list[Path] = []

    def make(kind: str, size: int) -> Path:
        where = tmp_path / f"{kind}-{len(mounted)}"
        where.mkdir()
        if kind == "tmpfs":
            as_root("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where))
        else:
            image = where.with_suffix(".img")
            with image.open("wb") as file:
                file.truncate(size)
            as_root("mkfs.ext4", "-q", "-m", "0", str(image))
            as_root("mount", "-o", "loop", str(image), str(where))
        mounted.append(where)
        return where

    yield make
    for where in mounted:
        subprocess.run(["umount", str(where)], check=True)


@pytest.fixture
def no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no O_DIRECT."""
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> Any:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


@pytest.fixture
def shm_path() -> Iterator[Path]:
    """A directory on a tmpfs."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("/dev/shm cannot be written to")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def _file(request: pytest.FixtureRequest, where: str = "tmp_path") -> SwapFile:
    return SwapFile.open(str(request.getfixturevalue(where) / "swap"), size=SIZE)


def _buffered(request: pytest.FixtureRequest) -> BlockDevice:
    request.getfixturevalue("no_direct")
    file = _file(request)
    assert not file.direct
    return file


KINDS: dict[str, Callable[[pytest.FixtureRequest], BlockDevice]] = {
    "memory": lambda _: MemoryDevice(EXTENTS),
    "faulty": lambda _: FaultyDevice(MemoryDevice(EXTENTS)),
    "sealed": lambda _: SealedDevice(MemoryDevice(EXTENTS)),
    "file": _file,
    "file-buffered": _buffered,
    "file-tmpfs": lambda request: _file(request, "shm_path"),
    "file-sealed": lambda request: SealedDevice(_file(request)),
    "block": lambda request: SwapFile.open(request.getfixturevalue("loop_device")),
    "block-sealed": lambda request: SealedDevice(
        SwapFile.open(request.getfixturevalue("loop_device"))
    ),
}


@pytest.fixture(params=list(KINDS))
def device(request: pytest.FixtureRequest) -> Iterator[CheckedDevice]:
    """Each kind of device in turn, EXTENTS long, held to the contract."""
    checked = CheckedDevice(KINDS[request.param](request))
    yield checked
    checked.close()
