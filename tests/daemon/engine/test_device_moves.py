"""swapoff and merging: what lies on a device goes elsewhere, whatever happens meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from support.engine import (
    KIB,
    MIB,
    ZERO,
    Rig,
    UnkindDevice,
    ids,
    make_engine,
    numbers_of,
    page,
    pages_of,
)
from support.interleaving import start
from vswapd.errors import NoSuchDeviceError, PageLostError, SwapoffError
from vswapd.extent_reads import ExtentReads
from vswapd.groups import Space
from vswapd.settings import GroupLimits
from vswapd.swap_table import Tag, places_of
from vswapd_backends.base import I64, PAUSE, U64, WAIT, IoBatch, run
from vswapd_backends.segment import Directory
from vswapd_backends.swapdev import SwapDevice
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES

BLOCKS = EXTENT_BYTES // BLOCK_BYTES
"""Of one extent."""


def _fill(rig: Rig, space: Space, count: int, *, kind: str = "text") -> tuple[U64, list[bytes]]:
    """Pages that lie on devices."""
    pages = pages_of(kind, count)
    slots = rig.put(space, pages)
    rig.writeback()
    assert set(rig.tags(slots)) == {Tag.PHYS}
    return slots, pages


def _nearly_full(rig: Rig) -> tuple[Space, dict[int, bytes]]:
    """A device of 8 extents, all but the reserve in use, each with few live entries."""
    space = rig.space()
    held: dict[int, bytes] = {}
    for turn in range(7):
        pages = pages_of("noise", 60, 100 * turn)
        slots = rig.put(space, pages)
        rig.writeback()
        rig.free(space, slots[5:])
        held.update(zip(slots[:5].tolist(), pages[:5], strict=True))
    device = rig.device_of(rig.devices[0])
    assert np.count_nonzero(device.live_entries) == 7
    return space, held


def _check_held(rig: Rig, space: Space, held: dict[int, bytes]) -> None:
    assert rig.load(space, ids(*held)) == list(held.values())
    assert rig.verify().ok


# swapoff


def test_swapoff_moves_pages_to_the_pool_and_keeps_ids() -> None:
    """With room in the pool everything goes there, under the same ids."""
    rig = make_engine(devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 200)
    device = rig.devices[0]
    assert rig.swapoff(device).moved == 200
    assert set(rig.tags(slots)) == {Tag.ZSWAP}
    assert rig.load(space, slots) == pages
    assert rig.engine.snapshot().devices == ()
    assert rig.verify().ok


def test_swapoff_moves_pages_to_another_device_if_the_pool_has_no_room() -> None:
    """What the pool does not take is written to another device, and counted under swapoff."""
    rig = make_engine(devices=[16, 16])
    space = rig.space()
    slots, pages = _fill(rig, space, 200)
    rig.set(pool_max=0)
    one, other = rig.devices
    full, empty = (one, other) if rig.device_of(one).live_entries.any() else (other, one)
    assert rig.swapoff(full).moved == 200
    assert set(rig.tags(slots)) == {Tag.PHYS}
    assert rig.load(space, slots) == pages
    stats = rig.engine.snapshot().stats
    assert stats.swapoff_bytes == empty.written
    assert rig.verify().ok


def test_swapoff_that_cannot_move_everything_fails_and_the_device_stays() -> None:
    """Nothing is lost, the device is in use again, and a later swapoff can succeed."""
    rig = make_engine(devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 200)
    rig.set(pool_max=300 * KIB)
    device = rig.devices[0]
    with pytest.raises(SwapoffError):
        rig.swapoff(device)
    assert rig.engine.snapshot().devices[0].state == "on"
    assert set(rig.tags(slots)) <= {Tag.ZSWAP, Tag.PHYS}
    assert rig.load(space, slots) == pages
    rig.put(space, pages_of("text", 5, 900))
    rig.writeback()
    rig.set(pool_max=4 * MIB)
    rig.swapoff(device)
    assert rig.load(space, slots) == pages
    assert rig.verify().ok


def test_swapoff_of_an_unknown_path_changes_nothing() -> None:
    """The error names what is in use."""
    rig = make_engine(devices=[4])
    with pytest.raises(NoSuchDeviceError, match="mem0"):
        run(rig.engine.swapoff("elsewhere"))


def test_swapoff_that_is_under_way_refuses_a_second_one() -> None:
    """One drain at a time; the second says so."""
    rig = make_engine(devices=[4])
    _fill(rig, rig.space(), 20)
    first = start(rig.engine.swapoff("mem0"))
    first.until_io()
    with pytest.raises(SwapoffError):
        run(rig.engine.swapoff("mem0"))
    first.finish()


def test_swapoff_with_a_read_error_fails_and_loses_nothing_else() -> None:
    """An extent that cannot be read keeps the device in use; its pages are readable again later."""
    rig = make_engine(devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 300)
    device = rig.devices[0]
    device.bad_blocks = set(range(BLOCKS, 2 * BLOCKS))
    with pytest.raises(SwapoffError):
        rig.swapoff(device)
    device.bad_blocks = set()
    assert {Tag.ZSWAP, Tag.PHYS} == set(rig.tags(slots))
    assert rig.load(space, slots) == pages
    assert rig.swapoff(device).moved > 0
    assert rig.load(space, slots) == pages


def test_damaged_entries_do_not_become_other_bytes_by_swapoff() -> None:
    """Only sound entries go to the pool, where loads need not look at checks."""
    rig = make_engine(devices=[16])
    space = rig.space()
    pages = pages_of("noise", 20) + pages_of("text", 20)
    slots = rig.put(space, pages)
    rig.writeback()
    for index in (3, 25):
        rig.damage(int(slots[index]), byte=60)
    with pytest.raises(SwapoffError, match=r"damaged.*38 page\(s\) were moved, 2 such are left"):
        rig.swapoff(rig.devices[0])
    assert [i for i, tag in enumerate(rig.tags(slots)) if tag == Tag.PHYS] == [3, 25]
    expected = [None if i in {3, 25} else page for i, page in enumerate(pages)]
    assert rig.peek(space, slots) == expected
    other = rig.swapon(8)
    rig.swapoff(rig.devices[0])
    assert rig.devices == [other]
    assert rig.peek(space, slots) == expected


def test_swapoff_moves_all_that_can_be_read() -> None:
    """What cannot keeps the device in use until it is overwritten; everything else is elsewhere."""
    rig = make_engine(8 * MIB, devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 400)
    device = rig.devices[0]
    device.bad_blocks = {*range(BLOCKS), *range(2 * BLOCKS, 3 * BLOCKS)}
    with pytest.raises(SwapoffError, match="cannot be read"):
        rig.swapoff(device)
    left = [i for i, tag in enumerate(rig.tags(slots)) if tag == Tag.PHYS]
    assert 0 < len(left) < 300
    assert int(rig.device_of(device).live_entries.astype(bool).sum()) == 2
    device.fails = lambda kind, nth: kind == "read"
    rig.store(space, [pages[i] for i in left], slots[left])
    rig.swapoff(device)
    assert rig.load(space, slots) == pages


@pytest.mark.parametrize("others", [0, 1])
def test_swapoff_moves_what_can_be_read_of_an_extent(others: int) -> None:
    """Also where header and directory cannot be read: just the pages on bad blocks are left."""
    rig = make_engine(8 * MIB, devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 300)
    device = rig.devices[0]
    if others:
        rig.set(pool_enabled=False)
        rig.swapon(16)
    blocks = rig.blocks_of(slots)
    device.bad_blocks = {0, 9, BLOCKS - 1, BLOCKS + 5}
    hit = [i for i in range(len(slots)) if blocks[i] & device.bad_blocks]
    moved = len(slots) - len(hit)
    said = rf"cannot be read.*{moved} page\(s\) were moved, {len(hit)} such are left"
    with pytest.raises(SwapoffError, match=said):
        rig.swapoff(device)
    on_it = [i for i, place in enumerate(places_of(rig.words(slots)).number) if not place >> 24]
    assert [i for i in on_it if rig.tags(slots)[i] == Tag.PHYS] == hit
    assert rig.peek(space, slots) == [None if i in hit else p for i, p in enumerate(pages)]
    rig.check()
    rig.free(space, slots[hit])
    assert rig.swapoff(device) == (0, 0)


@pytest.mark.parametrize("bad", ["blocks", "bytes", "device"])
def test_what_is_given_up_is_lost_and_keeps_no_device_in_use(bad: str) -> None:
    """24: just what nobody can read; it stays an error, until it is overwritten or freed."""
    rig = make_engine(8 * MIB, devices=[16])
    space, other = rig.space(), rig.space()
    slots, pages = _fill(rig, space, 300)
    more, _ = _fill(rig, other, 40, kind="noise")
    device = rig.devices[0]
    hit = list(range(300))
    if bad == "blocks":
        blocks = rig.blocks_of(slots)
        device.bad_blocks = {3, 4, BLOCKS + 5}
        hit = [i for i in range(300) if blocks[i] & device.bad_blocks]
        assert 3 < len(hit) < 30
    elif bad == "bytes":
        hit = [7, 150, 299]
        for index in hit:
            rig.damage(int(slots[index]), byte=60)
    else:
        device.fails = lambda kind, _: kind == "read"
    with pytest.raises(SwapoffError, match="give"):
        rig.swapoff(device)
    left = int(rig.device_of(device).live_entries.sum())
    drained = rig.swapoff(device, give_up=True)
    assert drained == (0, left)
    assert left == len(hit) + (len(more) if bad == "device" else 0)
    rig.check()
    assert [i for i, tag in enumerate(rig.tags(slots)) if tag == Tag.LOST] == hit
    assert rig.engine.snapshot().slots.lost == left
    with pytest.raises(PageLostError) as caught:
        rig.load(space, slots)
    assert caught.value.slots.tolist() == slots[hit].tolist()
    assert rig.peek(space, slots) == [None if i in hit else p for i, p in enumerate(pages)]
    rig.recover()
    rig.check()
    space, other = rig.engine.orphans()
    with pytest.raises(PageLostError):
        rig.load(space, slots[hit[0] : hit[0] + 1])
    some = slots[hit[:2]]
    rig.store(space, pages_of("mixed", 2), some)
    assert rig.load(space, some) == pages_of("mixed", 2)
    rig.check()
    rig.free(space, slots)
    rig.close(other)
    rig.check()
    assert rig.engine.snapshot().slots.allocated == 0


def test_a_dead_device_costs_few_walks_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """One finds the entries of many extents, in turns, also if some of them go meanwhile."""
    rig = make_engine(8 * MIB, devices=[24], max_slots=1 << 18)
    space = rig.space()
    clusters = [rig.put(space, [ZERO] * 512) for _ in range(40)]
    slots, _ = _fill(rig, space, 1200, kind="noise")
    device = rig.devices[0]
    device.fails = lambda kind, _: kind == "read"
    walks: list[int] = []
    walk = ExtentReads._walk

    def watched(moves: ExtentReads, of: SwapDevice, extents: I64) -> object:
        walks.append(len(extents))
        return walk(moves, of, extents)

    def never(*_: object) -> Directory:
        raise AssertionError("a whole walk for one extent")

    monkeypatch.setattr(ExtentReads, "_walk", watched)
    monkeypatch.setattr(ExtentReads, "directory_from_table", never)
    swapoff = start(rig.engine.swapoff("mem0", give_up=True))
    pauses = 0
    while not swapoff.ended:
        if swapoff.need is PAUSE:
            pauses += 1
            if clusters:
                rig.free(space, clusters.pop())
            rig.free(space, slots[-5:])
            slots = slots[:-5]
        swapoff.perform()
        swapoff.advance()
    assert pauses >= 2
    assert len(walks) == 1
    assert walks[0] > 10
    assert sum(swapoff.result) <= 1200
    assert set(rig.tags(slots)) == {Tag.LOST}
    rig.check()


def test_only_what_is_stuck_is_given_up() -> None:
    """Pages that could be read, and have no room anywhere, keep the device in use all the same."""
    rig = make_engine(8 * MIB, devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 100)
    rig.damage(int(slots[3]), byte=60)
    rig.set(pool_enabled=False)
    with pytest.raises(SwapoffError, match="neither the pool nor another device has room"):
        rig.swapoff(rig.devices[0], give_up=True)
    assert rig.engine.snapshot().slots.lost == 0
    assert rig.peek(space, slots) == [None if i == 3 else p for i, p in enumerate(pages)]
    rig.set(pool_enabled=True)
    assert rig.swapoff(rig.devices[0], give_up=True) == (99, 1)


def test_a_swapoff_that_fails_says_what_it_has_given_up() -> None:
    """What nobody could read is lost by then, though there was no room for the rest."""
    rig = make_engine(8 * MIB, devices=[16])
    space = rig.space()
    slots, _ = _fill(rig, space, 200, kind="noise")
    device = rig.devices[0]
    device.bad_blocks = set(range(BLOCKS))
    gone = int(rig.device_of(device).live_entries[0])
    rig.set(pool_enabled=False)
    with pytest.raises(SwapoffError, match=rf"has room .*; {gone} page\(s\) were given up"):
        rig.swapoff(device, give_up=True)
    assert rig.engine.snapshot().slots.lost == gone > 0
    with pytest.raises(SwapoffError) as caught:
        rig.swapoff(device, give_up=True)
    assert "given up" not in str(caught.value)
    assert rig.tags(slots).count(Tag.LOST) == gone


def test_what_is_damaged_can_be_given_up_without_a_write_budget() -> None:
    """Nothing is to be written for it: the others go to the pool."""
    rig = make_engine(8 * MIB, devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 100)
    rig.damage(int(slots[3]), byte=60)
    rig.set(write_budget=1)
    with pytest.raises(SwapoffError, match="give"):
        rig.swapoff(rig.devices[0])
    assert rig.swapoff(rig.devices[0], give_up=True) == (0, 1)
    assert rig.peek(space, slots) == [None if i == 3 else p for i, p in enumerate(pages)]
    rig.check()


def test_what_is_loaded_or_overwritten_while_it_is_given_up_is_not_lost() -> None:
    """Given up is the very word that could not be read, not what the slot has by then."""
    rig = make_engine(8 * MIB, devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 20)
    device = rig.devices[0]
    device.fails = lambda kind, _: kind == "read"
    swapoff = start(rig.engine.swapoff("mem0", give_up=True))
    swapoff.until_io()
    for _ in ("all", "its entries"):
        swapoff.perform()
        swapoff.advance()
    swapoff.perform()
    device.fails = None
    rig.store(space, pages_of("noise", 1), slots[:1])
    assert rig.load(space, slots[1:2]) == pages[1:2]
    swapoff.finish()
    assert swapoff.result == (1, 18)
    assert rig.load(space, slots[:2]) == [*pages_of("noise", 1), pages[1]]
    rig.check()


@pytest.mark.parametrize("give_up", [False, True])
def test_an_extent_that_is_freed_while_it_cannot_be_read_keeps_nothing(*, give_up: bool) -> None:
    """There is nothing to read apart any more, and nothing to give up: the device goes."""
    rig = make_engine(8 * MIB, devices=[16])
    space = rig.space()
    slots, _ = _fill(rig, space, 20)
    device = rig.devices[0]
    device.fails = lambda kind, _: kind == "read"
    swapoff = start(rig.engine.swapoff("mem0", give_up=give_up))
    swapoff.until_io()
    swapoff.perform()
    rig.free(space, slots)
    swapoff.finish()
    assert swapoff.result == (0, 0)
    rig.check()


@pytest.mark.parametrize("where", ["header", "directory"])
def test_swapoff_survives_a_damaged_header_or_directory(where: str) -> None:
    """The table is the truth: entries are found through it, and no page is lost."""
    rig = make_engine(devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 200)
    for extent in range(4):
        at = 20 if where == "header" else EXTENT_BYTES - 12
        rig.devices[0].data[extent * EXTENT_BYTES + at] ^= 0xFF
    assert rig.swapoff(rig.devices[0]).moved == 200
    assert rig.load(space, slots) == pages


def test_swapoff_keeps_within_the_groups_pool_limit() -> None:
    """The pool limit of the group that owns the pages is not passed by swapoff."""
    rig = make_engine(devices=[16])
    space = rig.space("7")
    slots, pages = _fill(rig, space, 200)
    rig.set(groups={"7": GroupLimits(pool_max=100 * KIB)})
    with pytest.raises(SwapoffError):
        rig.swapoff(rig.devices[0])
    assert rig.engine.snapshot().groups[0].pool_bytes <= 100 * KIB
    assert rig.load(space, slots) == pages


def test_pages_change_hands_while_swapoff_reads_them() -> None:
    """Freed, overwritten and loaded pages of the extent under way keep their own fate."""
    rig = make_engine(devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 60)
    swapoff = start(rig.engine.swapoff("mem0"))
    swapoff.until_io()
    rig.free(space, slots[:10])
    rig.store(space, pages_of("text", 10, 500), slots[10:20])
    assert rig.load(space, slots[20:30]) == pages[20:30]
    swapoff.finish()
    assert rig.load(space, slots[10:20]) == pages_of("text", 10, 500)
    assert rig.load(space, slots[20:]) == pages[20:]
    assert rig.verify().ok


def test_folio_published_while_swapoff_reads_its_extent_is_not_taken_from_the_older_image() -> None:
    """swapoff waits for a folio that is being written into the extent, and moves it then."""
    rig = make_engine(devices=[16], pool_enabled=False)
    space = rig.space()
    pages = pages_of("noise", 4)
    slots = rig.put(space, pages)
    late = pages_of("noise", 4, 50)
    store = start(rig.engine.store(space, rig.engine.prepare(b"".join(late))), "store")
    writes = store.until_io()
    rig.set(pool_enabled=True)
    swapoff = start(rig.engine.swapoff("mem0"), "swapoff")
    need = swapoff.advance()
    if isinstance(need, IoBatch):
        swapoff.perform()  # the image as it is before the folio's bytes are there
    else:
        assert need is WAIT
    for request in writes.requests:
        request.perform()
    store.air.clear()
    store.finish()
    swapoff.finish()
    assert rig.load(space, slots) == pages
    assert rig.load(space, store.result.slots) == late
    assert rig.verify().ok


def test_swapoff_waits_for_a_load_that_is_under_way() -> None:
    """Nobody asks a device for anything after swapoff has returned."""
    rig = make_engine(devices=[16])
    space = rig.space()
    slots, pages = _fill(rig, space, 20)
    load = start(rig.engine.load(space, slots))
    load.until_io()
    swapoff = start(rig.engine.swapoff("mem0"))
    swapoff.until_io()
    swapoff.perform()
    assert swapoff.advance() is WAIT
    assert load.finish() == pages
    swapoff.finish()
    rig.devices.pop().close()
    rig.settle()


def test_swapoff_waits_for_discards_that_are_under_way() -> None:
    """A discard that somebody else has begun ends before the device is let go of."""
    rig = make_engine(devices=[16])
    space = rig.space()
    slots, _ = _fill(rig, space, 60)
    rig.free(space, slots)
    discard = start(rig.engine.core.devices.discard(), "discard")
    discard.until_io()
    swapoff = start(rig.engine.swapoff("mem0"), "swapoff")
    assert swapoff.advance() is WAIT
    discard.finish()
    swapoff.finish()
    rig.check()


@pytest.mark.parametrize("steps", range(12))
def test_swapoff_can_be_given_up_anywhere(steps: int) -> None:
    """Ended after any step, it leaves the device in use and every page where it can be loaded."""
    rig = make_engine(devices=[16, 16])
    space = rig.space()
    slots, pages = _fill(rig, space, 150)
    rig.free(space, slots[::3])
    rig.set(pool_max=200 * KIB)
    swapoff = start(rig.engine.swapoff("mem0"))
    for _ in range(steps):
        swapoff.advance()
        swapoff.perform()
        if swapoff.ended:
            break
    if not swapoff.ended:
        swapoff.cancel(perform=True)
        assert rig.device_of(rig.devices[0]).state == "on"
    rig.check()
    kept = [i for i in range(150) if i % 3]
    assert rig.load(space, slots[kept]) == [pages[i] for i in kept]
    assert rig.verify().ok


# Merging


def test_merging_frees_extents_of_a_nearly_full_device() -> None:
    """Few live entries in many extents become few extents, and every page is still there."""
    rig = make_engine(devices=[8])
    space, held = _nearly_full(rig)
    assert "merging extents" in rig.shrink()
    assert np.count_nonzero(rig.device_of(rig.devices[0]).live_entries) < 7
    stats = rig.engine.snapshot().stats
    assert stats.device_compact_bytes > 0
    _check_held(rig, space, held)


@pytest.mark.parametrize("reused", [False, True])
def test_merging_leaves_extents_alone_that_were_given_up_while_it_waited(*, reused: bool) -> None:
    """Extents are chosen again after a wait for discards: none gets two owners, none is mixed."""
    rig = make_engine(devices=[4])
    space = rig.space()
    held: list[U64] = []
    for turn in range(3):
        slots = rig.put(space, pages_of("noise", 60, 100 * turn))
        rig.writeback()
        rig.free(space, slots[2 if turn else 1 :])
        held.append(slots[: 2 if turn else 1])
    devices = rig.engine.core.devices
    reserve = devices.take(0, 0, 0, reserve=True)
    assert reserve is not None
    devices.unpin(reserve)
    merge = start(rig.engine._moves.merge(), "merge")
    merge.until_io()  # the discard of the reserve
    rig.free(space, held[0])
    late = rig.put(space, pages_of("text", 20, 700))
    if reused:
        run(devices.discard())
        rig.set(codec="zstd:1")
        late = np.concatenate((late, rig.put(space, pages_of("text", 20, 720))))
        assert devices.take(1, 0, 0, reserve=True) == 0, "another stream has it now"
    merge.finish()
    rig.check()
    if reused:
        devices.unpin(0)
    rig.settle()
    rig.check()
    assert rig.load(space, np.concatenate(held[1:])) == [
        page for turn in (1, 2) for page in pages_of("noise", 2, 100 * turn)
    ]
    assert rig.load(space, late) == pages_of("text", len(late), 700)
    assert rig.verify().ok


def test_damaged_entries_stay_damaged_when_they_are_merged() -> None:
    """Checks are carried over: a page that rotted is lost before and after, and no other is."""
    rig = make_engine(devices=[8])
    space, held = _nearly_full(rig)
    slots = ids(*held)
    rig.damage(int(slots[7]), byte=9)
    rig.shrink()
    assert rig.peek(space, slots) == [
        None if i == 7 else page for i, page in enumerate(held.values())
    ]
    with pytest.raises(PageLostError) as caught:
        rig.load(space, slots)
    assert caught.value.slots.tolist() == [int(slots[7])]


def test_merging_with_write_errors_keeps_every_page() -> None:
    """Merged extents that cannot be written leave their sources as they were."""
    rig = make_engine(devices=[8])
    space, held = _nearly_full(rig)
    rig.devices[0].fails = lambda kind, nth: kind == "write"
    rig.shrink()
    rig.devices[0].fails = None
    _check_held(rig, space, held)


def test_a_device_that_lost_a_write_is_found_out() -> None:
    """Stale bytes of the same place, once right for the same slot, are an error and not a page."""
    rig = make_engine(devices=[3])
    space = rig.space()
    slots, _ = _fill(rig, space, 40, kind="noise")
    where = places_of(rig.words(slots)).address.tolist()
    rig.store(space, pages_of("noise", 40, 300), slots)
    device = rig.devices[0]
    image = bytes(device.data)
    rig.settle()
    device.data[:] = image
    device.lies = True
    rig.writeback()
    assert places_of(rig.words(slots)).address.tolist() == where
    with pytest.raises(PageLostError) as caught:
        rig.load(space, slots)
    assert caught.value.slots.tolist() == slots.tolist()


def test_devices_of_one_priority_are_filled_in_the_order_of_swapon() -> None:
    """Also when one of them has taken over the number of another that is gone."""
    rig = make_engine(4 * MIB, devices=[8, 8, 8])
    first, *others = rig.devices
    rig.swapoff(first)
    last = rig.swapon(8)
    assert [entry.device for entry in rig.engine.core.devices] == [*others, last]


def test_devices_are_filled_by_priority() -> None:
    """The device of the highest priority takes pages as long as it has room."""
    rig = make_engine(8 * MIB)
    low = rig.swapon(8, priority=-5)
    high = rig.swapon(3, priority=5)
    space = rig.space()
    slots, pages = _fill(rig, space, 250, kind="noise")
    assert rig.device_of(high).map.free == 1
    assert rig.device_of(low).live_entries.any()
    assert isinstance(high, UnkindDevice)
    assert numbers_of(slots).tolist() == list(range(250))
    assert rig.load(space, slots) == pages
    assert page("zero", 0) == bytes(4096)
