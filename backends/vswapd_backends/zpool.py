"""The memory under all pools: an arena of segments in one sparse shared region.

A segment that was given back is *spare* for a while before its memory is: the next one that is
opened takes it over warm. `trim` gives spare memory back to the system; the shrinker calls it.

Invariants:
- A segment that is neither handed out nor spare occupies nothing: it was punched, or never touched.
- `resident_bytes` is what the segments' writers have touched, spare ones included; it equals what
  the system counts for the region, and stays at or below `most_bytes` as long as those in use do.

The arena must not know codecs, groups, or what an entry is.
"""

from __future__ import annotations

import heapq
from typing import Final

import numpy as np
import numpy.typing as npt

from vswapd_backends.base import I64, PAGE_BYTES, SEGMENT_BYTES
from vswapd_backends.kept import SegmentColumns
from vswapd_backends.segment import DIRECTORY_ENTRY_BYTES
from vswapd_backends.shared import SharedRegion

_SEGMENT_PAGES: Final = SEGMENT_BYTES // PAGE_BYTES
_SPARE_SHARE: Final = 16
"""Spare memory is at most this fraction of the limit. Reusing a segment instead of punching and
faulting it in again saves 0.4 to 0.9 us per stored page, of 6 in all (medians of 9 rounds)."""


