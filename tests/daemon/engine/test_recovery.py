"""What a new engine knows of an old one's memory, and what it makes of what is not there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from support.engine import KIB, MIB, ZERO, Clock, Rig, ids, make_engine, page, pages_of
from vswapd.control import KeptDevice, Origin
from vswapd.errors import (
    ArgumentError,
    BadSlotError,
    PageLostError,
    SwapoffError,
)
from vswapd.groups import Holder, Space
from vswapd.ledger import Column, Ledger, shared_region
from vswapd.memory import Head, ShardMemory
from vswapd.recovery import RecoveryError, Reopen
from vswapd.settings import Settings
from vswapd.swap_table import OFFSET_SHIFT, Tag
from vswapd.vswap import Engine
from vswapd_backends.base import U64, run
from vswapd_backends.shared_extents import SharedExtents, owners_region
from vswapd_blockdev.device import BlockDevice
from vswapd_blockdev.extents import ExtentMap
from vswapd_blockdev.sealed import SealedDevice, new_key
from vswapd_blockdev.swapfile import SwapFile

HOLDER = Holder(pid=77, started=1 << 40, token=(1 << 64) - 5)


def _next(rig: Rig, reopen: Reopen | None = None, **changes: int) -> Engine:
    """Another engine, made from what a rig's has left."""
    core = rig.engine.core
    fds = {kind: os.dup(fd) for kind, fd in core.memory.fds.items()}
    settings = Settings(pool_max=changes.get("pool_max", core.settings.pool_max))
    return Engine.recover(
        settings, rig.clock, memory=ShardMemory.adopt(fds), reopen=reopen or rig.reopen
    )


# Spaces


def test_an_untouched_memory_gives_an_empty_engine() -> None:
    """Nothing was kept, nothing is there, and nothing is brought into memory by looking."""
    rig = make_engine()
    rig.recover()
    rig.check()
    assert rig.engine.orphans() == []
    memory = rig.engine.core.memory
    assert (memory.table.resident_bytes, memory.pool.resident_bytes) == (0, 0)
    assert memory.state.resident_bytes <= 64 * KIB


def test_a_space_comes_back_with_all_that_is_known_of_it() -> None:
    """Who opened it, when, how it is called; but nobody is connected to it."""
    rig = make_engine()
    rig.clock.advance(5)
    space = rig.engine.open_space(
        uid=1000,
        group="1000",
        client="größe",
        holder=HOLDER,
        key="ab" * 16,
        name="cache",
        joined=True,
    )
    rig.clock.advance(60)
    rig.recover()
    (found,) = rig.engine.orphans()
    assert found is not space
    assert (found.id, found.uid, found.group.name, found.holder) == (space.id, 1000, "1000", HOLDER)
    assert (found.client, found.key, found.name) == ("größe", "ab" * 16, "cache")
    assert (found.joined, found.group.spaces) == (True, 0)
    assert (found.opened_at, found.since) == (1005.0, 1065.0)
    assert not found.attached


def test_a_space_is_opened_again_by_its_key() -> None:
    """Once; a key that nobody has finds nothing, and one with a client is not given away."""
    rig = make_engine()
    key, other = "a" * 32, "b" * 32
    slots = rig.put(rig.engine.open_space(uid=0, group="0", key=key), pages_of("text", 5))
    rig.engine.open_space(uid=0, group="0", key=other)
    rig.recover()
    assert rig.engine.reopen_space("c" * 32) is None
    another = Holder(99, 5)
    space = rig.engine.reopen_space(key, holder=another)
    assert space is not None
    assert (space.attached, space.holder) == (True, another)
    assert rig.load(space, slots) == pages_of("text", 5)
    assert rig.engine.reopen_space(key) is None
    assert [orphan.key for orphan in rig.engine.orphans()] == [other]
    rig.recover()
    found = {orphan.key: orphan.holder for orphan in rig.engine.orphans()}
    assert found == {key: another, other: Holder()}


def test_what_another_client_has_had_is_not_opened_again_by_the_one_before() -> None:
    """By its name it is anybody's of that user; by its token the last holder's, kills or not."""
    rig = make_engine()
    first, second = Holder(1, 2, 3 << 60), Holder(4, 5, (1 << 64) - 1)
    space = rig.engine.open_space(uid=0, group="0", key="k", name="cache", holder=first)
    rig.recover()
    assert rig.engine.reopen_space("k", number=space.id, holder=second) is not None
    rig.recover()
    assert rig.engine.reopen_space("k", holder=first) is None
    rig.recover()
    assert rig.engine.reopen_space("k", holder=second) is not None


