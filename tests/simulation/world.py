"""A daemon's engine, its clients, operators and devices in one thread, at the whim of a seed.

Time, devices and the order of everything are simulated: operations and their device requests
overlap and are performed in any order; devices fail now and then, fail for good, are full for a
while, hang for a while, tear what they write, and flip bits; memory runs short; operators steer;
and at any point the process may be killed and goes on from its memory, perhaps without one of its
devices. Which of it happens in a run, and how often, the seed decides, too (see `swarm`).

Invariants:
- The same seed gives the same run: `trace` is a digest of all that happened.
- Whatever a client loads is what it stored last, or a PageLostError of a page that was really hit.
- A slot that is not the client's own is refused; an id of a cluster that was given back never comes
  again.
- When all is freed nothing is left, and what is out of use on devices comes back in time.
- What has happened is counted (`happened`), so that nobody can believe in what never does.

What a device has acknowledged stays, but for the faults above: there is no flush to wait for, since
processes are killed here and not machines, and what is on swap is worthless after a machine's end.

This module must not know sockets, threads, or the wire.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from simulation.codecs import Remembering
from simulation.devices import FaultyDevice, Span
from simulation.swarm import Swarm
from support.engine import DAY, KIB, MIB, Rig, ids, make_engine, numbers_of, page
from support.interleaving import Running, Scheduler
from vswap.protocol import Reason
from vswapd.clusters import slots_of
from vswapd.errors import BadSlotError, PageLostError, SwapoffError, UnbackedError
from vswapd.groups import Group, Space
from vswapd.ledger import IDLE, STUCK, Column, Ledger, shared_region
from vswapd.pressure import Free
from vswapd.settings import GroupLimits
from vswapd.shrinker import Doing
from vswapd.swap_table import CLUSTER_SHIFT, Tag, places_of, tags_of
from vswapd_backends.base import I64, U64, IoKind, IoRequest
from vswapd_backends.segment import CHECK_BYTES
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES

_CHECK_EVERY: Final = 40
"""Steps between two looks at all sums: they take longer than a step."""
_LONG_STEPS: Final = 30
"""A request has been in the air for long if others took so many steps meanwhile."""
_LONGEST_PAUSE_S: Final = 3600.0
"""Between two tries of extents that are out of use; see vswapd.retrial."""
_WRONG: Final = 0.05
"""Of all requests, those for a slot that is not the client's."""
EVENTS: Final = (
    *("read error", "write error", "write to a full disk", "torn write", "flipped bit"),
    *("damage read", "a request in the air for long", "a request overtaken", "a device dies"),
    *("a kill", "a write cut off by a kill", "a device is gone after a kill", "a page lost"),
    *("an operation cancelled", "a wrong slot refused", "extents in use again", "the clock set"),
    *("swapon", "swapoff", "swapoff failed", "a bad block", "a page given up"),
    *(f"rejected: {reason.word}" for reason in Reason),
    *(f"shrinker: {doing}" for doing in Doing if doing.works),
)
"""What is to happen in every large set of runs; by the device's doing first."""


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
        self.happened: Counter[str] = Counter()
        """By what it was: see EVENTS."""
        self._all_devices: list[FaultyDevice] = []
        """Also those that were drained and closed."""
        region = shared_region(self.swarm.shards) if self.swarm.shards > 1 else None
        self._neighbour: Final = None if region is None else Ledger(region, 1)
        self.rig: Final[Rig] = make_engine(
            self.swarm.pool_max,
            devices=self.swarm.devices,
            default_group=self.swarm.limits,
            make_device=self._make_device,
            ledger=Ledger(region),
            pool_enabled=self.swarm.pool_enabled,
            dense=self.swarm.dense,
            dense_age=0.0,
        )
        self._hanging: set[object] = set()
        """Devices that perform nothing for now."""
        self.scheduler = self._scheduler(seed + 1)
        self._pool_before = self._limit_before = 0
        """What the pool occupied after the last step, and its limit."""
        self._moment = 0
        self._later: list[tuple[int, Callable[[], None]]] = []
        """What ends in which moment."""
        self._cpu_s = 0.0
        self.clients: list[Client] = []
        self.pages = 0
        """Pages that were stored, loaded and freed, by requests that ended well."""
        self.lost = self.steps = 0
        self._made = self._spaces = 0
        self._damaged: set[int] = set()
        """Slots, by number, whose entries were read where they were damaged."""
        self._damage_reads = 0
        self._memory_left = 1 << 40
        """Bytes of memory that the machine has left."""
        self._freed: deque[int] = deque(maxlen=200)
        """Slots that were somebody's."""
        self._in_cluster: Counter[int] = Counter()
        """Slots that clients hold, by the beginning of their ids: cluster and generation."""
        self._retired: set[int] = set()
        """Such beginnings that must not come again."""
        self._furnish()
        for _ in range(self.chooser.choice([0, 0, 1, 4])):
            self._set()

    @property
    def trace(self) -> str:
        """A digest of all that has happened."""
        return self._trace.hexdigest()

    def _note(self, what: object) -> None:
        self._trace.update(repr(what).encode())

    # Devices

    def _furnish(self) -> None:
        """Give an engine what surrounds it."""
        engine = self.rig.engine
        engine.watch_memory(lambda: Free(self._memory_left, "the machine"))
        engine.on_pressure = lambda: None
        engine.shrinker.recompression.cpu_clock = self._cpu_clock
        self._remember()
        lose = engine.core.lose

        def watched(numbers: I64, expected: U64, group: Group) -> int:
            """What is given up is damaged, or could not be read by itself."""
            still = engine.core.words_now(numbers) == expected
            given_up = set(numbers[still].tolist())
            unread = (self._alone_in(d, d.failed_reads) for d in self._devices)
            assert given_up <= self._damaged.union(*unread), "what can be read was given up"
            self._damaged |= given_up
            self.happened["a page given up"] += len(given_up)
            return lose(numbers, expected, group)

        engine.core.lose = watched  # type: ignore[method-assign]

    def _remember(self) -> None:
        """Pages are compressed once; to be called when there may be codecs that there were not."""
        for pool in self.rig.engine.core.zswap.pools:
            if not isinstance(pool.codec, Remembering):
                pool.codec = Remembering(pool.codec)

    def _scheduler(self, seed: int) -> Scheduler:
        return Scheduler(seed, self._stepped, hanging=self._hanging, slow=self.swarm.slow)

    def _cpu_clock(self) -> float:
        # The real one would make a run depend on how fast the machine is.
        self._cpu_s += self.swarm.compute_s
        return self._cpu_s

    def _make_device(self, extents: int, path: str) -> FaultyDevice:
        device = FaultyDevice(
            extents, path, self.chooser, self.swarm.rates, self._note, self.happened
        )
        device.on_damage_read = self._damage_read
        self._all_devices.append(device)
        return device

    @property
    def _devices(self) -> list[FaultyDevice]:
        return [device for device in self.rig.devices if isinstance(device, FaultyDevice)]

    def _damage_read(self, device: FaultyDevice, span: Span) -> None:
        """What lies there is lost; also elsewhere, for whoever moves it takes the damage along."""
        self._damage_reads += 1
        self.happened["damage read"] += 1
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

    def _alone_in(self, device: FaultyDevice, spans: list[Span]) -> set[int]:
        """The same of entries for which alone just these spans would be read."""
        wanted = set(spans)
        found = set()
        for number in self._slots_in(device, spans):
            places = places_of(self.rig.engine.core.table.words[number : number + 1])
            _, extent = self.rig.engine.core.devices.device_of(places.number.item())
            begin = extent * EXTENT_BYTES + places.offset.item()
            end = begin + CHECK_BYTES + places.length.item()
            blocks = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
            if (blocks[0] * BLOCK_BYTES, blocks[1] * BLOCK_BYTES) in wanted:
                found.add(number)
        return found

    def _bad_block(self) -> None:
        if self.rig.devices:
            self.chooser.choice(self._devices).spoil()

    def _flip(self) -> None:
        """A bit of a device changes by itself."""
        if self.rig.devices:
            self.chooser.choice(self._devices).flip()

    def _device_dies(self) -> None:
        if self.rig.devices:
            self.chooser.choice(self._devices).dead = True
            self.happened["a device dies"] += 1

    def _disk_full(self) -> None:
        """Writes fail for a while, on one device or on all: they may be files of one disk."""
        if not self.rig.devices:
            return
        devices = self._devices
        some = self.chooser.choice([[self.chooser.choice(devices)], devices])
        for device in some:
            device.full = True
        self._later.append((self._moment + self.chooser.randint(1, 100), lambda: _empty(some)))

    def _hang(self) -> None:
        """A device performs nothing for a while, unless all wait for it."""
        if not self.rig.devices:
            return
        device = self.chooser.choice(self._devices)
        begun = self.steps
        self._hanging.add(device)

        def end() -> None:
            waiting = (r for task in self.scheduler.running for r in task.air)
            late = sum(isinstance(r, IoRequest) and r.device is device for r in waiting)
            if self.steps - begun >= _LONG_STEPS:
                self.happened["a request in the air for long"] += late
            self._hanging.discard(device)

        self._later.append((self._moment + self.chooser.randint(1, 60), end))

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
        some = self._some(held)
        if self.chooser.random() < _WRONG and (self._freed or len(self.clients) > 1):
            self._ask_wrongly(client, some)
            return
        verb = self.chooser.choice(self.swarm.verbs)
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

    def _some(self, held: list[int]) -> U64:
        """Some of a client's slots to ask for."""
        count = min(len(held), self.chooser.choice(self.swarm.sizes))
        match self.swarm.picks:
            case "random":
                return ids(*self.chooser.sample(held, count))
            case "oldest":
                return ids(*held[:count])
            case _:
                first = self.chooser.randint(0, len(held) - count)
                return ids(*held[first : first + count])

    def _ask_wrongly(self, client: Client, some: U64) -> None:
        """For slots of which one is not the client's own: refused, and nothing is changed."""
        others = [slot for other in self.clients if other is not client for slot in other.held]
        wrong = [slot for slot in self._freed if slot not in client.held]
        strange = self.chooser.choice(others[-1:] + wrong[-50:] or [1])
        slots = np.append(some, np.uint64(strange))
        engine = self.rig.engine
        match self.chooser.choice(["over", "load", "free"]):
            case "over":
                folio = engine.prepare(b"".join(self._contents(len(slots))))
                operation: Any = engine.store(client.space, folio, slots)
            case "load":
                operation = engine.load(client.space, slots)
            case _:
                client.requests += 1
                operation = engine.free(client.space, slots, client.requests)

        def done(task: Running) -> None:
            client.task = None
            if not task.cancelled and not client.closing:
                assert isinstance(task.error, BadSlotError), task.error or task.result
                self.happened["a wrong slot refused"] += 1

        self._begin_for(client, "wrong", operation, done, None)

    def _got(self, slots: U64) -> None:
        """New slots: none of an id that was given back with its cluster."""
        clusters, counts = np.unique(slots >> np.uint64(CLUSTER_SHIFT), return_counts=True)
        for cluster, count in zip(clusters.tolist(), counts.tolist(), strict=True):
            assert cluster not in self._retired, f"ids of cluster {cluster:#x} came again"
            self._in_cluster[cluster] += count

    def _gave_up(self, slots: U64) -> None:
        self._freed.extend(slots[:10].tolist())
        clusters, counts = np.unique(slots >> np.uint64(CLUSTER_SHIFT), return_counts=True)
        for cluster, count in zip(clusters.tolist(), counts.tolist(), strict=True):
            self._in_cluster[cluster] -= count
            if not self._in_cluster[cluster]:
                self._retired.add(cluster)

    def _store(self, client: Client, slots: U64 | None, pages: list[bytes]) -> None:
        engine = self.rig.engine
        folio = engine.prepare(b"".join(pages))
        client.requests += 1
        folio.request = number = client.requests
        before = client.space.slots.slots

        def stored(at: U64, reason: Reason | None) -> None:
            held: list[bytes | None] = list(pages)
            if reason is not None:
                held = [None] * len(pages)
                self.happened[f"rejected: {reason.word}"] += 1
            self._damaged.difference_update(numbers_of(at).tolist())
            if slots is None and not client.closing:
                self._got(at)
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
        self.happened["a page lost"] += len(lost)
        lost -= self._damaged
        for device in self._devices:
            if lost:
                # Neighbours are read together, but none is lost by what another one lies on.
                lost -= self._alone_in(
                    device, device.failed_reads[failed_before.get(device.path, 0) :]
                )
        assert not lost, f"slot numbers {sorted(lost)} were lost by nothing"

    def _free(self, client: Client, slots: U64) -> None:
        client.requests += 1
        number = client.requests

        def freed() -> None:
            for slot in slots.tolist():
                del client.held[slot]
            if not client.closing:
                self._gave_up(slots)
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
        if client.held:
            self._gave_up(ids(*client.held))
        if self.chooser.random() < 0.5:
            engine.detach(client.space)
        self.scheduler.start(f"close {client.key}", engine.close_space(client.space))

    # Everybody else

    def _stir(self) -> None:
        """An operator begins something, or time passes."""
        engine = self.rig.engine
        what = self.chooser.choice(["writeback", "compact", "verify", "time", "time"])
        if any(task.name == what for task in self.scheduler.running):
            return
        match what:
            case "writeback":
                self.scheduler.start(what, engine.writeback(self.chooser.choice([1, MIB, 8 * MIB])))
            case "compact":
                self.scheduler.start(what, engine.compact())
            case "verify":
                self._verify()
            case _:
                self.rig.clock.advance(self.chooser.choice([1, 1, 1, 70, 70, 70, 4000, DAY]))
                self._set_clock()

    def _set_clock(self) -> None:
        """Somebody sets the machine's clock, mostly not."""
        by = self.chooser.choice([0] * 12 + [-4000, 4000, -DAY, DAY, -900 * DAY, 900 * DAY])
        if by:
            self.rig.clock.set_by += by
            self.happened["the clock set"] += 1

    def _shrink(self) -> None:
        """As its thread does: count, then scan, or sleep until a time that is still to come."""
        if any(task.name == "shrink" for task in self.scheduler.running):
            return
        shrinker = self.rig.engine.shrinker
        out_of_use = self._extents_out_of_use
        count = shrinker.count()
        if self._extents_out_of_use < out_of_use:
            self.happened["extents in use again"] += 1
        if count:
            self.happened[f"shrinker: {shrinker.doing}"] += 1
            self.scheduler.start("shrink", shrinker.scan(count))
        else:
            due, now = shrinker.next_wakeup(), self.rig.clock()
            assert due is None or due > now, f"{shrinker.why}: would wake at {due}, it is {now}"

    @property
    def _extents_out_of_use(self) -> int:
        return sum(device.map.bad for device in self.rig.engine.core.devices)

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
            self.happened["swapon"] += 1
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
                self.happened["swapoff failed"] += not task.cancelled
            else:
                assert task.error is None, task.error
                self.happened["swapoff"] += 1
                self.rig.devices.remove(device)
                device.close()

        give_up = self.chooser.random() < self.swarm.rates["give up"]
        operation = self.rig.engine.swapoff(device.path, give_up=give_up)
        self.scheduler.start(name, operation, done)

    def _set(self) -> None:
        choose = self.chooser.choice
        match choose(self.swarm.settings):
            case "codec":
                self.rig.set(codec=choose(["lz4", "lz4hc:1", "zstd:1"]))
                self._remember()
            case "dense":
                self.rig.set(dense=choose(["", "zstd:1", "zstd:3"]), dense_age=choose([0.0, 5.0]))
                self._remember()
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

    def _neighbour_moves(self) -> None:
        """Another shard grows, shrinks, or writes, of what is limited for all together."""
        if self._neighbour is None:
            return
        day = int(self.rig.clock.wall() // DAY)
        pool = self.rig.engine.core.settings.pool_max
        self._neighbour.enter(Column.POOL, self.chooser.choice([0, pool // 4, pool // 2]))
        self._neighbour.enter(Column.BUDGET_DAY, self.chooser.choice([day, day - 1]))
        self._neighbour.enter(Column.BUDGET, self.chooser.choice([0, 300 * KIB, 4 * MIB]))
        columns = self._neighbour.columns_of("7")
        assert columns is not None
        for column in columns:
            self._neighbour.enter(column, self.chooser.choice([0, 100 * KIB]))
        for basis in (self._neighbour.basis_of(columns), Column.POOL_BASIS):
            self._neighbour.enter(basis, 300 * KIB * (self._moment % 2))
        self._neighbour.enter(Column.SHRINKING, (IDLE, STUCK, pool // 2)[self._moment % 3])

    def _neighbour_ends(self) -> None:
        if self._neighbour is not None:
            columns = self._neighbour.columns_of("7")
            assert columns is not None
            for column in (*Column, *columns, self._neighbour.basis_of(columns)):
                self._neighbour.enter(column, 0)

    def _cancel(self) -> None:
        begun = [t for t in self.scheduler.running if t.steps and not t.name.startswith("close")]
        if begun:
            self.scheduler.cancel(self.chooser.choice(begun))
            self.happened["an operation cancelled"] += 1

    # Kills

    def _kill(self) -> None:
        """The process is gone; what it had asked its devices for is done, or never was."""
        self.happened["a kill"] += 1
        for task in self.scheduler.running:
            for request in task.air:
                if isinstance(request, IoRequest):
                    self._perform_half(request)
            _bury(task.operation)
        seed = self.chooser.randrange(1 << 30)
        self.happened["a request overtaken"] += self.scheduler.overtaken
        self.scheduler = self._scheduler(seed)
        if self.chooser.random() < self.swarm.rates["gone"]:
            self._device_gone()
        self.rig.recover()
        self._furnish()
        engine = self.rig.engine
        for client in self.clients:
            found = engine.reopen_space(client.key)
            assert found is not None, f"{client.key} was lost"
            client.space = found
            if client.task is not None and client.after_kill is not None:
                client.after_kill()
            client.task = client.after_kill = None
            self._compare_slots(client)
        for orphan in engine.orphans():
            # A client had gone, and its slots were being freed.
            self.scheduler.start(f"close {orphan.key}", engine.close_space(orphan))
        self._check()

    def _device_gone(self) -> None:
        """A device cannot be opened again: what lies there is lost, and nothing else."""
        if there := [device for device in self._devices if not device.gone]:
            device = self.chooser.choice(there)
            self._damaged |= self._slots_in(device, [(0, len(device.data))])
            self._damage_reads += 1
            device.gone = True
            self.happened["a device is gone after a kill"] += 1

    def _perform_half(self, request: IoRequest) -> None:
        """What a device does for a process that dies: all, nothing, or the beginning."""
        if not isinstance(request.device, FaultyDevice):
            return
        what = self.chooser.choice(["all", "nothing", "beginning"])
        if what == "all":
            request.perform()
        elif what == "beginning" and request.kind is IoKind.WRITE:
            self.happened["a write cut off by a kill"] += 1
            start = request.extent * EXTENT_BYTES + request.offset
            arrived = BLOCK_BYTES * self.chooser.randrange(len(request.data) // BLOCK_BYTES)
            request.device.data[start : start + arrived] = request.data[:arrived]

    # The run

    def _stepped(self) -> None:
        self.steps += 1
        self._check_growth()
        if self.steps % _CHECK_EVERY == 0:
            self._check()

    def _check_growth(self) -> None:
        """No step has made the pool grow beyond what all shards together may have."""
        core = self.rig.engine.core
        now, limit = core.zswap.in_use_bytes, core.pressure.limit
        # The limit may have fallen at the step's end.
        most = max(limit, self._limit_before) - core.ledger.others(Column.POOL)
        assert now <= max(self._pool_before, most)
        self._pool_before, self._limit_before = now, limit

    def _check(self) -> None:
        assert not (problems := self.rig.sums()), problems

    def step(self) -> None:
        """A moment: something may be asked for, something may happen, something goes on."""
        rates, chance = self.swarm.rates, self.chooser.random
        self._moment += 1
        self._finish_due()
        if len(self.clients) < self.swarm.clients:
            self._open()
        for client in self.clients:
            if client.task is None and chance() < self.swarm.eager:
                self._ask(client)
        happenings: list[tuple[str, Callable[[], None]]] = [
            ("stir", self._stir),
            ("shrink", self._shrink),
            ("swap", self._swap),
            ("settings", self._set),
            ("flip", self._flip),
            ("bad block", self._bad_block),
            ("full disk", self._disk_full),
            ("hang", self._hang),
            ("dies", self._device_dies),
            ("cancel", self._cancel),
            ("neighbour", self._neighbour_moves),
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

    def _finish_due(self, *, all_of_it: bool = False) -> None:
        """End what was to last for a while."""
        due = [end for moment, end in self._later if all_of_it or moment <= self._moment]
        if due:
            self._later = [later for later in self._later if later[1] not in due]
            for end in due:
                end()

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
        self._finish_due(all_of_it=True)
        self._neighbour_ends()
        self.scheduler.drain()
        for client in self.clients:
            if client.again is not None:
                self._ask(client)
        self.scheduler.drain()
        for device in self.rig.devices:
            device.fails = None
            device.bad_blocks.clear()
        self.swarm.rates["read error"] = 0.0
        for client in self.clients:
            self._compare(client)
        for client in self.clients:
            self.rig.close(client.space)
        self.rig.settle()
        for _ in range(40):
            self.rig.clock.advance(_LONGEST_PAUSE_S)
            self.rig.settle()
        core, picture = self.rig.engine.core, self.rig.engine.snapshot()
        self._check()
        assert not any(device.map.retired for device in core.devices), "extents are out of use"
        assert (picture.slots.allocated, picture.table_bytes, picture.pool.bytes) == (0, 0, 0)
        assert not any(device.used_bytes for device in picture.devices)
        assert not any(device.pins.any() for device in core.devices)
        assert all(group.device_pending == 0 for group in core.groups)
        assert core.budget.pending == 0
        self.happened["a request overtaken"] += self.scheduler.overtaken

    def _compare_slots(self, client: Client) -> None:
        """A client has the slots that it was told of, and no others."""
        found = self.rig.engine.slots_after(client.space, 0, 1 << 30)
        assert found.tolist() == sorted(client.held), client.key
        assert client.space.slots.slots == len(client.held), client.key

    def _compare(self, client: Client) -> None:
        backed = {slot: page for slot, page in client.held.items() if page is not None}
        self._compare_slots(client)
        found = self.rig.peek(client.space, np.array(list(backed), np.uint64))
        for (slot, expected), got in zip(backed.items(), found, strict=True):
            if got is None:
                number = numbers_of(ids(slot)).item()
                assert number in self._damaged, f"slot {slot:#x} was lost by nothing"
            else:
                assert got == expected, f"slot {slot:#x} has other bytes"


def _empty(devices: list[FaultyDevice]) -> None:
    """There is room on their disk again."""
    for device in devices:
        device.full = False


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
