"""Whatever is killed, and whenever: no page is lost, nothing is left behind, and nothing grows.

`make torture KILLS=1000` kills so often; SEED=n does again what a run with that seed did, as far as
the machine's timing lets it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

import vswap
import vswap.aio
from support.clients import OverlappingClient, TaskClient, Worker, run_tasks
from support.impatient import ImpatientClient
from support.service_manager import ServiceManager, service
from vswap.control import Control

KILLS: Final = int(os.environ.get("VSWAPD_KILLS", "50"))
SEED: Final = int(os.environ.get("VSWAPD_SEED", str(random.SystemRandom().randrange(1 << 30))))
WORKERS: Final = 2
TIERS: Final = ("lz4,zstd:1", "lz4", "zstd:1,zstd:3")
KINDS: Final = (OverlappingClient, ImpatientClient)
_FORK = multiprocessing.get_context("fork")


@dataclass
class Client:
    """A client in a process of its own, with requests that overlap."""

    process: BaseProcess
    pipe: Connection
    done: int = 0
    outcome: tuple[list[str], int, int] | None = None

    @classmethod
    def start(
        cls,
        manager: ServiceManager,
        seed: int,
        make: Callable[[int, vswap.aio.Space], TaskClient],
    ) -> Client:
        here, there = _FORK.Pipe()
        process = _FORK.Process(
            target=run_tasks, args=(manager.socket_path, seed, there, None, make), daemon=True
        )
        process.start()
        there.close()
        return cls(process, here)

    def listen(self, timeout: float = 0.0) -> None:
        """Take what it has said."""
        while self.outcome is None and self.pipe.poll(timeout):
            said = self.pipe.recv()
            if isinstance(said, int):
                self.done = said
            else:
                self.outcome = said

    def end(self) -> tuple[list[str], int, int]:
        """Have it finish; returns its problems, and how much it has seen."""
        self.listen()
        if self.outcome is None:
            self.pipe.send("enough")
        while self.outcome is None:
            self.listen(1.0)
        self.process.join()
        self.pipe.close()
        return self.outcome

    def kill(self) -> None:
        """It dies without a word."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Place(NamedTuple):
    """How much room the pages are given, and what is done to it."""

    pool: tuple[str, ...]
    """pool.max: what it is in the beginning, and what it may be set to."""
    device_bytes: int
    devices: int
    steady: bool
    """Whether devices are all that changes."""


ROOMY: Final = Place(("6M", "5M", "8M"), 16 << 20, 2, steady=False)
CROWDED: Final = Place(("3M",), 4 << 20, 1, steady=True)
"""Shards run out of room all the time; as the one device comes and goes, for different reasons."""


class Operator(threading.Thread):
    """Steers all the time; what a death makes impossible is refused, or has no answer."""

    def __init__(self, manager: ServiceManager, directory: Path, place: Place, seed: int) -> None:
        super().__init__()
        self._manager = manager
        self._directory = directory
        self._place = place
        self._chooser = random.Random(seed)
        self.enough = threading.Event()
        self.done = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                with contextlib.suppress(
                    vswap.OutOfService, vswap.ConnectionLost, vswap.NoDaemon, vswap.BadArgument
                ):
                    self._steer()
                self.done += 1
        except BaseException as error:  # noqa: BLE001 - told by whoever joins
            self.error = error

    def _steer(self) -> None:
        place, chooser = self._place, self._chooser
        path = str(self._directory / f"swap{chooser.randrange(place.devices)}")
        verbs: list[tuple[str, dict[str, Any]]] = [
            ("swapon", {"path": path, "size": place.device_bytes}),
            ("swapon", {"path": path, "size": place.device_bytes}),
            ("swapoff", {"path": path}),
            ("verify", {}),
        ]
        if not place.steady:
            verbs += [
                ("writeback", {"bytes": 2 << 20}),
                ("compact", {}),
                ("set", {"key": "pool.tiers", "value": chooser.choice(TIERS)}),
                ("set", {"key": "pool.max", "value": chooser.choice(place.pool)}),
            ]
        verb, arguments = chooser.choice(verbs)
        with Control(self._manager.socket_path, timeout=60) as control:
            answer = control.call(verb, **arguments)
        if verb == "verify":
            assert answer["ok"], answer["problems"]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class Size(NamedTuple):
    """What must not grow."""

    descriptors: int
    processes: int
    kept: int

    @classmethod
    def of(cls, manager: ServiceManager) -> Size:
        return cls(
            descriptors=len(list(Path(f"/proc/{manager.pid}/fd").iterdir())),
            processes=len(children(manager.pid)),
            kept=len(manager.kept),
        )


