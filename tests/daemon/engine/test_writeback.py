"""Writeback beside others: loads, other operations, other shards, and mistakes in the middle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.engine import MIB, Rig, UnkindDevice, make_engine, pages_of
from support.interleaving import start
from vswapd.groups import Space
from vswapd_backends.base import SEGMENT_BYTES, U64, IoBatch, Places
from vswapd_backends.shared_extents import SharedExtents, owners_region


def fill(rig: Rig, space: Space, count: int, first: int = 0) -> U64:
    return np.concatenate(
        [
            rig.put(space, pages_of("noise", min(62, count - i), first + i))
            for i in range(0, count, 62)
        ]
    )


def test_writeback_of_a_pool_that_was_loaded_stays_within_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pages that were all loaded get their second chance a segment at a time, within the limit."""
    rig = make_engine(8 * MIB, arena_bytes=64 * MIB, devices=[64])
    space = rig.space()
    slots = fill(rig, space, 62 * 28)
    for i in range(0, len(slots), 500):
        rig.load(space, slots[i : i + 500])
    zswap = rig.engine.core.zswap
    most = 0
    append = zswap.append

    def spy(*args: Any) -> Places:
        nonlocal most
        places = append(*args)
        most = max(most, zswap.in_use_bytes)
        return places

    monkeypatch.setattr(zswap, "append", spy)
    before = zswap.in_use_bytes
    rig.writeback(1)
    assert most <= max(before, 8 * MIB) + SEGMENT_BYTES


def test_two_that_wait_for_the_same_discards_keep_the_write_budget() -> None:
    """Two operations that wait for the same discards do not write more than the budget together."""
    rig = make_engine(8 * MIB, devices=[4])
    space = rig.space()
    old = fill(rig, space, 62 * 3)
    rig.writeback()
    fill(rig, space, 62 * 3, 1000)
    rig.free(space, old)
    device = rig.devices[0]
    written = device.written
    rig.engine.core.budget._used = 0
    rig.set(write_budget=SEGMENT_BYTES)
    tasks = [start(rig.engine.writeback(1)) for _ in range(2)]
    for task in tasks:
        task.advance()
    for _ in range(100):
        for task in tasks:
            if not task.ended:
                task.perform()
                task.advance()
    assert device.written - written <= SEGMENT_BYTES


def test_a_mistake_raised_into_write_back_ends_its_flights_at_once() -> None:
    """An error in the middle of a writeback gives back at once what it has pinned and reserved."""
    rig = make_engine(8 * MIB, devices=[16])
    fill(rig, rig.space(), 124)
    operation = rig.engine.writeback(1)
    need = next(operation)
    while not isinstance(need, IoBatch):
        need = next(operation)
    with pytest.raises(MemoryError) as caught:
        operation.throw(MemoryError())
    assert caught.tb is not None
    assert not rig.engine.core.zswap._pins.any()
    assert rig.engine.core.budget.pending == 0


def test_whole_segments_survive_a_neighbour_that_is_faster() -> None:
    """Extents that another shard takes meanwhile make a writeback smaller, and leave no pin."""
    rig = make_engine(8 * MIB, arena_bytes=32 * MIB)
    fill(rig, rig.space(), 62 * 10)
    extents = 32
    region = owners_region(extents, 2)
    mine = SharedExtents(extents, region, 0, 2)

    class Overtaken(SharedExtents):
        def _take_chunk(self) -> bool:
            got = super()._take_chunk()
            self._owners[self._owners == 0] = 2  # the other shard
            return got

    mine.__class__ = Overtaken
    device = rig.engine.core.devices.add(UnkindDevice(extents), 0, mine)
    assert device is not None
    written = rig.writeback(8 * SEGMENT_BYTES)
    assert written.stopped is not None
    rig.check()
    assert not device.pins.any()
