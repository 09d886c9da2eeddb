"""What nobody had asked for while it was wrong: policies that one group's pages could bring to a
halt, limits that overlapping work could pass, work that nobody was woken for.

Each test failed once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.engine import KIB, MIB, Rig, ids, make_engine, pages_of
from support.interleaving import start
from vswap.protocol import Reason
from vswapd.groups import Space
from vswapd.settings import GroupLimits
from vswapd.swap_table import Tag, places_of, tags_of
from vswapd.vswap import Stored
from vswapd_backends.base import PAGE_BYTES, SEGMENT_BYTES, U64, Operation


def fill(rig: Rig, space: Space, kind: str, count: int, first: int = 0) -> U64:
    """Store different pages in folios that fit a segment each; returns their slots."""
    folios = [
        rig.put(space, pages_of(kind, min(62, count - done), first + done))
        for done in range(0, count, 62)
    ]
    return np.concatenate(folios)


def _store(rig: Rig, space: Space, pages: list[bytes]) -> Operation[Stored]:
    return rig.engine.store(space, rig.engine.prepare(b"".join(pages)))


# Compaction and merging: one group's leftovers do not keep another's waste where it is


def test_a_small_sparse_segment_does_not_keep_others_from_being_compacted() -> None:
    """What cannot be packed any better in one group is no reason to leave the others' waste."""
    rig = make_engine(32 * MIB)
    small, large = rig.space("1"), rig.space("2")
    few = fill(rig, small, "noise", 124)
    rig.free(small, few[5:62])
    rig.shrink()
    rig.free(small, few[1:5])
    many = fill(rig, large, "noise", 62 * 40, 1000)
    rig.free(large, many[np.arange(len(many)) % 3 != 0])
    rig.settle()
    pool = rig.engine.snapshot().pool
    assert pool.bytes < 1.25 * pool.live_bytes + 2 * SEGMENT_BYTES
    rig.check()


def test_a_lonely_sparse_extent_does_not_keep_others_from_being_merged() -> None:
    """The emptiest extent may have no partner of its own group; others have."""
    rig = make_engine(32 * MIB, devices=[16])
    lonely, others = rig.space("1"), rig.space("2")
    one = fill(rig, lonely, "noise", 62)
    rig.writeback()
    rig.free(lonely, one[1:])
    many = fill(rig, others, "noise", 62 * 14, 1000)
    rig.writeback()
    words = rig.words(many)
    extents = places_of(words).number
    on_device = tags_of(words) == Tag.PHYS
    kept = {int(slot) for e in set(extents[on_device]) for slot in many[extents == e][:4]}
    rig.free(others, ids(*(int(s) for s in many[on_device] if int(s) not in kept)))
    device = rig.device_of(rig.devices[0])
    assert device.map.free == 1
    rig.settle()
    assert device.map.free > 2
    assert rig.verify().ok


# Stores in need of room


def test_a_store_does_not_wait_for_writes_that_free_nothing_for_it() -> None:
    """Others who go straight to a device, one after the other, do not keep it from its answer."""
    rig = make_engine(
        2 * MIB,
        devices=[64],
        groups={"1": GroupLimits(writeback=False), "2": GroupLimits(pool_max=0)},
    )
    full, other = rig.space("1"), rig.space("2")
    while rig.store(full, pages_of("noise", 20)).reason is None:
        pass
    under_way = start(_store(rig, other, pages_of("noise", 3, 100)), "straight")
    under_way.until_io()
    waiting = start(_store(rig, full, pages_of("noise", 20)), "store")
    waiting.advance()
    assert waiting.ended
    assert waiting.result.reason is Reason.WRITEBACK_DISABLED
    under_way.finish()


def test_a_store_still_waits_for_writeback_that_frees_what_it_needs() -> None:
    """While the only segments that could go are being written, there is hope."""
    rig = make_engine(2 * MIB, devices=[64])
    space = rig.space()
    while rig.engine.core.pool_room() > 200 * KIB:
        rig.put(space, pages_of("noise", 10))
    flight = start(rig.engine.writeback(8 * MIB), "writeback")
    flight.until_io()
    waiting = start(_store(rig, space, pages_of("noise", 100)), "store")
    assert waiting.advance() is not None
    flight.finish()
    assert waiting.finish().reason is None
    assert rig.engine.core.stats.fallback_pages == 0


def test_a_store_that_compacts_gives_way_between_steps() -> None:
    """However much has to be packed, others have the lock after each segment."""
    rig = make_engine(32 * MIB)
    space = rig.space()
    folios = []
    while (stored := rig.store(space, pages_of("noise", 62))).reason is None:
        folios.append(stored.slots)
    slots = np.concatenate(folios)
    rig.free(space, slots[np.arange(len(slots)) % 4 != 0])
    moved: list[int] = []
    copied = 0
    waiting = start(_store(rig, space, pages_of("noise", 400)), "store")
    while not waiting.ended:
        waiting.advance()
        moved.append(rig.engine.core.stats.compact_bytes - copied)
        copied += moved[-1]
    assert waiting.result.reason is None
    assert len([size for size in moved if size]) > 2
    assert max(moved) <= SEGMENT_BYTES


