"""The shrinker's policy: how much should go, what goes, and why nothing does.

Invariants (numbers as in "What must never be"): 17, 20, 21.
"""

from __future__ import annotations

import numpy as np
import pytest

from support.engine import DAY, KIB, MIB, Rig, ids, make_engine, page, pages_of
from support.interleaving import start
from vswapd.settings import GroupLimits
from vswapd.swap_table import Tag
from vswapd_backends.base import PAUSE, SEGMENT_BYTES, U64, run


def _full(rig: Rig, group: str = "0", *, first: int = 0, most: int = 4000) -> U64:
    """Noise pages until the pool is above its high watermark."""
    space = rig.space(group)
    settings = rig.engine.core.settings
    slots: list[int] = []
    while rig.engine.core.zswap.in_use_bytes <= settings.high_watermark * settings.pool_max:
        slots += rig.put(space, pages_of("noise", 8, first + len(slots))).tolist()
        assert len(slots) < most
    return ids(*slots)


def _idles(rig: Rig) -> str:
    """Why nothing is to be done; that nothing is."""
    assert rig.engine.shrinker.count() == 0
    assert rig.engine.shrinker.doing == "idle"
    return rig.engine.shrinker.why


# Watermarks


def test_below_the_high_watermark_nothing_goes() -> None:
    """A pool that is not nearly full is left alone, however old its pages are."""
    rig = make_engine(4 * MIB, devices=[32])
    rig.put(rig.space(), pages_of("noise", 900))
    rig.clock.advance(10 * DAY)
    assert rig.engine.core.zswap.in_use_bytes < 0.95 * 4 * MIB
    assert _idles(rig) == "below the watermarks"
    assert rig.engine.shrinker.next_wakeup() is None
    assert not rig.engine.shrinker.wanted()


def test_past_the_high_watermark_the_oldest_go_down_to_the_low_one() -> None:
    """Writeback begins at the high watermark, ends at the low one, and takes the coldest first."""
    rig = make_engine(4 * MIB, devices=[32])
    slots = _full(rig)
    assert rig.engine.shrinker.wanted()
    count = rig.engine.shrinker.count()
    assert count == rig.engine.core.zswap.in_use_bytes - int(0.85 * 4 * MIB)
    assert rig.engine.shrinker.why == "the pool passed its high watermark"
    assert set(rig.shrink()) <= {"writing back", "discarding"}
    in_use = rig.engine.core.zswap.in_use_bytes
    assert 0.85 * 4 * MIB - 9 * SEGMENT_BYTES < in_use <= 0.85 * 4 * MIB
    tags = rig.tags(slots)
    assert tags == sorted(tags, reverse=True), "no younger page went before an older one"
    assert _idles(rig) == "below the watermarks"
    rig.put(rig.space(), pages_of("noise", 80, 5000))
    assert rig.engine.core.zswap.in_use_bytes > 0.85 * 4 * MIB
    assert _idles(rig) == "below the watermarks"
    rig.check()


def test_between_the_watermarks_work_that_was_begun_goes_on() -> None:
    """Coming from above it writes back; coming from below it does not: hysteresis."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[64])
    slots = _full(rig)
    rig.engine.shrinker.count()
    run(rig.engine.shrinker.scan(1))
    assert 0.85 < rig.engine.core.zswap.in_use_bytes / (8 * MIB) < 0.95
    assert rig.engine.shrinker.count() > 0
    rig.engine.shrinker.settings_changed()
    assert _idles(rig) == "below the watermarks"
    assert Tag.PHYS in rig.tags(slots)


def test_a_limit_that_is_lowered_is_worked_towards() -> None:
    """With a smaller pool.max what is beyond it goes."""
    rig = make_engine(4 * MIB, devices=[32])
    rig.put(rig.space(), pages_of("noise", 600))
    rig.set(pool_max=1 * MIB)
    rig.settle()
    assert rig.pool_bytes <= MIB


# Nothing can be done (20)


def test_without_a_device_it_says_so_and_sleeps() -> None:
    """20: no device, no work, and no time at which there will be."""
    rig = make_engine(2 * MIB)
    _full(rig)
    assert _idles(rig) == "no swap device"
    assert rig.engine.shrinker.next_wakeup() is None


def test_with_full_devices_it_says_so_and_sleeps() -> None:
    """20: a device without a free extent is no reason to work."""
    rig = make_engine(2 * MIB, devices=[3])
    for turn in range(2):
        _full(rig, first=5000 * turn)
        rig.shrink()
    _full(rig, first=10000)
    assert _idles(rig) == "swap devices are full"
    assert rig.engine.shrinker.next_wakeup() is None


def test_with_the_budget_spent_it_says_so_and_sleeps_until_tomorrow() -> None:
    """20: today's writes are used up; the next day it goes on by itself."""
    rig = make_engine(2 * MIB, devices=[32], write_budget=300 * KIB)
    rig.clock.now = 3.25 * DAY
    _full(rig)
    rig.shrink()
    assert rig.devices[0].written <= 300 * KIB
    _full(rig, first=5000)
    assert _idles(rig) == "today's write budget is spent"
    assert rig.engine.shrinker.next_wakeup() == 4 * DAY
    rig.clock.now = 4 * DAY
    assert rig.shrink()
    assert 300 * KIB < rig.devices[0].written <= 600 * KIB


