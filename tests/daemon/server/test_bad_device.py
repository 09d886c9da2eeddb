"""A swap device that turns bad under a running daemon: what is hit is lost, and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn, Self

import numpy as np
import pytest

import vswap
from support.daemon import RunningDaemon, running_daemon
from vswap.control import Control
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES

PAGE: Final = 4096
MIB: Final = 1 << 20
PAGES: Final = 3000


def content_of(number: int) -> bytes:
    """Half of a page is noise: it shrinks, and is like no other."""
    return np.random.default_rng(number).bytes(PAGE // 2) + bytes([number % 251]) * (PAGE // 2)


@pytest.fixture(params=[1, 3])
def daemon(request: pytest.FixtureRequest) -> Iterator[RunningDaemon]:
    with running_daemon("pool.max=64M", f"server.shards={request.param}") as running:
        yield running


class Stored:
    """Pages of two spaces, most of them on a device."""

    def __init__(self, daemon: RunningDaemon, path: Path, **swapon: Any) -> None:
        self.control = Control(daemon.socket_path)
        self.control.call("swapon", path=str(path), **({"size": 32 * MIB} | swapon))
        self.spaces = [vswap.connect(daemon.socket_path) for _ in range(2)]
        self.contents = [content_of(number) for number in range(PAGES)]
        half = PAGES // 2
        parts = (self.contents[:half], self.contents[half:])
        self.slots = [
            space.store(b"".join(part)).tolist()
            for space, part in zip(self.spaces, parts, strict=True)
        ]

    def write_back(self, nbytes: int = 1 << 30) -> dict[str, int]:
        """Have so much written; returns how many slots are where."""
        self.control.call("writeback", bytes=nbytes)
        slots: dict[str, int] = self.control.status()["slots"]
        return slots

    def lost(self) -> int:
        """Load every page by itself: how many are lost. All others are what was stored."""
        return len(self.lost_numbers())

    def lost_numbers(self) -> set[int]:
        """The same: which."""
        found, number = set(), 0
        for space, slots in zip(self.spaces, self.slots, strict=True):
            for slot in slots:
                try:
                    assert space.load([slot]) == self.contents[number]
                except vswap.PageLost as error:
                    if error.slots.tolist() == [slot]:
                        found.add(number)
                number += 1
        return found

    def at(self, number: int) -> tuple[vswap.Space, int]:
        """Where a page is stored."""
        which, index = divmod(number, PAGES // 2)
        return self.spaces[which], self.slots[which][index]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.spaces:
            space.close()
        self.control.close()


def test_flipped_bytes_lose_pages_and_nothing_else(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Each page that is hit says so; with a place to go, a swapoff saves all others."""
    path = tmp_path / "swap"
    chooser = random.Random(7)
    with Stored(daemon, path) as stored:
        on_device = stored.write_back(4 * MIB)["phys"]
        assert 1000 < on_device < PAGES
        flips = 40
        with path.open("r+b") as file:
            whole = file.read()
            used = np.flatnonzero(np.frombuffer(whole, np.uint8)[MIB:]) + MIB
            for at in chooser.sample(used.tolist(), flips):
                file.seek(at)
                file.write(bytes([whole[at] ^ 0x10]))
            file.flush()
            os.fsync(file.fileno())
        lost = stored.lost()
        # A byte in 16 of a block's encryption garbles 16: it may hit two neighbours.
        assert 1 <= lost <= 2 * flips
        assert stored.control.status()["traffic"]["lost_pages"] >= lost
        assert "such requests so far" in daemon.log
        for space, slots in zip(stored.spaces, stored.slots, strict=True):
            with pytest.raises(vswap.PageLost):
                space.load(slots)
        # In the pool nobody would notice what is damaged: it needs another device to go to.
        with pytest.raises(vswap.OutOfService, match="are damaged"):
            stored.control.call("swapoff", path=str(path))
        assert stored.control.status()["slots"]["phys"] == lost
        assert stored.lost() == lost
        stored.control.call("swapon", path=str(tmp_path / "other"), size=32 * MIB)
        stored.control.call("swapoff", path=str(path))
        path.unlink()
        assert stored.lost() == lost
        for space, slots in zip(stored.spaces, stored.slots, strict=True):
            space.free(slots)
        assert stored.control.call("verify")["ok"]