def test_parts_of_one_space_are_told_apart_by_number() -> None:
    """Two connections to one shard have the same key, and slots of their own."""
    rig = make_engine()
    parts = [rig.engine.open_space(uid=0, group="0", key="k", joined=j) for j in (False, True)]
    rig.recover()
    for part in reversed(parts):
        found = rig.engine.reopen_space("k", number=part.id)
        assert found is not None
        assert found.id == part.id
    assert rig.engine.reopen_space("k", number=parts[0].id) is None


def test_of_several_parts_the_last_one_is_opened_again() -> None:
    """Whoever was not answered when he opened the first has opened another, and asked for it."""
    rig = make_engine()
    rig.engine.open_space(uid=0, group="0", key="k", joined=True, holder=HOLDER)
    rig.recover()
    space = rig.engine.open_space(uid=0, group="0", key="k", joined=True, holder=HOLDER)
    slots = rig.put(space, pages_of("text", 5))
    rig.recover()
    found = rig.engine.reopen_space("k", holder=HOLDER)
    assert found is not None
    assert rig.load(found, slots) == pages_of("text", 5)


def test_a_client_that_goes_leaves_its_space_to_be_found() -> None:
    """Those that have been without a client for longest come first."""
    rig = make_engine()
    spaces = [rig.space() for _ in range(3)]
    for space in (spaces[1], spaces[0]):
        rig.clock.advance(1)
        rig.engine.detach(space)
    assert rig.engine.orphans() == [spaces[1], spaces[0]]
    assert spaces[0].since == spaces[1].since + 1


def test_a_named_space_is_found_by_its_owner_alone() -> None:
    """Another user's space of that name is another one."""
    rig = make_engine()
    mine = rig.engine.open_space(uid=1, group="1", name="cache")
    theirs = rig.engine.open_space(uid=2, group="2", name="cache")
    rig.recover()
    for uid, space in ((1, mine), (2, theirs)):
        found = rig.engine.find_space(uid=uid, name="cache")
        assert found is not None
        assert found.id == space.id
    assert rig.engine.find_space(uid=3, name="cache") is None
    found = rig.engine.find_space(uid=1, name="cache")
    assert found is not None
    rig.close(found)
    assert rig.engine.find_space(uid=1, name="cache") is None


def test_a_name_that_is_too_long_is_refused() -> None:
    """Nothing is opened."""
    rig = make_engine()
    with pytest.raises(ArgumentError, match="255 bytes"):
        rig.engine.open_space(uid=0, group="0", name="n" * 256)
    assert not rig.engine.core.spaces
    assert not any(group.spaces for group in rig.engine.core.groups)


def test_a_space_that_was_being_closed_is_gone() -> None:
    """With all that it held, wherever that lay."""
    rig = make_engine(devices=[8])
    space, other = rig.space(), rig.space()
    rig.put(space, pages_of("text", 100))
    rig.writeback()
    rig.put(space, [*pages_of("noise", 40), *pages_of("zero", 5)])
    kept = rig.put(other, pages_of("text", 10))
    rig.put(space, [ZERO] * 4096)
    for _ in range(8):
        rig.put(space, [ZERO] * 4096)
    closing = rig.engine.close_space(space)
    next(closing)
    assert space.slots.slots, "nothing is left to be closed after the first step"
    rig.recover()
    rig.check()
    (left,) = rig.engine.orphans()
    assert left.id == other.id
    assert rig.load(left, kept) == pages_of("text", 10)
    assert rig.engine.snapshot().slots.allocated == 10
    rig.settle()
    assert not any(device.used_bytes for device in rig.engine.snapshot().devices)


def test_numbers_of_spaces_are_never_used_twice() -> None:
    """Nor are those of spaces that are gone."""
    rig = make_engine()
    last = rig.space()
    rig.close(last)
    rig.recover()
    assert rig.space().id == last.id + 1


@pytest.mark.parametrize("number", [(1 << 32) - 1, 1 << 32, (1 << 32) + 1, (1 << 40) - 1])
def test_a_space_may_have_a_large_number(number: int) -> None:
    """After billions of spaces a new one's pages are kept as those of the first."""
    rig = make_engine()
    rig.engine.core.control.head[Head.NEXT_SPACE] = number
    space = rig.space()
    assert space.id == number
    slots = rig.put(space, pages_of("text", 600))
    rig.recover()
    rig.check()
    (space,) = rig.engine.orphans()
    assert rig.load(space, slots) == pages_of("text", 600)


