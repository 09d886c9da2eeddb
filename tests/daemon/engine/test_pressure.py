"""The pool gives way where memory runs short, and takes its room back when it is free again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from support.engine import MIB, Clock, Rig, make_engine, page, pages_of
from vswap.protocol import Reason
from vswapd.errors import UnbackedError
from vswapd.pressure import Free, Pressure


class Machine:
    """Memory of which others take some, and the engine's pool the rest."""

    def __init__(self, rig: Rig, free: int) -> None:
        self.rig = rig
        self.free = free
        """With an empty pool."""
        self.looks = 0

    def __call__(self) -> Free:
        self.looks += 1
        return Free(self.free - self.rig.engine.core.zswap.resident_bytes, "the machine")


def rig_with(free: int, **options: Any) -> tuple[Rig, Machine]:
    rig = make_engine(pool_max=8 * MIB, pool_reserve=4 * MIB, **options)
    machine = Machine(rig, free)
    rig.engine.on_pressure = lambda: None
    rig.engine.watch_memory(machine)
    return rig, machine


def settings(rig: Rig, **changes: Any) -> None:
    rig.engine.apply(dataclasses.replace(rig.engine.core.settings, **changes))


@pytest.mark.parametrize(
    ("free", "taken", "limit", "critical"),
    [
        (1000, 0, 100, False),
        (150, 0, 50, False),
        (150, 30, 80, False),
        (100, 30, 30, False),
        (90, 30, 20, False),
        (25, 30, 0, False),
        (24, 30, 0, True),
        (-50, 300, 100, True),
        (-50, 180, 30, True),
    ],
)
def test_what_the_pool_may_take(free: int, taken: int, limit: int, *, critical: bool) -> None:
    """What it takes, and what is free but for the reserve; never more than its maximum."""
    pressure = Pressure(Clock())
    pressure.meter = lambda: Free(free, "x")
    pressure.look(100, 100, lambda: taken)
    assert (pressure.limit, pressure.critical) == (limit, critical)
    assert pressure.why == ("memory is short on x" if limit < 100 else "")


def test_without_a_reserve_memory_is_not_looked_at() -> None:
    """A reserve of 0 switches it off, and so does having no meter."""

    def fail() -> Free:
        raise AssertionError("looked at")

    pressure = Pressure(Clock())
    pressure.look(100, 50, lambda: 0)
    assert pressure.limit == 100
    assert not pressure.due()
    pressure.meter = fail
    pressure.look(100, 0, lambda: 0)
    assert pressure.limit == 100


def test_looks_are_rare_where_there_is_much() -> None:
    """Every quarter of a second where it is short, every ten seconds where there is plenty."""
    clock = Clock()
    pressure = Pressure(clock)
    intervals = []
    for free in (0, 1 << 30, 9 << 30, 1 << 50):
        pressure.meter = lambda free=free: Free(free, "x")
        pressure.look(100, 1 << 30, lambda: 0)
        intervals.append(pressure.next_look - clock())
        assert not pressure.due()
    assert intervals == [0.25, 0.25, 2.0, 10.0]
    clock.advance(10)
    assert pressure.due()


def test_stores_are_refused_before_memory_runs_out() -> None:
    """Without a device the pool stops at what is free but for the reserve: pool_full."""
    rig, machine = rig_with(6 * MIB)
    space = rig.space()
    stored = []
    for seed in range(0, 4096, 16):
        found = rig.store(space, pages_of("noise", 16, seed))
        if found.reason is not None:
            assert found.reason is Reason.POOL_FULL
            break
        stored.append((seed, found.slots))
    assert machine().nbytes >= 4 * MIB
    assert rig.engine.core.zswap.resident_bytes > 1 * MIB
    for seed, slots in stored:
        assert rig.load(space, slots) == pages_of("noise", 16, seed)
    assert rig.engine.snapshot().pool.pressure == "memory is short on the machine"


def test_what_is_too_much_goes_to_the_device_and_comes_to_stay_when_it_is_over() -> None:
    """Pages leave for the device as others take memory; the limit is back when they have gone."""
    rig, machine = rig_with(64 * MIB, devices=[64])
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 1024))
    core = rig.engine.core
    assert core.zswap.resident_bytes > 4 * MIB
    machine.free = 6 * MIB
    rig.clock.advance(10)
    rig.shrink()
    assert machine().nbytes >= 4 * MIB
    assert core.zswap.in_use_bytes < 2 * MIB
    assert core.pressure.limit < 3 * MIB
    assert rig.load(space, slots) == pages_of("noise", 1024)
    machine.free = 64 * MIB
    rig.clock.advance(0.25)
    assert rig.engine.shrinker.count() == 0
    assert core.pressure.limit == 8 * MIB
    assert rig.engine.snapshot().pool.pressure == ""
    rig.put(space, pages_of("noise", 1024, 5000))
    assert rig.engine.core.stats.fallback_pages == 0


