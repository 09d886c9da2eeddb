"""What a slot is, and that nothing else says otherwise.

Invariants (numbers as in "What must never be"): 1 to 5.
"""

from __future__ import annotations

import numpy as np
import pytest

from support.engine import MIB, Rig, make_engine, numbers_of, page, pages_of
from vswapd.errors import BadSlotError
from vswapd.groups import Space
from vswapd.swap_table import Tag, addresses_of, lengths_of
from vswapd_backends.base import SEGMENT_BYTES, U64, run
from vswapd_backends.segment import parse_image


def _all_states(rig: Rig, space: Space) -> dict[Tag, U64]:
    """Slots in every state that an allocated slot can have."""
    found = {Tag.PHYS: rig.put(space, pages_of("text", 40))}
    rig.writeback()
    found[Tag.ZSWAP] = rig.put(space, pages_of("text", 30, 100))
    found[Tag.ZERO] = rig.put(space, pages_of("zero", 20))
    found[Tag.UNBACKED] = rig.put(space, pages_of("text", 10, 200))
    rig.set(store_enabled=False)
    rig.store(space, pages_of("text", 10), found[Tag.UNBACKED])
    rig.set(store_enabled=True)
    return found


def test_each_slot_has_one_state_and_all_sums_agree_with_it() -> None:
    """1: counts by state, entries of pools, devices and groups are sums over the slots' words."""
    rig = make_engine(devices=[8])
    space = rig.space()
    states = _all_states(rig, space)
    for tag, slots in states.items():
        assert set(rig.tags(slots)) == {tag}
    picture = rig.engine.snapshot()
    counted = picture.slots
    assert (counted.phys, counted.zswap, counted.zero, counted.unbacked) == (40, 30, 20, 10)
    assert counted.allocated == 100
    compressed = {t: int(lengths_of(rig.words(s)).sum()) for t, s in states.items()}
    assert compressed[Tag.ZERO] == compressed[Tag.UNBACKED] == 0
    assert picture.pool.live_bytes == compressed[Tag.ZSWAP] == picture.groups[0].pool_bytes
    assert picture.devices[0].live_bytes == compressed[Tag.PHYS] == picture.groups[0].device_bytes
    assert picture.spaces[0].compressed_bytes == compressed[Tag.ZSWAP] + compressed[Tag.PHYS]
    assert picture.pool.original_bytes == 30 * 4096
    assert picture.spaces[0].original_bytes == 90 * 4096
    rig.check()


def test_sums_agree_when_states_change_hands() -> None:
    """1: moving every slot to every other state leaves each sum right."""
    rig = make_engine(devices=[16])
    space = rig.space()
    states = _all_states(rig, space)
    everything = np.concatenate(list(states.values()))
    for kind in ("text", "zero", "noise", "zero", "repeat"):
        rig.store(space, pages_of(kind, 100), everything)
        rig.check()
        rig.writeback()
        rig.check()
        rig.load(space, everything)
        rig.check()
    rig.free(space, everything[::2])
    rig.check()


def test_zero_and_pool_slots_own_no_device_space() -> None:
    """2: a device is touched by writeback only."""
    rig = make_engine(devices=[8])
    space = rig.space()
    slots = rig.put(space, [*pages_of("text", 100), *pages_of("zero", 100)])
    rig.load(space, slots)
    state = rig.engine.snapshot().devices[0]
    assert (state.used_bytes, state.live_bytes) == (0, 0)
    device = rig.devices[0]
    assert (device.reads, device.writes, device.discards) == (0, 0, 0)
    rig.writeback()
    assert rig.engine.snapshot().devices[0].used_bytes == SEGMENT_BYTES
    assert set(rig.tags(slots[100:])) == {Tag.ZERO}


def test_everything_but_writeback_works_without_a_device() -> None:
    """2: stores, overwrites, loads, frees, codecs, compaction, verify and status need none."""
    rig = make_engine()
    space = rig.space()
    slots = rig.put(space, pages_of("text", 400))
    rig.store(space, pages_of("zero", 50), slots[:50])
    rig.set(codec="zstd:1")
    rig.store(space, pages_of("mixed", 50), slots[50:100])
    rig.free(space, slots[200:])
    run(rig.engine.compact())
    rig.settle()
    expected = [*pages_of("zero", 50), *pages_of("mixed", 50), *pages_of("text", 100, 100)]
    assert rig.load(space, slots[:200]) == expected
    assert rig.verify().ok
    assert rig.engine.snapshot().devices == ()
    written = rig.writeback()
    assert (written.bytes, written.pages) == (0, 0)
    assert written.stopped is not None
    rig.close(space)
    assert rig.engine.snapshot().slots.allocated == 0


def test_a_directory_entry_names_its_slot_as_long_as_the_word_names_it() -> None:
    """3: of all entries in the pool, exactly those that their slot's word names are alive."""
    rig = make_engine()
    space = rig.space()
    slots = rig.put(space, pages_of("text", 300))
    rig.store(space, pages_of("text", 100, 500), slots[100:200])
    rig.free(space, slots[250:])
    core = rig.engine.core
    named = dict(
        zip(
            addresses_of(rig.words(slots[:250])).tolist(),
            numbers_of(slots[:250]).tolist(),
            strict=True,
        )
    )
    found: dict[int, int] = {}
    dead = 0
    for segment in core.zswap.all_segments().tolist():
        directory = core.zswap.directory(segment)
        alive, words = core.live_words(Tag.ZSWAP, segment, directory.numbers, directory.offsets)
        assert (lengths_of(words) == directory.lengths[alive]).all()
        dead += len(directory) - len(alive)
        live = directory.pick(alive)
        addresses = (live.offsets + segment * SEGMENT_BYTES).tolist()
        found |= dict(zip(addresses, live.numbers.tolist(), strict=True))
    assert found == named
    assert dead == 150


