"""Folios of every size and every kind of page, through every state."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from support.engine import KINDS, MIB, Rig, make_engine, page, pages_of
from vswapd.errors import BatchError, PageLostError
from vswapd.swap_table import Tag, places_of
from vswapd_backends.segment import CHECK_BYTES

SIZES = (1, 2, 63, 64, 65, 511, 512, 513, 1000, 4095, 4096)


def _engine() -> Rig:
    return make_engine(40 * MIB, arena_bytes=64 * MIB, devices=[100])


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("kind", ["noise", "zero", "text", "all"])
def test_folios_of_all_sizes_come_back(kind: str, count: int) -> None:
    """Incompressible, all zero, compressible and mixed: stored, loaded, written back, freed."""
    rig = _engine()
    space = rig.space()
    pages = [page(KINDS[i % 5] if kind == "all" else kind, i % 900) for i in range(count)]
    slots = rig.put(space, pages)
    assert len(set(slots.tolist())) == count
    assert rig.load(space, slots) == pages
    zero = {Tag.ZERO} if not all(map(any, pages)) else set()
    assert set(rig.tags(slots)) - zero <= {Tag.ZSWAP}
    rig.writeback()
    rig.writeback()
    assert set(rig.tags(slots)) - zero <= {Tag.PHYS}
    assert rig.load(space, slots) == pages
    rig.store(space, pages[::-1], slots)
    assert rig.load(space, slots) == pages[::-1]
    rig.free(space, slots)
    rig.settle()
    rig.check()
    picture = rig.engine.snapshot()
    assert (picture.slots.allocated, picture.table_bytes, picture.pool.bytes) == (0, 0, 0)
    assert picture.devices[0].used_bytes == 0


@pytest.mark.parametrize("count", [1, 64, 4096])
@pytest.mark.parametrize("codec", ["lz4", "lz4hc:3", "zstd:1"])
def test_incompressible_folios_take_a_page_each_and_little_more(codec: str, count: int) -> None:
    """No codec makes noise larger than it is: 16 bytes per page, and the ends of segments."""
    rig = make_engine(40 * MIB, arena_bytes=64 * MIB, codec=codec)
    space = rig.space()
    pages = [page("noise", i % 900) for i in range(count)]
    slots = rig.put(space, pages)
    assert rig.engine.snapshot().pool.live_bytes == count * 4096
    assert rig.pool_bytes <= 1.03 * count * 4096 + 3 * 4096
    assert rig.load(space, slots) == pages


def test_all_zero_folios_cost_a_word_each() -> None:
    """Zero pages take no pool, no device and no codec: 8 bytes of table."""
    rig = _engine()
    space = rig.space()
    slots = rig.put(space, pages_of("zero", 4096))
    picture = rig.engine.snapshot()
    assert (picture.pool.bytes, picture.devices[0].used_bytes) == (0, 0)
    assert picture.table_bytes == 4096 * 8
    assert rig.load(space, slots) == pages_of("zero", 4096)


@pytest.mark.parametrize("length", [0, 1, 4095, 4097, 4096 * 4097, 2 * 4096 - 1])
def test_what_is_no_folio_is_refused(length: int) -> None:
    """No page, part of a page, more than 4096 pages: one error, before anything is done."""
    rig = _engine()
    with pytest.raises(BatchError, match=f"these are {length}"):
        rig.engine.prepare(bytes(length))


@pytest.mark.parametrize("slots", [1, 3])
def test_a_slot_for_each_page(slots: int) -> None:
    """An overwrite with fewer or more slots than pages is refused, and changes nothing."""
    rig = _engine()
    space = rig.space()
    held = rig.put(space, pages_of("text", 3))
    with pytest.raises(BatchError, match=f"{slots} slots for 2 pages"):
        rig.store(space, pages_of("noise", 2), held[:slots])
    assert rig.load(space, held) == pages_of("text", 3)


@pytest.mark.parametrize("verify", ["always", "never"])
@pytest.mark.parametrize("devices", [[], [100]])
def test_pages_alone_are_treated_as_in_a_folio(verify: str, devices: list[int]) -> None:
    """One by one they take shorter ways, to the same words, counters and charges."""

    def outcome(*, alone: bool) -> list[Any]:
        rig = make_engine(40 * MIB, arena_bytes=64 * MIB, devices=devices, verify=verify)
        space = rig.space()
        pages = [page(KINDS[i % 5], i) for i in range(40)]
        slots = rig.put(space, pages[:20])
        rig.writeback()
        rig.set(codec="zstd:1")
        slots = np.concatenate((slots, rig.put(space, pages[20:])))
        parts = [[i] for i in range(40)] if alone else [list(range(40))]
        seen: list[Any] = []

        def look() -> None:
            core = rig.engine.core
            stats = dataclasses.asdict(core.stats)
            seen.append((stats, core.slot_counts[1:].tolist()))
            seen.append((space.zero_pages, space.backed_pages, space.compressed_bytes))
            seen.append((space.group.pool_bytes, space.group.device_bytes, space.slots.slots))
            seen.extend(
                (pool.codec.spec, pool.entries, pool.live_bytes) for pool in core.zswap.pools
            )
            assert rig.sums() == []

        for part in parts:
            assert rig.load(space, slots[part]) == [pages[i] for i in part]
        look()
        seen.append(rig.words(slots).tolist())
        for part in parts:
            rig.store(space, [page(KINDS[(i // 5) % 5], 900 + i) for i in part], slots[part])
        look()
        seen.append(rig.words(slots).tolist())
        for part in parts:
            rig.free(space, slots[part])
        look()
        return seen

    assert outcome(alone=True) == outcome(alone=False)


@pytest.mark.parametrize("verify", ["always", "never"])
def test_a_lost_page_alone_is_counted_as_in_a_folio(verify: str) -> None:
    """It is named, stays in its place without a mark, and no page counts as loaded."""
    rig = make_engine(verify=verify)
    space = rig.space()
    slots = rig.put(space, pages_of("text", 2))
    place = places_of(rig.words(slots[:1]))
    begin = int(place.address[0]) + CHECK_BYTES
    rig.engine.core.zswap.arena.view[begin : begin + 8] = b"\xff" * 8
    words = rig.words(slots).tolist()
    with pytest.raises(PageLostError) as caught:
        rig.load(space, slots[:1])
    assert caught.value.slots.tolist() == slots[:1].tolist()
    stats = rig.engine.core.stats
    assert (stats.lost_pages, stats.load_pages) == (1, 0)
    assert rig.engine.snapshot().pool.corrupt_entries == 1
    assert rig.words(slots).tolist() == words
