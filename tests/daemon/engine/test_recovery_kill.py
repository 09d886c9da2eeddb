"""A kill at every step: before the 1st, the 2nd, the 3rd ... write to memory or device.

Each history has a part that happens, and a part during which a child process dies, really, by
SIGKILL (see `support.dying` for what counts as a write). Then an engine is made of what it left:
each acknowledged page is there, each page of the request that was under way is the old or the new
one, everything adds up, and when all is freed nothing is left anywhere.
"""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pytest

from support.dying import Dying, KeptDevice
from support.engine import KIB, MIB, ZERO, Clock, Rig, page
from vswapd import vswap
from vswapd.clusters import slots_of
from vswapd.control import KeptDevice as Record
from vswapd.control import Origin
from vswapd.core import Core
from vswapd.errors import BadSlotError, PageLostError, UnbackedError
from vswapd.groups import Space
from vswapd.memory import Shape, ShardMemory
from vswapd.recovery import Reopen, recover
from vswapd.settings import Settings
from vswapd.swap_table import places_of
from vswapd.vswap import Engine
from vswapd_backends.base import U64, run
from vswapd_backends.shared import SharedRegion
from vswapd_backends.shared_extents import SharedExtents, owners_region
from vswapd_blockdev.device import EXTENT_BYTES
from vswapd_blockdev.extents import ExtentMap

EVERY: Final = int(os.environ.get("VSWAPD_KILL_EVERY", "1"))
"""Only each so many-th write, for a hurried run."""
SHAPE: Final = Shape.fitting(shard=0, max_slots=1 << 14, arena_bytes=12 * MIB)
SETTINGS: Final = Settings(pool_max=4 * MIB, max_slots=SHAPE.max_slots)
ENOUGH: Final = 5000
SHARED: Final = "shared"
DIED: Final = -signal.SIGKILL


@dataclass(frozen=True)
class Known:
    """What clients know: their pages by space and slot, and their last request by space."""

    held: dict[int, dict[int, bytes | None]]
    request: dict[int, int]


