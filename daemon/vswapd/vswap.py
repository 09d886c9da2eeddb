"""The engine: stores, loads and frees of slots, over whatever stands behind them.

A slot's id never changes while its page moves between zero, pool and device. Stores are all or
nothing per folio; loads take any mixture of backings and do not consume.

Invariants: invariants 1 to 19 of ARCHITECTURE.md hold between any two steps of its operations.

The engine is a plain synchronous object: no sockets, no threads, no wall clock, no randomness. It
is not thread-safe; whoever drives it holds one lock per step (see `vswapd_backends.base`). Only
`prepare`, which is the codec's work, needs no lock.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from vswap.protocol import Reason
from vswapd import snapshot as snapshots
from vswapd.admission import Admission, Refusal
from vswapd.answers import Answer
from vswapd.clusters import SlotSet, bad_slots, refuse_duplicates, slots_of
from vswapd.compaction import Compaction, CompactResult
from vswapd.control import Control, KeptDevice, Origin
from vswapd.core import Core
from vswapd.device_moves import DeviceMoves, Drained
from vswapd.errors import (
    ArgumentError,
    BadSlotError,
    BatchError,
    EngineError,
    OutOfServiceError,
)
from vswapd.fallback import Fallback
from vswapd.folio import Folio, prepare
from vswapd.groups import NOBODY, Holder, Space, refuse_closed
from vswapd.housekeeping import Report
from vswapd.ledger import Ledger
from vswapd.loading import Loading
from vswapd.memory import Shape, ShardMemory
from vswapd.pressure import Meter
from vswapd.recompression import Recompression
from vswapd.recovery import Reopen, recover
from vswapd.room import Room, reason_for
from vswapd.settings import Settings
from vswapd.shrinker import Shrinker
from vswapd.swap_table import (
    CLUSTER_SHIFT,
    CLUSTER_SLOTS,
    UNBACKED_WORD,
    ZERO_WORD,
    Tag,
    make_words,
)
from vswapd.verify import VerifyReport, verify
from vswapd.writeback import Cause, Stop, Writeback, Written
from vswapd_backends.base import I64, PAUSE, U64, Operation, Places, T
from vswapd_backends.codec import UnknownCodecError
from vswapd_blockdev.device import BlockDevice
from vswapd_blockdev.extents import ExtentMap

NO_ORIGIN: Final = Origin()
_CLOSE_CLUSTERS: Final = 64
"""Clusters of a closed space that are freed per step: 32768 slots, about 2 ms under the lock."""


# Not frozen: see Folio.
@dataclass(slots=True)
class Stored:
    """The outcome of a store."""

    slots: U64
    """The folio's slots; of a rejected new store: none."""
    reason: Reason | None = None
    """Why the folio was rejected; None: it was stored."""