def test_a_request_after_the_look_is_due_looks_first() -> None:
    """The limit follows also where the shrinker's thread is held up by a device."""
    rig, machine = rig_with(64 * MIB)
    space = rig.space()
    rig.put(space, pages_of("noise", 16))
    machine.free = 4 * MIB
    rig.clock.advance(10)
    rig.put(space, [page("zero", 0)])
    assert rig.store(space, pages_of("noise", 256, 50)).reason is Reason.POOL_FULL


def test_looks_are_not_per_request() -> None:
    """However much is stored and freed, memory is looked at as often as time says."""
    rig, machine = rig_with(64 * MIB)
    space = rig.space()
    before = machine.looks
    for _ in range(200):
        rig.free(space, rig.put(space, pages_of("text", 4)))
    assert machine.looks == before
    rig.clock.advance(10)
    rig.free(space, rig.put(space, pages_of("text", 4)))
    assert machine.looks == before + 1


def test_at_the_very_end_not_even_zero_pages_get_slots() -> None:
    """With less than a quarter of the reserve nothing new is begun; what is there can go."""
    rig, machine = rig_with(64 * MIB)
    space = rig.space()
    slots = rig.put(space, pages_of("text", 8))
    machine.free = MIB - 1
    rig.clock.advance(10)
    rig.load(space, slots)
    rig.shrink()
    assert rig.store(space, [page("zero", 0)]).reason is Reason.POOL_FULL
    assert rig.store(space, [page("zero", 0)], slots[:1]).reason is None
    rig.free(space, slots[:4])
    assert rig.load(space, slots[4:]) == pages_of("text", 8)[4:]
    rejected = rig.store(space, pages_of("noise", 1), slots[5:6])
    assert rejected.reason is Reason.POOL_FULL
    with pytest.raises(UnbackedError):
        rig.load(space, slots[5:6])
    machine.free = 64 * MIB
    rig.clock.advance(0.25)
    rig.shrink()
    assert rig.store(space, [page("zero", 0)]).reason is None


def test_an_idle_shrinker_wakes_up_for_the_next_look() -> None:
    """Nobody need store for the daemon to notice that others want the memory."""
    rig, _ = rig_with(64 * MIB, shrinker_enabled=False)
    rig.shrink()
    assert rig.engine.shrinker.next_wakeup() == rig.engine.core.pressure.next_look


def test_a_change_of_settings_holds_under_pressure_too() -> None:
    """Another pool.max or pool.reserve is in force at once, and no more than memory allows."""
    rig, _ = rig_with(6 * MIB)
    core = rig.engine.core
    assert core.pressure.limit == 2 * MIB
    settings(rig, pool_reserve=1 * MIB)
    assert core.pressure.limit == 5 * MIB
    settings(rig, pool_max=3 * MIB)
    assert core.pressure.limit == 3 * MIB
    settings(rig, pool_max=8 * MIB, pool_reserve=0)
    assert core.pressure.limit == 8 * MIB


def test_a_look_that_sees_a_part_never_raises_the_limit() -> None:
    """What was free when it was last seen may be pool by now: the limit stays, or falls."""
    pressure = Pressure(Clock())
    found = Free(60, "x")
    pressure.meter = lambda: found
    pressure.look(100, 10, lambda: 30)
    assert (pressure.limit, pressure.why) == (80, "memory is short on x")
    found = Free(1000, "y", complete=False)
    pressure.look(100, 10, lambda: 80)
    assert pressure.limit == 80
    assert "cannot be looked at" in pressure.why
    found = Free(5, "y", complete=False)
    pressure.look(100, 10, lambda: 80)
    assert (pressure.limit, pressure.why) == (75, "memory is short on y")
    pressure.look(70, 10, lambda: 80)
    assert pressure.limit == 70
    found = Free(1000, "y")
    pressure.look(100, 10, lambda: 75)
    assert (pressure.limit, pressure.why) == (100, "")


def test_a_meter_that_raises_leaves_the_limit_and_is_asked_again_later() -> None:
    """The limit is what it was, a lower maximum excepted, and the next look is not at once."""
    clock = Clock()
    pressure = Pressure(clock)
    pressure.meter = lambda: Free(60, "x")
    pressure.look(100, 10, lambda: 30)

    def fail() -> Free:
        raise OSError("no more descriptors")

    pressure.meter = fail
    clock.advance(10)
    for most, limit in ((100, 80), (50, 50)):
        with pytest.raises(OSError, match="descriptors"):
            pressure.look(most, 10, lambda: 30)
        assert pressure.limit == limit
        assert not pressure.due()
        clock.advance(1)
        assert pressure.due()