def test_with_writeback_off_it_tries_once_and_sleeps() -> None:
    """20: pages that may not go are found out once, until something changes."""
    rig = make_engine(2 * MIB, devices=[32], default_group=GroupLimits(writeback=False))
    _full(rig)
    assert len(rig.shrink()) <= 1
    assert _idles(rig) == "writeback is off for the groups that hold pages"
    assert rig.devices[0].writes == 0
    rig.set(default_group=GroupLimits())
    assert rig.shrink()
    assert rig.devices[0].writes


def test_at_the_groups_device_limits_it_tries_once_and_sleeps() -> None:
    """20: groups that have their share of the devices already give no more."""
    rig = make_engine(2 * MIB, devices=[32], default_group=GroupLimits(device_max=300 * KIB))
    for turn in range(2):
        _full(rig, first=5000 * turn)
        rig.shrink()
    assert _idles(rig) == "the groups that hold pages are at their device limits"
    assert rig.engine.snapshot().groups[0].device_bytes <= 300 * KIB


def test_switched_off_it_writes_nothing_but_gives_back_what_is_free() -> None:
    """20: shrinker.enabled = false stops writeback, not discards and trimming."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[32], shrinker_enabled=False)
    space = rig.space()
    slots = _full(rig)
    assert _idles(rig) == "switched off (shrinker.enabled)"
    rig.set(pool_enabled=False)
    rig.free(space, rig.put(space, pages_of("noise", 5)))
    assert rig.shrink() == ["discarding"]
    owner = next(s for s in rig.engine.core.spaces.values() if s is not space)
    rig.free(owner, slots)
    rig.clock.advance(0.5)
    assert rig.shrink() == []
    rig.clock.advance(1)
    assert rig.shrink() == ["trimming"]
    assert rig.pool_bytes == 0


def test_a_device_that_fails_is_tried_again_when_something_has_changed() -> None:
    """20: after failed writes it idles; a minute, a store or a free makes it try again."""
    rig = make_engine(2 * MIB, devices=[64])
    device = rig.devices[0]
    slots = _full(rig)
    device.fails = lambda kind, _: kind == "write"
    rig.shrink()
    tried = device.writes
    assert 0 < tried <= 20
    assert _idles(rig) == "writes to the swap device fail"
    assert rig.shrink() == []
    assert device.writes == tried
    rig.clock.advance(61)
    rig.shrink()
    assert device.writes > tried
    device.fails = None
    assert _idles(rig)
    rig.free(next(iter(rig.engine.core.spaces.values())), slots[-1:])
    assert rig.shrink()
    assert Tag.PHYS in rig.tags(slots[:-1])


def test_a_stalled_shrinker_is_not_woken_at_once() -> None:
    """20: what could not be done has no wake-up that is due already."""
    rig = make_engine(2 * MIB, devices=[64], idle_age=10.0)
    _full(rig)
    rig.devices[0].fails = lambda kind, _: kind == "write"
    rig.clock.advance(100)
    rig.shrink()
    assert rig.engine.shrinker.count() == 0
    wakeup = rig.engine.shrinker.next_wakeup()
    assert wakeup is not None
    assert wakeup >= rig.clock() + 1.0


# Other work


def test_spare_memory_goes_segment_by_segment() -> None:
    """Others have the lock between two segments, and may take what is still there."""
    rig = make_engine(64 * MIB, arena_bytes=80 * MIB)
    space = rig.space()
    rig.free(space, rig.put(space, pages_of("noise", 600)))
    arena = rig.engine.core.zswap.arena
    assert arena.spare_segments > 3
    trimming = start(rig.engine.shrinker._compaction.trim())
    left = [arena.spare_segments]
    while trimming.advance() is not None:
        left.append(arena.spare_segments)
        if len(left) == 3:
            slots = rig.put(space, pages_of("noise", 60))
    assert max(-np.diff(left)) <= 2
    assert arena.spare_segments == 0
    assert rig.load(space, slots) == pages_of("noise", 60)
    rig.check()


@pytest.mark.parametrize("what", ["nothing", "some", "all"])
def test_what_dies_before_it_is_compacted_is_left_out(what: str) -> None:
    """Others have the lock between the look for sparse segments and the copying."""
    rig = make_engine(64 * MIB, arena_bytes=80 * MIB)
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 600))
    rig.free(space, slots[::2])
    left = slots[1::2]
    content = [page("noise", i) for i in range(1, 600, 2)]
    step = start(rig.engine.shrinker._compaction.paused_step())
    assert step.advance() is PAUSE
    assert rig.engine.core.zswap._pins.any()
    gone = {"nothing": 0, "some": 100, "all": 300}[what]
    if gone:
        rig.free(space, left[:gone])
    moved = step.finish().moved_bytes
    assert (moved > 0) == (what != "all")
    assert not rig.engine.core.zswap._pins.any()
    if what != "all":
        assert rig.load(space, left[gone:]) == content[gone:]
    rig.check()


def test_spare_memory_goes_after_a_second() -> None:
    """Freed segments stay warm for a second, and then go back to the system."""
    rig = make_engine(16 * MIB, arena_bytes=24 * MIB)
    space = rig.space()
    rig.free(space, rig.put(space, pages_of("noise", 60)))
    assert rig.pool_bytes > 0
    assert rig.engine.shrinker.wanted()
    assert rig.shrink() == []
    assert rig.engine.shrinker.next_wakeup() == rig.clock() + 1.0
    rig.clock.advance(1.0)
    assert rig.shrink() == ["trimming"]
    assert rig.pool_bytes == 0
    assert not rig.engine.shrinker.wanted()
    assert rig.engine.shrinker.next_wakeup() is None


def test_dead_entries_are_compacted_away() -> None:
    """When much of the pool is dead the live entries are put together, device or not."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB)
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 1500))
    rig.free(space, ids(*[s for i, s in enumerate(slots.tolist()) if i % 4]))
    assert rig.engine.shrinker.wanted()
    assert "compacting" in rig.shrink()
    rig.settle()
    live = rig.engine.snapshot().pool.live_bytes
    assert rig.pool_bytes <= 1.25 * live
    assert rig.load(space, slots[::4]) == pages_of("noise", 1500)[::4]