class Engine:
    """Everything behind a slot. See the module's docstring for how to call it."""

    def __init__(
        self,
        *,
        settings: Settings,
        memory: ShardMemory,
        clock: Callable[[], float],
        wall: Callable[[], float] | None,
        ledger: Ledger,
    ) -> None:
        """Over memory in which nothing is kept yet; see `create` and `recover`."""
        try:
            self.core: Final = Core(settings, memory, clock, wall or clock, ledger)
        except UnknownCodecError as error:
            raise ArgumentError(str(error)) from None
        self._admission: Final = Admission(self.core)
        self._writeback: Final = Writeback(self.core)
        self._compaction: Final = Compaction(self.core, self._admission)
        self._fallback: Final = Fallback(self.core, self._writeback)
        self._room: Final = Room(self.core, self._admission, self._writeback, self._compaction)
        self._moves: Final = DeviceMoves(
            self.core, self._admission, self._writeback, self._fallback
        )
        self._recompression: Final = Recompression(self.core, self._admission)
        self.shrinker: Final = Shrinker(
            self.core, self._writeback, self._compaction, self._moves, self._recompression
        )
        self._loading: Final = Loading(self.core, self._fallback, self.shrinker, self._nudge)
        self.on_pressure: Callable[[], None] | None = None
        """Called, under the lock, when the shrinker has got something to do. Must be cheap."""

    @classmethod
    def create(
        cls,
        settings: Settings,
        clock: Callable[[], float],
        *,
        wall: Callable[[], float] | None = None,
        arena_bytes: int | None = None,
        ledger: Ledger | None = None,
        memory: ShardMemory | None = None,
    ) -> Engine:
        """An engine with new memory.

        Args:
            settings: what it starts with.
            clock: seconds, without leaps; only differences of it are used.
            wall: seconds since 1970, UTC, of which only days are used, for the write budget. It may
                leap, forwards and back. None: days are the clock's.
            arena_bytes: see `shape_for`.
            ledger: what it shares limits through; by default it is alone.
            memory: what nothing is kept in yet; None: made here.
        """
        ledger = ledger or Ledger()
        if memory is None:
            memory = ShardMemory.create(shape_for(settings, ledger.shard, arena_bytes))
        return cls(settings=settings, memory=memory, clock=clock, wall=wall, ledger=ledger)

    @classmethod
    def recover(
        cls,
        settings: Settings,
        clock: Callable[[], float],
        *,
        memory: ShardMemory,
        reopen: Reopen,
        wall: Callable[[], float] | None = None,
        ledger: Ledger | None = None,
    ) -> Engine:
        """An engine that goes on where another one has ended, wherever that was.

        All spaces are there, without clients (see `orphans`).

        Args:
            settings: what it starts with. `max_slots` is the memory's.
            clock: the one that the other had, or pages would grow old too early, or never.
            memory: what the other one has left.
            reopen: opens its devices again.
            wall: as of `create`.
            ledger: what it shares limits through; by default it is alone.

        Raises:
            ArgumentError: the settings do not fit the memory; it was left alone.
            RecoveryError: what is kept does not fit together.
        """
        settings = dataclasses.replace(settings, max_slots=memory.shape.max_slots)
        refuse_small_arena(settings, memory.pool.size)
        engine = cls(
            settings=settings, memory=memory, clock=clock, wall=wall, ledger=ledger or Ledger()
        )
        recover(engine.core, reopen)
        return engine

    # Spaces

    def open_space(
        self,
        *,
        uid: int,
        group: str,
        client: str = "",
        holder: Holder = NOBODY,
        key: str = "",
        joined: bool = False,
        name: str = "",
    ) -> Space:
        """A new space without slots.

        Args:
            uid: whose it is.
            group: what its pages are charged to.
            client: what it is called.
            holder: who the client is.
            key: what tells the parts of a space on several shards to be one.
            joined: whether this is a part that came after the first.
            name: of a space that is to outlive its client; empty: it has none.

        Raises:
            OutOfServiceError: there are too many spaces, or groups.
            ArgumentError: name or key is too long.
        """
        group_of = self.core.groups.get(group)
        # Shards take turns at numbers, so that none is another's.
        ledger = self.core.ledger
        number = self.core.control.next_space(ledger.shards, 1 + ledger.shard)
        space = Space(
            id=number,
            group=group_of,
            client=client,
            holder=holder,
            uid=uid,
            opened_at=self.core.clock(),
            slots=SlotSet(number),
            key=key,
            joined=joined,
            name=name,
            since=self.core.clock(),
        )
        self.core.control.add_space(space)
        space.group.spaces += not joined
        self.core.spaces[number] = space
        return space

    def detach(self, space: Space) -> None:
        """The space's client has gone, and may come back: see `reopen_space`."""
        space.attached = False
        space.since = self.core.clock()

    def orphans(self) -> list[Space]:
        """Spaces without a client, those that have been longest so first."""
        found = (space for space in self.core.spaces.values() if not space.attached)
        return sorted(found, key=lambda space: space.since)

    def reopen_space(
        self, key: str, *, number: int | None = None, holder: Holder = NOBODY
    ) -> Space | None:
        """The space that a client which has come back asks for; None: there is none.

        Of several it is the one that was opened last: a client that was not answered when it opened
        one has opened another, and knows of no other.

        Args:
            key: what it was opened with; not empty.
            number: its id, of a space that has several parts on this shard, or that anybody may
                have who is its user. None: any of them that nobody with another token has had
                meanwhile, since that has ended it for all earlier clients.
            holder: who the client is now.
        """
        for space in sorted(self.orphans(), key=lambda space: space.id, reverse=True):
            known, wanted = (
                (space.holder.token, holder.token) if number is None else (space.id, number)
            )
            if known == wanted and space.key == key and not space.closed:
                space.attached = True
                space.since = self.core.clock()
                space.holder = holder
                self.core.control.attach_space(space)
                return space
        return None

    def is_known(self, key: str, token: int) -> bool:
        """Whether there is a space of that key here which that client has, or has left."""
        return any(
            space.key == key and space.holder.token == token and not space.closed
            for space in self.core.spaces.values()
        )

    def bequeath(self, key: str, holder: Holder) -> None:
        """Spaces of that key which have no client here are of a new one now, and of no other."""
        for space in self.orphans():
            if space.key == key and not space.closed:
                self.forget_answer(space)
                space.holder = holder
                self.core.control.attach_space(space)

    def last_answer(self, space: Space) -> Answer | None:
        """The space's last request that gave it slots, or took some, and was given a number.

        None if there was none, or it was not carried out. It is right also after a kill in the
        middle of it. Of several requests under way in one space only the last is known: whoever
        begins one is to have had the answers to the others.
        """
        return self.core.control.answers.last(space.record)

    def forget_answer(self, space: Space) -> None:
        """Whoever made the last request is not the one who asks next."""
        self.core.control.answers.withdrawn(space.record)

    def find_space(self, *, uid: int, name: str) -> Space | None:
        """A user's space of that name, whether it has a client or not; None: there is none."""
        return next(
            (
                space
                for space in self.core.spaces.values()
                if (space.uid, space.name) == (uid, name) and not space.closed
            ),
            None,
        )

    def slots_after(self, space: Space, slot: int, most: int) -> U64:
        """A space's slots that come after one, ascending; at most so many.

        Args:
            space: whose.
            slot: the last one that is known already; 0: none is.
            most: how many at most; 1 or more.
        """
        refuse_closed(space)
        if not space.slots.clusters:
            return np.empty(0, np.uint64)
        words, clusters = self.core.table.words, self.core.clusters
        found: list[U64] = []
        count = 0
        # By id: generations stand above numbers in it, so clusters are not in the ids' order.
        firsts = clusters.ids_of(np.array(list(space.slots.clusters), np.int64) << CLUSTER_SHIFT)
        for first in np.sort(firsts).tolist():
            if first + CLUSTER_SLOTS <= slot:
                continue
            numbers = clusters.resolve(space.id, np.array([first], np.uint64)) + np.arange(
                CLUSTER_SLOTS
            )
            ids = clusters.ids_of(numbers[words[numbers] != 0])
            ids = ids[ids > slot]
            found.append(ids)
            count += len(ids)
            if count >= most:
                break
        return np.concatenate(found)[:most] if found else np.empty(0, np.uint64)

    def named_spaces(self, uid: int) -> int:
        """How many spaces of a user have a name."""
        return sum(bool(space.name) and space.uid == uid for space in self.core.spaces.values())

    def close_space(self, space: Space) -> Operation[None]:
        """Free all slots of a space, in steps, and forget it. Its slots are refused at once.

        Idempotent: whoever calls it again, after it was ended in the middle, finishes it.
        """
        if space.id in self.core.spaces:
            self.core.control.closing_space(space)
        space.closed = True
        while space.slots.clusters:
            some = [c for c, _ in zip(space.slots.clusters, range(_CLOSE_CLUSTERS), strict=False)]
            numbers = slots_of(np.array(some, np.int64))
            numbers = numbers[self.core.table.words[numbers] != 0]
            self._release(space, numbers)
            self.core.stats.free_pages += len(numbers)
            self._nudge()
            yield PAUSE
        if self.core.spaces.pop(space.id, None) is not None:
            space.group.spaces -= not space.joined
            self.core.control.forget_space(space.record)

    # Store

    def prepare(self, pages: bytes | bytearray | memoryview) -> Folio:
        """A folio of these pages, by the codec of the moment; see `folio.prepare`."""
        return prepare(self.core.zswap.current, pages)

    def store(self, space: Space, folio: Folio, slots: U64 | None = None) -> Operation[Stored]:
        """Store a folio, all or nothing: to new slots, or over `slots`.

        Raises:
            BadSlotError, DuplicateSlotError, BatchError, NoSlotsError: nothing was changed.
        """
        numbers = self._store_target(space, folio, slots)
        compressed = folio.compressed
        if not self.core.settings.store_enabled:
            return self._reject(space, folio, numbers, slots, Reason.DISABLED)
        if self.core.pressure.critical and numbers is None:
            # Not even for zero pages: the table grows too.
            return self._reject(space, folio, numbers, slots, Reason.POOL_FULL)
        if compressed is None:
            return self._publish(space, folio, numbers, slots, None, Tag.ZSWAP)
        refusal = self._admission.admit(space.group, compressed)
        if refusal is not None:
            refusal = yield from self._room.make(space.group, compressed)
            # Anything may have changed while room was made: look again.
            try:
                numbers = self._store_target(space, folio, slots)
            except EngineError:
                self.core.enter(space.group)  # nothing comes of what was admitted
                raise
        if refusal is not None:
            return (yield from self._store_to_device(space, folio, numbers, slots, refusal))
        if numbers is None:
            numbers = self._allocate(space, folio)
        target = numbers if folio.zero is None else numbers[~folio.zero]
        places = self.core.zswap.append(space.group.index, target, compressed, self.core.clock())
        return self._publish(space, folio, numbers, slots, places, Tag.ZSWAP)

    def _store_target(self, space: Space, folio: Folio, slots: U64 | None) -> I64 | None:
        """The slots to overwrite, checked; None for a store to new ones, if there are enough."""
        refuse_closed(space)
        if slots is None:
            self.core.clusters.ensure(space.slots, folio.pages)
            return None
        if len(slots) != folio.pages:
            raise BatchError(f"{len(slots)} slots for {folio.pages} pages: one slot per page")
        refuse_duplicates(slots)
        return self._resolve(space, slots)[0]

    def _resolve(self, space: Space, slots: U64) -> tuple[I64, U64]:
        """Numbers and words of a space's allocated slots.

        Raises:
            BadSlotError: some are not.
        """
        refuse_closed(space)
        numbers = self.core.clusters.resolve(space.id, slots)
        words = self.core.table.words[numbers]
        if not words.all():
            raise bad_slots(slots[words == 0])
        return numbers, words

    def _store_to_device(
        self, space: Space, folio: Folio, numbers: I64 | None, slots: U64 | None, refusal: Refusal
    ) -> Operation[Stored]:
        """The second rung. New slots are allocated first: entries carry their slot's number."""
        compressed = folio.compressed
        assert compressed is not None
        obstacle = self._fallback.obstacle(space.group, compressed.compressed_bytes)
        if obstacle is not None:
            return self._reject(space, folio, numbers, slots, reason_for(refusal, obstacle))
        new = numbers is None
        if numbers is None:
            numbers = self._allocate(space, folio)
            self.core.publish(space, numbers, np.full(len(numbers), UNBACKED_WORD))
        target = numbers if folio.zero is None else numbers[~folio.zero]
        placed: Places | Stop = Stop.DEVICE_FULL
        try:
            placed = yield from self._fallback.place(space.group, target, compressed)
        finally:
            if new and isinstance(placed, Stop) and not space.closed:
                self._release(space, numbers)
                if folio.request is not None:
                    self.core.control.answers.withdrawn(space.record)
                numbers = None
        if isinstance(placed, Stop):
            if not new:
                numbers = self._store_target(space, folio, slots)
            return self._reject(space, folio, numbers, slots, reason_for(refusal, placed))
        try:
            if not new:
                numbers = self._store_target(space, folio, slots)
            elif space.closed:
                raise BadSlotError("the space was closed while the folio was stored")
            assert numbers is not None
            for number, entries, length in _per_extent(placed):
                self.core.devices.keep(number, entries, length)
            stored = self._publish(space, folio, numbers, slots, placed, Tag.PHYS)
        finally:
            self._fallback.settle(space.group, placed)
        self.core.stats.fallback_pages += len(placed.number)
        return stored

    def _publish(
        self,
        space: Space,
        folio: Folio,
        numbers: I64 | None,
        slots: U64 | None,
        places: Places | None,
        tag: Tag,
    ) -> Stored:
        """Write the words of a folio whose payload is in place. Nothing can fail after this."""
        if numbers is None:
            numbers = self._allocate(space, folio)
        # What is to be answered is made first.
        stored = Stored(self.core.clusters.ids_of(numbers) if slots is None else slots)
        if folio.zero is None:
            assert places is not None
            words = make_words(tag, places)
        else:
            words = np.full(folio.pages, ZERO_WORD)
            if places is not None:
                words[~folio.zero] = make_words(tag, places)
        if slots is None and tag is Tag.ZSWAP:
            length = folio.compressed.compressed_bytes if folio.compressed else 0
            self.core.publish_new(space, numbers, words, folio.zeros, length)
        else:
            self.core.publish(space, numbers, words)
        if slots is None and folio.request is not None:
            self.core.control.answers.stored(space.record)
        self.core.stats.store_pages += folio.pages
        self._fallback.close_idle()
        self._nudge()
        return stored

    def _allocate(self, space: Space, folio: Folio) -> I64:
        """New slots for a folio, written down as about to be the answer; see `answers`."""
        numbers = self.core.clusters.allocate(space.slots, folio.pages)
        if folio.request is not None:
            ids = self.core.clusters.ids_of(numbers)
            self.core.control.answers.storing(space.record, folio.request, ids)
        return numbers

    def _reject(
        self,
        space: Space,
        folio: Folio,
        numbers: I64 | None,
        slots: U64 | None,
        reason: Reason,
    ) -> Stored:
        """Refuse a folio: what stood in its slots is stale now, and must never come back."""
        self.core.stats.rejects[reason.word] += folio.pages
        if numbers is None or slots is None:
            return Stored(np.empty(0, np.uint64), reason)
        self.core.publish(space, numbers, np.full(len(numbers), UNBACKED_WORD))
        self._fallback.close_idle()
        self._nudge()
        return Stored(slots, reason)

    # Load

    def load(self, space: Space, slots: U64) -> Operation[list[bytes | memoryview]]:
        """The pages of slots, in the order asked for; a slot may stand twice. See `Loading`.

        Returns:
            n buffers of PAGE_BYTES each.

        Raises:
            BadSlotError, UnbackedError: some slots have no page.
            PageLostError: some pages could not be had; the others can be loaded without them.
        """
        return self._loading.load(space, slots)

    # Free

    def free(self, space: Space, slots: U64, request: int | None = None) -> Operation[None]:
        """Give slots back: their pages are gone, their ids wrong from now on.

        Args:
            space: the slots' space.
            slots: which; at most MAX_BATCH if it is a request.
            request: see `Folio.request`.

        Raises:
            BadSlotError, DuplicateSlotError: nothing was freed.
        """
        refuse_duplicates(slots)
        numbers, _ = self._resolve(space, slots)
        if request is not None:
            self.core.control.answers.freeing(space.record, request, slots)
        self._release(space, numbers)
        if request is not None:
            self.core.control.answers.freed(space.record)
        self.core.stats.free_pages += len(numbers)
        self._nudge()
        return
        yield  # an operation like the others, although it never needs anything

    def _release(self, space: Space, numbers: I64) -> None:
        if len(numbers):
            self.core.publish(space, numbers, np.zeros(len(numbers), np.uint64))
            self.core.clusters.release(space.slots, numbers)
            self._fallback.close_idle()

    # Steering

    def keep_run_time_settings(self, settings: Mapping[str, str]) -> None:
        """Keep what operators have set, by key, for the process after this one.

        Raises:
            ArgumentError: it is too much; what was kept before still is.
        """
        self.core.control.keep_settings(json.dumps(settings))

    def run_time_settings(self) -> dict[str, str]:
        """What operators have set, in this process or in one before it."""
        return run_time_settings(self.core.control)

    def apply(self, settings: Settings) -> None:
        """Change settings at run time.

        Raises:
            ArgumentError: an unknown codec, a pool larger than the arena, another table size;
                nothing was changed.
        """
        shape = shape_for(settings, self.core.ledger.shard)
        if shape.max_slots != self.core.memory.shape.max_slots:
            raise ArgumentError("table.max_slots cannot be changed while the daemon runs")
        refuse_small_arena(settings, self.core.zswap.arena.region.size)
        zswap = self.core.zswap
        try:
            current = zswap.pool_of(settings.codec)
            dense = zswap.pool_of(settings.dense) if settings.dense else None
        except UnknownCodecError as error:
            raise ArgumentError(str(error)) from None
        if dense is not zswap.dense:
            zswap.tried[:] = False
        zswap.current, zswap.dense = current, dense
        self.core.settings = settings
        self.core.look()
        self.core.groups.apply(settings)
        self.shrinker.settings_changed()
        self._poke()

    def swapon(
        self,
        device: BlockDevice,
        priority: int,
        extents_of: ExtentMap | None = None,
        origin: Origin = NO_ORIGIN,
    ) -> int:
        """Put a device into use; returns its index.

        Args:
            device: the device.
            priority: devices of a higher one are filled first.
            extents_of: which of its extents are this engine's; None: all.
            origin: what it takes to open it again, for `recover`.

        Raises:
            OutOfServiceError: there are too many devices, or one of this path is in use already.
            ArgumentError: path or origin cannot be kept.
        """
        if self.core.devices.find(device.path) is not None:
            raise OutOfServiceError(f"{device.path} is in use already")
        entry = self.core.devices.add(device, priority, extents_of)
        if entry is None:
            raise OutOfServiceError("no more devices can be added: swapoff one first")
        try:
            self.core.control.add_device(
                KeptDevice(
                    index=entry.index,
                    path=device.path,
                    priority=priority,
                    added=entry.added,
                    extents=device.extents,
                    origin=origin,
                )
            )
        except ArgumentError:
            self.core.devices.remove(entry)
            raise
        self.shrinker.settings_changed()
        self._poke()
        return entry.index

    def swapoff(self, path: str, *, give_up: bool = False) -> Operation[Drained]:
        """Move everything off a device and let go of it.

        The device object is closed by its owner afterwards.

        Args:
            path: the device's.
            give_up: pages that cannot be read, or not be moved since they are damaged, do not keep
                it in use: they are LOST until they are freed or overwritten. As Linux does with
                a swapped page that cannot be read (PTE_MARKER_POISONED).

        Raises:
            NoSuchDeviceError: no device of that path is in use.
            SwapoffError: what lies on it fits nowhere else, or cannot be read; it stays in use.
        """
        return self._then_nudge(self._moves.swapoff(path, give_up=give_up))

    def writeback(self, nbytes: int) -> Operation[Written]:
        """Write back at least `nbytes` of the coldest pages, or until something stops it."""
        return self._then_nudge(self._writeback.write_back(nbytes, Cause.WRITEBACK))

    def compact(self) -> Operation[CompactResult]:
        """Compact pools until no step pays any more."""
        return self._compaction.run()

    def verify(self) -> Operation[VerifyReport]:
        """Walk table, pools and devices; check every checksum and every sum."""
        return self._then_nudge(verify(self.core))

    def lock_memory(self) -> None:
        """Keep table, pool and state in RAM; see ShardMemory.lock."""
        self.core.memory.lock()

    def report_to(self, report: Report) -> None:
        """Have what goes wrong besides requests told, instead of raised; see `housekeeping`."""
        self.core.housekeeping.report = report

    def watch_memory(self, meter: Meter) -> None:
        """Let the pool give way where memory runs short; see `pressure`."""
        self.core.pressure.meter = meter
        self.core.look()

    def snapshot(self) -> snapshots.Snapshot:
        """What the engine holds and has done, frozen. Cheap."""
        return snapshots.take(self.core, self.shrinker)

    def _poke(self) -> None:
        if self.on_pressure is not None:
            self.core.housekeeping.do("the shrinker cannot be woken", self.on_pressure)

    def _nudge(self) -> None:
        if self.on_pressure is not None:
            self.core.housekeeping.do("the shrinker cannot be woken", self._wake)

    def _wake(self) -> None:
        if self.on_pressure is not None and self.shrinker.wanted():
            self.on_pressure()

    def _then_nudge(self, operation: Operation[T]) -> Operation[T]:
        """An operation whose end may leave the shrinker something: what was pinned goes then."""
        try:
            return (yield from operation)
        finally:
            self._nudge()


