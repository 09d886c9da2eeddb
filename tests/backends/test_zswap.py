"""The logs of compressed pages: appended in order, oldest first out, returned when dead."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from support.engine import KINDS, MIB, page, pages_of
from support.pages import compress
from vswapd_backends.base import PAGE_BYTES, SEGMENT_BYTES, Places
from vswapd_backends.codec import CorruptError, UnknownCodecError
from vswapd_backends.segment import CHECK_BYTES, ENTRY_OVERHEAD
from vswapd_backends.zpool import ZPool
from vswapd_backends.zswap import Stream, Zswap, concatenate_places


def _zswap(arena_bytes: int = 16 * MIB, codec: str = "lz4") -> Zswap:
    return Zswap(ZPool(arena_bytes), codec)


def _append(
    zswap: Zswap,
    pages: Sequence[bytes],
    *,
    group: int = 0,
    first: int = 0,
    spec: str | None = None,
    now: float = 0.0,
) -> Places:
    numbers = np.arange(first, first + len(pages), dtype=np.int64)
    return zswap.append(group, numbers, compress(zswap, pages, spec), now)


def _read(zswap: Zswap, places: Places) -> list[bytes]:
    return [bytes(found) for found in zswap.read(places.address, places.length)]


def _fill_segment(zswap: Zswap, group: int = 0, *, first: int = 0, now: float = 0.0) -> Places:
    """One segment that is sealed: pages that do not shrink, until the next would not fit."""
    places = _append(zswap, pages_of("noise", 63, first), group=group, first=first, now=now)
    zswap.seal((0, group))
    assert len(set(places.number.tolist())) == 1
    return places


def _flip_byte(zswap: Zswap, places: Places, index: int, at: int = CHECK_BYTES) -> None:
    zswap.arena.view[int(places.address[index]) + at] ^= 0x55


# Append and read


@pytest.mark.parametrize("spec", ["lz4", "lz4hc:3", "zstd:3"])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 300])
def test_pages_come_back_in_any_order(spec: str, count: int) -> None:
    """Pages of every kind are read as they were appended, in the order asked for, also twice."""
    zswap = _zswap(codec=spec)
    pages = [page(KINDS[i % 4], i) for i in range(count)]
    places = _append(zswap, pages)
    assert _read(zswap, places) == pages
    order = np.array([*random.Random(count).sample(range(count), count), 0, 0])
    assert _read(zswap, places.pick(order)) == [pages[i] for i in order.tolist()]
    assert zswap.wrong(places.address, places.length) == []


def test_a_folio_of_4096_pages_that_do_not_shrink() -> None:
    """The largest folio goes over as many segments as it needs, in order, each page raw."""
    zswap = _zswap(24 * MIB)
    pages = pages_of("noise", 4096)
    compressed = compress(zswap, pages)
    assert zswap.has_segments_for(compressed)
    places = zswap.append(0, np.arange(4096), compressed, 0.0)
    assert set(places.length.tolist()) == {PAGE_BYTES}
    assert (np.diff(places.address) > 0).all()
    assert _read(zswap, places) == pages


def test_folios_are_packed_one_behind_the_other() -> None:
    """Appends go on where the last one ended, and a directory lists them in that order."""
    zswap = _zswap()
    one, two = _append(zswap, pages_of("text", 5)), _append(zswap, pages_of("text", 5), first=5)
    assert two.address[0] == one.address[-1] + CHECK_BYTES + one.length[-1]
    directory = zswap.directory(0)
    assert directory.numbers.tolist() == list(range(10))
    assert directory.offsets.tolist() == [*one.offset.tolist(), *two.offset.tolist()]
    assert directory.lengths.tolist() == [*one.length.tolist(), *two.length.tolist()]


def test_raw_pages_are_copies() -> None:
    """A raw page that was read does not change when its place is used again."""
    zswap = _zswap()
    places = _append(zswap, [page("noise", 1)])
    (found,) = zswap.read(places.address, places.length)
    alone = zswap.read_one(places.address.item(), places.length.item())
    zswap.arena.bytes[:SEGMENT_BYTES] = 0
    assert found == alone == page("noise", 1)


def test_each_stream_has_segments_of_its_own() -> None:
    """No segment holds two groups' pages, nor entries of two codecs."""
    zswap = _zswap()
    seen: dict[int, Stream] = {}
    for group in (0, 1, 2):
        for spec in ("lz4", "zstd:1"):
            places = _append(zswap, pages_of("text", 300), group=group, spec=spec)
            for segment in set(places.number.tolist()):
                assert seen.setdefault(segment, (zswap.pool_of(spec).index, group)) == (
                    zswap.stream_of(segment)
                )
    assert len(set(seen.values())) == 6
    assert zswap.open_streams == 6