def test_more_spaces_than_there_are_records_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until one is closed."""
    monkeypatch.setattr("vswapd.control.MOST_SPACES", 2)
    rig = make_engine()
    first, _ = rig.space(), rig.space()
    with pytest.raises(Exception, match="2 spaces: close some first"):
        rig.space()
    rig.close(first)
    rig.space()


# Slots


def test_ids_of_a_freed_cluster_are_wrong_for_ever() -> None:
    """Its generation outlives the process, however often it was handed out."""
    rig = make_engine()
    space, gone = rig.space(), []
    for _ in range(3):
        slots = rig.put(space, pages_of("zero", 3))
        rig.free(space, slots)
        gone += slots.tolist()
    rig.recover()
    space = rig.engine.orphans()[0]
    now = rig.put(space, pages_of("zero", 3)).tolist()
    assert not set(now) & set(gone)
    for slot in gone:
        with pytest.raises(BadSlotError):
            rig.load(space, [slot])


def test_free_slots_of_open_clusters_are_used_again() -> None:
    """No cluster is opened while there is room in those that are."""
    rig = make_engine()
    slots = rig.put(rig.space(), pages_of("zero", 600))
    rig.recover()
    space = rig.engine.orphans()[0]
    rig.free(space, slots[10:20])
    rig.put(space, pages_of("zero", 1024 - 590))
    assert rig.engine.core.clusters.in_use == 2
    rig.check()


# Devices


def test_pages_of_a_device_that_is_lost_are_lost_and_no_others() -> None:
    """They say so one by one; nothing is written there, and the rest goes on."""
    rig = make_engine(devices=[8, 8])
    space = rig.space()
    first = rig.put(space, pages_of("text", 50))
    rig.writeback()
    second = rig.put(space, pages_of("noise", 5))
    lost = rig.devices.pop(0)
    rig.recover()
    space = rig.engine.orphans()[0]
    with pytest.raises(PageLostError) as caught:
        rig.load(space, first)
    assert caught.value.slots.tolist() == first.tolist()
    assert rig.load(space, second) == pages_of("noise", 5)
    rig.check()
    rig.writeback()
    assert rig.load(space, second) == pages_of("noise", 5)
    with pytest.raises(SwapoffError):
        run(rig.engine.swapoff(lost.path))
    rig.free(space, first)
    rig.settle()
    assert run(rig.engine.swapoff(lost.path)) == (0, 0)
    rig.check()


def test_a_device_of_another_size_is_refused() -> None:
    """It is not the one that was in use."""
    rig = make_engine(devices=[8])
    other = make_engine(devices=[9]).devices[0]
    with pytest.raises(RecoveryError, match="mem0 has 9 extents, it had 8"):
        _next(rig, lambda _: (other, None))


def test_what_a_device_was_opened_with_is_kept_until_it_is_let_go_of() -> None:
    """Its key is in no text, and not in memory either once it is out of use."""
    rig = make_engine()
    device = make_engine(devices=[8]).devices[0]
    origin = Origin(boot_id=b"b" * 16, key=bytes(range(100, 164)), description='{"size": 5}')
    rig.engine.swapon(device, 3, None, origin)
    asked: list[KeptDevice] = []

    def reopen(kept: KeptDevice) -> tuple[BlockDevice, None]:
        asked.append(kept)
        return device, None

    engine = _next(rig, reopen)
    (kept,) = asked
    assert (kept.path, kept.priority, kept.extents, kept.origin) == ("mem0", 3, 8, origin)
    assert "key" not in repr(kept)
    assert str(origin.key[0]) not in repr(kept.origin)
    assert origin.key in bytes(engine.core.memory.devices)
    run(engine.swapoff("mem0"))
    assert not any(bytes(engine.core.memory.devices))
    assert _next(rig, reopen).core.control.devices() == []


def test_a_device_that_cannot_be_kept_is_not_taken() -> None:
    """A key that is too long is refused, and the place is free for the next."""
    rig = make_engine()
    device = make_engine(devices=[8]).devices[0]
    with pytest.raises(ArgumentError, match="its key 64"):
        rig.engine.swapon(device, 0, None, Origin(key=bytes(65)))
    assert not rig.engine.core.devices.any
    rig.engine.swapon(device, 0)


def test_extents_out_of_use_stay_so() -> None:
    """One that failed a write is not handed out by the next process either."""
    rig = make_engine(devices=[8])
    space = rig.space()
    rig.put(space, pages_of("text", 20))
    rig.devices[0].fails = lambda kind, nth: kind == "write" and nth == 1
    rig.writeback()
    rig.settle()
    entry = rig.device_of(rig.devices[0])
    before = (entry.map.bad, entry.map.free)
    assert before[0] == 1
    rig.recover()
    rig.settle()
    entry = rig.device_of(rig.devices[0])
    assert (entry.map.bad, entry.map.free) == before


def test_what_was_written_and_is_dead_is_discarded() -> None:
    """An extent whose discard was still to come gives its space back in the next process."""
    rig = make_engine(devices=[8])
    space = rig.space()
    slots = rig.put(space, pages_of("text", 20))
    rig.writeback()
    rig.free(space, slots)
    rig.recover()
    entry = rig.device_of(rig.devices[0])
    assert len(entry.discards) == 1
    before = rig.devices[0].discards
    rig.settle()
    assert rig.devices[0].discards == before + 1
    assert entry.map.used == 0


# What else is kept


def test_the_write_budget_is_not_given_twice() -> None:
    """What was written today counts in the next process, too; a new day is a new budget."""
    rig = make_engine(devices=[16], write_budget=MIB)
    space = rig.space()
    rig.put(space, pages_of("noise", 200))
    rig.writeback()
    left = rig.engine.core.budget_left()
    assert left is not None
    assert left < MIB
    rig.recover()
    assert rig.engine.core.budget_left() == left
    rig.clock.advance(86400)
    assert rig.engine.core.budget_left() == MIB


def test_pages_of_every_codec_that_ever_was_can_be_read() -> None:
    """Pools keep their numbers, whatever the settings name now."""
    rig = make_engine(codec="lz4")
    space = rig.space()
    held: dict[int, bytes] = {}
    for codec in ("zstd:3", "lz4hc:4", "lz4"):
        rig.set(codec=codec)
        pages = [page("text", len(held) + i) for i in range(20)]
        held.update(zip(rig.put(space, pages).tolist(), pages, strict=True))
    rig.set(codec="zstd:3")
    rig.recover()
    space = rig.engine.orphans()[0]
    assert rig.load(space, ids(*held)) == list(held.values())
    specs = [pool.codec.spec for pool in rig.engine.core.zswap.pools]
    assert specs == ["lz4", "zstd:3", "lz4hc:4"]
    assert rig.engine.core.zswap.current.index == 1


def test_settings_are_kept_whole() -> None:
    """The last ones, however often they change; what is too long changes nothing."""
    rig = make_engine()
    assert rig.engine.core.control.settings() is None
    for text in ("", "a", '{"größe": 1}', "x" * 300_000, "y"):
        rig.engine.core.control.keep_settings(text)
        rig.recover()
        assert rig.engine.core.control.settings() == text
    with pytest.raises(ArgumentError, match="too much was set"):
        rig.engine.core.control.keep_settings("z" * (1 << 20))
    assert rig.engine.core.control.settings() == "y"


def test_the_arena_must_be_as_large_as_the_limit() -> None:
    """A pool.max beyond what was reserved is refused, and the memory left for another try."""
    rig = make_engine(MIB, arena_bytes=16 * MIB)
    slots = rig.put(rig.space(), pages_of("text", 5))
    with pytest.raises(ArgumentError, match=r"pool\.max of 17825792 bytes is beyond"):
        _next(rig, pool_max=17 * MIB)
    engine = _next(rig, pool_max=16 * MIB)
    assert run(engine.load(engine.orphans()[0], slots)) == pages_of("text", 5)


@pytest.mark.parametrize("tag", [Tag.ZSWAP, Tag.PHYS])
def test_words_that_name_nothing_are_no_kills_work(tag: Tag) -> None:
    """Damaged memory is told from what a kill leaves."""
    rig = make_engine()
    slots = rig.put(rig.space(), pages_of("text", 3))
    word = int(tag) | 100 << 4 | (9999 << 18) << OFFSET_SHIFT
    rig.engine.core.table.words[int(slots[1]) & 0xFFFF] = word
    with pytest.raises(RecoveryError, match="words name"):
        _next(rig)


# Several shards


def test_a_shard_enters_what_it_holds_again() -> None:
    """The others see what it really holds, not what it had entered when it was killed."""
    region = shared_region(2)
    clock = Clock()
    ledgers = [Ledger(region, shard) for shard in range(2)]
    settings = Settings(pool_max=4 * MIB, max_slots=1 << 14)
    engine = Engine.create(settings, clock, arena_bytes=8 * MIB, ledger=ledgers[0])
    rig = Rig(engine, clock)
    space = rig.space("7")
    rig.put(space, pages_of("noise", 30))
    columns = ledgers[0].columns_of("7")
    assert columns is not None
    ledgers[0].enter(Column.POOL, 123)
    ledgers[0].enter(columns[0], 123)
    memory = ShardMemory.adopt({k: os.dup(fd) for k, fd in engine.core.memory.fds.items()})
    again = Engine.recover(
        settings, clock, memory=memory, reopen=lambda _: None, ledger=Ledger(region, 0)
    )
    assert ledgers[1].others(Column.POOL) == again.core.zswap.in_use_bytes
    assert ledgers[1].others(columns[0]) == 30 * 4096


def test_a_shard_finds_its_chunks_of_a_shared_device() -> None:
    """Its extents are its own as before, and no other shard's."""
    extents, shards = 64, 2
    region = owners_region(extents, shards)
    clock = Clock()
    settings = Settings(pool_max=4 * MIB, max_slots=1 << 14)
    device = make_engine(devices=[extents]).devices[0]
    rig = Rig(Engine.create(settings, clock, arena_bytes=16 * MIB), clock)
    rig.engine.swapon(device, 0, SharedExtents(extents, region, 0, shards))
    other = SharedExtents(extents, region, 1, shards)
    theirs = [other.take() for _ in range(5)]
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 400))
    rig.writeback()
    rig.free(space, slots[:100])
    before = rig.device_of(device).map.free
    owners = region.bytes_array()[:16].tolist()
    mine = SharedExtents(extents, region, 0, shards)
    engine = _next(rig, lambda _: (device, mine))
    rig.engine = engine
    rig.check()
    assert region.bytes_array()[:16].tolist() == owners
    assert mine.free == before
    space = engine.orphans()[0]
    assert rig.load(space, slots[100:]) == pages_of("noise", 400)[100:]
    taken = [mine.take() for _ in range(mine.free)]
    assert None not in taken
    assert not set(taken) & set(theirs)
    assert not set(taken) & set(np.flatnonzero(rig.device_of(device).live_entries).tolist())
    assert mine.take() is None


