"""A daemon's engine, its clients, operators and devices in one thread, at the whim of a seed.

Time, devices and the order of everything are simulated: operations and their device requests
overlap and are performed in any order; devices fail for a while, fail for good, tear what they
write, and flip bits; memory runs short; operators steer; and at any point the process may be killed
and goes on from its memory. Which of it happens in a run, and how often, the seed decides, too (a
swarm: a run that does little but one thing finds what a run that does everything hides).

Invariants:
- The same seed gives the same run: `trace` is a digest of all that happened.
- Whatever a client loads is what it stored last, or a PageLostError of a page that was really hit.
- When all is freed nothing is left.

What a device has acknowledged stays, but for the faults above: there is no flush to wait for, since
processes are killed here and not machines, and what is on swap is worthless after a machine's end.

This module must not know sockets, threads, or the wire.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from simulation.devices import FaultyDevice, Span
from support.engine import KIB, KINDS, MIB, Rig, UnkindDevice, ids, make_engine, numbers_of, page
from support.interleaving import Running, Scheduler
from vswapd.clusters import slots_of
from vswapd.errors import BadSlotError, PageLostError, SwapoffError, UnbackedError
from vswapd.groups import Space
from vswapd.pressure import Free
from vswapd.settings import GroupLimits
from vswapd.swap_table import Tag, places_of, tags_of
from vswapd_backends.base import U64, IoKind, IoRequest
from vswapd_backends.segment import CHECK_BYTES
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES

_CHECK_EVERY: Final = 40
"""Steps between two looks at all sums: they take longer than a step."""
SETTINGS: Final = (
    *("codec", "dense", "pool", "enabled", "store", "verify"),
    *("budget", "idle", "rate", "watermarks", "groups", "memory"),
)


@dataclass
class Swarm:
    """What a run does, and how often; made of its seed."""

    pool_max: int
    devices: list[int]
    limits: GroupLimits
    rates: dict[str, float]
    sizes: list[int]
    kinds: list[str]
    settings: list[str]
    """Which are changed."""

    @classmethod
    def of(cls, chooser: random.Random) -> Swarm:
        """Each thing that may happen does so in half of the runs."""

        def some(rate: float) -> float:
            return rate * chooser.random() if chooser.random() < 0.5 else 0.0

        limits = GroupLimits()
        if chooser.random() < 0.2:
            limits = GroupLimits(
                pool_max=chooser.choice([200, 500]) * KIB,
                device_max=chooser.choice([None, 500 * KIB, 2 * MIB]),
            )
        return cls(
            pool_max=chooser.choice([300 * KIB, 700 * KIB, MIB, 3 * MIB]),
            devices=chooser.choice([[], [4], [6, 5], [24], [12, 3, 8]]),
            limits=limits,
            rates={
                "close": some(0.05),
                "kill": some(0.02),
                "swap": some(0.08),
                "settings": some(0.1),
                "stir": 0.05 + some(0.3),
                "flip": some(0.03),
                "tear": some(0.05),
                "read error": some(0.1),
                "write error": some(0.2),
                "dies": some(0.004),
                "cancel": some(0.05),
            },
            sizes=chooser.choice([[1], [1, 5, 30], [30, 120], [64, 250], [1, 120, 512]]),
            kinds=chooser.sample(KINDS, chooser.randint(1, len(KINDS))),
            settings=chooser.sample(SETTINGS, chooser.randint(1, len(SETTINGS))),
        )


@dataclass
class Client:
    """One space, what it should hold, and what it has asked for."""

    key: str
    space: Space
    held: dict[int, bytes | None] = field(default_factory=dict)
    """Slot -> page; None: rejected."""
    task: Running | None = None
    closing: bool = False
    requests: int = 0
    again: tuple[U64, list[bytes]] | None = None
    """An overwriting that a kill left in doubt: to be asked for again."""
    after_kill: Callable[[], None] | None = None
    """What to think of the request under way if the process is killed now."""


class World:
    """See the module. `run`, then `end`."""

    def __init__(self, seed: int) -> None:
        self.seed: Final = seed
        self.chooser: Final = random.Random(seed)
        self.swarm: Final = Swarm.of(self.chooser)
        self._trace = hashlib.blake2b(digest_size=8)
        self._all_devices: list[FaultyDevice] = []
        """Also those that were drained and closed."""
        self.rig: Final[Rig] = make_engine(
            self.swarm.pool_max,
            devices=self.swarm.devices,
            default_group=self.swarm.limits,
            make_device=self._make_device,
        )
        self.scheduler = Scheduler(seed + 1, self._stepped)
        self.clients: list[Client] = []
        self.pages = 0
        """Pages that were stored, loaded and freed, by requests that ended well."""
        self.kills = self.lost = self.steps = 0
        self._made = self._spaces = 0
        self._damaged: set[int] = set()
        """Slots, by number, whose entries were read where they were damaged."""
        self._damage_reads = 0
        self._memory_left = 1 << 40
        """Bytes of memory that the machine has left."""
        self._watch_memory()

    @property
    def trace(self) -> str:
        """A digest of all that has happened."""
        return self._trace.hexdigest()

    def _note(self, what: object) -> None:
        self._trace.update(repr(what).encode())

    # Devices

    def _make_device(self, extents: int, path: str) -> FaultyDevice:
        device = FaultyDevice(extents, path, self.chooser, self.swarm.rates, self._note)
        device.on_damage_read = self._damage_read
        self._all_devices.append(device)
        return device

    @property
    def _devices(self) -> list[FaultyDevice]:
        return [device for device in self.rig.devices if isinstance(device, FaultyDevice)]

    def _damage_read(self, device: FaultyDevice, span: Span) -> None:
        """What lies there is lost; also elsewhere, for whoever moves it takes the damage along."""
        self._damage_reads += 1
        self._damaged |= self._slots_in(device, [span])

    def _slots_in(self, device: FaultyDevice, spans: list[Span]) -> set[int]:
        """Numbers of slots whose entries have bytes in these spans of a device."""
        core = self.rig.engine.core
        entry = core.devices.find(device.path)
        found: set[int] = set()
        if entry is None or not spans:
            return found
        numbers = slots_of(core.clusters.open_clusters())
        words = core.table.words[numbers]
        on = tags_of(words) == Tag.PHYS
        numbers, places = numbers[on], places_of(words[on])
        begins = places.address - entry.number_of(0) * EXTENT_BYTES
        ends = begins + CHECK_BYTES + places.length
        for begin, end in spans:
            found |= set(numbers[(begins < end) & (ends > begin)].tolist())
        return found

    def _flip(self) -> None:
        """A bit of a device changes by itself."""
        if self.rig.devices:
            self.chooser.choice(self._devices).flip()

    def _device_dies(self) -> None:
        if self.rig.devices:
            self.chooser.choice(self._devices).dead = True

    # Clients

    def _open(self) -> None:
        self._spaces += 1
        key = f"client {self._spaces}"
        group = self.chooser.choice(["0", "7"])
        space = self.rig.engine.open_space(uid=int(group), group=group, key=key)
        self.clients.append(Client(key, space))

    def _contents(self, count: int) -> list[bytes]:
        first, self._made = self._made, self._made + count
        kinds = self.chooser.choices(self.swarm.kinds, k=3)
        return [page(kinds[i % 3], (first + i) % 1500) for i in range(count)]

    def _ask(self, client: Client) -> None:
        """Something for an idle client to do."""
        if client.again is not None:
            slots, pages = client.again
            client.again = None
            self._store(client, slots, pages)
            return
        held = list(client.held)
        some = ids(
            *self.chooser.sample(held, min(len(held), self.chooser.choice(self.swarm.sizes)))
        )
        verb = self.chooser.choice(["new", "new", "over", "load", "load", "load", "free"])
        if verb == "new" and len(held) > 3000:
            verb = "free"
        if verb == "new" or not held:
            self._store(client, None, self._contents(self.chooser.choice(self.swarm.sizes)))
        elif verb == "over":
            self._store(client, some, self._contents(len(some)))
        elif verb == "load":
            self._load(client, some)
        else:
            self._free(client, some)

    def _store(self, client: Client, slots: U64 | None, pages: list[bytes]) -> None:
        engine = self.rig.engine
        folio = engine.prepare(b"".join(pages))
        client.requests += 1
        folio.request = number = client.requests
        before = client.space.slots.slots

        def stored(at: U64, reason: object) -> None:
            held: list[bytes | None] = list(pages)
            if reason is not None:
                held = [None] * len(pages)
            self._damaged.difference_update(numbers_of(at).tolist())
            client.held.update(zip(at.tolist(), held, strict=False))
            self.pages += len(at)

        def done(task: Running) -> None:
            client.task = None
            if task.cancelled:
                if slots is not None:
                    client.again = slots, pages
                else:
                    assert client.closing or client.space.slots.slots == before
            elif task.error is not None:
                assert client.closing, task.error
                assert isinstance(task.error, BadSlotError)
            else:
                stored(task.result.slots, task.result.reason)

        def after_kill() -> None:
            last = self.rig.engine.last_answer(client.space)
            if slots is not None:
                client.again = slots, pages
            elif last is not None and last.request == number:
                stored(last.slots, None)

        self._begin_for(client, "store", engine.store(client.space, folio, slots), done, after_kill)

    def _load(self, client: Client, slots: U64) -> None:
        failed_before = {device.path: len(device.failed_reads) for device in self._devices}

        def done(task: Running) -> None:
            client.task = None
            if task.cancelled or (client.closing and task.error is not None):
                return
            expected = [client.held[slot] for slot in slots.tolist()]
            if isinstance(task.error, UnbackedError):
                assert None in expected
            elif isinstance(task.error, PageLostError):
                self._check_lost(task.error, failed_before)
            else:
                assert task.error is None, task.error
                assert [bytes(got) for got in task.result] == expected, "other bytes"
                self.pages += len(slots)

        self._begin_for(client, "load", self.rig.engine.load(client.space, slots), done, None)

    def _check_lost(self, error: PageLostError, failed_before: dict[str, int]) -> None:
        """What is lost is damaged, or lies where a read has failed meanwhile."""
        lost = set(numbers_of(error.slots).tolist())
        self.lost += len(lost)
        lost -= self._damaged
        for device in self._devices:
            if lost:
                lost -= self._slots_in(
                    device, device.failed_reads[failed_before.get(device.path, 0) :]
                )
        assert not lost, f"slot numbers {sorted(lost)} were lost by nothing"

    def _free(self, client: Client, slots: U64) -> None:
        client.requests += 1
        number = client.requests

        def freed() -> None:
            for slot in slots.tolist():
                del client.held[slot]
            self._damaged.difference_update(numbers_of(slots).tolist())
            self.pages += len(slots)

        def done(task: Running) -> None:
            client.task = None
            if not task.cancelled and not (client.closing and task.error is not None):
                assert task.error is None, task.error
                freed()

        def after_kill() -> None:
            last = self.rig.engine.last_answer(client.space)
            if last is not None and last.request == number:
                freed()

        operation = self.rig.engine.free(client.space, slots, number)
        self._begin_for(client, "free", operation, done, after_kill)

    def _begin_for(
        self,
        client: Client,
        verb: str,
        operation: Any,
        done: Callable[[Running], None],
        after_kill: Callable[[], None] | None,
    ) -> None:
        client.after_kill = after_kill
        client.task = self.scheduler.start(f"{verb} {client.key}", operation, done)

    def _close(self, client: Client) -> None:
        client.closing = True
        self.clients.remove(client)
        engine = self.rig.engine
        self.scheduler.start(f"close {client.key}", engine.close_space(client.space))

    # Everybody else

    def _stir(self) -> None:
        """The shrinker, or an operator, begins something."""
        engine = self.rig.engine
        what = self.chooser.choice(["writeback", "shrink", "shrink", "compact", "verify", "time"])
        if any(task.name == what for task in self.scheduler.running):
            return
        match what:
            case "writeback":
                self.scheduler.start(what, engine.writeback(self.chooser.choice([1, MIB])))
            case "shrink" if count := engine.shrinker.count():
                self.scheduler.start(what, engine.shrinker.scan(count))
            case "compact":
                self.scheduler.start(what, engine.compact())
            case "verify":
                self._verify()
            case _:
                self.rig.clock.advance(self.chooser.choice([1, 70]))

    def _verify(self) -> None:
        before, damaged = self._bad_reads, bool(self._damaged)

        def done(task: Running) -> None:
            if task.cancelled or task.result.ok:
                return
            problems = task.result.problems
            assert all("on a device do not agree" in text for text in problems), problems
            assert damaged or self._bad_reads > before, problems

        self.scheduler.start("verify", self.rig.engine.verify(), done)

    @property
    def _bad_reads(self) -> int:
        """Reads that have failed, or brought damage."""
        return self._damage_reads + sum(len(device.failed_reads) for device in self._all_devices)

    def _swap(self) -> None:
        """A device comes, or one is drained."""
        if len(self.rig.devices) < 3 and self.chooser.random() < 0.5:
            self.rig.swapon(self.chooser.randint(2, 20), self.chooser.choice([0, 1]))
            return
        if not self.rig.devices:
            return
        device = self.chooser.choice(self.rig.devices)
        name = f"swapoff {device.path}"
        if any(task.name == name for task in self.scheduler.running):
            return

        def done(task: Running) -> None:
            if isinstance(task.error, SwapoffError) or task.cancelled:
                assert self.rig.device_of(device).state != "draining"
            else:
                assert task.error is None, task.error
                self.rig.devices.remove(device)
                device.close()

        self.scheduler.start(name, self.rig.engine.swapoff(device.path), done)

    def _set(self) -> None:
        choose = self.chooser.choice
        match choose(self.swarm.settings):
            case "codec":
                self.rig.set(codec=choose(["lz4", "lz4hc:1", "zstd:1"]))
            case "dense":
                self.rig.set(dense=choose(["", "zstd:1", "zstd:3"]), dense_age=choose([0.0, 5.0]))
            case "pool":
                self.rig.set(pool_max=choose([300 * KIB, 700 * KIB, 2 * MIB]))
            case "enabled":
                self.rig.set(pool_enabled=choose([True, True, False]))
            case "store":
                self.rig.set(store_enabled=choose([True, True, True, False]))
            case "verify":
                self.rig.set(verify=choose(["always", "never"]))
            case "budget":
                self.rig.set(write_budget=choose([0, 1, 500 * KIB, 5 * MIB]))
            case "idle":
                self.rig.set(idle_age=choose([0.0, 1.0, 100.0]))
            case "rate":
                self.rig.set(shrinker_rate=choose([0, 100 * KIB, MIB]))
            case "watermarks":
                low = choose([0.2, 0.5, 0.85])
                self.rig.set(low_watermark=low, high_watermark=choose([low + 0.05, 0.95]))
            case "groups":
                self.rig.set(groups={"7": self._limits()})
            case "memory":
                self._memory_left = choose([0, 10 * KIB, 300 * KIB, 1 << 40])
                self.rig.set(pool_reserve=choose([0, 100 * KIB]))

    def _limits(self) -> GroupLimits:
        choose = self.chooser.choice
        return GroupLimits(
            pool_max=choose([None, 0, 100 * KIB, MIB]),
            device_max=choose([None, 0, 300 * KIB]),
            writeback=choose([True, True, False]),
        )

    def _watch_memory(self) -> None:
        self.rig.engine.watch_memory(lambda: Free(self._memory_left, "the machine"))

    def _cancel(self) -> None:
        begun = [t for t in self.scheduler.running if t.steps and not t.name.startswith("close")]
        if begun:
            self.scheduler.cancel(self.chooser.choice(begun))

    # Kills

    def _kill(self) -> None:
        """The process is gone; what it had asked its devices for is done, or never was."""
        self.kills += 1
        self._note("kill")
        for task in self.scheduler.running:
            for request in task.air:
                if isinstance(request, IoRequest):
                    self._perform_half(request)
            _bury(task.operation)
        self.scheduler = Scheduler(self.chooser.randrange(1 << 30), self._stepped)
        self.rig.recover()
        self._watch_memory()
        engine = self.rig.engine
        for client in self.clients:
            found = engine.reopen_space(client.key)
            assert found is not None, f"{client.key} was lost"
            client.space = found
            if client.task is not None and client.after_kill is not None:
                client.after_kill()
            client.task = client.after_kill = None
            assert client.space.slots.slots == len(client.held), client.key
        for orphan in engine.orphans():
            # A client had gone, and its slots were being freed.
            self.scheduler.start(f"close {orphan.key}", engine.close_space(orphan))
        self._check()

    def _perform_half(self, request: IoRequest) -> None:
        """What a device does for a process that dies: all, nothing, or the beginning."""
        what = self.chooser.choice(["all", "nothing", "beginning"])
        if what == "all":
            request.perform()
        elif what == "beginning" and request.kind is IoKind.WRITE:
            assert isinstance(request.device, UnkindDevice)
            start = request.extent * EXTENT_BYTES + request.offset
            arrived = BLOCK_BYTES * self.chooser.randrange(len(request.data) // BLOCK_BYTES)
            request.device.data[start : start + arrived] = request.data[:arrived]

    # The run

    def _stepped(self) -> None:
        self.steps += 1
        if self.steps % _CHECK_EVERY == 0:
            self._check()

    def _check(self) -> None:
        assert not (problems := self.rig.sums()), problems

    def step(self) -> None:
        """A moment: something may be asked for, something may happen, something goes on."""
        rates, chance = self.swarm.rates, self.chooser.random
        if len(self.clients) < 3:
            self._open()
        idle = [client for client in self.clients if client.task is None]
        if idle and chance() < 0.6:
            self._ask(self.chooser.choice(idle))
        happenings: list[tuple[str, Callable[[], None]]] = [
            ("stir", self._stir),
            ("swap", self._swap),
            ("settings", self._set),
            ("flip", self._flip),
            ("dies", self._device_dies),
            ("cancel", self._cancel),
            ("kill", self._kill),
            ("close", lambda: self._close(self.chooser.choice(self.clients))),
        ]
        for name, happen in happenings:
            if rates[name] and chance() < rates[name]:
                self._note(name)
                if name != "stir" or len(self.scheduler.running) < 8:
                    happen()
        for _ in range(self.chooser.randint(0, 5)):
            self.scheduler.step()
        self._note((self.pages, self.lost, len(self.scheduler.running)))

    def run(self, moments: int) -> None:
        """So many moments, then the end.

        Raises:
            AssertionError: a promise was broken.
        """
        for _ in range(moments):
            self.step()
        self._end()

    def _end(self) -> None:
        """Let everything finish, compare every page, free everything, and look for remains."""
        self.scheduler.drain()
        for client in self.clients:
            if client.again is not None:
                self._ask(client)
        self.scheduler.drain()
        for device in self.rig.devices:
            device.fails = None
        self.swarm.rates["read error"] = 0.0
        for client in self.clients:
            self._compare(client)
        for client in self.clients:
            self.rig.close(client.space)
        self.rig.settle()
        core, picture = self.rig.engine.core, self.rig.engine.snapshot()
        self._check()
        assert (picture.slots.allocated, picture.table_bytes, picture.pool.bytes) == (0, 0, 0)
        assert not any(device.used_bytes for device in picture.devices)
        assert not any(device.pins.any() for device in core.devices)
        assert all(group.device_pending == 0 for group in core.groups)
        assert core.budget_pending == 0

    def _compare(self, client: Client) -> None:
        backed = {slot: page for slot, page in client.held.items() if page is not None}
        assert client.space.slots.slots == len(client.held)
        found = self.rig.peek(client.space, np.array(list(backed), np.uint64))
        for (slot, expected), got in zip(backed.items(), found, strict=True):
            if got is None:
                number = numbers_of(ids(slot)).item()
                assert number in self._damaged, f"slot {slot:#x} was lost by nothing"
            else:
                assert got == expected, f"slot {slot:#x} has other bytes"


def _bury(operation: object) -> None:
    """What a killed process had under way is never ended: it must not clean up after its death."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(operation))


def simulate(seed: int, moments: int) -> World:
    """A whole run.

    Raises:
        Exception: a promise was broken, or the engine broke; a note says how to do it again.
    """
    world = World(seed)
    try:
        world.run(moments)
    except Exception as error:
        last = "\n  ".join(world.scheduler.history[-30:])
        # What is looked at last depends on when a run ends: its length belongs to its name.
        error.add_note(
            f"seed {seed}, step {world.steps}; again: make simulate SEED={seed} MOMENTS={moments}\n"
            f"{world.swarm}\nthe last steps were:\n  {last}"
        )
        world.scheduler.abandon()
        raise
    return world