@dataclass
class Scene:
    """An engine, what its clients know, and which slots the request under way is about."""

    memory: ShardMemory
    devices: list[KeptDevice]
    owners: SharedRegion
    """Whose the chunks of the shared device are."""
    told: mmap.mmap
    rig: Rig = field(init=False)
    held: dict[int, dict[int, bytes | None]] = field(default_factory=dict)
    """By space: slot -> page; None: it has none."""
    made: int = 0
    request: dict[int, int] = field(default_factory=dict)
    """By space: the last request that has a number."""
    damaged: bool = False
    """Whether there is a page that nobody can read."""
    armed: bool = False
    log: list[Known] = field(default_factory=list)
    """After each acknowledged request from the arming on: what clients know then."""

    def __post_init__(self) -> None:
        clock = Clock()
        self.rig = Rig(Engine.create(SETTINGS, clock, memory=self.memory), clock)

    # What histories are made of

    def pages(self, kinds: str, count: int) -> list[bytes]:
        names = kinds.split()
        self.made += count
        return [page(names[i % len(names)], i) for i in range(self.made - count, self.made)]

    def space(self, group: str = "0") -> Space:
        space = self.rig.engine.open_space(uid=int(group), group=group, key=f"key of {group}")
        self.held[space.id] = {}
        self._acknowledged()
        return space

    def close(self, space: Space) -> None:
        self.rig.close(space)
        del self.held[space.id]
        self._acknowledged()

    def store(
        self, space: Space, kinds: str, count: int, over: list[int] | None = None
    ) -> list[int]:
        pages = self.pages(kinds, count)
        engine = self.rig.engine
        folio = engine.prepare(b"".join(pages))
        if over is None:
            folio.request = self._numbered(space)
        where = None if over is None else np.array(over, np.uint64)
        stored = run(engine.store(space, folio, where))
        slots: list[int] = stored.slots.tolist()
        what: list[bytes | None] = list(pages) if stored.reason is None else [None] * len(slots)
        self.held[space.id].update(zip(slots, what, strict=True))
        self._acknowledged()
        return slots

    def free(self, space: Space, slots: list[int]) -> None:
        which = np.array(slots, np.uint64)
        run(self.rig.engine.free(space, which, self._numbered(space)))
        for slot in slots:
            del self.held[space.id][slot]
        self._acknowledged()

    def load(self, space: Space, slots: list[int]) -> None:
        found = self.rig.load(space, slots)
        assert found == [self.held[space.id][slot] for slot in slots]

    def swapon(self, number: int) -> None:
        device = self.devices[number]
        self.rig.engine.swapon(device, 0, None, Origin(key=b"k" * 64, description="{}"))
        self._acknowledged()

    def swapon_shared(self, number: int) -> None:
        """One of two shards that a device is for."""
        device = self.devices[number]
        extents = SharedExtents(device.extents, self.owners, 0, 2)
        origin = Origin(key=b"k" * 64, description=SHARED)
        self.rig.engine.swapon(device, 0, extents, origin)
        self._acknowledged()

    def swapoff(self, number: int, *, give_up: bool = False) -> None:
        run(self.rig.engine.swapoff(self.devices[number].path, give_up=give_up))
        self._acknowledged()

    def damage(self, space: Space, slots: list[int]) -> None:
        """Their pages on a device are not what was stored any more."""
        self.damaged = True
        for slot in slots:
            places = places_of(self.rig.words(np.array([slot], np.uint64)))
            entry, extent = self.rig.engine.core.devices.device_of(int(places.number[0]))
            assert isinstance(entry.device, KeptDevice)
            entry.device.region.view[extent * EXTENT_BYTES + int(places.offset[0]) + 30] ^= 1
            self.held[space.id][slot] = None

    def shrink(self) -> None:
        self.rig.settle()
        self._acknowledged()

    def _numbered(self, space: Space) -> int:
        self.made += 1
        self.request[space.id] = self.made
        return self.made

    def _acknowledged(self) -> None:
        """The client has its answer."""
        if self.armed:
            held = {number: dict(held) for number, held in self.held.items()}
            self.log.append(Known(held, dict(self.request)))
            self.told[8:16] = len(self.log).to_bytes(8, "little")

    def arm(self, fatal: int) -> None:
        """From here on each write counts."""
        self.armed = True
        self._acknowledged()
        if fatal >= 0:
            shared = [self.owners]
            Dying(fatal, self.told).watch(self.rig.engine.core, self.rig.engine, shared=shared)


History = Callable[[Scene], Callable[[], None]]
"""Does what comes before, and returns what comes under fire."""