# The maps


@pytest.mark.parametrize(
    ("taken", "bad"), [([], []), ([0], []), ([2, 5], [1]), ([0, 1, 2], [2]), ([], [7])]
)
def test_a_map_is_restored(taken: list[int], bad: list[int]) -> None:
    """Used, free and out of use are what they were; the lowest free extent goes first."""
    extents = ExtentMap(8)
    extents.restore(taken, bad)
    assert (extents.used, extents.bad) == (len(taken), len(bad))
    free = [e for e in range(8) if e not in taken and e not in bad]
    assert extents.free == len(free)
    assert [extents.take() for _ in free] == free
    assert extents.take() is None
    for extent in taken:
        extents.give(extent)
    assert extents.free == len(set(taken) - set(bad))


def test_a_map_can_be_closed() -> None:
    """No extent of it is handed out any more, and what is given back stays away."""
    extents = ExtentMap(8)
    extents.restore([1, 2], [4])
    extents.retire_free()
    assert (extents.free, extents.take()) == (0, None)
    extents.give(1)
    assert (extents.free, extents.used, extents.take()) == (0, 1, None)


# Answers that were not sent


def _numbered(rig: Rig, space: Space, pages: list[bytes], request: int) -> U64:
    folio = rig.engine.prepare(b"".join(pages))
    folio.request = request
    stored = run(rig.engine.store(space, folio))
    return stored.slots


