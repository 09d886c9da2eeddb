"""What a load gives, in which order, and what it does not change.

Invariants (numbers as in "What must never be"): 14 to 16; 17 is test_shrinker's.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from support.engine import KINDS, MIB, Rig, make_engine, page, pages_of
from support.interleaving import start
from support.pages import STATES, put_in_state
from vswapd.errors import BadSlotError, PageLostError, UnbackedError
from vswapd.groups import Space
from vswapd.swap_table import Tag, places_of, without_reference
from vswapd_backends.base import U64
from vswapd_backends.segment import CHECK_BYTES


def _mixture(rig: Rig, space: Space, count: int = 200) -> tuple[U64, list[bytes]]:
    """Slots of every backing, shuffled, and their pages: zero, pool and devices, two codecs."""
    pages = [page(KINDS[i % 5], i) for i in range(count)]
    parts = []
    for i, codec in enumerate(("lz4", "zstd:1", "lz4", "zstd:1")):
        rig.set(codec=codec)
        parts.append(rig.put(space, pages[i * count // 4 : (i + 1) * count // 4]))
        if i == 1:
            rig.writeback()
    slots = np.concatenate(parts)
    order = random.Random(count).sample(range(count), count)
    assert set(rig.tags(slots)) == {Tag.ZERO, Tag.ZSWAP, Tag.PHYS}
    return slots[order], [pages[i] for i in order]


def test_loads_do_not_consume() -> None:
    """14: a page can be loaded again and again, and lies where it lay."""
    rig = make_engine(devices=[8])
    space = rig.space()
    slots, pages = _mixture(rig, space)
    before = without_reference(rig.words(slots)).tolist()
    for _ in range(3):
        assert rig.load(space, slots) == pages
        assert without_reference(rig.words(slots)).tolist() == before
    assert rig.engine.snapshot().slots.allocated == len(slots)
    rig.check()


@pytest.mark.parametrize("count", [1, 2, 64, 199])
def test_any_mixture_comes_in_the_order_asked_for(count: int) -> None:
    """15: zero, pool and device in one request, any order, a slot twice, every count."""
    rig = make_engine(devices=[8, 8])
    space = rig.space()
    slots, pages = _mixture(rig, space)
    for seed in range(10):
        which = random.Random(seed).choices(range(len(slots)), k=count)
        assert rig.load(space, slots[which]) == [pages[i] for i in which]


@pytest.mark.parametrize("state", [Tag.ZSWAP, Tag.PHYS])
@pytest.mark.parametrize("at", [0, 7, 199])
def test_a_lost_page_fails_its_own_slot(state: Tag, at: int) -> None:
    """15: the error names the slots whose bytes are wrong; the others load without them."""
    rig = make_engine(devices=[8], verify="always")
    space = rig.space()
    slots, pages = _mixture(rig, space)
    tags = rig.tags(slots)
    candidates = [i for i, tag in enumerate(tags) if tag is state]
    broken = candidates[at % len(candidates)]
    rig.damage(int(slots[broken]), byte=CHECK_BYTES + 3)
    rest = [i for i in range(len(slots)) if i != broken]
    for asked in (slots, np.concatenate((slots[rest], slots[[broken, broken]]))):
        with pytest.raises(PageLostError) as caught:
            rig.load(space, asked)
        assert set(caught.value.slots.tolist()) == {int(slots[broken])}
    assert rig.load(space, slots[rest]) == [pages[i] for i in rest]


def test_several_lost_pages_are_all_named() -> None:
    """15: one error names every slot that is lost, from the pool and from devices together."""
    rig = make_engine(devices=[8], verify="always")
    space = rig.space()
    slots, pages = _mixture(rig, space)
    backed = [i for i, tag in enumerate(rig.tags(slots)) if tag is not Tag.ZERO]
    broken = backed[::20]
    for i in broken:
        rig.damage(int(slots[i]))
    with pytest.raises(PageLostError) as caught:
        rig.load(space, slots)
    assert sorted(caught.value.slots.tolist()) == sorted(slots[broken].tolist())
    assert rig.engine.snapshot().stats.lost_pages == len(broken)
    rest = [i for i in range(len(slots)) if i not in broken]
    assert rig.load(space, slots[rest]) == [pages[i] for i in rest]


@pytest.mark.parametrize("others", STATES)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_slot_without_content_is_an_error_and_never_zeros(others: Tag, at: int) -> None:
    """16: among slots of any state, wherever it stands, it alone is named."""
    rig = make_engine(devices=[8])
    space = rig.space()
    good = put_in_state(rig, space, others)
    bad = put_in_state(rig, space, Tag.UNBACKED)
    asked = np.insert(good, at, bad[0])
    with pytest.raises(UnbackedError) as caught:
        rig.load(space, asked)
    named = set(caught.value.slots.tolist())
    assert named == ({int(bad[0])} if others is not Tag.UNBACKED else set(asked.tolist()))
    rig.store(space, pages_of("text", 1), bad[:1])
    assert rig.load(space, bad[:1]) == pages_of("text", 1)


@pytest.mark.parametrize("others", STATES)
def test_a_free_slot_is_an_error_and_never_zeros(others: Tag) -> None:
    """16: a slot that was freed is bad, among slots of any state."""
    rig = make_engine(devices=[8])
    space = rig.space()
    good = put_in_state(rig, space, others)
    freed = rig.put(space, pages_of("text", 2, 50))
    rig.free(space, freed)
    with pytest.raises(BadSlotError) as caught:
        rig.load(space, np.concatenate((good, freed)))
    assert caught.value.slots.tolist() == freed.tolist()


@pytest.mark.parametrize("codec", ["lz4", "zstd:3"])
@pytest.mark.parametrize("verify", ["always", "never"])
@pytest.mark.parametrize("mixed", [True, False])
def test_an_entry_that_does_not_decompress_is_an_error_and_stays(
    codec: str, verify: str, *, mixed: bool
) -> None:
    """16: it is counted and kept for inspection; other loads go on, and it can be freed."""
    rig = make_engine(codec=codec, verify=verify)
    space = rig.space()
    slots = rig.put(space, pages_of("text", 10))
    if mixed:
        slots = np.concatenate((slots, rig.put(space, pages_of("zero", 2))))
    place = places_of(rig.words(slots[4:5]))
    start, length = int(place.address[0]) + CHECK_BYTES, int(place.length[0])
    view = rig.engine.core.zswap.arena.view
    damaged = b"\xff" * length
    view[start : start + length] = damaged
    words = rig.words(slots).tolist()
    for turn in (1, 2):
        with pytest.raises(PageLostError) as caught:
            rig.load(space, slots)
        assert caught.value.slots.tolist() == [int(slots[4])]
        picture = rig.engine.snapshot()
        assert picture.pool.corrupt_entries == picture.stats.lost_pages == turn
    assert rig.words(slots).tolist() == words
    assert bytes(view[start : start + length]) == damaged
    left = np.delete(slots, 4)
    assert rig.load(space, left)[:9] == [p for i, p in enumerate(pages_of("text", 10)) if i != 4]
    rig.store(space, pages_of("text", 1, 77), slots[4:5])
    assert rig.load(space, slots[4:5]) == pages_of("text", 1, 77)
    rig.free(space, slots)
    rig.settle()
    rig.check()
    assert rig.pool_bytes == 0


def test_an_entry_on_a_device_that_does_not_decompress_is_an_error_and_stays() -> None:
    """16: bytes that agree with their check and are no page are lost, by name; others are not."""
    rig = make_engine(devices=[8])
    space = rig.space()
    good = rig.put(space, [*pages_of("zero", 3), *pages_of("text", 10)])
    rig.writeback()
    bad = rig.put(space, pages_of("text", 4, 100))
    rig.writeback()
    entry, extent = rig.engine.core.devices.device_of(int(places_of(rig.words(bad)).number[0]))
    pool = int(entry.pool[extent])
    entry.pool[extent] = rig.engine.core.zswap.pool_of("zstd:1").index
    asked = np.concatenate((good, bad))
    for _ in range(2):
        with pytest.raises(PageLostError) as caught:
            rig.load(space, asked)
        assert caught.value.slots.tolist() == bad.tolist()
    assert rig.load(space, good) == [*pages_of("zero", 3), *pages_of("text", 10)]
    entry.pool[extent] = pool
    assert rig.load(space, bad) == pages_of("text", 4, 100)


@pytest.mark.parametrize("kind", ["text", "noise"])
@pytest.mark.parametrize("byte", [0, CHECK_BYTES - 1, CHECK_BYTES, CHECK_BYTES + 200])
def test_with_verify_always_a_flipped_bit_in_the_pool_is_found(kind: str, byte: int) -> None:
    """16: pool.verify = always compares checks on every load from the pool; raw pages too."""
    rig = make_engine(verify="always")
    space = rig.space()
    slots = rig.put(space, pages_of(kind, 8))
    assert rig.load(space, slots) == pages_of(kind, 8)
    rig.damage(int(slots[5]), byte=byte)
    for turn, asked in enumerate((slots, slots[5:6]), 1):
        with pytest.raises(PageLostError) as caught:
            rig.load(space, asked)
        assert caught.value.slots.tolist() == [int(slots[5])]
        assert rig.engine.snapshot().pool.corrupt_entries == turn
    rig.set(verify="never")
    assert rig.load(space, np.delete(slots, 5)) == [
        p for i, p in enumerate(pages_of(kind, 8)) if i != 5
    ]


def test_every_load_from_a_device_is_verified() -> None:
    """16: whatever pool.verify says, wrong bytes from a device are never a page."""
    rig = make_engine(8 * MIB, devices=[16], verify="never")
    space = rig.space()
    slots = rig.put(space, [*pages_of("noise", 30), *pages_of("text", 30)])
    rig.writeback()
    for i in range(60):
        rig.damage(int(slots[i]), byte=(i * 7) % 60)
    for slot in slots.tolist():
        with pytest.raises(PageLostError) as caught:
            rig.load(space, [slot])
        assert caught.value.slots.tolist() == [slot]


@pytest.mark.parametrize("how", ["overwritten", "drained"])
def test_a_page_that_moved_while_its_device_failed_is_not_lost(how: str) -> None:
    """A load looks again where the page is now; one that is still there is lost, and it alone."""
    rig = make_engine(devices=[8])
    space = rig.space()
    pages = pages_of("mixed", 40)
    slots = rig.put(space, pages)
    rig.writeback()
    assert set(rig.tags(slots)) == {Tag.PHYS}
    load, other = start(rig.engine.load(space, slots[:1])), start(rig.engine.load(space, slots))
    load.until_io()
    other.until_io()
    (device,) = rig.devices
    if how == "overwritten":
        pages[0] = page("text", 99)
        rig.store(space, pages[:1], slots[:1])
    else:
        drain = start(rig.engine.swapoff(device.path))
        while rig.tags(slots[:1]) == [Tag.PHYS]:
            drain.advance()
            drain.perform()
    device.fails = lambda kind, _: kind == "read"
    assert [bytes(got) for got in load.finish()] == pages[:1]
    if how == "overwritten":
        with pytest.raises(PageLostError) as caught:
            other.finish()
        assert set(caught.value.slots.tolist()) == set(slots[1:].tolist())
    else:
        assert [bytes(got) for got in other.finish()] == pages
        device.fails = None
        drain.finish()


@pytest.mark.parametrize("count", [20, 200])
def test_a_bad_block_loses_only_the_pages_on_it(count: int) -> None:
    """15: neighbours are read together, but one block that cannot be read takes none with it."""
    rig = make_engine(devices=[8])
    space = rig.space()
    pages = [page(KINDS[i % 3], i) for i in range(count)]
    slots = rig.put(space, pages)
    rig.writeback()
    device = rig.devices[0]
    blocks = rig.blocks_of(slots)
    bad = {min(blocks[5]), max(blocks[count - 3])}
    hit = {i for i in range(count) if blocks[i] & bad}
    assert 2 <= len(hit) < 12
    device.bad_blocks = bad
    with pytest.raises(PageLostError) as caught:
        rig.load(space, slots)
    assert set(caught.value.slots.tolist()) == set(slots[sorted(hit)].tolist())
    report = rig.verify()
    assert [problem.split()[0] for problem in report.problems] == [str(len(hit))]
    device.bad_blocks = set()
    assert rig.load(space, slots) == pages
    rig.check()
