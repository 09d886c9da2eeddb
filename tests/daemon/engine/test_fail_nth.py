"""Fail the first device operation, then the second, ... until a whole scenario has passed.

The scenario goes through everything that touches a device: writeback of both tiers by the shrinker
itself, direct reclaim, folios straight to the device, loads, overwrites, merging, swapoff.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pytest

from support.engine import KIB, MIB, Rig, UnkindDevice, ids, make_engine, page
from vswapd.errors import PageLostError, SwapoffError
from vswapd.groups import Space
from vswapd_backends.base import U64

ENOUGH: Final = 400
"""No scenario does so many operations of one kind."""


@dataclass
class Faults:
    """One counter over all devices: the nth operation of a kind fails, and perhaps all after it."""

    kind: str
    nth: int
    lasting: int = 1
    count: int = 0
    hits: int = 0

    def __call__(self, kind: str, _: int) -> bool:
        if kind != self.kind:
            return False
        self.count += 1
        if self.nth <= self.count < self.nth + self.lasting:
            self.hits += 1
            return True
        return False


@dataclass
class Scenario:
    """The same history every time, but for what the fault changes."""

    faults: Faults
    rig: Rig = field(init=False)
    space: Space = field(init=False)
    held: dict[int, bytes] = field(default_factory=dict)
    made: int = 0

    def __post_init__(self) -> None:
        self.rig = make_engine(600 * KIB, dense="zstd:1")
        self.add(10)
        self.add(10)
        self.space = self.rig.space()

    def add(self, extents: int) -> UnkindDevice:
        device = self.rig.swapon(extents)
        device.fails = self.faults
        return device

    def pages(self, count: int) -> list[bytes]:
        self.made += count
        kinds = ("noise", "text", "mixed", "zero")
        return [page(kinds[i % 4], i) for i in range(self.made - count, self.made)]

    def store(self, count: int, slots: U64 | None = None) -> None:
        """Store; what was rejected is not held any more."""
        pages = self.pages(count)
        stored = self.rig.store(self.space, pages, slots)
        if stored.reason is None:
            self.held.update(zip(stored.slots.tolist(), pages, strict=True))
        else:
            for slot in stored.slots.tolist():
                self.held.pop(slot, None)
        self.rig.check()

    def some(self, first: int, count: int, step: int = 1) -> U64:
        return ids(*list(self.held)[first : first + count * step : step])

    def load(self, slots: U64) -> None:
        """Each page is right, or it is named as lost, which only a failed read can do."""
        before = self.faults.hits
        try:
            pages = self.rig.load(self.space, slots)
        except PageLostError as error:
            lost = set(error.slots.tolist())
        else:
            assert pages == [self.held[slot] for slot in slots.tolist()]
            return
        assert self.faults.kind == "read"
        assert self.faults.hits > before
        assert lost <= set(slots.tolist())

    def free(self, slots: U64) -> None:
        self.rig.free(self.space, slots)
        for slot in slots.tolist():
            del self.held[slot]

    def check(self) -> None:
        self.rig.check()
        slots = np.array(list(self.held), np.uint64)
        assert self.rig.peek(self.space, slots) == list(self.held.values())

    def run(self) -> None:
        rig = self.rig
        for _ in range(6):
            self.store(60)
        self.load(self.some(0, 50, 4))
        rig.clock.advance(100)
        rig.shrink()
        rig.writeback(300 * KIB)
        self.check()
        self.store(40, self.some(20, 40, 2))
        rig.set(pool_enabled=False)
        for _ in range(4):
            self.store(12)
        self.store(20, self.some(100, 20, 3))
        self.load(self.some(0, 40, 7))
        rig.set(pool_enabled=True)
        for _ in range(12):
            self.store(60)
            self.free(self.some(3, 25, 2))
        self.check()
        rig.shrink()
        self.check()
        try:
            rig.swapoff(rig.devices[0])
        except SwapoffError:
            assert self.faults.hits
        self.check()
        self.add(6)
        self.store(60)
        rig.shrink()
        self.load(self.some(0, 30, 5))

    def end(self) -> None:
        """All pages are there; when they are freed, nothing is left but extents out of use."""
        self.faults.nth = 1 << 60
        self.check()
        assert self.rig.verify().ok
        self.rig.close(self.space)
        self.rig.settle()
        picture = self.rig.engine.snapshot()
        assert (picture.slots.allocated, picture.pool.bytes) == (0, 0)
        assert not any(device.used_bytes for device in picture.devices)
        errors = sum(device.write_errors + device.read_errors for device in picture.devices)
        assert errors <= self.faults.hits


def _until_it_passes(make: Callable[[int], Faults], step: int) -> int:
    """How many operations there were to fail."""
    for nth in range(1, ENOUGH, step):
        faults = make(nth)
        scenario = Scenario(faults)
        scenario.run()
        scenario.end()
        if not faults.hits:
            return nth - step
    raise AssertionError("the scenario never passes without a fault")


@pytest.mark.parametrize("lasting", [1, 5])
def test_nothing_is_lost_whichever_write_fails(lasting: int) -> None:
    """A write error keeps pages where they were, or rejects; whichever write it is."""
    assert _until_it_passes(lambda nth: Faults("write", nth, lasting), lasting) > 20


@pytest.mark.parametrize("lasting", [1, 5])
def test_only_what_could_not_be_read_is_missing_whichever_read_fails(lasting: int) -> None:
    """A read error is an error for the pages it hits and no other, and they are not gone."""
    assert _until_it_passes(lambda nth: Faults("read", nth, lasting), lasting) > 10


def test_the_scenario_uses_everything() -> None:
    """Without faults it writes for every cause, and rejects nothing."""
    scenario = Scenario(Faults("none", 0))
    scenario.run()
    stats = scenario.rig.engine.snapshot().stats
    assert stats.writeback_bytes
    assert stats.reclaim_bytes
    assert stats.fallback_bytes
    assert stats.swapoff_bytes
    assert stats.device_compact_bytes
    assert stats.recompress_pages
    assert stats.swapin_pages
    assert not any(stats.rejects.values())
    assert scenario.rig.engine.core.zswap.in_use_bytes < MIB
    scenario.end()
