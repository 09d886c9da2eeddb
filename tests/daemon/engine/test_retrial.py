"""Extents whose writes failed: when they are tried again, and when not."""

from __future__ import annotations

import itertools

import pytest

from support.engine import DAY, KIB, MIB, Rig, UnkindDevice, make_engine, pages_of
from vswapd_backends.base import U64

MINUTE = 60.0
HOUR = 3600.0


def _rig(extents: int = 12) -> tuple[Rig, UnkindDevice]:
    rig = make_engine(700 * KIB, arena_bytes=4 * MIB, devices=[extents])
    return rig, rig.devices[0]


def _bad(rig: Rig, device: UnkindDevice) -> int:
    return rig.device_of(device).map.retired


def _wear_down(rig: Rig, device: UnkindDevice) -> None:
    """All writes fail until no extent is left."""
    device.fails = lambda kind, _: kind == "write"
    space = rig.space()
    seed = 0
    while rig.engine.core.devices.free_extents:
        rig.store(space, pages_of("noise", 60, seed))
        rig.writeback()
        rig.clock.advance(31.0)  # what got nowhere is tried again after half a minute
        rig.settle()
        seed = (seed + 60) % 1200
        assert device.writes < 1000
    assert _bad(rig, device) >= device.extents - 1


def _pass(rig: Rig, seconds: float) -> int:
    """Let time pass as the shrinker's thread does: awake when there may be work; how often."""
    end = rig.clock.now + seconds
    woken = 0
    while True:
        rig.shrink()
        wakeup = rig.engine.shrinker.next_wakeup()
        if wakeup is None or wakeup > end:
            break
        rig.clock.now = max(wakeup, rig.clock.now)
        woken += 1
        assert woken < 100_000
    rig.clock.now = end
    return woken


def _put_out(rig: Rig) -> U64:
    """Pages that lie on the device in the end."""
    slots = rig.put(rig.space(), pages_of("noise", 60, 5000))
    rig.writeback()
    rig.settle()
    return slots


def test_a_device_that_is_well_again_gets_all_its_extents_back() -> None:
    """First one, then twice as many each time, until none is out of use; then nobody looks."""
    rig, device = _rig()
    _wear_down(rig, device)
    for space in list(rig.engine.core.spaces.values()):
        rig.close(space)
    device.fails = None
    rig.clock.advance(HOUR)
    left = [_bad(rig, device)]
    while left[-1]:
        rig.shrink()
        left.append(_bad(rig, device))
        rig.clock.advance(MINUTE)
    tried = [n for n in (before - after for before, after in itertools.pairwise(left)) if n]
    assert len(tried) > 3
    assert tried[:-1] == [2**n for n in range(len(tried) - 1)]
    rig.clock.advance(HOUR)
    rig.shrink()
    assert rig.engine.shrinker.next_wakeup() is None
    assert rig.engine.core.devices.free_extents == device.extents - 1
    slots = _put_out(rig)
    assert rig.verify().ok
    assert device.written > 0
    assert len(slots) == 60
    rig.check()


def test_a_device_that_stays_bad_is_left_alone_for_longer_and_longer() -> None:
    """One write after a minute, two, four, and so on up to an hour; nothing is lost by them."""
    rig, device = _rig(4)
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 100, 7000))
    rig.set(high_watermark=0.2, low_watermark=0.1)
    _wear_down(rig, device)
    _pass(rig, HOUR)
    before = device.writes
    _pass(rig, DAY)
    assert 0 < device.writes - before <= 3 * 24 * 2
    assert rig.load(space, slots) == pages_of("noise", 100, 7000)
    rig.check()


def test_the_first_failure_is_noticed_and_remembered() -> None:
    """The shrinker is woken for it, and says when it will look again: in a minute."""
    rig, device = _rig()
    assert rig.engine.shrinker.next_wakeup() is None
    device.fails = lambda kind, nth: kind == "write" and nth == 1
    rig.put(rig.space(), pages_of("noise", 60))
    rig.writeback()
    rig.settle()
    assert _bad(rig, device) == 1
    wakeup = rig.engine.shrinker.next_wakeup()
    assert wakeup is not None
    assert wakeup <= rig.clock.now + MINUTE
    _pass(rig, 2 * MINUTE)
    assert _bad(rig, device) == 0
    rig.check()


def test_a_failure_outside_of_the_shrinker_wakes_it() -> None:
    """A store that goes straight to the device, and clears up itself: the thread has to know."""
    rig, device = _rig(2)
    rig.set(pool_enabled=False)
    assert rig.engine.shrinker.count() == 0
    device.fails = lambda kind, _: kind == "write"
    assert rig.store(rig.space(), pages_of("noise", 6)).reason is not None
    assert not rig.engine.core.devices.discards_waiting
    assert _bad(rig, device) == 1
    assert rig.engine.shrinker.wanted()
    rig.shrink()
    assert not rig.engine.shrinker.wanted()
    assert rig.engine.shrinker.next_wakeup() == rig.clock.now + MINUTE


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_forgets_no_bad_extent_and_no_good_one(when: str) -> None:
    """What is out of use stays so in the next process, and is tried again there."""
    rig, device = _rig()
    _wear_down(rig, device)
    device.fails = None
    if when == "after":
        _pass(rig, 3 * MINUTE)
    bad = _bad(rig, device)
    assert bad
    rig.recover()
    assert _bad(rig, device) == bad
    _pass(rig, HOUR)
    assert _bad(rig, device) == 0
    rig.recover()
    assert _bad(rig, device) == 0
    rig.check()


def test_a_device_that_is_being_drained_is_not_tried() -> None:
    """Nothing is to be written to it any more."""
    rig, device = _rig()
    _wear_down(rig, device)
    bad = _bad(rig, device)
    rig.device_of(device).draining = True
    _pass(rig, HOUR)
    assert _bad(rig, device) == bad
    rig.device_of(device).draining = False
