"""Reads from swap devices: few requests, each entry checked; and the writes of images."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.engine import KINDS, UnkindDevice, page
from vswapd_backends.base import (
    I64,
    PAGE_BYTES,
    SEGMENT_BYTES,
    IoBatch,
    IoKind,
    Places,
)
from vswapd_backends.segment import CHECK_BYTES, ImageBuilder, fits, payload_of
from vswapd_backends.swapdev import (
    SwapDevices,
    image_writes,
)


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


@dataclass
class Stock:
    """Devices with entries on them, and what these are."""

    devices: SwapDevices
    kept: list[UnkindDevice]
    places: Places
    numbers: I64
    bodies: list[bytes]

    def read(self, which: I64) -> list[bytes | None]:
        """As a load does: plan, read, collect."""
        plan = self.devices.plan_reads(self.places.pick(which))
        IoBatch(plan.requests).perform()
        found = self.devices.collect(plan, self.numbers[which])
        return [None if entry is None else bytes(entry) for entry in found]


def _stock(extents: int = 6, *, seed: int = 0) -> Stock:
    """Images on two devices, full of entries of all lengths."""
    devices, kept = _devices(extents, extents)
    chooser = random.Random(seed)
    addresses, lengths, numbers, bodies = [], [], [], []
    for sequence in range(1, 2 * (extents - 1) + 1):
        number = devices.take(0, 0, sequence)
        assert number is not None
        buffer = memoryview(bytearray(SEGMENT_BYTES))
        builder = ImageBuilder(buffer, codec="lz4", sequence=sequence, group=0, salt=True)
        count = 0
        while True:
            length = chooser.choice([1, 30, 500, 1500, 3000, PAGE_BYTES])
            if not fits(np.array([length]), builder.room):
                break
            body = page(chooser.choice(KINDS), chooser.randrange(500))[:length]
            slot = chooser.randrange(1 << 39)
            (offset,) = builder.add(
                np.array([slot]), np.array([length]), payload_of([body])
            ).tolist()
            addresses.append(number * SEGMENT_BYTES + offset)
            lengths.append(length)
            numbers.append(slot)
            bodies.append(body)
            count += 1
        builder.finish()
        entry, extent = devices.device_of(number)
        entry.device.write(extent, 0, buffer)
        devices.keep(number, count, sum(lengths[-count:]))
        devices.unpin(number)
    places = Places(np.array(addresses, np.int64), np.array(lengths, np.int64))
    return Stock(devices, kept, places, np.array(numbers, np.int64), bodies)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 3),
    picks=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 40)), min_size=1, max_size=12),
)
def test_entries_are_read_in_the_order_asked_for(seed: int, picks: list[tuple[int, int]]) -> None:
    """Any entries, in any order, twice too, from any extents and devices, are found in a plan."""
    stock = _stock(3, seed=seed)
    total = len(stock.bodies)
    chosen = [(first + i) % total for first, count in picks for i in range(count)]
    random.Random(seed).shuffle(chosen)
    assert stock.read(np.array(chosen)) == [stock.bodies[i] for i in chosen]
    assert all(not entry.pins.any() for entry in stock.devices)


@settings(deadline=None, max_examples=60)
@given(picks=st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_reads_cover_their_entries_once(picks: list[int]) -> None:
    """Requests are whole blocks inside one extent, and no block is read twice."""
    stock = _stock(3)
    which = np.array([pick % len(stock.bodies) for pick in picks])
    plan = stock.devices.plan_reads(stock.places.pick(which))
    blocks: set[tuple[str, int, int]] = set()
    for request in plan.requests:
        assert request.kind is IoKind.READ
        assert request.offset % PAGE_BYTES == request.length % PAGE_BYTES == 0
        assert 0 < request.length <= SEGMENT_BYTES - request.offset
        for at in range(request.offset, request.offset + request.length, PAGE_BYTES):
            block = (request.device.path, request.extent, at)
            assert block not in blocks
            blocks.add(block)
    for index, start, length in zip(
        plan.which.tolist(), plan.start.tolist(), plan.places.length.tolist(), strict=True
    ):
        assert 0 <= start <= plan.requests[index].length - CHECK_BYTES - length
    stock.devices.abandon(plan)
    assert all(not entry.pins.any() for entry in stock.devices)


def test_neighbours_are_read_in_one_request() -> None:
    """All entries of an extent are one read, entries far apart are one each."""
    stock = _stock(3)
    extent = np.flatnonzero(stock.places.number == stock.places.number[0])
    plan = stock.devices.plan_reads(stock.places.pick(extent[::-1].copy()))
    assert len(plan.requests) == 1
    stock.devices.abandon(plan)
    ends = extent[[0, len(extent) - 1]]
    plan = stock.devices.plan_reads(stock.places.pick(ends))
    assert len(plan.requests) == 2
    assert sum(request.length for request in plan.requests) <= 4 * PAGE_BYTES
    stock.devices.abandon(plan)


def test_extents_that_touch_are_read_by_themselves() -> None:
    """The last entry of an extent and the first of the next are not one request."""
    devices, _ = _devices(4)
    one, two = _take(devices), _take(devices)
    assert two == one + 1
    places = Places(np.array([two * SEGMENT_BYTES - 100, two * SEGMENT_BYTES]), np.array([50, 50]))
    plan = devices.plan_reads(places)
    assert [(request.extent, request.offset) for request in plan.requests] == [
        (0, SEGMENT_BYTES - PAGE_BYTES),
        (1, 0),
    ]


def test_a_plan_pins_what_it_reads() -> None:
    """Until it is collected or abandoned the extents stay, also if all in them dies."""
    stock = _stock(3)
    which = np.flatnonzero(stock.places.number == 0)
    plan = stock.devices.plan_reads(stock.places.pick(which[:1]))
    stock.devices.give_up(stock.places.pick(which))
    assert not stock.devices.discards_waiting
    IoBatch(plan.requests).perform()
    (entry,) = stock.devices.collect(plan, stock.numbers[which[:1]])
    assert entry is not None
    assert bytes(entry) == stock.bodies[0]
    assert stock.devices.discards_waiting


def test_a_read_error_is_for_the_entries_that_it_hits() -> None:
    """Entries of a failed request are missing, the others are there; the error is counted once."""
    stock = _stock(4)
    stock.kept[0].fails = lambda kind, _: kind == "read"
    found = stock.read(np.arange(len(stock.bodies)))
    on_first = (stock.places.number < (1 << 24)).tolist()
    expected = [None if lost else body for body, lost in zip(stock.bodies, on_first, strict=True)]
    assert found == expected
    assert [entry.read_errors for entry in stock.devices] == [3, 0]
    stock.kept[0].fails = None
    assert stock.read(np.arange(len(stock.bodies))) == stock.bodies


@settings(deadline=None, max_examples=60)
@given(which=st.integers(0, 5000), byte=st.integers(0, 5000), flip=st.integers(1, 255))
def test_damage_is_for_the_entry_that_it_hits(which: int, byte: int, flip: int) -> None:
    """A flipped byte in check or body makes that entry missing, and no other."""
    stock = _stock(3)
    index = which % len(stock.bodies)
    at = byte % (CHECK_BYTES + len(stock.bodies[index]))
    entry, extent = stock.devices.device_of(int(stock.places.number[index]))
    assert isinstance(entry.device, UnkindDevice)
    start = extent * SEGMENT_BYTES + int(stock.places.offset[index])
    entry.device.data[start + at] ^= flip
    expected: list[bytes | None] = list(stock.bodies)
    expected[index] = None
    assert stock.read(np.arange(len(stock.bodies))) == expected


def test_entries_of_another_slot_or_image_are_missing() -> None:
    """Right bytes for the wrong slot, or from an image that was to be overwritten, are none."""
    stock = _stock(3)
    every = np.arange(len(stock.bodies))
    stock.numbers[3] += 1
    assert stock.read(every)[3] is None
    stock.numbers[3] -= 1
    entry, extent = stock.devices.device_of(int(stock.places.number[0]))
    entry.sequence[extent] += 1
    lost = stock.places.number == stock.places.number[0]
    assert [found is None for found in stock.read(every)] == lost.tolist()


# Writes of images


@pytest.mark.parametrize(
    ("payload_end", "count", "spans"),
    [
        (64, 1, [(0, 4096), (SEGMENT_BYTES - 4096, 4096)]),
        (4097, 513, [(0, 8192), (SEGMENT_BYTES - 8192, 8192)]),
        (SEGMENT_BYTES - 4096, 100, [(0, SEGMENT_BYTES)]),
        (SEGMENT_BYTES - 24000, 100, [(0, SEGMENT_BYTES - 20480), (SEGMENT_BYTES - 4096, 4096)]),
        (SEGMENT_BYTES - 16384, 100, [(0, SEGMENT_BYTES)]),
    ],
)
def test_a_sparse_image_is_written_without_its_middle(
    payload_end: int, count: int, spans: list[tuple[int, int]]
) -> None:
    """Both ends as whole blocks, or everything in one request if the gap is not worth a second."""
    device = UnkindDevice(2)
    image = memoryview(bytes(range(256)) * 1024)
    writes = image_writes(device, 1, image, payload_end, count)
    assert [(write.offset, write.length) for write in writes] == spans
    IoBatch(writes).perform()
    for offset, length in spans:
        start = SEGMENT_BYTES + offset
        assert device.data[start : start + length] == image[offset : offset + length]
