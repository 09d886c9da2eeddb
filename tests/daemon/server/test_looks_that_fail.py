"""A daemon whose looks at memory fail: no acknowledged page goes with them, and it says so."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import vswap
from support.daemon import RunningDaemon, running_daemon
from support.memory_group import MemoryGroup, memory_group
from vswap.control import Control

MIB: Final = 1 << 20


def noise(seed: int, count: int = 64) -> bytes:
    return np.random.default_rng(seed).bytes(count * 4096)


@contextlib.contextmanager
def crowd(daemon: RunningDaemon, count: int) -> Iterator[None]:
    """So many connections that do nothing, as far as they are taken."""
    with contextlib.ExitStack() as opened:
        for _ in range(count):
            sock = opened.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(daemon.socket_path))
        yield


def store_until_short(space: vswap.Space, control: Control) -> dict[int, Any]:
    """Store, and free, until the daemon has noticed that memory is short; what is kept of it."""
    stored: dict[int, Any] = {}
    seed = 0
    while not control.status()["pool"]["pressure"]:
        seed += 1
        try:
            slots = space.store(noise(seed))
        except vswap.Rejected:
            continue  # it has just noticed
        if len(stored) < 20:
            stored[seed] = slots
        else:
            space.free(slots)
    return stored


def check(space: vswap.Space, stored: dict[int, Any]) -> None:
    for seed, slots in stored.items():
        assert bytes(space.load(slots)) == noise(seed), f"batch {seed}"


@pytest.mark.parametrize("shards", [1, 2])
def test_no_descriptor_is_left(shards: int) -> None:
    """With all descriptors in idle connections memory is looked at as before, no page is lost."""
    command = ["prlimit", "--nofile=70:70"]
    with (
        memory_group(400 * MIB) as group,
        running_daemon(
            f"server.shards={shards}",
            "pool.max=64M",
            "pool.reserve=16M",
            "server.max_connections=400",
            "server.max_user_connections=400",
            under=[*group.command, *command],
        ) as daemon,
        vswap.connect(daemon.socket_path) as space,
        Control(daemon.socket_path) as control,
        crowd(daemon, 80 * shards),
    ):
        kept = {seed: space.store(noise(seed)) for seed in range(1000, 1004)}
        group.limit(group.usage + 24 * MIB)
        kept |= store_until_short(space, control)
        check(space, kept)
        group.limit(400 * MIB)
        while control.status()["pool"]["pressure"]:
            check(space, kept)
        assert control.status()["traffic"]["housekeeping_errors"] == 0


def test_a_group_that_the_daemon_leaves() -> None:
    """Moved to another control group, its old one removed, it goes by the new one's limit."""
    with (
        memory_group(400 * MIB) as group,
        running_daemon("pool.max=64M", "pool.reserve=16M", under=group.command) as daemon,
        vswap.connect(daemon.socket_path) as space,
        Control(daemon.socket_path) as control,
    ):
        slots = space.store(noise(1))
        other = MemoryGroup(group.directory.with_name(f"{group.directory.name}-b"), group.unified)
        other.directory.mkdir()
        try:
            other.limit(12 * MIB)
            (other.directory / "cgroup.procs").write_text(str(daemon.pid))
            kept = store_until_short(space, control)
            assert control.status()["pool"]["pressure"].endswith(other.directory.name)
            check(space, kept | {1: slots})
        finally:
            (group.directory / "cgroup.procs").write_text(str(daemon.pid))
            other.directory.rmdir()
        while control.status()["pool"]["pressure"]:
            check(space, kept)
        assert daemon.process.poll() is None


@pytest.fixture
def meminfo(tmp_path: Path) -> tuple[Path, list[str]]:
    """A /proc/meminfo of one's own, and what makes a command have it."""
    path = tmp_path / "meminfo"
    path.write_text(Path("/proc/meminfo").read_text())
    bound = f'mount --bind {path} /proc/meminfo && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", bound, "sh"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"hardware: no mounts here: {tried.stderr.strip()}")
    return path, command


@pytest.mark.parametrize("text", ["", "MemAvailable: many kB\n", "MemTotal: 5 kB\n"])
def test_a_file_that_makes_no_sense(text: str, meminfo: tuple[Path, list[str]]) -> None:
    """What cannot be read is told once in a while; the pool goes on with the limit that it had."""
    path, command = meminfo
    with (
        # So large that it looks several times a second.
        running_daemon("pool.max=16M", "pool.reserve=99%", under=command) as daemon,
        vswap.connect(daemon.socket_path) as space,
        Control(daemon.socket_path) as control,
    ):
        control.call("set", key="pool.reserve", value="1M")
        slots = space.store(noise(1))
        path.write_text(text)
        control.call("set", key="pool.reserve", value="2M")
        limit = control.status()["pool"]["limit_bytes"]
        assert limit == 16 * MIB
        before = control.status()["traffic"]["housekeeping_errors"]
        assert before > 0
        while control.status()["traffic"]["housekeeping_errors"] < before + 3:
            space.free(space.store(noise(2, 4)))
        assert bytes(space.load(slots)) == noise(1)
        lines = [line for line in daemon.log.splitlines() if "cannot be looked at" in line]
        assert 1 <= len(lines) <= 4
        assert "the memory of the machine cannot be looked at" in lines[0]


def test_no_proc_any_more(tmp_path: Path) -> None:
    """A /proc that goes away while the daemon runs changes nothing: what it needs is open."""
    if os.geteuid() != 0:
        pytest.skip("taking /proc away needs root")
    del tmp_path
    with (
        running_daemon("pool.max=16M", under=["unshare", "--mount"]) as daemon,
        vswap.connect(daemon.socket_path) as space,
        Control(daemon.socket_path) as control,
    ):
        slots = space.store(noise(1))
        subprocess.run(
            ["nsenter", f"--mount=/proc/{daemon.pid}/ns/mnt", "umount", "--lazy", "/proc"],
            check=True,
        )
        for reserve in ("1M", "2M", "3M"):
            control.call("set", key="pool.reserve", value=reserve)
            assert bytes(space.load(slots)) == noise(1)
        assert control.status()["traffic"]["housekeeping_errors"] == 0
        with vswap.connect(daemon.socket_path) as another:
            another.store(noise(2))
