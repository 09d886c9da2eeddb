"""Which extents of a device are free, used, or out of use. No I/O.

Invariants:
- Every extent is free, used, or free-and-bad; a used extent that is marked bad stays used until it
  is given back, and is then never handed out again.
- The lowest free extent is handed out first: the used part of a sparse file stays together, and a
  device that is nearly empty is nearly all holes.

This module must not know devices, discards, or what stands in an extent.
"""

from __future__ import annotations

import heapq
from typing import Final


class ExtentMap:
    """The extents 0 to `extents` - 1 of one device."""

    def __init__(self, extents: int) -> None:
        self.extents: Final = extents
        self._limit = 0
        self._returned: list[int] = []
        self._bad: set[int] = set()
        self._used = 0
        self._retired = 0

    @property
    def used(self) -> int:
        """Extents that were taken and not given back."""
        return self._used

    @property
    def bad(self) -> int:
        """Extents that are out of use, or will be once they are given back."""
        return len(self._bad)

    @property
    def free(self) -> int:
        """Extents that `take` can hand out."""
        return self.extents - self._used - self._retired

    def take(self) -> int | None:
        """The lowest free extent, or None."""
        if self._returned:
            extent = heapq.heappop(self._returned)
        elif self._limit < self.extents:
            extent = self._limit
            self._limit += 1
        else:
            return None
        self._used += 1
        return extent

    def give(self, extent: int) -> None:
        """Return an extent that was taken; a bad one goes out of use."""
        assert 0 <= extent < self._limit
        self._used -= 1
        if extent in self._bad:
            self._retired += 1
        else:
            heapq.heappush(self._returned, extent)

    def mark_bad(self, extent: int) -> None:
        """Never hand out an extent again that is in use now; idempotent."""
        self._bad.add(extent)