def test_a_file_that_was_cut_loses_what_is_gone(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Pages in RAM and before the cut are there; the daemon lives, and takes another device."""
    path, other = tmp_path / "swap", tmp_path / "other"
    with Stored(daemon, path) as stored:
        slots = stored.write_back(4 * MIB)
        assert slots["phys"]
        assert slots["zswap"]
        os.truncate(path, 2 * MIB)
        lost = stored.lost()
        assert 0 < lost <= slots["phys"]
        stored.control.call("swapon", path=str(other), size=32 * MIB, priority=5)
        stored.control.call("writeback", bytes=1 << 30)
        assert stored.lost() == lost


def test_a_disk_that_is_full_keeps_pages_in_ram(daemon: RunningDaemon, small_disk: Path) -> None:
    """The space of discarded extents was taken by somebody: writes fail, and nothing is lost."""
    path = small_disk / "swap"
    with Stored(daemon, path, size=24 * MIB) as stored:
        stored.write_back()
        # Back in RAM: the device's extents are discarded, and their space is free for others.
        for index, (space, slots) in enumerate(zip(stored.spaces, stored.slots, strict=True)):
            half = PAGES // 2
            content = b"".join(stored.contents[index * half : (index + 1) * half])
            space.store(content, slots=slots)
        while stored.control.status()["slots"]["phys"]:
            stored.control.call("compact")
        with pytest.raises(OSError, match="space"):
            fill(small_disk / "somebody's")
        stored.control.call("writeback", bytes=1 << 30)
        document = stored.control.status()
        assert document["devices"][0]["write_errors"]
        assert stored.lost() == 0
        (small_disk / "somebody's").unlink()
        stored.control.call("swapoff", path=str(path))
        assert stored.lost() == 0


def test_a_disk_whose_reads_fail(daemon: RunningDaemon, tmp_path: Path) -> None:
    """First some, then all, of a real disk: just the pages there are lost, and the journal says it.

    A loop device answers with EIO where the file behind it has ended.
    """
    behind = tmp_path / "behind"
    with (
        loop_device(behind, 32 * MIB) as path,
        Stored(daemon, path, size=None, encrypt=False) as stored,
    ):
        on_device = stored.write_back(4 * MIB)["phys"]
        image = behind.read_bytes()
        places = {
            number: at
            for number, content in enumerate(stored.contents)
            if (at := image.find(content[64:128])) >= 0
        }
        # A page may have been written twice, by a merge of extents; not here.
        assert len(places) == on_device
        assert stored.lost() == 0
        cut = sorted(places.values())[on_device // 2] // EXTENT_BYTES * EXTENT_BYTES
        os.truncate(behind, cut)
        hit = {number for number, at in places.items() if at >= cut}
        assert 0 < len(hit) < on_device
        assert stored.lost_numbers() == hit
        assert f"{path}: reads fail" in daemon.log
        assert "Input/output error" in daemon.log
        os.truncate(behind, 0)
        assert stored.lost_numbers() == set(places)
        status = stored.control.status()
        assert status["devices"][0]["state"] == "failing"
        assert status["devices"][0]["read_errors"] >= len(hit)
        # What is told once is not told again with each page.
        assert daemon.log.count("reads fail") < 20 * 3
        stored.control.call("swapon", path=str(tmp_path / "other"), size=32 * MIB)
        with pytest.raises(vswap.OutOfService):
            stored.control.call("swapoff", path=str(path))
        assert stored.lost_numbers() == set(places)
        # Overwritten, nothing of them is on the bad device any more: it can go.
        for number in places:
            space, slot = stored.at(number)
            space.store(stored.contents[number], slots=[slot])
        stored.control.call("swapoff", path=str(path))
        assert stored.lost() == 0
        assert stored.control.call("verify")["ok"]


def test_a_disk_of_which_a_part_cannot_be_read(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The border goes through an extent: only pages beyond it are lost; all others can move away.

    A loop device answers with EIO where the file behind it has ended.
    """
    behind = tmp_path / "behind"
    with (
        loop_device(behind, 32 * MIB) as path,
        Stored(daemon, path, size=None, encrypt=False) as stored,
    ):
        stored.write_back()
        image = behind.read_bytes()
        places = {n: image.find(content[64:128]) for n, content in enumerate(stored.contents)}
        assert min(places.values()) >= 0
        spans = {at // EXTENT_BYTES for at in places.values()}
        middle = sorted(spans)[len(spans) // 2] * EXTENT_BYTES
        # An entry begins 64 to 80 bytes before what was looked for, and is half a page long.
        cut = next(
            at
            for at in range(middle + EXTENT_BYTES // 4, middle + EXTENT_BYTES, BLOCK_BYTES)
            if not any(-40 < at - place - PAGE // 2 + 64 < 40 for place in places.values())
        )
        os.truncate(behind, cut)
        hit = {n for n, place in places.items() if place + PAGE // 2 - 64 > cut}
        assert 0 < len(hit) < PAGES
        named: set[int] = set()
        for which, (space, slots) in enumerate(zip(stored.spaces, stored.slots, strict=True)):
            try:
                space.load(slots)
            except vswap.PageLost as error:
                first = which * PAGES // 2
                named |= {first + slots.index(slot) for slot in error.slots.tolist()}
        assert named
        assert named <= hit
        assert stored.lost_numbers() == hit
        with pytest.raises(vswap.OutOfService, match="cannot be read"):
            stored.control.call("swapoff", path=str(path))
        assert stored.control.status()["slots"]["phys"] == len(hit)
        done = stored.control.call("swapoff", path=str(path), give_up=True)
        assert (done["moved_pages"], done["lost_pages"]) == (0, len(hit))
        document = stored.control.status()
        assert (document["slots"]["lost"], document["devices"]) == (len(hit), [])
        assert stored.control.call("verify")["ok"]
        assert stored.lost_numbers() == hit


def test_a_disk_whose_writes_fail(daemon: RunningDaemon, small_disk: Path, tmp_path: Path) -> None:
    """Nothing is lost; it is said, not tried over and over, and another device takes the pages.

    A loop device answers so where there is no room for the file behind it: with EIO, or ENOSPC.
    """
    with (
        loop_device(small_disk / "behind", 64 * MIB) as path,
        Stored(daemon, path, size=None) as stored,
    ):
        with pytest.raises(OSError, match="space"):
            fill(small_disk / "somebody's")
        assert stored.write_back()["phys"] == 0
        device = stored.control.status()["devices"][0]
        assert device["state"] == "failing"
        assert 0 < device["write_errors"] <= 16 * 3
        assert f"{path}: writes fail" in daemon.log
        assert re.search("Input/output error|No space left", daemon.log)
        assert stored.lost() == 0
        again = stored.control.status()["devices"][0]
        assert again["write_errors"] == device["write_errors"]
        other = str(tmp_path / "other")
        stored.control.call("swapon", path=other, size=32 * MIB, priority=5)
        stored.write_back()  # what was loaded a moment ago gets a second chance, once
        assert stored.write_back()["phys"] == PAGES
        stored.control.call("swapoff", path=str(path))
        assert stored.lost() == 0
        assert stored.control.call("verify")["ok"]


@contextlib.contextmanager
def loop_device(behind: Path, size: int) -> Iterator[Path]:
    """A block device over a sparse file."""
    if os.geteuid() != 0:
        pytest.skip("hardware: only root has loop devices")
    behind.touch()
    os.truncate(behind, size)
    command = ["losetup", "--find", "--show", str(behind)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"hardware: no loop devices here: {tried.stderr.strip()}")
    path = Path(tried.stdout.strip())
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", str(path)], check=True)


def fill(path: Path) -> NoReturn:
    with path.open("wb") as file:
        while True:
            file.write(bytes(MIB))
            file.flush()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 28 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
