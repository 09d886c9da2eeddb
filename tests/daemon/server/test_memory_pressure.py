"""A real daemon where memory is short: it sheds or rejects, says so, and is not killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import pytest

import vswap
from support.daemon import RunningDaemon, running_daemon
from support.memory_group import memory_group
from vswap.control import Control

MIB: Final = 1 << 20
BATCH: Final = 256
"""Pages per call: 1 MiB."""
PLENTY: Final = 1 << 30
"""So little that the daemon looks often."""


def noise(seed: int, count: int = BATCH) -> bytes:
    return np.random.default_rng(seed).bytes(count * 4096)


def fill(space: vswap.Space, batches: int) -> tuple[dict[int, Any], str | None]:
    """Store until it is refused, or all is stored; slots by seed, and the reason."""
    stored: dict[int, Any] = {}
    for seed in range(batches):
        try:
            stored[seed] = space.store(noise(seed))
        except vswap.Rejected as error:
            return stored, error.reason
    return stored, None


def store_again_and_again(space: vswap.Space) -> NoReturn:
    while True:
        space.free(space.store(bytes(4096)))


def check(space: vswap.Space, stored: dict[int, Any]) -> None:
    for seed, slots in stored.items():
        assert bytes(space.load(slots)) == noise(seed), f"batch {seed}"


def pids(daemon: RunningDaemon) -> list[int]:
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()
    return [daemon.pid, *map(int, children.split())]


@pytest.mark.parametrize("shards", [1, 4])
def test_a_group_too_small_for_the_limit(shards: int) -> None:
    """Without a device pages are refused, before the kernel has to kill; those taken are right."""
    size = (96 + 64 * shards) * MIB
    settings = (f"server.shards={shards}", f"pool.max={size - MIB}")
    with (
        memory_group(size) as group,
        running_daemon(*settings, under=group.command) as daemon,
        vswap.connect(daemon.socket_path) as space,
        Control(daemon.socket_path) as control,
    ):
        before = pids(daemon)
        stored, reason = fill(space, size // MIB + 50)
        assert reason == "pool_full"
        pool = control.status()["pool"]
        assert "memory is short on control group" in pool["pressure"]
        assert pool["limit_bytes"] < pool["max_bytes"]
        check(space, stored)
        assert len(stored) * MIB > size // 16
        assert group.kills == 0
        assert pids(daemon) == before
        for slots in stored.values():
            space.free(slots)
        assert control.call("verify")["ok"]


@pytest.mark.parametrize("shards", [1, 4])
def test_a_group_that_is_made_smaller(shards: int, tmp_path: Path) -> None:
    """With a device pages leave for it; all of them are right, and room comes back with memory."""
    size = (128 + 64 * shards) * MIB
    settings = (f"server.shards={shards}", f"pool.max={size // 2}")
    device = f"device={tmp_path / 'swap'},size=512M"
    with (
        memory_group(2 * size) as group,
        running_daemon(*settings, device, under=group.command) as daemon,
        vswap.connect(daemon.socket_path) as space,
        Control(daemon.socket_path) as control,
    ):
        stored, reason = fill(space, size // 3 // MIB)
        assert reason is None
        room = control.status()["pool"]["bytes"]
        assert room > size // 4
        # All fits, and there is a reserve for what the processes may come to take.
        assert control.status()["pool"]["lowered"] == ""
        reserve = control.status()["pool"]["reserve_bytes"]
        assert size // 8 < reserve < size
        lowest = 2 * size
        while control.status()["pool"]["bytes"] > room // 2:
            # In steps: what is taken at once the daemon cannot give at once, and is killed for.
            lowest = min(lowest, group.usage + reserve - 16 * MIB)
            with contextlib.suppress(OSError):
                group.limit(lowest)
            check(space, stored)
        assert group.kills == 0
        status = control.status()
        assert "memory is short on control group" in status["pool"]["pressure"]
        assert status["traffic"]["writeback_pages"] > 0
        check(space, stored)
        group.limit(2 * size)
        while control.status()["pool"]["pressure"]:
            check(space, stored)
        assert control.status()["pool"]["limit_bytes"] == size // 2
        assert control.call("verify")["ok"]


class Meminfo:
    """A /proc/meminfo of one's own, bound over the real one for one daemon."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "meminfo"
        self._text = Path("/proc/meminfo").read_text().splitlines(keepends=True)
        self.available(PLENTY)

    def available(self, nbytes: int) -> None:
        lines = [
            f"MemAvailable: {nbytes >> 10} kB\n" if line.startswith("MemAvailable:") else line
            for line in self._text
        ]
        # In place: it is this file that is bound. One write, so that no half of it is read.
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        with open(fd, "wb", buffering=0) as file:
            file.write("".join(lines).ljust(8192).encode())

    @property
    def command(self) -> list[str]:
        bound = f'mount --bind {self.path} /proc/meminfo && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", bound, "sh"]


@pytest.fixture
def meminfo(tmp_path: Path) -> Meminfo:
    made = Meminfo(tmp_path)
    tried = subprocess.run([*made.command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no mounts here: {tried.stderr.strip()}")
    return made


@pytest.mark.parametrize("shards", [1, 4])
def test_a_machine_whose_memory_runs_out(shards: int, tmp_path: Path, meminfo: Meminfo) -> None:
    """As others take the machine's memory pages go to the device; without room there, rejects."""
    settings = (f"server.shards={shards}", "pool.max=64M", "pool.reserve=256M")
    with (
        running_daemon(
            *settings, f"device={tmp_path / 'swap'},size=48M", under=meminfo.command
        ) as daemon,
        vswap.connect(daemon.socket_path) as space,
        Control(daemon.socket_path) as control,
    ):
        stored, reason = fill(space, 40)
        assert reason is None
        assert control.status()["pool"]["pressure"] == ""
        meminfo.available(240 * MIB)
        while control.status()["pool"]["bytes"] > 26 * MIB:
            check(space, dict(list(stored.items())[:1]))
        status = control.status()
        assert status["pool"]["pressure"] == "memory is short on the machine"
        assert status["traffic"]["writeback_pages"] > 0
        check(space, stored)
        # Whatever comes goes the way of the oldest, until the device is full.
        more, reason = fill(space, 100)
        assert reason in {"device_full", "pool_full"}
        check(space, more)
        check(space, stored)
        meminfo.available(20 * MIB)
        with pytest.raises(vswap.Rejected, match="pool_full"):
            store_again_and_again(space)
        meminfo.available(PLENTY)
        while control.status()["pool"]["pressure"]:
            pass
        space.store(noise(7))
        check(space, stored)
        assert control.call("verify")["ok"]
