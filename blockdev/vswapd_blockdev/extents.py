"""Which extents of a device are free, used, or out of use. No I/O.

Invariants:
- Every extent is free, used, or out of use; a used extent that is marked bad stays used until it is
  given back, and is then out of use until it is forgiven.
- The lowest free extent is handed out first: the used part of a sparse file stays together, and a
  device that is nearly empty is nearly all holes.

Taking and giving cost O(log n) of what was given back, and nothing is kept for what was never used.

This module must not know devices, discards, pins, or what stands in an extent: who takes one gives
it back when nobody reads or writes it any more, and after its discard.
"""

from __future__ import annotations

import heapq


class ExtentMap:
    """The extents 0 to `extents` - 1 of one device."""

    def __init__(self, extents: int) -> None:
        self.extents = extents
        self._fresh = extents
        """Extents that were there from the beginning; those from `_limit` on were never taken."""
        self._limit = 0
        self._returned: list[int] = []
        self._taken: set[int] = set()
        self._bad: set[int] = set()
        self._retired = 0
        self._closed = False
        """Whether all are out of use for good."""

    @property
    def used(self) -> int:
        """Extents that were taken and not given back."""
        return len(self._taken)

    @property
    def bad(self) -> int:
        """Extents that are out of use, or will be once they are given back."""
        return len(self._bad)

    @property
    def retired(self) -> int:
        """Extents that are out of use, and can be forgiven."""
        return 0 if self._closed else self._retired

    @property
    def free(self) -> int:
        """Extents that `take` can hand out."""
        return self.extents - len(self._taken) - self._retired

    def take(self) -> int | None:
        """The lowest free extent, or None."""
        if self._returned:
            extent = heapq.heappop(self._returned)
        elif self._limit < self._fresh:
            extent = self._limit
            self._limit += 1
        else:
            return None
        self._taken.add(extent)
        return extent

    def give(self, extent: int) -> None:
        """Return an extent that was taken; a bad one goes out of use."""
        assert extent in self._taken, f"extent {extent} was given back twice, or never taken"
        self._taken.remove(extent)
        if extent in self._bad:
            self._retired += 1
        else:
            heapq.heappush(self._returned, extent)

    def restore(self, taken: list[int], bad: list[int]) -> None:
        """Take up what another process has left; nothing was taken yet.

        Args:
            taken: extents that are used, ascending.
            bad: extents that are not to be handed out again, used or not.
        """
        self._taken = set(taken)
        self._bad = set(bad)
        retired = self._bad - self._taken
        self._retired = len(retired)
        self._limit = max([*taken[-1:], *bad], default=-1) + 1
        # Ascending: a heap.
        self._returned = [
            extent
            for extent in range(self._limit)
            if extent not in self._taken and extent not in retired
        ]

    def retire_free(self) -> None:
        """Never hand out an extent again: neither those that are free, nor those given back."""
        self._bad = set(range(self.extents))
        self._retired = self.extents - len(self._taken)
        self._returned = []
        self._fresh = self._limit = 0
        self._closed = True

    def leave(self) -> None:
        """No extent is used any more, nor will be."""

    def _add(self, extents: range) -> None:
        """More free extents, for maps that do not have all of them."""
        for extent in extents:
            heapq.heappush(self._returned, extent)

    def _drop(self, extents: range) -> None:
        """Have these free extents no more."""
        self._returned = [extent for extent in self._returned if extent not in extents]
        heapq.heapify(self._returned)

    def forgive(self, most: int) -> list[int]:
        """Make extents free that are out of use: the lowest, at most so many; returns them."""
        if self._closed:
            return []
        some = sorted(self._bad - self._taken)[:most]
        self._bad.difference_update(some)
        self._retired -= len(some)
        for extent in some:
            heapq.heappush(self._returned, extent)
        return some

    def mark_bad(self, extent: int) -> None:
        """Never hand out an extent again that is in use now; idempotent."""
        assert extent in self._taken, f"extent {extent} is not in use"
        self._bad.add(extent)
