"""Small engines for tests: pages of every kind, devices that fail on demand, looks without traces.

Invariants:
- Nothing here sleeps or asks a real clock: time is what `Clock` was set to.
- `Rig.peek` leaves everything as it was, reference bits and counters included.
- A `UnkindDevice` is as unkind as the contract allows: what a failed write touched, and what was
  discarded, is garbage afterwards.

This module must not know any one test.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import numpy as np

from vswapd.control import KeptDevice
from vswapd.device_moves import Drained
from vswapd.errors import PageLostError
from vswapd.groups import Space
from vswapd.ledger import Ledger
from vswapd.memory import ShardMemory
from vswapd.settings import GroupLimits, Settings
from vswapd.swap_table import Tag, places_of, tags_of
from vswapd.verify import VerifyReport, check_sums
from vswapd.vswap import Engine, Stored
from vswapd.writeback import Written
from vswapd_backends.base import PAGE_BYTES, U64, run
from vswapd_backends.segment import CHECK_BYTES
from vswapd_backends.swapdev import SwapDevice
from vswapd_blockdev.device import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    RUN_EXTENTS,
    BlockDevice,
    ReadError,
    WriteError,
)

MIB: Final = 1 << 20
KIB: Final = 1 << 10
ZERO: Final = bytes(PAGE_BYTES)
DAY: Final = 86400.0
UNLIMITED: Final = GroupLimits()

# Pages


@lru_cache(maxsize=1)
def _prose() -> bytes:
    chooser = random.Random(7)
    words = ["".join(chooser.choices("etaoinshrdlu", k=chooser.randint(2, 9))) for _ in range(24)]
    return " ".join(chooser.choices(words, k=12000)).encode()


@lru_cache(maxsize=8192)
def page(kind: str, seed: int) -> bytes:
    """A page that no other kind and seed gives.

    Kinds: `text` shrinks to about two fifths, `mixed` to about three quarters, `noise` not at all,
    `repeat` to some 30 bytes, `zero` is zero whatever the seed.
    """
    if kind == "zero":
        return ZERO
    stamp = seed.to_bytes(8, "little") + kind[:1].encode()
    chooser = random.Random(f"{kind} {seed}")
    match kind:
        case "noise":
            body = chooser.randbytes(PAGE_BYTES)
        case "repeat":
            body = bytes([seed % 255 + 1]) * PAGE_BYTES
        case "text" | "mixed":
            start = chooser.randrange(len(_prose()) - PAGE_BYTES)
            body = _prose()[start : start + PAGE_BYTES]
            if kind == "mixed":
                body = chooser.randbytes(PAGE_BYTES // 2) + body
        case _:
            raise ValueError(kind)
    return (stamp + body)[:PAGE_BYTES]


KINDS: Final = ("text", "mixed", "noise", "repeat", "zero")


def pages_of(kind: str, count: int, first: int = 0) -> list[bytes]:
    """`count` different pages of one kind (but for `zero`)."""
    return [page(kind, first + i) for i in range(count)]


def ids(*slots: int) -> U64:
    """Slot ids as requests carry them."""
    return np.array(slots, np.uint64)


# Clock and device


class Clock:
    """Seconds that only pass when they are told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.set_by = 0.0
        """By how much somebody has set the wall clock; negative: back."""

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        """The machine's clock, which shows the same until it is set."""
        return self.now + self.set_by

    def advance(self, seconds: float) -> None:
        self.now += seconds


