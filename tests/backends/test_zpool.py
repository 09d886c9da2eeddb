"""The arena under all pools: segments are handed out, kept warm for a while, and really go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vswapd_backends.base import PAGE_BYTES, SEGMENT_BYTES
from vswapd_backends.zpool import ZPool

SEGMENTS = 32


def _write(pool: ZPool, segment: int, payload_end: int, count: int) -> None:
    """Write as a segment's writer does: from the front, and directory words from the back."""
    view = pool.segment_view(segment)
    view[:payload_end] = b"\x11" * payload_end
    view[len(view) - 8 * count :] = b"\x22" * (8 * count)
    pool.touched(segment, payload_end, count)


def _agrees(pool: ZPool) -> bool:
    return pool.resident_bytes == pool.region.resident_bytes


def test_an_arena_of_any_size_is_whole_segments() -> None:
    """Bytes are rounded up to segments; there are at least two, and none costs anything."""
    assert ZPool(1).segments == 2
    assert ZPool(2 * SEGMENT_BYTES + 1).segments == 3
    pool = ZPool(1 << 40)
    assert (pool.available, pool.resident_bytes) == (1 << 22, 0)
    assert _agrees(pool)


def test_a_segments_bytes_are_counted_by_the_page() -> None:
    """What a writer has touched, from either end, is what the system counts."""
    pool = ZPool(SEGMENTS * SEGMENT_BYTES)
    segment = pool.take()
    for payload_end, count, pages in [(64, 0, 1), (64, 1, 2), (5000, 512, 3), (5000, 513, 4)]:
        _write(pool, segment, payload_end, count)
        assert pool.resident_bytes == pages * PAGE_BYTES
        assert _agrees(pool)
    assert pool.occupied(np.array([segment])).tolist() == [4 * PAGE_BYTES]


def test_payload_and_directory_that_meet_are_not_counted_twice() -> None:
    """A full segment is its size, also where both ends share a page."""
    pool = ZPool(SEGMENTS * SEGMENT_BYTES)
    segment = pool.take()
    _write(pool, segment, SEGMENT_BYTES - 808, 101)
    assert pool.resident_bytes == SEGMENT_BYTES
    pool.finished(segment, SEGMENT_BYTES - 808, 101)
    assert pool.resident_bytes == SEGMENT_BYTES
    assert _agrees(pool)


def test_the_lowest_free_segment_comes_first() -> None:
    """Segments that were given back and punched are handed out again, the lowest first."""
    pool = ZPool(SEGMENTS * SEGMENT_BYTES)
    taken = [pool.take() for _ in range(5)]
    assert taken == [0, 1, 2, 3, 4]
    for segment in (3, 1, 4):
        pool.give(segment)
    pool.trim()
    assert [pool.take() for _ in range(4)] == [1, 3, 4, 5]
    assert pool.in_use == 6


def test_a_spare_segment_is_handed_out_warm() -> None:
    """A segment that was just given back comes first, with its memory."""
    pool = ZPool(SEGMENTS * SEGMENT_BYTES)
    segments = [pool.take() for _ in range(3)]
    for segment in segments:
        _write(pool, segment, 10 * PAGE_BYTES, 1)
    pool.give(segments[2])
    before = pool.resident_bytes
    assert pool.spare_bytes == 11 * PAGE_BYTES
    assert pool.in_use_bytes == 22 * PAGE_BYTES
    assert pool.take() == segments[2]
    assert (pool.resident_bytes, pool.spare_bytes) == (before, 0)
    assert _agrees(pool)


def test_what_a_warm_segment_did_not_need_is_given_back_when_it_is_finished() -> None:
    """A segment taken over warm keeps, once sealed, only the pages that its own writer used."""
    pool = ZPool(SEGMENTS * SEGMENT_BYTES)
    segment = pool.take()
    _write(pool, segment, 30 * PAGE_BYTES, 1024)
    pool.give(segment)
    assert pool.take() == segment
    _write(pool, segment, 100, 1)
    assert pool.resident_bytes == 32 * PAGE_BYTES
    _write(pool, segment, 100, 1025)
    assert pool.resident_bytes == 33 * PAGE_BYTES
    pool.finished(segment, 100, 1025)
    assert pool.resident_bytes == 4 * PAGE_BYTES
    assert _agrees(pool)
    view = pool.segment_view(segment)
    assert bytes(view[:100]) == b"\x11" * 100
    assert bytes(view[-8:]) == b"\x22" * 8