def test_what_does_not_fit_goes_on_in_the_next_segment() -> None:
    """A folio that crosses into the next segment fills the first, entry by entry."""
    zswap = _zswap()
    head = _append(zswap, pages_of("noise", 60))
    tail = _append(zswap, pages_of("noise", 10), first=60)
    assert set(head.number.tolist()) == {0}
    assert tail.number.tolist() == [0] * 3 + [1] * 7
    assert not zswap.is_open(0)
    assert zswap.is_open(1)
    assert zswap.directory(1).numbers.tolist() == list(range(63, 70))
    assert _read(zswap, tail) == pages_of("noise", 10)


def test_a_slice_of_compressed_pages_is_the_same_pages() -> None:
    """Any slice can be appended by itself, and has its own sums."""
    zswap = _zswap()
    pages = [page(KINDS[i % 4], i) for i in range(12)]
    compressed = compress(zswap, pages)
    assert compressed.slice(0, 12) is compressed
    for first, last in [(0, 1), (3, 9), (11, 12)]:
        part = compressed.slice(first, last)
        assert len(part) == last - first
        assert part.footprint == part.lengths.sum() + ENTRY_OVERHEAD * (last - first)
        places = zswap.append(0, np.arange(first, last), part, 0.0)
        assert _read(zswap, places) == pages[first:last]


def test_places_can_be_put_together() -> None:
    """Several batches of places are one, and none are none."""
    zswap = _zswap()
    parts = [_append(zswap, pages_of("text", 3, 3 * i)) for i in range(3)]
    assert _read(zswap, concatenate_places(parts)) == pages_of("text", 9)
    assert concatenate_places([]).address.tolist() == []


# Codecs


def test_an_unknown_codec_makes_no_pool() -> None:
    """A spec that names no codec is refused, and the pools are what they were."""
    zswap = _zswap()
    with pytest.raises(UnknownCodecError):
        zswap.pool_of("lz5")
    assert [pool.codec.spec for pool in zswap.pools] == ["lz4"]
    assert zswap.pool_of("lz4") is zswap.current
    with pytest.raises(UnknownCodecError):
        _zswap(codec="zstd")


def test_entries_of_several_codecs_are_read_together() -> None:
    """One read takes any mixture of pools, and each pool counts its own entries."""
    zswap = _zswap()
    specs = ["lz4", "zstd:1", "lz4hc:3"]
    parts = [
        _append(zswap, pages_of("text", 4, 4 * i), first=4 * i, spec=spec)
        for i, spec in enumerate(specs)
    ]
    places = concatenate_places(parts)
    order = np.array([11, 0, 5, 4, 8, 1])
    expected = [pages_of("text", 12)[i] for i in order.tolist()]
    assert _read(zswap, places.pick(order)) == expected
    assert [pool.entries for pool in zswap.pools] == [4, 4, 4]
    assert zswap.pools_of(places.number).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    zswap.give_up(parts[1])
    assert [(pool.entries, pool.live_bytes > 0) for pool in zswap.pools] == [
        (4, True),
        (0, False),
        (4, True),
    ]


# Corruption


def test_entries_that_do_not_decompress_are_named_and_counted() -> None:
    """A read of damaged entries names them, in any mixture of pools, and they stay."""
    zswap = _zswap()
    parts = [
        _append(zswap, pages_of("text", 5, 5 * i), first=5 * i, spec=spec)
        for i, spec in enumerate(["lz4", "zstd:1"])
    ]
    places = concatenate_places(parts)
    for index in (1, 7):
        start = int(places.address[index]) + CHECK_BYTES
        zswap.arena.view[start : start + 30] = b"\xff" * 30
    with pytest.raises(CorruptError) as caught:
        zswap.read(places.address, places.length)
    assert sorted(caught.value.indices) == [1, 7]
    assert zswap.corrupt_entries == 2
    assert zswap.total_entries == 10
    good = np.array([0, 2, 3, 4, 5, 6, 8, 9])
    assert _read(zswap, places.pick(good)) == [pages_of("text", 10)[i] for i in good.tolist()]


