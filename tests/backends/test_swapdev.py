"""Extents of swap devices: handed out by priority, pinned, discarded before they are free."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.engine import UnkindDevice
from vswapd_backends.base import (
    IoBatch,
    IoKind,
    Places,
    run,
)
from vswapd_backends.segment import ENTRY_OVERHEAD
from vswapd_backends.swapdev import (
    MAX_DEVICES,
    SwapDevice,
    SwapDevices,
    footprint,
)

VERBS = ("take", "take", "reserve", "keep", "kill", "unpin", "fail", "discard")


def _devices(*extents: int) -> tuple[SwapDevices, list[UnkindDevice]]:
    devices = SwapDevices()
    kept = [UnkindDevice(count, f"mem{i}") for i, count in enumerate(extents)]
    for device in kept:
        assert devices.add(device, 0) is not None
    return devices, kept


def _take(devices: SwapDevices, *, reserve: bool = False) -> int:
    number = devices.take(0, 0, 1, reserve=reserve)
    assert number is not None
    return number


def _place(number: int, count: int = 1) -> Places:
    """Places of `count` small entries in an extent."""
    return Places.within(number, np.arange(count) * 100 + 4096, np.full(count, 50, np.int64))


# Devices


def test_extents_come_from_the_highest_priority() -> None:
    """The highest priority is used up first, then the next; equal ones in the order of swapon."""
    devices = SwapDevices()
    for path, priority in [("low", -1), ("one", 5), ("two", 5)]:
        devices.add(UnkindDevice(3, path), priority)
    assert [d.device.path for d in devices] == ["one", "two", "low"]
    taken = [devices.device_of(_take(devices))[0].device.path for _ in range(6)]
    assert taken == ["one", "one", "two", "two", "low", "low"]
    assert devices.take(0, 0, 1) is None


def test_a_device_is_found_by_its_path() -> None:
    """`find` knows the devices in use, and no others."""
    devices, _ = _devices(2, 2)
    found = devices.find("mem1")
    assert found is not None
    assert found.index == 1
    assert devices.find("mem2") is None
    devices.remove(found)
    assert devices.find("mem1") is None
    assert [d.device.path for d in devices] == ["mem0"]


def test_there_are_as_many_devices_as_numbers_for_them() -> None:
    """One more than the numbers reach is refused; a place that became free is used again."""
    devices, _ = _devices(*[1] * MAX_DEVICES)
    assert devices.add(UnkindDevice(1, "more"), 0) is None
    third = devices.find("mem3")
    assert third is not None
    devices.remove(third)
    added = devices.add(UnkindDevice(1, "more"), 0)
    assert added is not None
    assert added.index == 3


def test_a_device_with_live_entries_cannot_be_removed() -> None:
    """Forgetting a device that words still name is a mistake that is noticed."""
    devices, _ = _devices(4)
    number = _take(devices)
    devices.keep(number, 1, 50)
    with pytest.raises(AssertionError):
        devices.remove(devices.device_of(number)[0])
    devices.give_up(_place(number))
    with pytest.raises(AssertionError):
        devices.remove(devices.device_of(number)[0])


def test_numbers_name_device_and_extent() -> None:
    """What `take` hands out leads back to its device and extent, on every device."""
    devices, kept = _devices(3, 3, 3)
    for _ in range(6):
        number = _take(devices)
        entry, extent = devices.device_of(number)
        assert entry.number_of(extent) == number
        assert entry.device in kept


def test_states_are_words() -> None:
    """A device is on, failing once something has failed, or draining."""
    devices, _ = _devices(4)
    number = _take(devices)
    entry, _ = devices.device_of(number)
    assert entry.state == "on"
    devices.fail(number)
    assert entry.state == "failing"
    entry.draining = True
    assert entry.state == "draining"


# Extents


def test_one_extent_of_each_device_is_kept_in_reserve() -> None:
    """The last extent is handed out only for moving entries together."""
    devices, _ = _devices(3, 1)
    assert devices.free_extents == devices.ready_extents == 2
    taken = {_take(devices), _take(devices)}
    assert devices.take(0, 0, 1) is None
    assert devices.free_extents == devices.ready_extents == 0
    taken |= {_take(devices, reserve=True), _take(devices, reserve=True)}
    assert len(taken) == 4
    assert devices.take(0, 0, 1, reserve=True) is None


def test_a_draining_device_hands_out_nothing() -> None:
    """Neither an ordinary extent nor the reserve, and what is free on it does not count."""
    devices, _ = _devices(5, 3)
    first = devices.find("mem0")
    assert first is not None
    first.draining = True
    assert devices.free_extents == 2
    assert devices.any
    assert devices.device_of(_take(devices))[0].index == 1
    second = devices.find("mem1")
    assert second is not None
    second.draining = True
    assert not devices.any
    assert devices.take(0, 0, 1, reserve=True) is None


def test_an_extent_remembers_what_it_was_taken_for() -> None:
    """Sequence, pool and group of each extent are those of its last `take`."""
    devices, _ = _devices(4, 4)
    numbers = [devices.take(i % 2, i, 10 + i) for i in range(6)]
    places = np.array([number for number in numbers if number is not None], np.int64)
    assert len(places) == 6
    assert devices.pools_of(places).tolist() == [0, 1, 0, 1, 0, 1]
    assert devices.sequences_of(places).tolist() == [10, 11, 12, 13, 14, 15]
    for i, number in enumerate(places.tolist()):
        entry, extent = devices.device_of(number)
        assert entry.group[extent] == i


def test_an_extent_without_live_entries_is_discarded_before_it_is_free() -> None:
    """It waits for its discard, is not handed out while that is under way, and is free after."""
    devices, (device,) = _devices(3)
    numbers = [_take(devices) for _ in range(2)]
    for number in numbers:
        devices.keep(number, 3, 150)
        devices.unpin(number)
    assert not devices.discards_waiting
    devices.give_up(_place(numbers[0], 3))
    assert devices.discards_waiting
    assert (devices.free_extents, devices.ready_extents) == (1, 0)
    operation = devices.discard()
    batch = next(operation)
    assert isinstance(batch, IoBatch)
    assert devices.discarding
    assert not devices.discards_waiting
    assert devices.take(0, 0, 1) is None
    batch.perform()
    with pytest.raises(StopIteration) as end:
        next(operation)
    assert end.value.value == 1
    assert device.discards == 1
    assert not devices.discarding
    assert _take(devices) == numbers[0]


def test_neighbours_are_discarded_together() -> None:
    """One request per run of extents, however they were given up."""
    devices, (device,) = _devices(12)
    numbers = [_take(devices) for _ in range(10)]
    for index in (7, 1, 0, 2, 9, 8):
        devices.unpin(numbers[index])
    operation = devices.discard()
    batch = next(operation)
    assert isinstance(batch, IoBatch)
    assert [(r.kind, r.extent, r.length) for r in batch.requests] == [
        (IoKind.DISCARD, 0, 3),
        (IoKind.DISCARD, 7, 3),
    ]
    batch.perform()
    with pytest.raises(StopIteration):
        next(operation)
    assert device.discards == 2
    assert run(devices.discard()) == 0


def test_a_discard_that_is_given_up_leaves_the_extents_free() -> None:
    """An operation that is ended while its discards are under way loses no extent."""
    devices, _ = _devices(3)
    devices.unpin(_take(devices))
    operation = devices.discard()
    next(operation)
    operation.close()
    assert not devices.discarding
    assert devices.ready_extents == 2


def test_pins_keep_an_extent() -> None:
    """Dead or not, an extent that is read or written stays until its last pin goes."""
    devices, _ = _devices(3)
    number = _take(devices)
    devices.keep(number, 2, 100)
    devices.pin(number)
    devices.unpin(number)
    devices.unpin(number)
    devices.pin(number)
    devices.give_up(_place(number, 2))
    assert not devices.discards_waiting
    devices.unpin(number)
    assert devices.discards_waiting
    with pytest.raises(AssertionError):
        devices.unpin(number)


def test_a_failed_extent_is_never_handed_out_again() -> None:
    """A write error is counted; once empty and discarded the extent is out of use for good."""
    devices, _ = _devices(3)
    number = _take(devices)
    devices.fail(number)
    devices.unpin(number)
    run(devices.discard())
    entry = devices.device_of(number)[0]
    assert (entry.write_errors, entry.map.bad, entry.used) == (1, 1, 0)
    taken = {_take(devices), _take(devices, reserve=True)}
    assert number not in taken
    assert devices.take(0, 0, 1, reserve=True) is None


def test_live_entries_are_counted_per_extent() -> None:
    """What is kept and given up, on several devices in one call, is counted where it lies."""
    devices, _ = _devices(3, 3)
    numbers = [_take(devices) for _ in range(4)]
    for number in numbers:
        devices.keep(number, 3, 150)
    assert sum(int(entry.live_bytes.sum()) for entry in devices) == 600
    parts = [_place(numbers[0], 3), _place(numbers[1], 1), _place(numbers[3], 2)]
    devices.give_up(
        Places(
            np.concatenate([part.address for part in parts]),
            np.concatenate([part.length for part in parts]),
        )
    )
    left = [devices.device_of(number) for number in numbers]
    assert [int(entry.live_entries[extent]) for entry, extent in left] == [0, 2, 3, 1]
    assert [int(entry.live_bytes[extent]) for entry, extent in left] == [0, 100, 150, 50]
    entry, extent = left[1]
    assert footprint(entry, np.array([extent])).tolist() == [100 + 2 * ENTRY_OVERHEAD]
    assert [entry.used for entry in devices] == [2, 2]


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from([*VERBS]),
            st.integers(0, 20),
        ),
        max_size=60,
    )
)
def test_every_extent_is_free_held_or_on_its_way(steps: list[tuple[str, int]]) -> None:
    """Any sequence of calls: no extent has two owners, none is lost, and the counts say so."""
    devices, _ = _devices(4, 3)
    pinned: list[int] = []
    alive: list[int] = []
    bad: set[int] = set()
    for verb, which in steps:
        held = sorted({*pinned, *alive})
        if verb in {"take", "reserve"}:
            number = devices.take(0, 0, 1, reserve=verb == "reserve")
            if number is not None:
                assert number not in held
                assert number not in bad
                pinned.append(number)
        elif verb == "discard":
            run(devices.discard())
        elif verb == "kill" and alive:
            number = alive.pop(which % len(alive))
            devices.give_up(_place(number))
        elif verb == "unpin" and pinned:
            devices.unpin(pinned.pop(which % len(pinned)))
        elif verb == "keep" and pinned:
            alive.append(pinned[which % len(pinned)])
            devices.keep(alive[-1], 1, 50)
        elif verb == "fail" and pinned:
            bad.add(pinned[which % len(pinned)])
            devices.fail(pinned[which % len(pinned)])
        _check_counts(list(devices), {*pinned, *alive}, bad)


def _check_counts(devices: list[SwapDevice], held: set[int], bad: set[int]) -> None:
    for entry in devices:
        mine = {number for number in held if number >> 24 == entry.index}
        assert entry.used == len(mine)
        assert entry.map.bad == len({n for n in bad if n >> 24 == entry.index})
        waiting = {entry.number_of(extent) for extent in entry.discards}
        assert len(waiting) == len(entry.discards)
        assert not waiting & mine
        gone = {n for n in bad if n >> 24 == entry.index} - mine - waiting
        free = entry.map.extents - len(mine) - len(waiting) - len(gone)
        assert entry.map.free == free