def test_the_last_request_can_be_asked_for() -> None:
    """With the slots that it gave or took, in the order of its answer, in every later process."""
    rig = make_engine()
    space, other = rig.space(), rig.space()
    assert rig.engine.last_answer(space) is None
    slots = _numbered(rig, space, pages_of("text", 70), 7)
    for _ in range(2):
        answer = rig.engine.last_answer(space)
        assert answer is not None
        assert (answer.request, answer.freed) == (7, False)
        assert answer.slots.tolist() == slots.tolist()
        assert rig.engine.last_answer(other) is None
        rig.recover()
        space, other = (rig.engine.core.spaces[s.id] for s in (space, other))
    taken = slots[[5, 3, 60]]
    most = (1 << 64) - 1
    run(rig.engine.free(space, taken, most))
    rig.recover()
    answer = rig.engine.last_answer(rig.engine.core.spaces[space.id])
    assert answer is not None
    assert (answer.request, answer.freed) == (most, True)
    assert answer.slots.tolist() == taken.tolist()


def test_requests_have_all_of_their_64_bits() -> None:
    """A client may number as it likes: nothing is left of a request that is done, or undone."""
    rig = make_engine()
    space = rig.space()
    for number in (0, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        slots = _numbered(rig, space, pages_of("text", 3), number)
        answer = rig.engine.last_answer(space)
        assert answer is not None
        assert (answer.request, answer.freed) == (number, False)
        run(rig.engine.free(space, slots, number))
        answer = rig.engine.last_answer(space)
        assert answer is not None
        assert (answer.request, answer.freed) == (number, True)
        rig.check()
    rig.close(space)
    assert rig.engine.snapshot().slots.allocated == 0


def test_a_request_without_a_number_leaves_the_last_answer() -> None:
    """And a slot that it was given is not taken from it by an old request's being finished."""
    rig = make_engine()
    space = rig.space()
    slots = _numbered(rig, space, pages_of("text", 5), 7)
    run(rig.engine.free(space, slots[:3], 8))
    again = rig.put(space, pages_of("text", 3, 50))
    assert set(again.tolist()) == set(slots[:3].tolist())
    rig.recover()
    space = rig.engine.orphans()[0]
    assert rig.load(space, again) == pages_of("text", 3, 50)
    answer = rig.engine.last_answer(space)
    assert answer is not None
    assert answer.request == 8


def test_a_request_that_was_refused_is_not_the_last() -> None:
    """It can be sent again; nothing of it is left."""
    rig = make_engine(devices=[4], pool_enabled=False)
    space = rig.space()
    slots = _numbered(rig, space, pages_of("text", 5), 7)
    assert rig.tags(slots) == [Tag.PHYS] * 5
    rig.devices[0].fails = lambda kind, _: kind == "write"
    assert not len(_numbered(rig, space, pages_of("noise", 5), 8))
    assert rig.engine.last_answer(space) is None
    rig.recover()
    space = rig.engine.orphans()[0]
    assert rig.engine.last_answer(space) is None
    assert space.slots.slots == 5


def test_answers_go_with_their_space() -> None:
    """Whoever is kept at the same place next has none, and the memory is given back."""
    rig = make_engine()
    space = rig.space()
    memory = rig.engine.core.memory
    _numbered(rig, space, pages_of("zero", 2000), 7)
    before = memory.state.resident_bytes
    rig.close(space)
    assert memory.state.resident_bytes <= before - 4 * 4096
    fresh = rig.space()
    assert fresh.record == space.record
    assert rig.engine.last_answer(fresh) is None


def test_what_lies_on_an_encrypted_file_is_read_with_the_key_that_was_kept(tmp_path: Path) -> None:
    """The file is opened again by what was kept of it, and by nothing else."""
    boot_id, key, path = bytes(16), new_key(), str(tmp_path / "swap")
    rig = make_engine()
    file = SwapFile.open(path, size=4 * MIB, boot_id=boot_id, encrypted=True)
    rig.engine.swapon(SealedDevice(file, key), 0, None, Origin(boot_id=boot_id, key=key))
    pages = [*pages_of("text", 200), *pages_of("noise", 50)]
    slots = rig.put(rig.space(), pages)
    rig.writeback()
    assert set(rig.tags(slots)) == {Tag.PHYS}
    file.close()

    def reopen(kept: KeptDevice) -> tuple[BlockDevice, None]:
        origin = kept.origin
        again = SwapFile.reopen(
            kept.path, extents=kept.extents, boot_id=origin.boot_id, encrypted=bool(origin.key)
        )
        return SealedDevice(again, origin.key), None

    rig.engine = _next(rig, reopen)
    space = rig.engine.orphans()[0]
    assert rig.load(space, slots) == pages
    assert rig.verify().ok
    assert run(rig.engine.swapoff(path)) == (250, 0)
    assert rig.load(space, slots) == pages
    assert key not in (tmp_path / "swap").read_bytes()