def test_a_flipped_bit_is_found_by_its_check() -> None:
    """Entries that no longer agree with their checks are named: body or check, raw or not."""
    zswap = _zswap()
    places = _append(zswap, [page(KINDS[i % 3], i) for i in range(12)])
    _flip_byte(zswap, places, 2)
    _flip_byte(zswap, places, 5, at=0)
    _flip_byte(zswap, places, 9, at=CHECK_BYTES + int(places.length[9]) - 1)
    assert zswap.wrong(places.address, places.length) == [2, 5, 9]


# Give up, pin


def test_a_segment_goes_with_its_last_entry() -> None:
    """As long as one entry lives the segment stays; then it is returned at once."""
    zswap = _zswap()
    places = _fill_segment(zswap)
    zswap.give_up(places.pick(np.arange(1, 63)))
    assert zswap.live_entries[0] == 1
    assert zswap.oldest() == 0
    zswap.give_up(places.pick(np.array([0])))
    assert zswap.oldest() is None
    assert zswap.arena.in_use == 0
    assert (zswap.total_entries, zswap.total_live_bytes, zswap.needed_bytes) == (0, 0, 0)


def test_an_open_segment_goes_too_and_the_next_append_opens_another() -> None:
    """Nothing stored is nothing held: an open segment without live entries is closed."""
    zswap = _zswap()
    zswap.give_up(_append(zswap, pages_of("text", 3)))
    assert (zswap.open_streams, zswap.arena.in_use) == (0, 0)
    places = _append(zswap, pages_of("text", 3))
    assert _read(zswap, places) == pages_of("text", 3)
    assert zswap.open_streams == 1


def test_entries_of_many_segments_are_given_up_together() -> None:
    """One call may hit several segments, some wholly and some in part."""
    zswap = _zswap()
    parts = [_fill_segment(zswap, first=100 * i) for i in range(4)]
    everything = concatenate_places(parts)
    left = np.array([70, 200])
    gone = np.ones(len(everything.address), np.bool_)
    gone[left] = False
    zswap.give_up(everything.pick(gone))
    assert zswap.all_segments().tolist() == [1, 3]
    assert zswap.live_entries[:4].tolist() == [0, 1, 0, 1]
    assert zswap.live_bytes[:4].tolist() == [0, PAGE_BYTES, 0, PAGE_BYTES]


def test_a_pinned_segment_stays_until_it_is_unpinned() -> None:
    """A pin keeps a segment's number from meaning something else; several pins are counted."""
    zswap = _zswap()
    places = _fill_segment(zswap)
    zswap.pin(0)
    zswap.pin(0)
    zswap.give_up(places)
    others = _fill_segment(zswap, first=100)
    assert set(others.number.tolist()) == {1}
    zswap.unpin(0)
    assert zswap.all_segments().tolist() == [0, 1]
    zswap.unpin(0)
    assert zswap.all_segments().tolist() == [1]
    with pytest.raises(AssertionError):
        zswap.unpin(0)


def test_unpinning_leaves_what_lives_alone() -> None:
    """A segment with live entries stays when its last pin goes."""
    zswap = _zswap()
    places = _fill_segment(zswap)
    zswap.pin(0)
    zswap.unpin(0)
    assert _read(zswap, places) == pages_of("noise", 63)
    assert zswap.oldest() == 0


def test_a_pinned_open_segment_that_died_can_live_again() -> None:
    """Entries appended to a pinned segment after all others died are kept when it is unpinned."""
    zswap = _zswap()
    first = _append(zswap, pages_of("text", 3))
    zswap.pin(0)
    zswap.give_up(first)
    second = _append(zswap, pages_of("text", 2), first=3)
    assert set(second.number.tolist()) == {0}
    zswap.unpin(0)
    assert _read(zswap, second) == pages_of("text", 2)


# Oldest


def test_the_oldest_segment_is_the_one_that_was_opened_first() -> None:
    """Segments leave in the order in which they came, whatever their numbers."""
    zswap = _zswap()
    parts = [_fill_segment(zswap, first=100 * i) for i in range(3)]
    zswap.give_up(parts[0])
    zswap.arena.trim()
    assert set(_fill_segment(zswap, first=900).number.tolist()) == {0}
    assert zswap.oldest_first().tolist() == [1, 2, 0]
    for segment in (1, 2, 0):
        assert zswap.oldest() == segment
        zswap.pin(segment)
    assert zswap.oldest() is None
    assert zswap.oldest_first().tolist() == []
    assert zswap.all_segments().tolist() == [0, 1, 2]


