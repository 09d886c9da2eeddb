"""Several real clients at once, while everything moves behind their slots: each page is right.

`VSWAPD_SOAK=20 make test` does twenty times as much.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import pytest

import vswap
import vswap.aio
from support.daemon import running_daemon
from support.engine import page
from support.history import Event, History
from vswap.control import Control

CLIENTS: Final = 4
STEPS: Final = 200 * int(os.environ.get("VSWAPD_SOAK", "1"))
"""Requests of one task."""
TASKS: Final = 3
KINDS: Final = ("text", "mixed", "noise", "repeat", "zero")
_FORK = multiprocessing.get_context("fork")


def event(kind: str, slot: int, value: bytes, begin: float, end: float) -> Event:
    assert kind in {"store", "load"}
    return Event(kind, slot, value, begin, end)  # type: ignore[arg-type]


def test_the_checker_sees_what_is_wrong() -> None:
    """A stale page, a page of nobody's, and one from the future are found; overlap is allowed."""
    old, new = event("store", 1, b"old", 0, 1), event("store", 1, b"new", 2, 3)

    def problems(*loads: Event) -> int:
        return len(History([old, new, *loads]).problems())

    assert problems(event("load", 1, b"new", 4, 5), event("load", 1, b"old", 1, 1.5)) == 0
    assert problems(event("load", 1, b"old", 2.5, 5), event("load", 1, b"new", 2.5, 5)) == 0
    assert problems(event("load", 1, b"old", 4, 5)) == 1
    assert problems(event("load", 1, b"new", 1, 1.5)) == 1
    assert problems(event("load", 1, b"nobody's", 4, 5)) == 1
    assert problems(event("load", 2, b"old", 4, 5)) == 1


TIERS = ["lz4", "lz4,zstd:1", "zstd:1,zstd:9", "lz4hc:4,zstd:3", "lz4,zstd:3"]


class _Client:
    """One process's tasks over one space; slots are shared by its tasks."""

    def __init__(self, seed: int, space: vswap.aio.Space) -> None:
        self.chooser = random.Random(seed)
        self.space = space
        self.history = History()
        self.slots: list[int] = []
        self.busy: set[int] = set()
        """Slots that are being freed: nobody else may name them."""
        self.made = seed * 10_000_000
        self.rejects = 0

    def fresh(self, count: int) -> list[bytes]:
        self.made += count
        kinds = self.chooser.choices(KINDS, k=count)
        return [page(kind, self.made + i) for i, kind in enumerate(kinds)]

    def some(self) -> list[int]:
        there = [slot for slot in self.slots if slot not in self.busy]
        return self.chooser.sample(there, min(len(there), self.chooser.choice([1, 3, 40])))

    async def work(self) -> None:
        for _ in range(STEPS):
            what = self.chooser.choices(
                [self.store, self.overwrite, self.load, self.free], [3, 3, 6, 1.5]
            )[0]
            await what()

    async def store(self) -> None:
        pages = self.fresh(self.chooser.choice([1, 5, 64]))
        begin = time.monotonic()
        try:
            slots = (await self.space.store(b"".join(pages))).tolist()
        except vswap.Rejected:
            self.rejects += 1
            await self.free()
            return
        self.note("store", slots, pages, begin)
        self.slots += slots

    async def overwrite(self) -> None:
        slots = self.some()
        if not slots:
            return
        pages = self.fresh(len(slots))
        self.busy |= set(slots)  # two overlapping overwrites of one slot could end in any order
        begin = time.monotonic()
        try:
            await self.space.store(b"".join(pages), slots=slots)
        except vswap.Rejected as error:
            self.rejects += 1
            empty = set(error.slots.tolist())
            for slot in empty:
                self.slots.remove(slot)
            await self.space.free(sorted(empty))
            assert not set(slots) - empty
            self.busy -= set(slots)
            return
        self.note("store", slots, pages, begin)
        self.busy -= set(slots)

    async def load(self) -> None:
        slots = self.some()
        if not slots:
            return
        begin = time.monotonic()
        data = bytes(await self.space.load(slots))
        self.note("load", slots, [data[i : i + 4096] for i in range(0, len(data), 4096)], begin)

    async def free(self) -> None:
        slots = self.some()
        self.busy |= set(slots)
        for slot in slots:
            self.slots.remove(slot)
        # Loads that are under way are answered first: replies come in the order of requests.
        if slots:
            await self.space.free(slots)
        self.busy -= set(slots)

    def note(self, kind: str, slots: Sequence[int], pages: Sequence[bytes], begin: float) -> None:
        end = time.monotonic()
        for slot, content in zip(slots, pages, strict=True):
            self.history.events.append(event(kind, slot, content, begin, end))