def private_bytes(pid: int) -> int:
    """What a process has for itself alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines[1:])
    return sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) * 1024


@pytest.mark.timeout(120 + 6 * KILLS)
@pytest.mark.parametrize(
    ("shards", "place", "kills"),
    [
        pytest.param(1, ROOMY, KILLS // 2, id="1"),
        pytest.param(3, ROOMY, KILLS, id="3"),
        pytest.param(3, CROWDED, KILLS // 2, id="crowded"),
    ],
)
def test_nothing_is_lost(shards: int, place: Place, kills: int, tmp_path: Path) -> None:
    """Clients of two kinds, an operator, and somebody who kills shards, supervisor and clients."""
    print(f"seed {SEED}")
    settings = (f"pool.max={place.pool[0]}", "pool.dense_age=0s", "shrinker.recompress_cpu=100%")
    with service(*settings, "server.resume_timeout=5s", f"server.shards={shards}") as manager:
        before = Size.of(manager)
        outcomes = torture(manager, shards, place, tmp_path, kills)
        assert [problem for problems, *_ in outcomes for problem in problems] == []
        assert all(events for _, events, _ in outcomes)
        with Control(manager.socket_path, timeout=60) as control:
            report = control.call("verify")
            assert report["ok"], report["problems"]
            # Spaces of clients that were killed while the daemon was, too, go after resume_timeout.
            while control.status()["slots"]["allocated"]:
                control.call("compact")
            for device in control.status()["devices"]:
                control.call("swapoff", path=device["path"])
            document = control.status()
            assert document["pool"]["live_bytes"] == 0
            assert document["slots"]["phys"] == 0
        manager.restart()
        after = Size.of(manager)
        # The socket that READY went through may not be closed yet.
        assert after.descriptors <= before.descriptors + 1
        assert after[1:] <= before[1:]
        assert private_bytes(manager.pid) < 64 << 20


def torture(
    manager: ServiceManager, shards: int, place: Place, directory: Path, kills: int
) -> list[tuple[list[str], int, int]]:
    """Kill so often; returns what the clients that lived have found."""
    chooser = random.Random(SEED)
    workers = [Worker(manager.socket_path, SEED + number) for number in range(WORKERS)]
    # Forked before any thread is started.
    seeds = iter(range(SEED + 1000, SEED + 1000 + kills + 10))
    clients = [Client.start(manager, next(seeds), make) for make in KINDS]
    operator = Operator(manager, directory, place, SEED)
    for thread in (*workers, operator):
        thread.start()
    try:
        for turn in range(kills):
            operator.enough.wait(chooser.uniform(0, 0.05))
            strike(manager, shards, chooser)
            progress(workers, clients)
            failed = [worker for worker in workers if worker.error is not None]
            if failed or operator.error is not None or any(c.outcome for c in clients):
                print(f"after kill {turn}:", manager.log[-20_000:], sep="\n")
                break
    finally:
        operator.enough.set()
        for worker in workers:
            worker.stop = True
        for thread in (*workers, operator):
            thread.join()
        outcomes = [client.end() for client in clients]
    for error in [*(worker.error for worker in workers), operator.error]:
        if error is not None:
            raise error
    return outcomes


def strike(manager: ServiceManager, shards: int, chooser: random.Random) -> None:
    """Kill something, and see to it that it comes back."""
    whom = chooser.choice(["shard", "shard", "supervisor", "all", "restart"])
    alive = children(manager.pid)
    if whom == "shard" and shards > 1 and alive:
        kill(chooser.choice(alive))
    elif whom == "supervisor":
        kill(manager.pid)
        manager.start()
    elif whom == "restart":
        manager.restart()
    else:
        manager.kill()
        manager.start()


def progress(workers: list[Worker], clients: list[Client]) -> None:
    """Wait until everybody has done something since."""
    marks = [worker.done for worker in workers]
    done = [client.done for client in clients]
    for worker, mark in zip(workers, marks, strict=True):
        while worker.is_alive() and worker.done < mark + 10:
            worker.join(0.01)
    for client, mark in zip(clients, done, strict=True):
        while client.outcome is None and client.done <= mark:
            client.listen(0.05)


def test_clients_that_die_leave_nothing(tmp_path: Path) -> None:
    """In the middle of anything, beside a daemon that dies, too."""
    chooser = random.Random(SEED)
    with service("pool.max=6M", "server.shards=2", "server.resume_timeout=2s") as manager:
        with Control(manager.socket_path) as control:
            control.call("swapon", path=str(tmp_path / "swap"), size=32 << 20)
        clients = []
        for number in range(6):
            client = Client.start(manager, SEED + number, KINDS[number % len(KINDS)])
            while not client.done:
                client.listen(0.05)
            clients.append(client)
        for number, client in enumerate(clients):
            if number % 2:
                kill(chooser.choice(children(manager.pid)))
            client.kill()
        with Control(manager.socket_path, timeout=60) as control:
            while control.status()["slots"]["allocated"]:
                control.call("compact")
            document = control.status()
            assert document["pool"]["live_bytes"] == 0
            assert document["slots"]["phys"] == 0
            assert not control.call("spaces")["spaces"]