def test_a_new_folio_that_no_device_takes_has_freed_nothing() -> None:
    """Slots that were never handed out do not count as freed."""
    rig = make_engine(devices=[16], pool_enabled=False)
    rig.devices[0].fails = lambda kind, _: kind == "write"
    assert rig.store(rig.space(), pages_of("noise", 5)).reason is Reason.DEVICE_FULL
    assert rig.engine.core.stats.free_pages == 0


def test_an_extent_that_is_being_filled_costs_no_more_memory_than_it_holds() -> None:
    """Each group that goes straight to a device keeps one buffer, of 256 KiB and not of 2 MiB."""
    rig = make_engine(devices=[80], pool_enabled=False)
    spaces = [rig.space(str(group)) for group in range(64)]
    before = _resident_bytes()
    for space in spaces:
        rig.put(space, pages_of("text", 1))
    assert _resident_bytes() - before < len(spaces) * 2 * SEGMENT_BYTES


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


# The write budget


def test_folios_that_go_straight_to_a_device_share_the_write_budget() -> None:
    """Two that overlap cannot pass it together: the second is refused, although it would fit."""
    rig = make_engine(devices=[64], pool_enabled=False, write_budget=3 * MIB)
    spaces = [rig.space("1"), rig.space("2")]
    first, second = (start(_store(rig, s, pages_of("noise", 500)), "store") for s in spaces)
    first.until_io()
    second.advance()
    assert second.ended
    assert second.result.reason is Reason.WRITE_BUDGET
    assert first.finish().reason is None
    assert rig.engine.core.stats.fallback_bytes <= 3 * MIB
    assert rig.engine.core.budget.pending == 0


@pytest.mark.parametrize("pages", [1, 60, 700])
@pytest.mark.parametrize("kind", ["noise", "repeat"])
def test_what_is_written_around_a_folio_is_within_the_budget_too(kind: str, pages: int) -> None:
    """Headers, directories and unused ends of blocks wear flash as well."""
    budget = 4 * MIB
    rig = make_engine(devices=[64], pool_enabled=False, write_budget=budget)
    space = rig.space()
    stored = 0
    while rig.store(space, pages_of(kind, pages)).reason is None:
        stored += 1
    assert stored > 0
    assert 0.7 * budget - pages * 4200 <= rig.engine.core.stats.fallback_bytes <= budget


# The shrinker: when it sleeps, for how long, and what it does not give up for what


def _asleep(rig: Rig) -> str:
    """Do all there is to do; nothing is due then. Why nothing is."""
    rig.shrink()
    assert rig.engine.shrinker.count() == 0
    wakeup = rig.engine.shrinker.next_wakeup()
    assert wakeup is None or wakeup > rig.clock()
    return rig.engine.shrinker.why


@pytest.mark.parametrize(
    ("settings", "extents", "why"),
    [
        ({"default_group": GroupLimits(writeback=False)}, 64, "below the watermarks"),
        ({}, 4, "swap devices are full"),
        ({"write_budget": MIB}, 64, "today's write budget is spent"),
        ({"shrinker_rate": 100 * KIB}, 64, "held back by shrinker.rate"),
    ],
)
def test_idle_pages_that_cannot_go_do_not_keep_it_awake(
    settings: dict[str, Any], extents: int, why: str
) -> None:
    """20: however old they are, the next wake-up is not one that is over already."""
    rig = make_engine(16 * MIB, arena_bytes=24 * MIB, devices=[extents], idle_age=60.0, **settings)
    space = rig.space()
    fill(rig, space, "noise", 1000)
    for _ in range(3):
        rig.clock.advance(100)
        rig.settle()
        assert _asleep(rig) == why
        fill(rig, space, "noise", 62, 2000)


def test_protection_wears_off_by_time_and_not_by_looking() -> None:
    """17: however often it is asked, recent loads from a device protect what is in the pool."""
    rig = make_engine(16 * MIB, arena_bytes=24 * MIB, devices=[64], idle_age=80.0)
    space = rig.space()
    slots = fill(rig, space, "noise", 400)
    rig.writeback()
    idle = fill(rig, space, "noise", 300, 2000)
    rig.clock.advance(100)
    rig.load(space, slots)
    for _ in range(20):
        assert _asleep(rig) == "recent loads from the device protect the pool"
    assert rig.engine.shrinker.next_wakeup() == rig.clock() + 10
    assert set(rig.tags(idle)) == {Tag.ZSWAP}
    rig.clock.advance(10)
    rig.settle()
    assert Tag.PHYS in rig.tags(idle)


