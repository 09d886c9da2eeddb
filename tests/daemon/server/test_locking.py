"""Memory that is locked into RAM, or cannot be: the daemon does what pool.lock_memory says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import vswap
from support.daemon import RunningDaemon, daemon_environment, running_daemon
from support.privileges import limited, refusing_locks, skip_unless_locking, without
from support.wire import noise
from vswap.control import Control

OBSTACLES: Final = {
    "no limit at all": [*limited(memlock="0:0"), *without("ipc_lock")],
    "a limit below the regions": [*limited(memlock="4096:4096"), *without("ipc_lock")],
    "a limit between the regions": [
        *limited(memlock="1048576:1048576"),
        *without("ipc_lock"),
    ],
    "a filter of system calls": refusing_locks(),
}
"""What keeps memory from being locked."""
SMALL: Final = "table.max_slots=65536"
"""So that a table fits into what a process may lock without any right."""


def locked_bytes(daemon: RunningDaemon) -> list[int]:
    """What each process of a daemon has locked, the supervisor's first."""
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    found = []
    for pid in (daemon.pid, *children):
        text = Path(f"/proc/{pid}/status").read_text()
        found.append(int(re.findall(r"VmLck:\s+(\d+) kB", text)[0]) * 1024)
    return found


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_to_try_is_to_serve_and_to_say_so(obstacle: str, shards: int) -> None:
    """Where memory cannot be locked `try` is one warning, a line of the status, and a service."""
    settings = (f"server.shards={shards}", "pool.max=32M", "pool.lock_memory=try", SMALL)
    with (
        running_daemon(*settings, under=OBSTACLES[obstacle]) as daemon,
        vswap.connect(daemon.socket_path) as space,
        Control(daemon.socket_path) as control,
    ):
        pages = noise(400)
        slots = space.store(pages)
        assert bytes(space.load(slots)) == pages
        pool = control.status()["pool"]
        assert not pool["locked"]
        assert "RLIMIT_MEMLOCK is" in pool["lock_trouble"]
        lines = [line for line in daemon.log.splitlines() if "lock_memory" in line]
        assert len(lines) == 1
        assert "WARNING" in lines[0]
        assert lines[0].endswith("the daemon goes on without")
        assert set(locked_bytes(daemon)) == {0}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("word", ["must", "true"])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_must_be_and_cannot_be(obstacle: str, word: str, shards: int, tmp_path: Path) -> None:
    """Where memory cannot be locked `must` is one line that says what to do, and no start."""
    path = tmp_path / "s"
    command = [*OBSTACLES[obstacle], sys.executable, "-m", "vswapd", "serve", f"--socket={path}"]
    settings = (f"server.shards={shards}", "pool.max=32M", f"pool.lock_memory={word}", SMALL)
    done = subprocess.run(
        [*command, *(f"--set={setting}" for setting in settings)],
        env=daemon_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 71
    (line,) = done.stderr.splitlines()
    assert "pool.lock_memory: " in line
    assert "or set it to try" in line
    assert not path.exists()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("word", ["try", "must"])
def test_where_it_can_be_all_shards_lock(word: str, shards: int) -> None:
    """Where memory can be locked it is, by each shard for itself, also after a shard was killed."""
    skip_unless_locking(1 << 40)
    settings = (f"server.shards={shards}", "pool.max=32M", f"pool.lock_memory={word}")
    with (
        running_daemon(*settings) as daemon,
        vswap.connect(daemon.socket_path) as space,
        Control(daemon.socket_path) as control,
    ):
        pages = noise(400)
        slots = space.store(pages)
        pool = control.status()["pool"]
        assert (pool["locked"], pool["lock_trouble"]) == (True, "")
        assert "lock_memory" not in daemon.log
        supervisor, *others = locked_bytes(daemon)
        shards_locked = others or [supervisor]
        assert len(shards_locked) == shards
        assert min(shards_locked) > 1 << 30
        assert not others or supervisor == 0
        if others:
            children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
            os.kill(int(children[0]), 9)
            assert bytes(space.load(slots)) == pages
            assert min(locked_bytes(daemon)[1:]) > 1 << 30
        assert bytes(space.load(slots)) == pages


def test_no_is_the_default() -> None:
    """Unless it is wanted nothing is locked, and nothing is said of it."""
    with running_daemon("pool.max=8M") as daemon, Control(daemon.socket_path) as control:
        pool = control.status()["pool"]
        assert (pool["locked"], pool["lock_trouble"]) == (False, "")
        assert set(locked_bytes(daemon)) == {0}
        assert control.status()["settings"]["pool.lock_memory"] == "no"