def run_time_settings(control: Control) -> dict[str, str]:
    """See Engine.run_time_settings."""
    text = control.settings()
    found: dict[str, str] = {} if text is None else json.loads(text)
    return found


def shape_for(settings: Settings, shard: int = 0, arena_bytes: int | None = None) -> Shape:
    """What an engine's memory is to be made for.

    Args:
        settings: what it starts with.
        shard: its number.
        arena_bytes: address space for the pool, the most that `pool_max` can be raised to; by
            default the machine's RAM, or pool_max and a little if that is more.
    """
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    least = settings.pool_max + (8 << 20)
    return Shape.fitting(
        shard=shard,
        max_slots=settings.max_slots,
        arena_bytes=max(least, ram if arena_bytes is None else arena_bytes),
    )


def refuse_small_arena(settings: Settings, arena: int) -> None:
    """Raise if an arena of so many bytes is too small for the settings.

    Raises:
        ArgumentError: it is.
    """
    if settings.pool_max > arena:
        raise ArgumentError(
            f"pool.max of {settings.pool_max} bytes is beyond the {arena} bytes of address "
            "space that were reserved at the start: restart the daemon for more"
        )


def _per_extent(places: Places) -> list[tuple[int, int, int]]:
    """Extent number, entries, compressed bytes, for each extent of a folio."""
    found = []
    for number in np.unique(places.number).tolist():
        which = places.number == number
        found.append((number, int(which.sum()), int(places.length[which].sum())))
    return found