def test_a_group_over_its_limit_pays_with_its_own() -> None:
    """A limit that was lowered takes that group's pages out of the pool, and nobody else's."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[64])
    mine, other = rig.space("1"), rig.space("2")
    others = rig.put(other, pages_of("noise", 300, 5000))
    slots = rig.put(mine, pages_of("noise", 300))
    rig.set(groups={"1": GroupLimits(pool_max=400 * KIB)})
    assert rig.engine.shrinker.count() == mine.group.pool_bytes - 400 * KIB
    assert rig.engine.shrinker.why == "group 1 is over its pool limit"
    assert set(rig.shrink()) == {"writing back"}
    assert mine.group.pool_bytes <= 400 * KIB
    assert set(rig.tags(others)) == {Tag.ZSWAP}
    tags = rig.tags(slots)
    assert tags == sorted(tags, reverse=True)
    assert _idles(rig) == "below the watermarks"


def test_a_group_that_may_not_write_back_does_not_keep_others_from_it() -> None:
    """Of several groups over their limits those whose pages may go are worked on."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[64])
    stuck, mine = rig.space("1"), rig.space("2")
    for space in (stuck, mine):
        rig.put(space, pages_of("noise", 300, 1000 * space.id))
    low = GroupLimits(pool_max=400 * KIB)
    rig.set(groups={"1": GroupLimits(pool_max=400 * KIB, writeback=False), "2": low})
    rig.shrink()
    assert mine.group.pool_bytes <= 400 * KIB
    assert stuck.group.pool_bytes == 300 * 4096