def test_spare_memory_is_bounded() -> None:
    """At most a sixteenth of the limit stays warm; what is beyond it goes at once."""
    pool = ZPool(SEGMENTS * SEGMENT_BYTES)
    segments = [pool.take() for _ in range(8)]
    for segment in segments:
        _write(pool, segment, SEGMENT_BYTES, 0)
    for segment in segments:
        pool.give(segment)
        assert pool.spare_bytes <= pool.most_bytes // 16
        assert _agrees(pool)
    assert pool.spare_bytes == 2 * SEGMENT_BYTES
    assert pool.spare_segments == 2
    assert pool.trim(1) == SEGMENT_BYTES
    assert pool.spare_segments == 1
    assert _agrees(pool)
    assert pool.trim() == SEGMENT_BYTES
    assert (pool.resident_bytes, pool.region.resident_bytes) == (0, 0)
    assert pool.trim() == 0


def test_spare_memory_makes_room_for_what_is_needed() -> None:
    """When a writer takes the arena to its limit, spare segments go first."""
    pool = ZPool(SEGMENTS * SEGMENT_BYTES)
    pool.most_bytes = 16 * SEGMENT_BYTES
    segments = [pool.take() for _ in range(17)]
    for segment in segments[:15]:
        _write(pool, segment, SEGMENT_BYTES, 0)
    pool.give(segments[0])
    _write(pool, segments[15], SEGMENT_BYTES, 0)
    assert (pool.resident_bytes, pool.spare_bytes) == (pool.most_bytes, SEGMENT_BYTES)
    _write(pool, segments[16], PAGE_BYTES, 0)
    assert (pool.resident_bytes, pool.spare_bytes) == (15 * SEGMENT_BYTES + PAGE_BYTES, 0)
    assert _agrees(pool)


def test_no_segment_is_handed_out_twice() -> None:
    """All of them can be taken once, and then none is available."""
    pool = ZPool(4 * SEGMENT_BYTES)
    assert sorted(pool.take() for _ in range(4)) == [0, 1, 2, 3]
    assert pool.available == 0
    with pytest.raises(AssertionError):
        pool.take()


@settings(deadline=None, max_examples=60)
@given(
    most=st.integers(1, SEGMENTS),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["take", "take", "write", "write", "finish", "give", "trim"]),
            st.integers(0, SEGMENTS),
            st.integers(0, SEGMENT_BYTES),
            st.integers(0, 4000),
        ),
        max_size=40,
    ),
)
def test_accounts_agree_with_the_system(most: int, steps: list[tuple[Any, ...]]) -> None:
    """After any sequence of calls resident bytes are the system's, and segments have one owner."""
    pool = ZPool(SEGMENTS * SEGMENT_BYTES)
    pool.most_bytes = most * SEGMENT_BYTES
    held: dict[int, tuple[int, int]] = {}
    for verb, which, payload_end, count in steps:
        chosen = sorted(held)[which % len(held)] if held else None
        if verb == "take" and pool.available:
            segment = pool.take()
            assert segment not in held
            held[segment] = (0, 0)
        elif verb == "trim":
            pool.trim()
            assert pool.spare_bytes == 0
        elif chosen is None:
            continue
        elif verb == "write":
            low, high = held[chosen]
            high = max(high, count)
            low = max(low, min(payload_end, SEGMENT_BYTES - 8 * high))
            held[chosen] = (low, high)
            _write(pool, chosen, low, high)
        elif verb == "finish":
            pool.finished(chosen, *held[chosen])
        elif verb == "give":
            pool.give(chosen)
            del held[chosen]
        assert _agrees(pool)
        assert pool.in_use == len(held)
        assert pool.spare_bytes <= pool.most_bytes // 16
        occupied = int(pool.occupied(np.array(sorted(held), np.int64)).sum())
        assert pool.in_use_bytes == occupied
        for segment, (low, high) in held.items():
            view = pool.segment_view(segment)
            assert not low or view[0] == 0x11
            assert not high or view[-1] == 0x22
