"""Writeback: in which order, what it leaves alone, and what is charged for it.

Invariants (numbers as in "What must never be"): 18, 19, 21, 23, 25; 20 is test_shrinker's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from support.engine import KIB, MIB, Rig, UnkindDevice, make_engine, page, pages_of
from support.interleaving import start
from vswap.protocol import Reason
from vswapd.groups import Space
from vswapd.settings import GroupLimits
from vswapd.swap_table import Tag, lengths_of
from vswapd.writeback import Stop
from vswapd_backends.base import SEGMENT_BYTES, U64, run
from vswapd_blockdev.device import WriteError

# Pages of which some segments are whole and cold, and some are neither: both ways of writeback.
SHAPES = {"whole segments": 63 * 4, "one extent": 40}


def _filled(shape: str, **settings: object) -> tuple[Rig, Space, U64, list[bytes]]:
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[32])
    rig.set(**settings)
    space = rig.space()
    pages = pages_of("noise", SHAPES[shape])
    return rig, space, rig.put(space, pages), pages


# 18


class Onlooker(UnkindDevice):
    """A device that looks around before each of its writes."""

    def __init__(self, extents: int, look: Callable[[int], None]) -> None:
        super().__init__(extents, "onlooker")
        self._look = look

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._look(extent)
        super().write(extent, offset, data)


@pytest.mark.parametrize("shape", SHAPES)
def test_words_flip_after_the_write_and_segments_go_after_the_flip(shape: str) -> None:
    """18: while bytes are on their way every word still names the pool, and the entry is there."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB)
    space = rig.space()
    pages = pages_of("noise", SHAPES[shape])
    slots = rig.put(space, pages)
    looks: list[int] = []

    def look(extent: int) -> None:
        """Nothing has moved but what an earlier write has brought to the device."""
        looks.append(extent)
        tags = rig.tags(slots)
        assert rig.engine.core.devices.device_of(extent)[0].map.used > 0, "room is found first"
        assert rig.peek(space, slots) == pages
        written = SEGMENT_BYTES * (len(set(looks)) - 1)
        assert tags.count(Tag.PHYS) * 4096 <= written

    rig.engine.swapon(Onlooker(32, look), 0)
    rig.writeback()
    assert looks
    assert set(rig.tags(slots)) == {Tag.PHYS}
    assert rig.engine.core.zswap.in_use_bytes == 0
    rig.check()


@pytest.mark.parametrize("shape", SHAPES)
def test_without_room_on_the_device_nothing_is_read(shape: str) -> None:
    """18: a full device is noticed before any entry is looked at; nothing is pinned or moved."""
    rig, _, slots, _ = _filled(shape)
    rig.swapoff(rig.devices[0])
    device = rig.swapon(1)  # its one extent is the reserve
    before = rig.words(slots).tolist()
    written = rig.writeback()
    assert (written.bytes, written.stopped) == (0, Stop.DEVICE_FULL)
    assert rig.words(slots).tolist() == before
    assert device.writes == 0
    assert not rig.engine.core.zswap._pins.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_writeback_that_is_given_up_leaves_everything_in_the_pool(shape: str) -> None:
    """18: ended while its bytes are on their way, it has moved nothing and holds nothing."""
    rig, space, slots, pages = _filled(shape)
    writeback = start(rig.engine.writeback(SEGMENT_BYTES))
    writeback.until_io()
    writeback.cancel(perform=True)
    rig.check()
    assert set(rig.tags(slots)) == {Tag.ZSWAP}
    assert rig.load(space, slots) == pages
    rig.settle()
    assert rig.engine.snapshot().devices[0].used_bytes == 0