def test_idle_pages_go_and_younger_ones_stay() -> None:
    """What was stored longer ago than shrinker.idle_age is written back, and nothing else."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[64], idle_age=100.0)
    space = rig.space()
    old = rig.put(space, pages_of("noise", 126))
    rig.clock.advance(60)
    young = rig.put(space, pages_of("noise", 126, 1000))
    assert _idles(rig) == "below the watermarks"
    assert rig.engine.shrinker.next_wakeup() == rig.clock() + 40
    rig.clock.advance(41)
    assert rig.engine.shrinker.count() > 0
    assert rig.engine.shrinker.why == "pages older than shrinker.idle_age"
    rig.shrink()
    assert set(rig.tags(old)) == {Tag.PHYS}
    assert set(rig.tags(young)) == {Tag.ZSWAP}


def test_loads_from_the_device_protect_the_pool_from_idle_writeback() -> None:
    """17: pages that come back say that idle ones are wanted; loads from the pool say nothing."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[64], idle_age=100.0)
    space = rig.space()
    back = rig.put(space, pages_of("noise", 126))
    rig.writeback()
    idle = rig.put(space, pages_of("noise", 63, 1000))
    rig.clock.advance(101)
    assert rig.load(space, back) == pages_of("noise", 126)
    assert rig.engine.snapshot().stats.swapin_pages == 126
    assert _idles(rig) == "recent loads from the device protect the pool"
    wakeup = rig.engine.shrinker.next_wakeup()
    assert wakeup is not None
    assert set(rig.tags(idle)) == {Tag.ZSWAP}
    for _ in range(20):
        rig.clock.advance(20)
        rig.shrink()
    assert set(rig.tags(idle)) == {Tag.PHYS}, "protection wears off"


def test_loads_from_the_pool_do_not_protect() -> None:
    """17: only loads from a device count as swap-in."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[64], idle_age=100.0)
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 63))
    rig.load(space, slots)
    rig.clock.advance(101)
    assert rig.engine.snapshot().stats.swapin_pages == 0
    assert rig.engine.shrinker.count() > 0


def test_protection_does_not_hold_against_the_limits() -> None:
    """17: past the high watermark pages go, whatever was loaded from the device."""
    rig = make_engine(2 * MIB, devices=[64], idle_age=100.0)
    space = rig.space()
    back = rig.put(space, pages_of("noise", 300))
    rig.writeback()
    _full(rig, first=1000)
    rig.load(space, back)
    assert rig.engine.shrinker.count() > 0
    assert rig.engine.shrinker.why == "the pool passed its high watermark"


@pytest.mark.parametrize("rate", [512 * KIB, MIB])
def test_the_rate_is_kept(rate: int) -> None:
    """No more is written in any time than shrinker.rate allows for it; it says when it goes on."""
    rig = make_engine(16 * MIB, arena_bytes=32 * MIB, devices=[100], shrinker_rate=rate)
    rig.clock.advance(10)
    _full(rig)
    begin, device = rig.clock(), rig.devices[0]
    rig.shrink()
    assert device.written <= max(rate, 2 * SEGMENT_BYTES)
    first = device.written
    for _ in range(40):
        if not (why := _idles(rig)).startswith("held back"):
            break
        wakeup = rig.engine.shrinker.next_wakeup()
        assert wakeup is not None
        assert rig.clock() < wakeup <= rig.clock() + 1.0
        rig.clock.now = wakeup
        rig.shrink()
        assert device.written <= first + rate * (rig.clock() - begin) + SEGMENT_BYTES
    assert why == "below the watermarks"
    assert device.written > first


def test_sparse_extents_are_merged_when_the_device_is_nearly_full() -> None:
    """Live entries scattered over a full device are put together, and room comes back."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[12])
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 63 * 11))
    rig.writeback()
    keep = [slot for i, slot in enumerate(slots.tolist()) if i % 8 == 0]
    rig.free(space, ids(*sorted(set(slots.tolist()) - set(keep))))
    used = rig.engine.snapshot().devices[0].used_bytes
    assert "merging extents" in rig.shrink()
    assert rig.engine.snapshot().devices[0].used_bytes < used / 2
    assert rig.load(space, ids(*keep)) == pages_of("noise", 63 * 11)[::8]
    rig.check()


def test_what_it_does_is_in_the_picture() -> None:
    """Status shows what the shrinker does, why, and what its last scan made go."""
    rig = make_engine(4 * MIB, devices=[32])
    _full(rig)
    rig.engine.shrinker.count()
    state = rig.engine.snapshot().shrinker
    assert (state.doing, state.why) == ("writing back", "the pool passed its high watermark")
    gone = run(rig.engine.shrinker.scan(1))
    assert rig.engine.snapshot().shrinker.last_bytes == gone >= SEGMENT_BYTES
