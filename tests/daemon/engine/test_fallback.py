"""Folios that go straight to a device: what is acknowledged is never put at risk again."""

from __future__ import annotations

import numpy as np
import pytest

from support.engine import KIB, MIB, make_engine, page, pages_of
from support.interleaving import start
from vswap.protocol import Reason
from vswapd.errors import BadSlotError, UnbackedError
from vswapd.settings import GroupLimits
from vswapd.swap_table import Tag
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES


def test_failed_write_of_a_folio_leaves_earlier_folios_of_the_extent_readable() -> None:
    """No block with acknowledged entries is written again, so a failed write cannot spoil them."""
    rig = make_engine(pool_enabled=False, devices=[4])
    device, space = rig.devices[0], rig.space()
    first = rig.put(space, pages_of("repeat", 3))
    second = rig.put(space, pages_of("text", 1, 10))
    begin = device.writes
    device.fails = lambda kind, nth: kind == "write" and nth > begin
    rejected = rig.store(space, pages_of("text", 5, 20))
    assert rejected.reason is Reason.DEVICE_FULL
    device.fails = None
    assert rig.load(space, first) == pages_of("repeat", 3)
    assert rig.load(space, second) == pages_of("text", 1, 10)
    assert rig.verify().ok


def test_every_block_with_acknowledged_entries_is_written_once() -> None:
    """However full the extent becomes, a later folio shares no block with an earlier one."""
    rig = make_engine(pool_enabled=False, devices=[6])
    device, space = rig.devices[0], rig.space()
    stored: dict[int, bytes] = {}
    for turn in range(150):
        pages = [page(("text", "noise", "repeat")[turn % 3], turn)] * (1 + turn % 3)
        before = bytes(device.data)
        slots = rig.put(space, pages)
        held = np.array(list(stored), np.uint64)
        for word_slot, place in zip(held.tolist(), rig.words(held).tolist(), strict=True):
            address, length = place >> 17, place >> 4 & 0x1FFF
            span = slice(
                address // BLOCK_BYTES * BLOCK_BYTES,
                -(-(address + 8 + length) // BLOCK_BYTES) * BLOCK_BYTES,
            )
            assert device.data[span] == before[span], word_slot
        stored.update(zip(slots.tolist(), pages, strict=True))
    every = np.array(list(stored), np.uint64)
    assert rig.load(space, every) == list(stored.values())
    assert len({word >> 35 for word in rig.words(every).tolist()}) > 2


def test_folio_is_tried_on_other_extents_until_one_works() -> None:
    """A write error takes the extent out of use, is counted, and the next extent gets the folio."""
    rig = make_engine(pool_enabled=False, devices=[8])
    device, space = rig.devices[0], rig.space()
    device.fails = lambda kind, nth: kind == "write" and nth <= 2
    slots = rig.put(space, pages_of("text", 9))
    assert set(rig.tags(slots)) == {Tag.PHYS}
    state = rig.engine.snapshot().devices[0]
    assert (state.write_errors, state.bad_extents, state.state) == (1, 1, "failing")
    rig.free(space, slots)
    rig.settle()
    picture = rig.engine.snapshot().devices[0]
    assert picture.used_bytes == 0
    assert rig.device_of(device).map.free == 7


def test_each_block_of_a_folio_is_acknowledged_only_when_written() -> None:
    """Until its write is done a folio's new slots have no content, and nobody can load them."""
    rig = make_engine(pool_enabled=False, devices=[4])
    space = rig.space()
    slots = rig.put(space, pages_of("text", 4))
    store = start(
        rig.engine.store(space, rig.engine.prepare(b"".join(pages_of("text", 4, 9))), slots)
    )
    store.until_io()
    assert rig.load(space, slots) == pages_of("text", 4)
    store.finish()
    assert rig.load(space, slots) == pages_of("text", 4, 9)


def test_space_closed_while_its_folio_is_written_gets_an_error() -> None:
    """The folio of a space that went away meanwhile is dropped, and nothing of it remains."""
    rig = make_engine(pool_enabled=False, devices=[4])
    space = rig.space()
    store = start(rig.engine.store(space, rig.engine.prepare(b"".join(pages_of("text", 4)))))
    store.until_io()
    rig.close(space)
    with pytest.raises(BadSlotError):
        store.finish()
    rig.check()
    rig.settle()
    assert rig.engine.snapshot().devices[0].used_bytes == 0


def test_slots_freed_while_their_overwrite_is_written_stay_freed() -> None:
    """The overwrite finds its slots gone, says so, and gives the extent back."""
    rig = make_engine(pool_enabled=False, devices=[4])
    space = rig.space()
    slots = rig.put(space, pages_of("text", 4))
    store = start(
        rig.engine.store(space, rig.engine.prepare(b"".join(pages_of("text", 4, 9))), slots)
    )
    store.until_io()
    rig.free(space, slots[:1])
    with pytest.raises(BadSlotError):
        store.finish()
    assert rig.load(space, slots[1:]) == pages_of("text", 3, 1)
    rig.check()


def test_two_folios_on_their_way_cannot_pass_the_groups_device_limit_together() -> None:
    """What is being written counts against the limit before it is charged."""
    limit = 100 * KIB
    rig = make_engine(
        pool_enabled=False, devices=[8, 8], default_group=GroupLimits(device_max=limit)
    )
    one, two = rig.space(), rig.space()
    folio = rig.engine.prepare(b"".join(pages_of("noise", 15)))
    rig.set(codec="zstd:1")
    other = rig.engine.prepare(b"".join(pages_of("noise", 15, 50) + pages_of("text", 1)))
    first = start(rig.engine.store(one, folio))
    second = start(rig.engine.store(two, other))
    first.until_io()
    second.advance()
    first.finish()
    if not second.ended:
        second.finish()
    assert first.result.reason is None
    assert second.result.reason is Reason.GROUP_LIMIT
    assert rig.engine.snapshot().groups[0].device_bytes <= limit


def test_rejected_overwrite_after_failed_writes_leaves_no_stale_page() -> None:
    """When the device fails under an overwrite, the old page is stale and does not come back."""
    rig = make_engine(pool_enabled=False, devices=[8])
    device, space = rig.devices[0], rig.space()
    slots = rig.put(space, pages_of("text", 3))
    device.fails = lambda kind, nth: kind == "write"
    assert rig.store(space, pages_of("text", 3, 7), slots).reason is Reason.DEVICE_FULL
    device.fails = None
    with pytest.raises(UnbackedError):
        rig.load(space, slots)
    assert rig.engine.snapshot().slots.unbacked == 3
    rig.check()


def test_a_folio_larger_than_an_extent_is_cut() -> None:
    """4096 pages go to as many extents as they need, in order."""
    rig = make_engine(pool_enabled=False, devices=[40])
    space = rig.space()
    pages = [page(("text", "zero", "repeat", "mixed")[i % 4], i) for i in range(4096)]
    slots = rig.put(space, pages)
    assert rig.load(space, slots) == pages
    stats = rig.engine.snapshot().stats
    assert stats.fallback_pages == sum(any(p) for p in pages)
    assert stats.fallback_bytes == rig.devices[0].written
    assert rig.devices[0].written < 40 * EXTENT_BYTES


def test_idle_extents_are_let_go_of() -> None:
    """An extent that was being filled and holds nothing any more is given back at once."""
    rig = make_engine(1 * MIB, pool_enabled=False, devices=[4])
    space = rig.space()
    slots = rig.put(space, pages_of("text", 5))
    rig.free(space, slots)
    rig.settle()
    assert rig.device_of(rig.devices[0]).map.used == 0
    assert rig.devices[0].discards == 1
