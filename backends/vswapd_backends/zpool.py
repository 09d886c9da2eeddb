"""The memory under all pools: an arena of segments in one sparse shared region.

Invariants:
- A segment that is not handed out occupies nothing: it was punched, or never touched. So whoever
  gets it next finds zeros, never another client's bytes.
- `resident_bytes` is the sum over segments of the pages that their writers reported; it equals what
  the system counts for the region.

The arena must not know codecs, groups, or what an entry is.
"""

from __future__ import annotations

import heapq
from typing import Final

import numpy as np

from vswapd_backends.base import I64, PAGE_BYTES, SEGMENT_BYTES
from vswapd_backends.segment import pages_touched
from vswapd_backends.shared import SharedRegion


class ZPool:
    """`segments` segments of SEGMENT_BYTES each; the lowest free one is handed out first."""

    def __init__(self, arena_bytes: int) -> None:
        self.segments: Final = max(2, -(-arena_bytes // SEGMENT_BYTES))
        self.region: Final = SharedRegion("vswapd-pool", self.segments * SEGMENT_BYTES)
        self.view: Final = self.region.view
        self.bytes: Final = self.region.bytes_array()
        self.words: Final = self.region.words_array()
        self._pages: Final[I64] = np.zeros(self.segments, np.int64)
        self._free: list[int] = []
        self.limit = 0
        """No segment at or above this number was ever handed out."""
        self.in_use = 0
        self.resident_bytes = 0

    @property
    def available(self) -> int:
        """Segments that can still be handed out."""
        return self.segments - self.in_use

    def take(self) -> int:
        """A segment of zeros. The caller has made sure that one is `available`."""
        assert self.available
        self.in_use += 1
        if self._free:
            return heapq.heappop(self._free)
        self.limit += 1
        return self.limit - 1

    def touched(self, segment: int, payload_end: int, count: int) -> None:
        """Account what a segment's writer has written so far."""
        pages = pages_touched(payload_end, count)
        self.resident_bytes += (pages - int(self._pages[segment])) * PAGE_BYTES
        self._pages[segment] = pages

    def give(self, segment: int) -> None:
        """Return a segment and its memory.

        It is punched at once: keeping segments for reuse would save about 0.1 us of page faults a
        page, and count as resident all the while.
        """
        self.region.punch(segment * SEGMENT_BYTES, SEGMENT_BYTES)
        self.resident_bytes -= int(self._pages[segment]) * PAGE_BYTES
        self._pages[segment] = 0
        self.in_use -= 1
        heapq.heappush(self._free, segment)

    def segment_view(self, segment: int) -> memoryview:
        """The bytes of one segment."""
        return self.view[segment * SEGMENT_BYTES : (segment + 1) * SEGMENT_BYTES]

    def occupied(self, segments: I64) -> I64:
        """Bytes of memory that each of these segments takes."""
        pages: I64 = self._pages[segments] * PAGE_BYTES
        return pages