class UnkindDevice:
    """A swap device in memory that holds its caller to the contract, and fails when told to."""

    def __init__(self, extents: int, path: str = "mem") -> None:
        self.path = path
        self.extents = extents
        self.direct = False
        self.encrypted = False
        self.data = bytearray(extents * EXTENT_BYTES)
        self.closed = False
        self.gone = False
        """Whether nobody can open it again: see Rig.reopen."""
        self.reads = 0
        self.writes = 0
        self.discards = 0
        self.written = 0
        """Bytes of writes that succeeded."""
        self.fails: Callable[[str, int], bool] | None = None
        """Asked with `read` or `write` and that operation's number, from 1: whether it fails."""
        self.bad_blocks: set[int] = set()
        """Blocks, counted from the device's first, of which every read fails."""
        self.lies = False
        """Writes are acknowledged and dropped."""
        self.tears: Callable[[int, int], int] | None = None
        """Asked with a write's extent and length: how much of it is there in the end, although it
        was acknowledged, or had failed."""

    def _span(self, extent: int, offset: int, length: int) -> slice:
        assert not self.closed, "a closed device was used"
        assert 0 <= extent < self.extents
        assert offset % BLOCK_BYTES == 0
        assert length % BLOCK_BYTES == 0
        assert length > 0
        assert offset >= 0
        assert offset + length <= EXTENT_BYTES
        start = extent * EXTENT_BYTES + offset
        return slice(start, start + length)

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        span = self._span(extent, offset, length)
        self.reads += 1
        if self.fails is not None and self.fails("read", self.reads):
            raise ReadError(self.path, "told to fail")
        if not self.bad_blocks.isdisjoint(
            range(span.start // BLOCK_BYTES, span.stop // BLOCK_BYTES)
        ):
            raise ReadError(self.path, "a bad block")
        return memoryview(bytes(self.data[span]))

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        if len(data) > EXTENT_BYTES:
            count, rest = divmod(len(data), EXTENT_BYTES)
            assert rest == offset == 0
            assert 1 < count <= min(RUN_EXTENTS, self.extents - extent)
            start = extent * EXTENT_BYTES
            span = slice(start, start + len(data))
        else:
            span = self._span(extent, offset, len(data))
        self.writes += 1
        arrived = len(data) if self.tears is None else self.tears(extent, len(data))
        part = slice(span.start, span.start + arrived)
        if self.fails is not None and self.fails("write", self.writes):
            self.data[span] = b"\xee" * len(data)
            if self.tears is not None:
                self.data[part] = data[:arrived]
            raise WriteError(self.path, "told to fail")
        self.written += len(data)
        if not self.lies:
            self.data[part] = data[:arrived]

    def discard(self, extent: int, count: int = 1) -> None:
        assert not self.closed, "a closed device was used"
        assert count >= 1
        assert 0 <= extent <= self.extents - count
        self.discards += 1
        span = slice(extent * EXTENT_BYTES, (extent + count) * EXTENT_BYTES)
        self.data[span] = b"\xdd" * (count * EXTENT_BYTES)

    def close(self) -> None:
        self.closed = True


# Engine


@dataclass
class Rig:
    """An engine with its clock and devices, and the verbs that tests use most."""

    engine: Engine
    clock: Clock
    devices: list[UnkindDevice] = field(default_factory=list)
    named: int = 0
    """Devices that there have been; the next one's number."""
    make_device: Callable[[int, str], UnkindDevice] = UnkindDevice
    """Asked with the extents and the path of each device that comes."""

    # Requests

    def space(self, group: str = "0", client: str = "") -> Space:
        return self.engine.open_space(uid=int(group), group=group, client=client)

    def store(
        self, space: Space, pages: Sequence[bytes], slots: U64 | Sequence[int] | None = None
    ) -> Stored:
        where = None if slots is None else np.asarray(slots, np.uint64)
        return run(self.engine.store(space, self.engine.prepare(b"".join(pages)), where))

    def put(self, space: Space, pages: Sequence[bytes]) -> U64:
        """Store to new slots, which must succeed."""
        stored = self.store(space, pages)
        assert stored.reason is None, stored.reason
        return stored.slots

    def load(self, space: Space, slots: U64 | Sequence[int]) -> list[bytes]:
        found = run(self.engine.load(space, np.asarray(slots, np.uint64)))
        return [bytes(page) for page in found]

    def free(self, space: Space, slots: U64 | Sequence[int]) -> None:
        run(self.engine.free(space, np.asarray(slots, np.uint64)))

    def close(self, space: Space) -> None:
        run(self.engine.close_space(space))

    def writeback(self, nbytes: int = 1 << 40) -> Written:
        """As much as will go by default."""
        return run(self.engine.writeback(nbytes))

    # Steering

    def set(self, **changes: Any) -> None:
        """Change settings; `groups` by name, `default_group` for all others."""
        self.engine.apply(dataclasses.replace(self.engine.core.settings, **changes))

    def swapon(self, extents: int = 16, priority: int = 0, path: str | None = None) -> UnkindDevice:
        device = self.make_device(extents, path or f"mem{self.named}")
        self.named += 1
        self.devices.append(device)
        self.engine.swapon(device, priority)
        return device

    def swapoff(self, device: UnkindDevice, *, give_up: bool = False) -> Drained:
        """Drain it and, as its owner does, close it."""
        drained = run(self.engine.swapoff(device.path, give_up=give_up))
        self.devices.remove(device)
        device.close()
        return drained

    def shrink(self, most: int = 200) -> list[str]:
        """Count and scan until the shrinker idles; what it did, step by step."""
        done: list[str] = []
        while count := self.engine.shrinker.count():
            done.append(self.engine.shrinker.doing)
            run(self.engine.shrinker.scan(count))
            assert len(done) < most, f"the shrinker spins: {done[-10:]}"
        return done

    def recover(self) -> None:
        """Drop the engine as a kill between two steps does, and go on with what it has left."""
        core = self.engine.core
        settings, ledger = core.settings, core.ledger
        memory = ShardMemory.adopt({kind: os.dup(fd) for kind, fd in core.memory.fds.items()})
        self.engine = Engine.recover(
            settings,
            self.clock,
            wall=self.clock.wall,
            memory=memory,
            reopen=self.reopen,
            ledger=ledger,
        )

    def reopen(self, kept: KeptDevice) -> tuple[BlockDevice, None] | None:
        """The device of that path, if it is still there."""
        return next(((d, None) for d in self.devices if d.path == kept.path and not d.gone), None)

    def settle(self) -> None:
        """Let the shrinker finish what becomes due by time alone."""
        self.shrink()
        self.clock.advance(2)
        self.shrink()

    # Looks

    @property
    def pool_bytes(self) -> int:
        return self.engine.snapshot().pool.bytes

    def tags(self, slots: U64) -> list[Tag]:
        """What stands behind slots now; does not ask whose they are."""
        return [Tag(tag) for tag in tags_of(self.words(slots)).tolist()]

    def words(self, slots: U64) -> U64:
        words: U64 = self.engine.core.table.words[numbers_of(slots)]
        return words

    def device_of(self, device: UnkindDevice) -> SwapDevice:
        """What the engine knows of a device."""
        found = self.engine.core.devices.find(device.path)
        assert found is not None
        return found

    def damage(self, slot: int, *, byte: int = 0) -> None:
        """Flip one byte of a slot's entry, wherever it lies: `byte` counts from its check on."""
        word = self.words(ids(slot))
        places = places_of(word)
        at = int(places.offset[0]) + byte
        assert byte < CHECK_BYTES + int(places.length[0])
        if tags_of(word)[0] == Tag.ZSWAP:
            arena = self.engine.core.zswap.arena
            arena.view[int(places.number[0]) * EXTENT_BYTES + at] ^= 0x55
            return
        entry, extent = self.engine.core.devices.device_of(int(places.number[0]))
        assert isinstance(entry.device, UnkindDevice)
        entry.device.data[extent * EXTENT_BYTES + at] ^= 0x55

    def blocks_of(self, slots: U64) -> list[frozenset[int]]:
        """Per slot whose page is on a device: the blocks there that its entry lies in."""
        places = places_of(self.words(slots))
        found = []
        for number, offset, length in zip(
            places.number.tolist(), places.offset.tolist(), places.length.tolist(), strict=True
        ):
            _, extent = self.engine.core.devices.device_of(number)
            first = extent * EXTENT_BYTES + offset
            last = first + CHECK_BYTES + length - 1
            found.append(frozenset(range(first // BLOCK_BYTES, last // BLOCK_BYTES + 1)))
        return found

    def sums(self) -> list[str]:
        """What does not add up now: nothing."""
        return check_sums(self.engine.core)

    def check(self) -> None:
        """All sums agree."""
        assert self.sums() == []

    def verify(self) -> VerifyReport:
        return run(self.engine.verify())

    def peek(self, space: Space, slots: U64) -> list[bytes | None]:
        """The pages of slots, None for those that are lost; nobody notices that they were read."""
        core = self.engine.core
        stats = copy.deepcopy(core.stats)
        words = self.words(slots)
        protected = self.engine.shrinker._protected
        errors = [(d, d.read_errors) for d in core.devices]
        faults = [(d, d.fails, d.reads) for d in self.devices]
        corrupt = core.zswap.corrupt_entries
        for device in self.devices:
            device.fails = None
        try:
            return self._peek(space, slots)
        finally:
            for counter in dataclasses.fields(stats):
                setattr(core.stats, counter.name, getattr(stats, counter.name))
            core.table.words[numbers_of(slots)] = words
            core.zswap.corrupt_entries = corrupt
            self.engine.shrinker._protected = protected
            for entry, count in errors:
                entry.read_errors = count
            for device, fails, reads in faults:
                device.fails, device.reads = fails, reads

    def _peek(self, space: Space, slots: U64) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(slots)
        left = list(range(len(slots)))
        while left:
            try:
                pages = run(self.engine.load(space, slots[left]))
            except PageLostError as error:
                lost = set(error.slots.tolist())
                assert lost
                left = [i for i in left if int(slots[i]) not in lost]
            else:
                for index, got in zip(left, pages, strict=True):
                    found[index] = bytes(got)
                break
        return found


def numbers_of(slots: U64) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The slot numbers in ids."""
    return slots.astype(np.int64) & ((1 << 40) - 1)


def make_engine(
    pool_max: int = 4 * MIB,
    *,
    arena_bytes: int = 16 * MIB,
    devices: Sequence[int] = (),
    clock: Clock | None = None,
    make_device: Callable[[int, str], UnkindDevice] = UnkindDevice,
    ledger: Ledger | None = None,
    **settings: Any,
) -> Rig:
    """An engine of its own.

    Args:
        pool_max: the pool's limit; the arena has at least 8 MiB more.
        arena_bytes: address space for the pool.
        devices: extents of the devices to put into use, `mem0`, `mem1`, ..., all of priority 0.
        clock: the engine's time; its own by default.
        make_device: see Rig.
        ledger: what it shares its limits through; by default it is alone.
        settings: any other field of Settings.
    """
    clock = clock or Clock()
    settings.setdefault("max_slots", 1 << 16)
    chosen = Settings(pool_max=pool_max, **settings)
    engine = Engine.create(chosen, clock, wall=clock.wall, arena_bytes=arena_bytes, ledger=ledger)
    rig = Rig(engine, clock, make_device=make_device)
    for extents in devices:
        rig.swapon(extents)
    return rig
