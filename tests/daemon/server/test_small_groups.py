"""Real memory groups that are too small for pool.max: the daemon lowers it, and is never killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from support.daemon import RunningDaemon, daemon_environment, running_daemon
from support.memory_group import MemoryGroup, memory_group
from support.wire import LOAD, REJECTED, STORE, Wire, pack
from vswap.control import Control

MIB: Final = 1 << 20
_NOISE: Final = np.frombuffer(np.random.default_rng(1).bytes(4096 * 4096), np.uint64)


def noise(key: int, count: int) -> bytes:
    """Pages that do not shrink, made at once."""
    return (_NOISE[: count * 512] ^ np.uint64(key * 0x9E3779B97F4A7C15 % (1 << 64))).tobytes()


@contextmanager
def grouped(size: int, *settings: str) -> Iterator[tuple[MemoryGroup, RunningDaemon]]:
    """A daemon in a group of so many bytes, which no process of it is killed in."""
    with (
        memory_group(size) as group,
        running_daemon(*settings, under=group.command) as daemon,
    ):
        yield group, daemon
        assert group.kills == 0
        with Control(daemon.socket_path) as control:
            assert control.call("verify")["ok"]


class Client:
    """One that stores as fast as it can, several requests under way, and keeps what is taken."""

    def __init__(self, daemon: RunningDaemon, number: int) -> None:
        self.wire = Wire(daemon.socket_path)
        self.largest: int = self.wire.hello()["max_batch"]
        self.batch = min(800, self.largest)
        self.number = number
        self.stored: dict[int, list[int]] = {}
        self.refused = 0

    def fill(self, requests: int, depth: int = 4) -> None:
        """Send so many requests, and read the answers."""
        room = threading.Semaphore(depth)
        keys = [self.number * 10_000 + len(self.stored) + i for i in range(requests)]

        def send() -> None:
            for key in keys:
                room.acquire()
                self.wire.socket.sendall(
                    self.wire.frame(STORE, noise(key, self.batch), count=self.batch)
                )

        sender = threading.Thread(target=send)
        sender.start()
        for key in keys:
            reply = self.wire.reply()
            room.release()
            if reply.status == REJECTED:
                self.refused += 1
            else:
                assert reply.status == 0, reply.text
                self.stored[key] = reply.slots
        sender.join()

    def check(self) -> None:
        for key, slots in self.stored.items():
            assert self.wire.load(slots).body == noise(key, self.batch)


def together(work: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(one) for one in work]:
            done.result()


@pytest.mark.parametrize(
    ("mib", "shards", "most"),
    [
        (96, 1, "80%"),
        (128, 1, "60%"),
        (128, 1, "100M"),
        (160, 2, "60%"),
        (192, 2, "95%"),
        (256, 2, "90%"),
        (256, 4, "50%"),
    ],
)
def test_four_clients_that_fill_it(mib: int, shards: int, most: str) -> None:
    """What has no room is refused with pool_full; what was taken is right; nobody is killed."""
    with (
        grouped(mib * MIB, f"server.shards={shards}", f"pool.max={most}") as (_, daemon),
        ExitStack() as opened,
    ):
        with Control(daemon.socket_path) as control:
            pool = control.status()["pool"]
        assert pool["fits_bytes"] < pool["max_bytes"]
        assert f"{mib}" in pool["lowered"]
        assert daemon.log.count("does not fit") == 1
        clients = [Client(daemon, number) for number in range(4)]
        for client in clients:
            opened.enter_context(client.wire)
        together([partial(client.fill, mib // 3) for client in clients])
        assert sum(client.refused for client in clients)
        stored = sum(len(client.stored) * client.batch * 4096 for client in clients)
        assert stored > pool["fits_bytes"] // 4
        together([client.check for client in clients])


@pytest.mark.parametrize(("mib", "shards"), [(96, 1), (160, 2)])
def test_clients_that_take_what_they_can(mib: int, shards: int) -> None:
    """The largest requests, replies that are not read, frames that do not end: nobody is killed."""
    with (
        grouped(mib * MIB, f"server.shards={shards}", "pool.max=80%") as (_, daemon),
        ExitStack() as opened,
    ):
        greedy = [Client(daemon, number) for number in range(6)]
        for client in greedy:
            opened.enter_context(client.wire)
            client.batch = client.largest
        for number in range(30):
            other = Client(daemon, 100 + number)
            opened.enter_context(other.wire)
            if number % 2:
                frame = other.wire.frame(STORE, noise(1, 800), count=800)
                send_what_is_taken(other.wire, frame[:-100])
            else:
                slots = other.wire.store(noise(number, 64)).slots
                asked = other.wire.frame(LOAD, pack(slots), count=len(slots))
                send_what_is_taken(other.wire, asked * 40 if slots else b"")
        together([partial(client.fill, mib // 8, 16) for client in greedy])
        together([client.check for client in greedy])


def send_what_is_taken(wire: Wire, data: bytes) -> None:
    """As much as the daemon takes at once."""
    wire.socket.setblocking(False)
    try:
        while data:
            data = data[wire.socket.send(data) :]
    except BlockingIOError:
        return


def test_with_a_device(tmp_path: Path) -> None:
    """What the pool has no room for goes to the device; nobody is killed.

    In a rush requests under way may leave so little memory that some are refused; later none is.
    """
    settings = ("server.shards=2", "pool.max=60%", f"device={tmp_path / 'swap'},size=1G")
    with grouped(160 * MIB, *settings) as (_, daemon), ExitStack() as opened:
        clients = [Client(daemon, number) for number in range(4)]
        for client in clients:
            opened.enter_context(client.wire)
        together([partial(client.fill, 30) for client in clients])
        for client in clients:
            before = client.refused
            client.fill(5, depth=1)
            assert client.refused == before
        together([client.check for client in clients])


def test_a_group_in_which_nothing_fits(tmp_path: Path) -> None:
    """Where not even the smallest pool fits it is one line that says what to do, and code 71."""
    with memory_group(56 * MIB) as group:
        done = subprocess.run(
            [
                *group.command,
                *(sys.executable, "-m", "vswapd", "serve", "--set=pool.max=50%"),
                f"--socket={tmp_path / 's'}",
            ],
            env=daemon_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert group.kills == 0
    assert done.returncode == 71
    line = done.stderr.splitlines()[-1]
    assert len([one for one in done.stderr.splitlines() if "ERROR" in one]) == 1
    assert "nothing is left for the pool: allow it" in line
    assert not (tmp_path / "s").exists()


def test_what_fits_is_not_lowered() -> None:
    """A pool.max that fits beside all that the processes may take is what it says."""
    with grouped(512 * MIB, "server.shards=2", "pool.max=40%") as (_, daemon):
        with Control(daemon.socket_path) as control:
            pool = control.status()["pool"]
        assert (pool["lowered"], pool["fits_bytes"]) == ("", pool["max_bytes"])
        assert pool["limit_bytes"] == pool["max_bytes"]
        assert "does not fit" not in daemon.log