def test_an_extents_directory_names_the_slots_that_lie_in_it() -> None:
    """3: what is on a device is an image whose directory leads back to each word that names it."""
    rig = make_engine(devices=[16])
    space = rig.space()
    slots = rig.put(space, [*pages_of("noise", 130), *pages_of("text", 100)])
    rig.writeback()
    rig.free(space, slots[20:40])
    left = np.delete(slots, np.arange(20, 40))
    seen: set[int] = set()
    device = rig.devices[0]
    for extent in np.flatnonzero(rig.device_of(device).live_entries).tolist():
        start = extent * SEGMENT_BYTES
        header, directory = parse_image(memoryview(device.data)[start : start + SEGMENT_BYTES])
        assert header.sequence == rig.device_of(device).sequence[extent]
        alive, words = rig.engine.core.live_words(
            Tag.PHYS, extent, directory.numbers, directory.offsets
        )
        assert (lengths_of(words) == directory.lengths[alive]).all()
        seen |= set(directory.numbers[alive].tolist())
    assert seen == set(numbers_of(left).tolist())


def test_an_id_stays_the_same_wherever_its_page_goes() -> None:
    """4: pool, second chance, compaction, device, merging and swapoff: one id, one page."""
    rig = make_engine(8 * MIB, arena_bytes=24 * MIB, devices=[32])
    space = rig.space()
    slots = rig.put(space, pages_of("noise", 400))
    pages = pages_of("noise", 400)
    keep = np.arange(0, 400, 4)
    rig.free(space, np.delete(slots, keep))
    kept, expected = slots[keep], [pages[i] for i in keep.tolist()]
    seen = {tuple(rig.words(kept).tolist())}

    def still_there() -> None:
        assert rig.load(space, kept) == expected
        seen.add(tuple(rig.words(kept).tolist()))

    run(rig.engine.compact())
    still_there()
    rig.writeback(1)  # loaded meanwhile: their second chance
    still_there()
    for _ in range(2):
        rig.writeback()
    assert set(rig.tags(kept)) == {Tag.PHYS}
    still_there()
    rig.swapon(32)
    rig.set(pool_enabled=False)
    rig.swapoff(rig.devices[0])
    still_there()
    rig.set(pool_enabled=True)
    rig.swapoff(rig.devices[0])
    assert set(rig.tags(kept)) == {Tag.ZSWAP}
    still_there()
    assert len(seen) > 5, "the pages did move"


def test_a_freed_id_is_an_error_until_it_is_given_out_again() -> None:
    """4: in a cluster that lives on, the id of a freed slot is wrong, until a store gets it."""
    rig = make_engine()
    space = rig.space()
    slots = rig.put(space, pages_of("text", 10))
    rig.free(space, slots[3:4])
    for call in (
        lambda: rig.load(space, slots[3:4]),
        lambda: rig.free(space, slots[3:4]),
        lambda: rig.store(space, pages_of("text", 1), slots[3:4]),
    ):
        with pytest.raises(BadSlotError) as caught:
            call()
        assert caught.value.slots.tolist() == slots[3:4].tolist()
    again = rig.put(space, pages_of("text", 502, 50))
    assert slots[3] in again
    assert rig.load(space, slots[3:4]) == [page("text", 50 + again.tolist().index(slots[3]))]


def test_an_id_of_a_freed_cluster_is_an_error_for_ever() -> None:
    """4: the cluster's next owner gets other ids for the same places in the table."""
    rig = make_engine(max_slots=512)
    space = rig.space()
    old = rig.put(space, pages_of("text", 5))
    rig.free(space, old)
    for turn in range(5):
        other = rig.space()
        new = rig.put(other, pages_of("text", 5, turn))
        assert numbers_of(new).tolist() == numbers_of(old).tolist()
        assert not set(new.tolist()) & set(old.tolist())
        for who in (space, other):
            with pytest.raises(BadSlotError):
                rig.load(who, old)
        rig.close(other)


@pytest.mark.parametrize("how", ["free", "close"])
def test_nothing_stored_is_nothing_held(how: str) -> None:
    """5: when the last slot goes, whatever it was, no table, pool or device space is left."""
    rig = make_engine(devices=[8, 8])
    picture = rig.engine.snapshot()
    assert (picture.table_bytes, picture.pool.bytes, picture.clusters) == (0, 0, 0)
    space = rig.space()
    states = _all_states(rig, space)
    rig.set(pool_enabled=False)
    straight = rig.put(space, pages_of("text", 10, 900))
    assert set(rig.tags(straight)) == {Tag.PHYS}
    assert rig.engine.snapshot().table_bytes > 0
    if how == "free":
        for slots in [*states.values(), straight]:
            rig.free(space, slots)
    else:
        rig.close(space)
    rig.settle()
    picture = rig.engine.snapshot()
    assert (picture.table_bytes, picture.pool.bytes, picture.clusters) == (0, 0, 0)
    assert [device.used_bytes for device in picture.devices] == [0, 0]
    assert picture.slots.allocated == 0
    assert rig.engine.core.zswap.arena.region.resident_bytes == 0