# 19


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("event", ["overwritten", "zeroed", "freed", "loaded", "rejected"])
def test_a_page_that_changes_while_it_is_written_back_is_left_alone(shape: str, event: str) -> None:
    """19: its new state is what stays; old bytes never come back, and nothing is freed twice."""
    rig, space, slots, pages = _filled(shape)
    writeback = start(rig.engine.writeback(1))
    writeback.until_io()
    some = np.array([0, 5, 20, 39])
    expected = dict(enumerate(pages))
    match event:
        case "overwritten":
            rig.store(space, pages_of("text", 4, 900), slots[some])
            expected |= zip(some.tolist(), pages_of("text", 4, 900), strict=True)
        case "zeroed":
            rig.store(space, pages_of("zero", 4), slots[some])
            expected |= zip(some.tolist(), pages_of("zero", 4), strict=True)
        case "freed":
            rig.free(space, slots[some])
        case "loaded":
            assert rig.load(space, slots[some]) == [pages[i] for i in some.tolist()]
        case "rejected":
            rig.set(store_enabled=False)
            rig.store(space, pages_of("text", 4), slots[some])
    if event in {"freed", "rejected"}:
        for i in some.tolist():
            del expected[i]
    mine = rig.tags(slots[some])
    writeback.finish()
    rig.check()
    now = rig.tags(slots[some])
    if event == "overwritten":
        assert set(now) <= {Tag.ZSWAP, Tag.PHYS}
    else:
        assert now == mine
    left = np.array(sorted(expected))
    assert rig.load(space, slots[left]) == [expected[i] for i in left.tolist()]
    others = np.setdiff1d(np.arange(40), some)
    assert set(rig.tags(slots[others])) == {Tag.PHYS}
    rig.close(space)
    rig.settle()
    rig.check()
    assert (rig.pool_bytes, rig.engine.snapshot().devices[0].used_bytes) == (0, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_space_that_closes_while_it_is_written_back_leaves_nothing(shape: str) -> None:
    """19: what was on its way is nobody's when it arrives, and its extents go back."""
    rig, space, _, _ = _filled(shape)
    writeback = start(rig.engine.writeback(1 << 40))
    writeback.until_io()
    rig.close(space)
    other = rig.space()
    slots = rig.put(other, pages_of("text", 50, 700))
    writeback.finish()
    rig.check()
    assert rig.load(other, slots) == pages_of("text", 50, 700)
    rig.close(other)
    rig.settle()
    assert (rig.pool_bytes, rig.engine.snapshot().devices[0].used_bytes) == (0, 0)


# 21


@pytest.mark.parametrize("shape", SHAPES)
def test_a_loaded_page_survives_one_look_and_one_that_was_not_does_not(shape: str) -> None:
    """21: second chance, once: the next look takes it like any other."""
    rig, space, slots, pages = _filled(shape)
    loaded = np.arange(3, 40, 7)
    rig.load(space, slots[loaded])
    others = np.delete(np.arange(40), loaded)
    rig.writeback(1)
    assert set(rig.tags(slots[others])) == {Tag.PHYS}
    assert set(rig.tags(slots[loaded])) == {Tag.ZSWAP}
    rig.writeback()
    assert set(rig.tags(slots[loaded])) == {Tag.PHYS}
    assert rig.load(space, slots) == pages


def test_a_loaded_page_in_one_of_several_whole_segments_survives_their_look() -> None:
    """21: segments that are written together are looked at entry by entry."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[32])
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 63 * 6))
    loaded = np.array([70, 100, 125])
    rig.load(space, slots[loaded])
    rig.writeback(2 * SEGMENT_BYTES)
    assert set(rig.tags(slots[:63])) == {Tag.PHYS}
    assert set(rig.tags(slots[loaded])) == {Tag.ZSWAP}
    assert rig.load(space, slots) == pages_of("noise", 63 * 6)


def test_compaction_does_not_take_the_second_chance_away() -> None:
    """21: pages that are copied together are still known to have been loaded, or not."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[32])
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 63 * 4))
    kept = slots[::5]
    rig.free(space, np.setdiff1d(slots, kept))
    rig.load(space, kept[::2])
    before = rig.words(kept).tolist()
    assert run(rig.engine.compact()).moved_bytes
    assert (rig.words(kept) != np.array(before, np.uint64)).any()
    rig.writeback(1)
    assert set(rig.tags(kept[1::2])) == {Tag.PHYS}
    assert set(rig.tags(kept[::2])) == {Tag.ZSWAP}


# 23