def test_the_oldest_of_a_stream_and_of_groups() -> None:
    """The question can be asked of one stream or of some groups only."""
    zswap = _zswap()
    for i, group in enumerate([2, 0, 1, 0, 2]):
        _fill_segment(zswap, group, first=100 * i)
    assert [zswap.oldest((0, group)) for group in range(4)] == [1, 2, 0, None]
    assert zswap.oldest((1, 0)) is None
    assert zswap.oldest(groups=np.array([0, 1])) == 1
    assert zswap.oldest(groups=np.array([], np.int64)) is None
    assert zswap.oldest_first((0, 2)).tolist() == [0, 4]
    assert zswap.oldest_first(groups=np.array([1, 2])).tolist() == [0, 2, 4]
    assert zswap.in_stream(np.arange(5), (0, 0)).tolist() == [False, True, False, True, False]


def test_an_empty_pool_has_no_oldest() -> None:
    """Before anything was stored there is nothing to ask about."""
    zswap = _zswap()
    assert zswap.oldest() is None
    assert zswap.oldest_first().tolist() == []
    assert zswap.all_segments().tolist() == []


def test_an_adopted_segment_takes_the_place_that_it_is_given() -> None:
    """What compaction puts together is as old as it says, its entries alive."""
    zswap = _zswap()
    _fill_segment(zswap, first=0)
    _fill_segment(zswap, first=100)
    segment, builder = zswap.new_segment((0, 0))
    compressed = compress(zswap, pages_of("text", 3))
    offsets = builder.add(np.arange(200, 203), compressed.lengths, compressed.payload)
    zswap.adopt(segment, builder, age=zswap.age_of(0), stamp=5.0)
    assert zswap.stamps_of(np.array([segment])).tolist() == [5.0]
    assert zswap.age_of(segment) == zswap.age_of(0) < zswap.age_of(1)
    assert zswap.oldest_first().tolist() == [0, segment, 1]
    assert not zswap.is_open(segment)
    assert zswap.live_entries[segment] == 3
    assert _read(zswap, Places.within(segment, offsets, compressed.lengths)) == pages_of("text", 3)


def test_what_the_shrinker_asks() -> None:
    """Stamps, open and sealed, all alive, footprints: of each segment by itself."""
    zswap = _zswap()
    full = _fill_segment(zswap, first=0, now=7.0)
    _append(zswap, pages_of("text", 2), first=100, now=9.0)
    assert zswap.stamps_of(np.array([0, 1])).tolist() == [7.0, 9.0]
    both = np.array([0, 1])
    assert zswap.sealed(both).tolist() == [0]
    assert zswap.all_alive(both).tolist() == [True, True]
    zswap.give_up(full.pick(np.array([3])))
    assert zswap.all_alive(both).tolist() == [False, True]
    assert zswap.footprints(both).tolist()[0] == 62 * (PAGE_BYTES + ENTRY_OVERHEAD)
    assert zswap.needed_bytes == zswap.footprints(both).sum()


def test_sealing_a_stream_without_live_entries_returns_the_segment() -> None:
    """An open segment that is pinned and dead is sealed, and goes when it is unpinned."""
    zswap = _zswap()
    places = _append(zswap, pages_of("text", 2))
    zswap.pin(0)
    zswap.give_up(places)
    zswap.seal((0, 0))
    assert zswap.all_segments().tolist() == [0]
    zswap.unpin(0)
    assert zswap.all_segments().tolist() == []


@pytest.mark.parametrize("adopted", [True, False])
def test_a_finished_segment_keeps_only_the_memory_that_it_uses(*, adopted: bool) -> None:
    """A warm segment that was taken over gives back the rest when it is sealed or adopted."""
    zswap = _zswap()
    zswap.give_up(_fill_segment(zswap))
    assert zswap.resident_bytes == SEGMENT_BYTES
    compressed = compress(zswap, pages_of("repeat", 2))
    if adopted:
        segment, builder = zswap.new_segment((0, 0))
        builder.add(np.arange(2), compressed.lengths, compressed.payload)
        zswap.adopt(segment, builder, age=1, stamp=0.0)
    else:
        zswap.append(0, np.arange(2), compressed, 0.0)
        zswap.seal((0, 0))
    assert zswap.resident_bytes == zswap.in_use_bytes == 2 * PAGE_BYTES
    assert zswap.arena.region.resident_bytes == 2 * PAGE_BYTES


def test_sequences_are_never_used_twice() -> None:
    """Segments and extents draw their numbers from one source."""
    zswap = _zswap()
    before = [zswap.next_sequence() for _ in range(3)]
    _fill_segment(zswap)
    assert len({*before, zswap.age_of(0), zswap.next_sequence()}) == 5