def segments_in(arena_bytes: int) -> int:
    """How many segments an arena of that size has."""
    return max(2, -(-arena_bytes // SEGMENT_BYTES))


class ZPool:
    """`segments` segments of SEGMENT_BYTES each; the lowest free one is handed out first."""

    def __init__(
        self,
        arena_bytes: int,
        region: SharedRegion | None = None,
        columns: SegmentColumns | None = None,
    ) -> None:
        """An arena.

        Args:
            arena_bytes: how large it is at most; rounded up to whole segments.
            region: its memory, of that size; None: of its own.
            columns: what is kept of its segments; None: memory of its own.
        """
        self.segments: Final = segments_in(arena_bytes)
        size = self.segments * SEGMENT_BYTES
        self.region: Final = SharedRegion("vswapd-pool", size) if region is None else region
        assert self.region.size == size
        self.columns: Final = columns or SegmentColumns.private(self.segments)
        self.view: Final = self.region.view
        self.bytes: Final = self.region.bytes_array()
        self.words: Final = self.region.words_array()
        # Pages touched from the front (header, payload) and from the back (directory).
        self._low: Final[I64] = self.columns.low
        self._high: Final[I64] = self.columns.high
        self._free: list[int] = []
        self._spare: list[int] = []
        self.limit = self.columns.head.item(0)
        """No segment at or above this number was ever handed out."""
        self.in_use = 0
        self.resident_bytes = 0
        self.spare_bytes = 0
        self.most_bytes = self.region.size
        """Spare segments go as soon as resident_bytes is above this."""
        self.warm_bytes = self.region.size
        """Spare memory that may come into use again as it is, beyond what the caller needs of it.
        Where that is not enough, a spare segment's memory goes back before it is handed out."""

    @property
    def available(self) -> int:
        """Segments that can still be handed out."""
        return self.segments - self.in_use

    @property
    def in_use_bytes(self) -> int:
        """What the segments that are handed out occupy."""
        return self.resident_bytes - self.spare_bytes

    def take(self) -> int:
        """A segment, of zeros or of stale bytes. The caller has made sure one is `available`."""
        assert self.available
        self.in_use += 1
        if self._spare:
            occupied = self._occupied(self._spare[-1])
            # What the system does not take back comes into use as it is.
            if occupied <= self.warm_bytes or not self._punch_spare():
                self.warm_bytes = max(0, self.warm_bytes - occupied)
                self.spare_bytes -= occupied
                return self._spare.pop()
        if self._free:
            return heapq.heappop(self._free)
        self.limit += 1
        self.columns.head[0] = self.limit
        return self.limit - 1

    def touched(self, segment: int, payload_end: int, count: int) -> None:
        """Account what a segment's writer has written so far."""
        low = -(-payload_end // PAGE_BYTES)
        high = -(-count * DIRECTORY_ENTRY_BYTES // PAGE_BYTES)
        if low > self._low[segment] or high > self._high[segment]:
            # A segment that was spare may have been touched further already.
            before = self._occupied(segment)
            self._low[segment] = max(low, int(self._low[segment]))
            self._high[segment] = max(high, int(self._high[segment]))
            self.resident_bytes += self._occupied(segment) - before
            while self.resident_bytes > self.most_bytes and self._spare:
                if not self._punch_spare():
                    return

    def finished(self, segment: int, payload_end: int, count: int) -> None:
        """The segment's writer will write no more: give back pages it took over and did not use."""
        low = -(-payload_end // PAGE_BYTES)
        high = -(-count * DIRECTORY_ENTRY_BYTES // PAGE_BYTES)
        before = self._occupied(segment)
        if low + high >= _SEGMENT_PAGES or before == (low + high) * PAGE_BYTES:
            return
        if not self.region.give_back(*_middle(segment, low, high)):
            return
        self._low[segment], self._high[segment] = low, high
        self.resident_bytes += self._occupied(segment) - before

    def give(self, segment: int) -> None:
        """Return a segment; its memory is spare until it is taken again or trimmed."""
        self.in_use -= 1
        self.spare_bytes += self._occupied(segment)
        self._spare.append(segment)
        if self.spare_bytes > self.most_bytes // _SPARE_SHARE:
            self._punch_spare()

    @property
    def spare_segments(self) -> int:
        """Segments that are not in use and have kept their memory."""
        return len(self._spare)

    def trim(self, most: int | None = None) -> int:
        """Give spare memory back to the system; returns how many bytes that were.

        Args:
            most: segments, each some 85 us; None: all.
        """
        before = self.resident_bytes
        count = len(self._spare) if most is None else min(most, len(self._spare))
        for _ in range(count):
            if not self._punch_spare():
                break
        return before - self.resident_bytes

    def _punch_spare(self) -> bool:
        """Give a spare segment's memory back; False if the system did not take it: still spare."""
        segment = self._spare[-1]
        if not self.region.give_back(segment * SEGMENT_BYTES, SEGMENT_BYTES):
            return False
        self._spare.pop()
        occupied = self._occupied(segment)
        self.resident_bytes -= occupied
        self.spare_bytes -= occupied
        self._low[segment] = self._high[segment] = 0
        heapq.heappush(self._free, segment)
        return True

    def restore(self, used: npt.NDArray[np.bool_]) -> None:
        """Take up what another process has left: only these segments are handed out.

        Args:
            used: which segments are; shape (limit,). What is kept of them says what they occupy.
        """
        free = np.flatnonzero(~used)
        breaks = np.flatnonzero(np.diff(free) != 1) + 1
        for run in np.split(free, breaks) if len(free) else []:
            self.region.punch(int(run[0]) * SEGMENT_BYTES, len(run) * SEGMENT_BYTES)
        self._low[free] = self._high[free] = 0
        self._free = free.tolist()  # ascending: a heap
        self._spare = []
        self.spare_bytes = 0
        self.in_use = int(used.sum())
        self.resident_bytes = int(self.occupied(np.flatnonzero(used)).sum())

    def shape(self, segment: int, payload_end: int, count: int) -> None:
        """Give back the pages of a segment that nothing of its payload and directory lies on.

        For `restore`: nothing is accounted.
        """
        low = -(-payload_end // PAGE_BYTES)
        high = -(-count * DIRECTORY_ENTRY_BYTES // PAGE_BYTES)
        if low + high < _SEGMENT_PAGES:
            self.region.punch(*_middle(segment, low, high))
        self._low[segment], self._high[segment] = low, high

    def segment_view(self, segment: int) -> memoryview:
        """The bytes of one segment."""
        return self.view[segment * SEGMENT_BYTES : (segment + 1) * SEGMENT_BYTES]

    def occupied(self, segments: I64) -> I64:
        """Bytes of memory that each of these segments takes."""
        pages: I64 = np.minimum(self._low[segments] + self._high[segments], _SEGMENT_PAGES)
        return pages * PAGE_BYTES

    def _occupied(self, segment: int) -> int:
        return min(int(self._low[segment] + self._high[segment]), _SEGMENT_PAGES) * PAGE_BYTES


def _middle(segment: int, low: int, high: int) -> tuple[int, int]:
    """Where the pages of a segment lie that are neither of its first nor last: offset, bytes."""
    first = segment * SEGMENT_BYTES + low * PAGE_BYTES
    return first, (_SEGMENT_PAGES - low - high) * PAGE_BYTES