def test_device_space_is_charged_while_a_word_is_on_the_device() -> None:
    """23: to the group, from the flip on and until the page is freed, overwritten or moved back."""
    rig = make_engine(devices=[16])
    space = rig.space()
    group = space.group
    slots = rig.put(space, pages_of("text", 40))
    lengths = lengths_of(rig.words(slots))
    total = int(lengths.sum())
    assert (group.pool_bytes, group.device_bytes) == (total, 0)
    writeback = start(rig.engine.writeback(1))
    writeback.until_io()
    assert (group.pool_bytes, group.device_bytes) == (total, 0)
    writeback.finish()
    assert (group.pool_bytes, group.device_bytes) == (0, total)
    rig.load(space, slots)
    assert (group.pool_bytes, group.device_bytes) == (0, total)
    rig.free(space, slots[:10])
    left = total - int(lengths[:10].sum())
    assert (group.pool_bytes, group.device_bytes) == (0, left)
    rig.store(space, pages_of("zero", 10), slots[10:20])
    left -= int(lengths[10:20].sum())
    assert (group.pool_bytes, group.device_bytes) == (0, left)
    rig.swapoff(rig.devices[0])
    assert (group.pool_bytes, group.device_bytes) == (left, 0)
    assert group.device_pending == 0


def test_a_full_device_and_a_groups_limit_are_different_reasons() -> None:
    """23: who hits the device's end hears of it, who hits his own limit hears of that."""
    rig = make_engine(
        pool_enabled=False, devices=[4], groups={"1": GroupLimits(device_max=200 * KIB)}
    )
    limited, free = rig.space("1"), rig.space("2")
    reasons = []
    for space in (limited, free):
        while (stored := rig.store(space, pages_of("noise", 8))).reason is None:
            pass
        reasons.append(stored.reason)
    assert reasons == [Reason.GROUP_LIMIT, Reason.DEVICE_FULL]
    assert rig.engine.snapshot().groups[0].device_bytes <= 200 * KIB


@pytest.mark.parametrize("limit", [0, 5000, 100 * KIB, 300 * KIB])
def test_writeback_keeps_within_a_groups_device_limit(limit: int) -> None:
    """23: no more than the limit gets onto devices, whatever is asked for; other groups go on."""
    rig = make_engine(
        8 * MIB,
        arena_bytes=24 * MIB,
        devices=[64],
        groups={"1": GroupLimits(device_max=limit)},
    )
    limited, other = rig.space("1"), rig.space("2")
    for _ in range(2):
        slots = rig.put(limited, [page("noise", i) for i in range(130)])
        others = rig.put(other, pages_of("text", 50, 500))
        rig.writeback()
        assert limited.group.device_bytes <= limit
        assert limited.group.device_bytes >= limit - 2 * 4096 or limit < 8192
        assert set(rig.tags(others)) == {Tag.PHYS}
        assert rig.load(limited, slots) == pages_of("noise", 130)
    rig.check()


# 25


class Rotten(UnkindDevice):
    """A device that cannot be written where it is rotten."""

    def __init__(self, extents: int, rotten: int) -> None:
        super().__init__(extents, "rotten")
        self.rotten = rotten
        """So many of its first extents."""

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        if extent < self.rotten:
            raise WriteError(self.path, "rotten")
        super().write(extent, offset, data)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rotten", [1, 2, 5])
def test_a_failed_write_leaves_pages_in_ram_and_the_next_extent_is_tried(
    shape: str, rotten: int
) -> None:
    """25: the error is counted, the extent goes out of use, and in the end all are written."""
    rig, space, slots, pages = _filled(shape)
    rig.swapoff(rig.devices[0])
    device = Rotten(32, rotten)
    rig.engine.swapon(device, 0)
    for _ in range(5):
        rig.writeback()
        rig.check()
        assert rig.peek(space, slots) == pages
    assert set(rig.tags(slots)) == {Tag.PHYS}
    picture = rig.engine.snapshot().devices[0]
    assert picture.state == "failing"
    assert picture.bad_extents == picture.write_errors == rotten
    rig.free(space, slots)
    rig.settle()
    assert rig.engine.snapshot().devices[0].used_bytes == 0
    assert rig.device_of(device).map.free == 32 - rotten


@pytest.mark.parametrize("shape", SHAPES)
def test_a_failed_write_goes_to_the_next_device_when_the_first_has_no_extent_left(
    shape: str,
) -> None:
    """25: a device on which every write fails is used up, and then the next one takes the pages."""
    rig, space, slots, pages = _filled(shape)
    first = rig.devices[0]
    rig.swapoff(first)
    bad, good = rig.swapon(4, priority=5), rig.swapon(32)
    bad.fails = lambda kind, _: kind == "write"
    for _ in range(6):
        rig.writeback()
        rig.check()
    assert set(rig.tags(slots)) == {Tag.PHYS}
    assert good.written > 0
    assert bad.written == 0
    assert rig.load(space, slots) == pages