def _store_new(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.store(space, "text", 3)

    def under_fire() -> None:
        s.store(space, "text zero noise mixed", 9)
        s.store(s.space("7"), "zero", 2)
        s.store(space, "noise", 70)

    return under_fire


def _overwrite(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.swapon(0)
    old = s.store(space, "text zero noise", 12)
    s.rig.writeback()
    new = s.store(space, "text zero noise", 12)

    def under_fire() -> None:
        s.store(space, "zero text noise", 12, old[::2] + new[::2])
        s.store(space, "text", 6, old[:6])
        s.rig.set(store_enabled=False)
        s.store(space, "text", 4, old[2:6])

    return under_fire


def _free(s: Scene) -> Callable[[], None]:
    space, other = s.space(), s.space("7")
    s.swapon(0)
    old = s.store(space, "text zero noise", 9)
    s.rig.writeback()
    new = s.store(space, "text zero noise", 9)
    more = s.store(other, "text", 5)

    def under_fire() -> None:
        s.free(space, old[::2] + new[::2])
        s.free(other, more)
        s.store(other, "text", 2)
        s.free(space, old[1::2] + new[1::2])
        s.shrink()

    return under_fire


def _spaces(s: Scene) -> Callable[[], None]:
    space, other = s.space(), s.space("7")
    s.store(space, "text zero", 6)
    s.store(other, "text zero", 6)

    def under_fire() -> None:
        s.close(space)
        third = s.space("8")
        s.store(third, "text", 3)
        s.close(other)
        s.store(third, "text", 3)

    return under_fire


def _writeback(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.swapon(0)
    slots = s.store(space, "text zero mixed", 30)
    s.load(space, slots[:6])

    def under_fire() -> None:
        s.rig.writeback()
        s.store(space, "text", 4, slots[3:7])
        s.rig.writeback()

    return under_fire


def _whole_segments(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.swapon(0)
    s.store(space, "noise", 63 * 3 + 5)

    def under_fire() -> None:
        s.rig.writeback(3 * 256 * KIB)

    return under_fire


def _fallback(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.swapon(0)
    s.rig.set(pool_enabled=False)
    slots = s.store(space, "text noise", 8)

    def under_fire() -> None:
        s.store(space, "text zero noise", 9)
        s.store(space, "text", 5, slots[:5])
        s.free(space, slots)

    return under_fire


def _compaction(s: Scene) -> Callable[[], None]:
    space = s.space()
    slots = s.store(space, "noise", 63 * 3)
    for segment in range(3):
        s.free(space, slots[segment * 63 + 15 : segment * 63 + 63])

    def under_fire() -> None:
        run(s.rig.engine.compact())
        s.store(space, "text", 3)

    return under_fire


def _codec_switch(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.swapon(0)
    slots = s.store(space, "text", 8)

    def under_fire() -> None:
        s.rig.set(codec="zstd:1")
        s.store(space, "text", 5, slots[:5])
        s.store(space, "text", 5)
        s.rig.writeback()

    return under_fire


def _recompression(s: Scene) -> Callable[[], None]:
    space = s.space()
    slots = s.store(space, "text", 130)
    s.store(space, "noise", 40)
    s.rig.set(dense="zstd:1")
    s.rig.load(space, slots[:3])

    def under_fire() -> None:
        run(s.rig.engine.shrinker.recompression.step(young=True))
        s.store(space, "text", 3, slots[:3])
        s.free(space, slots[3:6])

    return under_fire


def _swapoff_to_the_pool(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.swapon(0)
    slots = s.store(space, "text mixed", 20)
    s.rig.writeback()

    def under_fire() -> None:
        s.swapon(1)
        s.free(space, slots[:2])
        s.swapoff(0)
        s.store(space, "text", 2)

    return under_fire


def _swapoff_to_another_device(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.swapon(0)
    s.store(space, "text mixed", 20)
    s.rig.writeback()
    s.swapon(1)
    s.rig.set(pool_enabled=False)

    def under_fire() -> None:
        s.swapoff(0)
        s.shrink()

    return under_fire


def _swapoff_that_gives_up(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.swapon(0)
    slots = s.store(space, "text mixed", 12)
    s.rig.writeback()
    s.damage(space, slots[3:6])

    def under_fire() -> None:
        s.swapoff(0, give_up=True)
        s.store(space, "text", 1, slots[3:4])
        s.free(space, slots[4:5])

    return under_fire


def _merge(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.swapon(2)
    slots = []
    for _ in range(3):
        slots.append(s.store(space, "noise", 40))
        s.rig.writeback()
    for some in slots:
        s.free(space, some[8:])

    def under_fire() -> None:
        s.shrink()
        s.store(space, "text", 2)

    return under_fire


def _shared_device(s: Scene) -> Callable[[], None]:
    space = s.space()
    s.swapon_shared(0)
    first = s.store(space, "text noise", 10)
    s.rig.writeback()

    def under_fire() -> None:
        second = s.store(space, "text noise", 6)
        s.rig.writeback()
        s.free(space, first)
        s.shrink()
        s.free(space, second)
        s.shrink()

    return under_fire


HISTORIES: Final[dict[str, History]] = {
    "store": _store_new,
    "overwrite": _overwrite,
    "free": _free,
    "spaces": _spaces,
    "writeback": _writeback,
    "whole segments": _whole_segments,
    "fallback": _fallback,
    "compaction": _compaction,
    "codec switch": _codec_switch,
    "recompression": _recompression,
    "swapoff to the pool": _swapoff_to_the_pool,
    "swapoff to another device": _swapoff_to_another_device,
    "swapoff that gives up": _swapoff_that_gives_up,
    "merge": _merge,
    "shared device": _shared_device,
}


def _scene() -> Scene:
    devices = [KeptDevice(extents, f"dev{i}") for i, extents in enumerate((12, 12, 5))]
    owners = owners_region(devices[0].extents, 2)
    return Scene(ShardMemory.create(SHAPE), devices, owners, mmap.mmap(-1, 16))


def _forked(work: Callable[[], None]) -> int:
    """Do something in a child; how that ended, as in `subprocess`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _recovered(scene: Scene) -> Rig:
    by_path = {device.path: device for device in scene.devices}

    def reopen(kept: Record) -> tuple[KeptDevice, ExtentMap | None]:
        assert kept.origin.key == b"k" * 64
        device = by_path[kept.path]
        if kept.origin.description != SHARED:
            return device, None
        return device, SharedExtents(device.extents, scene.owners, 0, 2)

    clock = Clock()
    return Rig(Engine.recover(SETTINGS, clock, memory=scene.memory, reopen=reopen), clock)


def _page_of(rig: Rig, space: Space, slot: int) -> bytes | None:
    """A slot's page; None: it has none.

    Raises:
        BadSlotError: the slot is not the space's.
    """
    try:
        return rig.load(space, [slot])[0]
    except (UnbackedError, PageLostError):
        return None


def _check(rig: Rig, before: Known, after: Known, *, sound: bool = True) -> None:
    """What is there lies between what was acknowledged and what was under way."""
    rig.check()
    there = rig.engine.core.spaces
    assert set(before.held) & set(after.held) <= set(there) <= set(before.held) | set(after.held)
    for number, space in there.items():
        assert space.key == f"key of {space.group.name}"
        if number in after.held:
            _check_slots(rig, space, before, after)
    for number, held in before.held.items():
        if number not in there:
            continue
        space = there[number]
        coming = after.held.get(number, {})
        same = [slot for slot, found in held.items() if coming.get(slot, ZERO + b"x") == found]
        filled = [slot for slot in same if held[slot] is not None]
        assert rig.load(space, filled) == [held[slot] for slot in filled] if filled else True
        for slot in held.keys() - set(filled):
            try:
                found = _page_of(rig, space, slot)
            except BadSlotError:
                assert slot not in coming
            else:
                # On its way to another page it may have lost the old one, but is never another's.
                assert found in {held[slot], coming.get(slot)} or slot not in coming
    assert rig.verify().ok or not sound


def _check_slots(rig: Rig, space: Space, before: Known, after: Known) -> None:
    """A space has just the slots that its client will know of when it has asked."""
    answer = rig.engine.last_answer(space)
    known = set(before.held.get(space.id, {}))
    coming = set(after.held[space.id])
    number = after.request.get(space.id)
    if number != before.request.get(space.id) and answer is not None and answer.request == number:
        changed = known - coming if answer.freed else coming - known
        assert set(answer.slots.tolist()) == changed
        known = coming
    assert set(_slots_of(rig, space).tolist()) == known


def _slots_of(rig: Rig, space: Space) -> U64:
    """The ids of all slots that a space has."""
    core = rig.engine.core
    numbers = slots_of(np.array(sorted(space.slots.clusters), np.int64))
    numbers = numbers[core.table.words[numbers] != 0]
    found = [core.clusters.ids_of(numbers[i : i + 1]) for i in range(len(numbers))]
    return np.concatenate(found) if found else np.empty(0, np.uint64)


def _check_goes_on(rig: Rig) -> None:
    """What is left can be used, and freed; then nothing is left."""
    engine = rig.engine
    spaces = list(engine.core.spaces.values())
    assert engine.orphans() == sorted(spaces, key=lambda space: space.id)
    fresh = engine.open_space(uid=3, group="3")
    assert fresh.id not in {space.id for space in spaces}
    pages = [page("text", 5), page("noise", 6), ZERO]
    slots = rig.put(fresh, pages)
    assert rig.load(fresh, slots) == pages
    for space in spaces:
        rig.free(space, _slots_of(rig, space))
        assert space.slots.slots == 0
        rig.close(space)
    rig.close(fresh)
    rig.settle()
    rig.check()
    picture = engine.snapshot()
    assert (picture.slots.allocated, picture.table_bytes, picture.pool.bytes) == (0, 0, 0)
    for device in engine.core.devices:
        assert (device.map.used, device.map.free) == (0, device.device.extents)
        assert isinstance(device.device, KeptDevice)
        assert device.device.is_discarded


def _run(scene: Scene, history: History, fatal: int) -> None:
    under_fire = history(scene)
    scene.arm(fatal)
    under_fire()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", HISTORIES)
def test_a_kill_at_every_step(name: str) -> None:
    """Whenever it dies, no acknowledged page is missing, and nothing is owned twice or leaked."""
    history = HISTORIES[name]
    dry = _scene()
    _run(dry, history, -1)
    kills = 0
    for fatal in range(1, ENOUGH, EVERY):
        scene = _scene()
        ended = _forked(lambda scene=scene, fatal=fatal: _run(scene, history, fatal))  # type: ignore[misc]
        assert ended in {0, DIED}
        done = int.from_bytes(scene.told[8:16], "little")
        rig = _recovered(scene)
        after = dry.log[min(done, len(dry.log) - 1)]
        _check(rig, dry.log[done - 1], after, sound=not dry.damaged)
        _check_goes_on(rig)
        if ended == 0:
            assert done == len(dry.log)
            break
        assert int.from_bytes(scene.told[:8], "little") == fatal
        kills += 1
    else:
        raise AssertionError("it never ends")
    assert kills > 20 / EVERY


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["spaces", "free", "overwrite", "compaction", "shared device"])
def test_a_kill_at_every_step_of_a_recovery(name: str) -> None:
    """Recovery may be killed as well, anywhere, and is begun again."""
    history = HISTORIES[name]
    dry = _scene()
    _run(dry, history, -1)
    kills = 0
    for first in range(5, ENOUGH, 9):
        for second in range(1, ENOUGH):
            scene = _scene()
            if _forked(lambda scene=scene, fatal=first: _run(scene, history, fatal)) == 0:  # type: ignore[misc]
                assert kills > 10
                return
            done = int.from_bytes(scene.told[8:16], "little")
            ended = _forked(lambda scene=scene, fatal=second: _die_recovering(scene, fatal))  # type: ignore[misc]
            assert ended in {0, DIED}
            rig = _recovered(scene)
            after = dry.log[min(done, len(dry.log) - 1)]
            _check(rig, dry.log[done - 1], after, sound=not dry.damaged)
            _check_goes_on(rig)
            kills += ended != 0
            if ended == 0:
                break


def _die_recovering(scene: Scene, fatal: int) -> None:
    """Recover, and die at one of its writes."""

    def watched(core: Core, reopen: Reopen) -> None:
        Dying(fatal, scene.told).watch(core, shared=[scene.owners])
        recover(core, reopen)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vswap, "recover", watched)
        _recovered(scene)


def _contents(memory: ShardMemory, kind: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The words of one memfd, as far as anything was ever written to it."""
    fd, size = memory.fds[kind], memory.shape.sizes[kind]
    words, at = [], 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        found = np.frombuffer(os.pread(fd, min(at, size) - begin, begin), np.uint64)
        filled = np.flatnonzero(found)
        words.append(np.stack((filled.astype(np.uint64) + np.uint64(begin // 8), found[filled])))
    return np.concatenate(words, axis=1) if words else np.empty((2, 0), np.uint64)


@pytest.mark.parametrize("name", ["overwrite", "free", "swapoff to the pool"])
def test_every_write_is_a_step(name: str) -> None:
    """From one step to the next one word of the table changes at most, and one of the state.

    Of the state, records of spaces and devices are the exception: half a record at a time.
    """
    before: dict[str, set[tuple[int, ...]]] = {}
    record = 0
    for fatal in range(1, ENOUGH):
        scene = _scene()
        ended = _forked(lambda scene=scene, fatal=fatal: _run(scene, HISTORIES[name], fatal))  # type: ignore[misc]
        now = {
            kind: set(map(tuple, _contents(scene.memory, kind).T.tolist()))
            for kind in ("table", "state")
        }
        for kind, words in now.items():
            changed = {word[0] for word in words ^ before.get(kind, words)}
            record += kind == "state" and len(changed) > 1
            assert len(changed) <= (1 if kind == "table" else 11)
        before = now
        if ended == 0:
            break
    assert record <= 4
