"""Operations that overlap, at the whim of a seed: clients, writeback, swapoff, merging, closing.

Each client asks for one thing at a time, as one on a connection does; everything else overlaps with
everything. `VSWAPD_SEEDS=n` runs n seeds of each kind.

Invariants:
- After every step all sums agree, and limits are kept.
- Whatever a client reads is what it stored last; what was cancelled has changed nothing.
- When all is freed nothing is left: no slots, no memory, no extents, no pins.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pytest

from support.engine import KIB, KINDS, MIB, Rig, ids, make_engine, page
from support.interleaving import Running, Scheduler
from vswapd.errors import BadSlotError, PageLostError, SwapoffError, UnbackedError
from vswapd.groups import Space
from vswapd.settings import GroupLimits
from vswapd.vswap import Stored
from vswapd_backends.base import SEGMENT_BYTES, U64

SEEDS: Final = int(os.environ.get("VSWAPD_SEEDS", "4"))
STEPS: Final = 350


@dataclass
class Client:
    """One space, what it should hold, and what it has asked for."""

    space: Space
    held: dict[int, bytes | None] = field(default_factory=dict)
    """Slot -> page; None: rejected."""
    task: Running | None = None
    closing: bool = False


@dataclass(frozen=True)
class Weather:
    """What may happen in a run."""

    pool_max: int = 700 * KIB
    devices: tuple[int, ...] = (6, 5)
    write_errors: float = 0.0
    read_errors: float = 0.0
    cancels: float = 0.0
    closes: float = 0.02
    swapoffs: float = 0.02
    limits: GroupLimits = field(default_factory=GroupLimits)
    straight: float = 0.0
    """How often the pool is switched off or on again."""


class Storm:
    """Clients and background work, all under way at once."""

    def __init__(self, seed: int, weather: Weather) -> None:
        self.weather = weather
        self.rig: Rig = make_engine(
            weather.pool_max, devices=weather.devices, default_group=weather.limits
        )
        self.clock = self.rig.clock
        self.chooser = random.Random(seed)
        self.scheduler = Scheduler(seed + 1, self.check)
        self.clients: list[Client] = []
        self.background: list[Running] = []
        self.made = 0
        self.device_names = 0
        self.rejected = 0
        for device in self.rig.devices:
            device.fails = self._fails

    # Faults

    def _fails(self, kind: str, nth: int) -> bool:
        rate = self.weather.write_errors if kind == "write" else self.weather.read_errors
        return self.chooser.random() < rate

    # Checks

    def check(self) -> None:
        core = self.rig.engine.core
        assert not (problems := self.rig.sums()), problems
        limit = self.weather.limits.device_max
        overlapping = 1 + len(self.scheduler.running)
        assert core.zswap.in_use_bytes <= core.settings.pool_max + overlapping * SEGMENT_BYTES
        for group in core.groups:
            assert limit is None or group.device_bytes <= limit
            assert group.device_pending >= 0
        assert core.budget.pending >= 0

    # Clients

    def open(self) -> None:
        group = self.chooser.choice(["0", "7"])
        self.clients.append(Client(self.rig.space(group)))

    def _pages(self, count: int) -> list[bytes]:
        first, self.made = self.made, self.made + count
        kinds = self.chooser.choices(KINDS, k=3)
        return [page(kinds[i % 3], (first + i) % 3000) for i in range(count)]

    def ask(self, client: Client) -> None:
        """Something for an idle client to do."""
        slots = list(client.held)
        count = min(len(slots), self.chooser.choice([1, 5, 30, 120, 300]))
        some = ids(*self.chooser.sample(slots, count))
        verb = self.chooser.choice(["new", "new", "new", "over", "load", "load", "free"])
        if verb == "new" or not slots:
            self._ask_store(client, None, self._pages(self.chooser.choice([1, 5, 30, 120])))
        elif verb == "over":
            self._ask_store(client, some, self._pages(len(some)))
        elif verb == "load":
            self._ask(client, "load", self.rig.engine.load(client.space, some), some)
        else:
            self._ask(client, "free", self.rig.engine.free(client.space, some), some)

    def _ask_store(self, client: Client, slots: U64 | None, pages: list[bytes]) -> None:
        folio = self.rig.engine.prepare(b"".join(pages))
        operation = self.rig.engine.store(client.space, folio, slots)
        before = client.space.slots.slots

        def done(task: Running) -> None:
            client.task = None
            if task.cancelled:
                assert client.closing or client.space.slots.slots == before
            elif task.error is not None:
                assert client.closing
                assert isinstance(task.error, BadSlotError)
            else:
                self._stored(client, task.result, pages)

        client.task = self.scheduler.start(f"store {client.space.id}", operation, done)

    def _stored(self, client: Client, stored: Stored, pages: list[bytes]) -> None:
        held: list[bytes | None] = list(pages)
        if stored.reason is not None:
            self.rejected += 1
            held = [None] * len(pages)
        client.held.update(zip(stored.slots.tolist(), held, strict=False))

    def _ask(self, client: Client, verb: str, operation: object, slots: U64) -> None:
        finish: Callable[[Running, Client, U64], None] = getattr(self, f"_done_{verb}")

        def done(task: Running) -> None:
            client.task = None
            if not task.cancelled and not (client.closing and task.error is not None):
                finish(task, client, slots)

        name = f"{verb} {client.space.id}"
        client.task = self.scheduler.start(name, operation, done)  # type: ignore[arg-type]

    def _done_load(self, task: Running, client: Client, slots: U64) -> None:
        expected = [client.held[slot] for slot in slots.tolist()]
        if isinstance(task.error, UnbackedError):
            assert None in expected
        elif isinstance(task.error, PageLostError):
            assert self.weather.read_errors
            assert set(task.error.slots.tolist()) <= set(slots.tolist())
        else:
            assert task.error is None, task.error
            assert [bytes(got) for got in task.result] == expected

    def _done_free(self, task: Running, client: Client, slots: U64) -> None:
        assert task.error is None
        for slot in slots.tolist():
            del client.held[slot]

    def close(self, client: Client) -> None:
        """A client goes away, whatever it has asked for."""
        client.closing = True
        self.clients.remove(client)
        self.scheduler.start(f"close {client.space.id}", self.rig.engine.close_space(client.space))

    # Background

    def stir(self) -> None:
        """Some background work begins."""
        engine = self.rig.engine
        match self.chooser.choice(
            ["writeback", "writeback", "shrink", "shrink", "compact", "verify"]
        ):
            case "writeback":
                nbytes = self.chooser.choice([1, MIB])
                self._begin("writeback", engine.writeback(nbytes))
            case "shrink" if (count := engine.shrinker.count()) and not self._busy("shrink"):
                self._begin("shrink", engine.shrinker.scan(count))
            case "compact" if not self._busy("compact"):
                self._begin("compact", engine.compact())
            case "verify" if not self._busy("verify"):
                self._begin("verify", engine.verify(), self._verified)
            case _:
                self.clock.advance(1)

    def _busy(self, name: str) -> bool:
        return any(task.name == name for task in self.scheduler.running)

    def _begin(
        self, name: str, operation: object, done: Callable[[Running], None] | None = None
    ) -> None:
        self.background.append(self.scheduler.start(name, operation, done))  # type: ignore[arg-type]

    def _verified(self, task: Running) -> None:
        if not task.cancelled and not self.weather.read_errors:
            assert task.result.ok, task.result.problems

    def swap(self) -> None:
        """A device comes, or one is drained."""
        if len(self.rig.devices) < 3:
            self.device_names += 1
            extents, name = self.chooser.randint(2, 8), f"late{self.device_names}"
            self.rig.swapon(extents, self.chooser.randint(-1, 1), name).fails = self._fails
            return
        device = self.chooser.choice(self.rig.devices)
        if self._busy(f"swapoff {device.path}"):
            return

        def done(task: Running) -> None:
            if isinstance(task.error, SwapoffError) or task.cancelled:
                assert self.rig.device_of(device).state != "draining"
            else:
                self.rig.devices.remove(device)
                device.close()

        self._begin(f"swapoff {device.path}", self.rig.engine.swapoff(device.path), done)

    # The run

    def rage(self, steps: int) -> None:
        weather, chance = self.weather, self.chooser.random
        for _ in range(steps):
            if len(self.clients) < 3:
                self.open()
            idle = [client for client in self.clients if client.task is None]
            if idle and chance() < 0.5:
                self.ask(self.chooser.choice(idle))
            if chance() < 0.1 and len(self.scheduler.running) < 8:
                self.stir()
            if chance() < weather.swapoffs:
                self.swap()
            if chance() < weather.closes:
                self.close(self.chooser.choice(self.clients))
            if chance() < weather.straight:
                self.rig.set(pool_enabled=not self.rig.engine.core.settings.pool_enabled)
            if chance() < 0.02:
                self.rig.set(codec=self.chooser.choice(["lz4", "lz4hc:1", "zstd:1"]))
            if chance() < 0.03:
                self.rig.set(dense=self.chooser.choice(["", "zstd:1", "zstd:3"]), dense_age=5.0)
            if chance() < weather.cancels:
                self._cancel_one()
            for _ in range(self.chooser.randint(0, 4)):
                self.scheduler.step()

    def _cancel_one(self) -> None:
        begun = [t for t in self.scheduler.running if t.steps and not t.name.startswith("close")]
        if begun:
            self.scheduler.cancel(self.chooser.choice(begun))

    def end(self) -> None:
        """Let everything finish, compare every page, free everything, and look for remains."""
        self.scheduler.drain()
        for device in self.rig.devices:
            device.fails = None
        for client in self.clients:
            backed = {s: p for s, p in client.held.items() if p is not None}
            assert self.rig.load(client.space, np.array(list(backed), np.uint64)) == list(
                backed.values()
            )
            assert client.space.slots.slots == len(client.held)
        report = self.rig.verify()
        assert report.ok, report.problems
        for client in self.clients:
            self.rig.close(client.space)
        self.rig.settle()
        picture = self.rig.engine.snapshot()
        assert not (problems := self.rig.sums()), problems
        assert (picture.slots.allocated, picture.table_bytes, picture.pool.bytes) == (0, 0, 0)
        assert not any(device.used_bytes for device in picture.devices)
        assert not any(device.pins.any() for device in self.rig.engine.core.devices)
        assert not self.rig.engine.core.zswap._pins.any()
        assert all(group.device_pending == 0 for group in self.rig.engine.core.groups)
        assert self.rig.engine.core.budget.pending == 0


WEATHERS: Final = {
    "calm": Weather(closes=0.0, swapoffs=0.0),
    "closing": Weather(closes=0.1),
    "draining": Weather(swapoffs=0.2, pool_max=MIB),
    "cancelling": Weather(cancels=0.2, swapoffs=0.05),
    "straight": Weather(straight=0.1, swapoffs=0.1, cancels=0.02),
    "write errors": Weather(write_errors=0.15, straight=0.05, cancels=0.05),
    "read errors": Weather(read_errors=0.15, swapoffs=0.1, straight=0.05),
    "tiny": Weather(pool_max=300 * KIB, devices=(4,), cancels=0.02, swapoffs=0.05),
    "limited": Weather(
        limits=GroupLimits(pool_max=200 * KIB, device_max=500 * KIB), straight=0.02, cancels=0.02
    ),
}


@pytest.mark.parametrize("name", WEATHERS)
def test_overlapping_operations_keep_every_page(name: str) -> None:
    """In any order of steps and of device requests, nobody reads anything but what he stored."""
    for seed in range(SEEDS):
        storm = Storm(seed, WEATHERS[name])
        try:
            storm.rage(STEPS)
            storm.end()
        except BaseException:
            print(f"seed {seed}; the last steps were:", *storm.scheduler.history[-40:], sep="\n  ")
            storm.scheduler.abandon()
            raise
