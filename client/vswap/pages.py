"""Whole pages in a caller's buffer, and how some of them are sent or filled.

Invariants:
- `whole` and `tail` are rows of single bytes, so that slices of them are slices of pages.
- Pages in one row are never copied: views look into the caller's memory.
- Nothing is held on to after `let_go`.

This module must not know frames, sockets, or the daemon.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vswap.protocol import OFFSET_BYTES, PAGE_BYTES

View = memoryview
I64 = npt.NDArray[np.int64]

LEAST_ROW: Final = 16
"""Average pages in a row from which on they are sent and received row by row, without a copy."""
_NOTHING: Final = memoryview(b"")


class Shared(Protocol):
    """Memory that daemon and client share."""

    generation: int
    """Changes when the daemon looks at other memory than before."""


class Place(NamedTuple):
    """Where in a window pages are."""

    memory: Shared
    generation: int
    shard: int
    """Which shard looks at it."""
    offset: int


class Pages:
    """Whole pages in a caller's buffer; the last may be short and stand in a page of its own.

    Shapes: `whole` is n*4096 bytes; `tail`, if any, is exactly one page.
    """

    __slots__ = ("count", "place", "tail", "whole")

    def __init__(self, whole: View, tail: View | None = None, place: Place | None = None) -> None:
        assert whole.nbytes % PAGE_BYTES == 0
        assert len(whole) == whole.nbytes  # cut by items, and counted as bytes
        self.whole = whole
        self.tail = tail
        self.place = place
        """Where in a window they are, if they are in one."""
        self.count = whole.nbytes // PAGE_BYTES + (tail is not None)

    def cut(self, where: slice | I64) -> list[View]:
        """Pages in one row as views; pages from here and there as a copy."""
        if not isinstance(where, slice):
            return [self._gather(where)]
        views = [self.whole[where.start * PAGE_BYTES : where.stop * PAGE_BYTES]]
        if self.tail is not None and where.stop == self.count:
            views.append(self.tail)
        return views

    def offset(self, where: slice | I64, shard: int) -> View | None:
        """Where these pages are in the shard's window, as it stands on the wire; None: nowhere."""
        place = self.place
        if place is None or place.shard != shard or not isinstance(where, slice):
            return None
        if place.generation != place.memory.generation:
            return None
        if self.tail is not None and where.stop == self.count:
            return None
        at: int = place.offset + where.start * PAGE_BYTES
        return memoryview(at.to_bytes(OFFSET_BYTES, "little"))

    def _gather(self, where: I64) -> View:
        inside = len(where) - (self.tail is not None and int(where[-1]) == self.count - 1)
        pages = np.empty((len(where), PAGE_BYTES), np.uint8)
        _rows(self.whole).take(where[:inside], axis=0, out=pages[:inside])
        if self.tail is not None and inside < len(where):
            pages[inside] = np.frombuffer(self.tail, np.uint8)
        return pages.reshape(-1).data

    def scatter(self, where: I64, pages: View) -> None:
        """Put `pages` where they belong; `where` rises."""
        inside = len(where) - (self.tail is not None and int(where[-1]) == self.count - 1)
        _rows(self.whole)[where[:inside]] = _rows(pages)[:inside]
        if self.tail is not None and inside < len(where):
            self.tail[:] = pages[-PAGE_BYTES:]

    def let_go(self) -> None:
        """Hold the buffer no more, whoever may still hold this object (a traceback, for one)."""
        self.whole, self.tail = _NOTHING, None


def _rows(view: View) -> npt.NDArray[np.uint8]:
    """Whole pages as rows."""
    return np.frombuffer(view, np.uint8).reshape(-1, PAGE_BYTES)


def cut_row(pages: I64, frame_pages: int) -> Iterator[tuple[slice | I64, int]]:
    """Rising numbers of pages, shape (n,) with n > 0, as frames: where, and how many.

    Where they mostly stand in rows, frames end where rows do, and are slices: no copy.
    """
    ends = np.flatnonzero(np.diff(pages) != 1) + 1
    if len(pages) < LEAST_ROW * (len(ends) + 1):
        for at in range(0, len(pages), frame_pages):
            piece = pages[at : at + frame_pages]
            yield piece, len(piece)
        return
    for row in np.split(pages, ends):
        first, last = int(row[0]), int(row[-1]) + 1
        for start in range(first, last, frame_pages):
            stop = min(start + frame_pages, last)
            yield slice(start, stop), stop - start
