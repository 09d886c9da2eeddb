"""What nobody had asked for while it was wrong: policies that one group's pages could bring to a
halt, limits that overlapping work could pass, work that nobody was woken for.

Each test failed once.
"""

from __future__ import annotations

import numpy as np
import pytest

from support.engine import KIB, MIB, Rig, ids, make_engine, pages_of
from support.interleaving import start
from vswap.protocol import Reason
from vswapd.groups import Space
from vswapd.settings import GroupLimits
from vswapd.swap_table import Tag, places_of, tags_of
from vswapd.vswap import Stored
from vswapd_backends.base import SEGMENT_BYTES, U64, Operation


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
    assert rig.engine.core.budget_pending == 0


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