def _client(path: Path, seed: int, pipe: Connection) -> None:
    async def run() -> tuple[list[str], int, int]:
        async with vswap.aio.connect(path, name=f"client {seed}") as space:
            client = _Client(seed, space)
            await asyncio.gather(*(client.work() for _ in range(TASKS)))
            left = [slot for slot in client.slots if slot not in client.busy]
            begin = time.monotonic()
            for at in range(0, len(left), 500):
                data = bytes(await space.load(left[at : at + 500]))
                pages = [data[i : i + 4096] for i in range(0, len(data), 4096)]
                client.note("load", left[at : at + 500], pages, begin)
            await space.free(left)
            return client.history.problems(), len(client.history.events), client.rejects

    try:
        pipe.send(asyncio.run(run()))
    except BaseException as error:  # noqa: BLE001 - the parent reports it
        pipe.send(([f"client {seed} failed: {error!r}"], 0, 0))


def _operate(control: Control, chooser: random.Random, extra: Path) -> None:
    """Something that operators do; what cannot be done now is no failure."""
    verbs: list[tuple[str, dict[str, Any]]] = [
        ("writeback", {"bytes": chooser.choice([1, 1 << 20, 1 << 30])}),
        ("compact", {}),
        ("verify", {}),
        ("set", {"key": "pool.tiers", "value": chooser.choice(TIERS)}),
        ("set", {"key": "pool.dense_age", "value": "0s"}),
        ("set", {"key": "pool.verify", "value": chooser.choice(["always", "never"])}),
        ("set", {"key": "pool.max", "value": chooser.choice(["2M", "3M", "6M"])}),
        ("swapon", {"path": str(extra), "size": 24 << 20}),
        ("swapoff", {"path": str(extra)}),
    ]
    verb, arguments = chooser.choice(verbs)
    try:
        answer = control.call(verb, **arguments)
    except vswap.OutOfService:
        return
    if verb == "verify":
        assert answer["ok"], answer["problems"]


@pytest.mark.parametrize("shards", [1, 3])
def test_every_page_is_what_it_can_be(shards: int, tmp_path: Path) -> None:
    """Concurrent clients with overlapping requests, a tiny pool, a device, an operator at work."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    with running_daemon("pool.max=3M", f"server.shards={shards}") as daemon:
        with Control(daemon.socket_path) as control:
            control.call("swapon", path=str(tmp_path / "swap"), size=64 << 20)
            pipes = []
            processes = []
            for number in range(CLIENTS):
                here, there = _FORK.Pipe()
                process = _FORK.Process(
                    target=_client, args=(daemon.socket_path, seed + number, there), daemon=True
                )
                process.start()
                there.close()
                pipes.append(here)
                processes.append(process)
            chooser = random.Random(seed)
            while not all(pipe.poll() for pipe in pipes):
                _operate(control, chooser, tmp_path / "extra")
            results = [pipe.recv() for pipe in pipes]
            for process in processes:
                process.join()
            assert [problem for problems, _, _ in results for problem in problems] == []
            assert all(events for _, events, _ in results)
            document = control.status()
            assert control.call("verify")["ok"]
        assert document["slots"]["allocated"] == 0
        assert document["traffic"]["writeback_pages"] > 0
        assert document["pool"]["live_bytes"] == 0