def test_a_log_that_grows_slowly_does_not_keep_idle_pages_of_others_in_the_pool() -> None:
    """The oldest segment may be in use still; what is idle goes, and only that."""
    rig = make_engine(16 * MIB, arena_bytes=24 * MIB, devices=[64], idle_age=60.0)
    slow, idle = rig.space("1"), rig.space("2")
    rig.put(slow, pages_of("text", 1))
    slots = fill(rig, idle, "noise", 300)
    for turn in range(4):
        rig.clock.advance(20)
        rig.put(slow, pages_of("text", 1, 10 + turn))
        _asleep(rig)
    assert set(rig.tags(slots)) == {Tag.PHYS}
    assert slow.group.device_bytes == 0


def test_the_first_page_wakes_a_shrinker_that_is_to_watch_its_age() -> None:
    """An empty pool has no page that could grow old; from the first one on somebody has to look."""
    rig = make_engine(16 * MIB, arena_bytes=24 * MIB, devices=[64], idle_age=60.0)
    woken: list[float] = []
    rig.engine.on_pressure = lambda: woken.append(rig.clock())
    assert _asleep(rig) == "below the watermarks"
    assert rig.engine.shrinker.next_wakeup() is None
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 10))
    assert woken
    _asleep(rig)
    assert rig.engine.shrinker.next_wakeup() == rig.clock() + 60
    woken.clear()
    rig.put(space, pages_of("noise", 10, 100))
    assert not woken, "it knows"
    rig.clock.advance(60)
    rig.settle()
    assert set(rig.tags(slots)) == {Tag.PHYS}


def test_a_group_over_its_limit_is_served_at_the_shrinkers_rate() -> None:
    """Held back by the rate it comes back for the rest, although the pool is nearly empty."""
    rig = make_engine(32 * MIB, devices=[64], shrinker_rate=MIB)
    space = rig.space()
    fill(rig, space, "noise", 1000)
    rig.set(default_group=GroupLimits(pool_max=MIB))
    _asleep(rig)
    while (wakeup := rig.engine.shrinker.next_wakeup()) is not None:
        rig.clock.now = wakeup
        _asleep(rig)
    assert space.group.pool_bytes <= MIB


def test_waste_that_is_not_worth_copying_does_not_keep_writeback_from_its_work() -> None:
    """Dead entries spread evenly are more than it likes, and in no segment enough: on it goes."""
    rig = make_engine(32 * MIB, devices=[256], high_watermark=0.8, low_watermark=0.5)
    slots = fill(rig, rig.space(), "noise", 115 * 62)
    rig.free(next(iter(rig.engine.core.spaces.values())), slots[::8])
    rig.settle()
    core = rig.engine.core
    assert core.zswap.in_use_bytes <= 0.5 * core.settings.pool_max


def test_a_group_at_its_device_limit_does_not_keep_others_from_keeping_theirs() -> None:
    """Of two groups over their pool limits, the one that has room on the device pays."""
    rig = make_engine(32 * MIB, devices=[64])
    stuck, other = rig.space("1"), rig.space("2")
    fill(rig, stuck, "noise", 500)
    fill(rig, other, "noise", 500, 1000)
    stuck_limits = GroupLimits(pool_max=MIB, device_max=0)
    rig.set(groups={"1": stuck_limits, "2": GroupLimits(pool_max=MIB)})
    assert _asleep(rig) == "the groups that hold pages are at their device limits"
    assert other.group.pool_bytes <= MIB < stuck.group.pool_bytes


# Whoever leaves the shrinker something to do wakes it


def _woken(rig: Rig) -> list[bool]:
    woken: list[bool] = []
    rig.settle()
    rig.engine.on_pressure = lambda: woken.append(True)
    return woken


def test_writeback_on_demand_leaves_no_memory_behind() -> None:
    """The segments that it has freed are trimmed, although nobody asks for anything any more."""
    rig = make_engine(32 * MIB, devices=[64])
    fill(rig, rig.space(), "noise", 1000)
    woken = _woken(rig)
    rig.writeback(MIB)
    assert rig.engine.core.zswap.arena.spare_bytes
    assert woken


def test_an_extent_that_dies_while_it_is_read_is_discarded_soon() -> None:
    """What was freed while a verify, or a load, still read it goes when that has ended."""
    rig = make_engine(32 * MIB, devices=[64])
    space = rig.space()
    slots = fill(rig, space, "noise", 62)
    rig.writeback()
    woken = _woken(rig)
    verifying = start(rig.engine.verify(), "verify")
    verifying.until_io()
    rig.free(space, slots)
    rig.settle()
    woken.clear()
    verifying.finish()
    assert rig.engine.core.devices.discards_waiting
    assert woken


@pytest.mark.parametrize("change", ["limit", "idle", "device"])
def test_settings_and_devices_wake_it_for_what_it_did_not_have_to_do_before(change: str) -> None:
    """A lower limit, an age, or a device: it looks again, however empty the pool is."""
    rig = make_engine(32 * MIB, devices=[64], idle_age=60.0 if change == "device" else 0.0)
    fill(rig, rig.space(), "noise", 500)
    woken = _woken(rig)
    _asleep(rig)
    match change:
        case "limit":
            rig.set(default_group=GroupLimits(pool_max=MIB))
        case "idle":
            rig.set(idle_age=60.0)
        case _:
            rig.swapon(16)
    assert woken
