"""What of pools and devices outlives the process that they are in: columns, and names by index.

A backend keeps here, and reads from here, what cannot be recomputed from the swap table's words.
The memory is the caller's; without any of the caller's, columns have memory of their own, and go
with the process.

Invariants:
- Whoever writes a word of the table has written before it what the columns must say of its place.
- Each store is of one aligned word, or of bytes that nothing refers to until such a store does.
- Rows at or above `limit` were never written, and are not read: reading would bring the pages.

This module must not know memory mappings, or what reads the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vswapd_backends.base import I64, U64

F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

SEGMENT_COLUMNS: Final = 8
EXTENT_ROW: Final = np.dtype(
    [("sequence", "<i8"), ("group", "<i4"), ("pool", "<i2"), ("bad", "<i2")]
)
"""What is kept of an extent; `sequence` is 0 where nothing was written since the last discard."""
DEVICE_ROWS: Final = 1 << 24
"""Rows per device: as many as a word's number can name."""


class NamesFullError(Exception):
    """There is no room for another name, or this one is too long."""


@dataclass(frozen=True, slots=True)
class SegmentColumns:
    """What is kept of each segment of an arena; arrays of shape (segments,)."""

    head: I64
    """[0]: rows in use are below it; [1]: the last sequence number that was given out."""
    age: I64
    stamp: F64
    count: I64
    """Directory entries that are complete."""
    pool: I64
    group: I64
    low: I64
    high: I64
    sealed: I64
    """1 once nothing will be appended, and the pages that were not used are given back."""

    @classmethod
    def over(cls, head: I64, words: I64) -> SegmentColumns:
        """Columns in memory that is given: SEGMENT_COLUMNS words per segment."""
        age, stamp, count, pool, group, low, high, sealed = words.reshape(SEGMENT_COLUMNS, -1)
        return cls(head, age, stamp.view(np.float64), count, pool, group, low, high, sealed)

    @classmethod
    def private(cls, segments: int) -> SegmentColumns:
        """Columns in memory of their own, which costs nothing until it is used."""
        return cls.over(np.zeros(2, np.int64), np.zeros(SEGMENT_COLUMNS * segments, np.int64))


class ExtentColumns:
    """What is kept of each extent of each device."""

    def __init__(
        self,
        rows: npt.NDArray[np.void] | None = None,
        wipe: Callable[[int], None] | None = None,
    ) -> None:
        """Over memory that is given, or of their own.

        Args:
            rows: EXTENT_ROWs, DEVICE_ROWS per device.
            wipe: makes all rows of a device zeros, by its index.
        """
        self._rows = rows
        self._wipe = wipe

    def fresh(self, index: int, extents: int) -> npt.NDArray[np.void]:
        """Rows of zeros for a device that is put into use; shape (extents,)."""
        if self._rows is None:
            return np.zeros(extents, EXTENT_ROW)
        assert self._wipe is not None
        self._wipe(index)
        return self.of(index, extents)

    def of(self, index: int, extents: int) -> npt.NDArray[np.void]:
        """The rows of a device that was in use before; shape (extents,)."""
        assert self._rows is not None
        first = index * DEVICE_ROWS
        return self._rows[first : first + extents]


class Names:
    """Texts by index. One that was added stays, under its index."""

    def __init__(self, count: U64, records: U8) -> None:
        """Over memory that is given.

        Args:
            count: how many there are; shape (1,). Written last.
            records: room for them, shape (most, bytes), each ended by a zero.
        """
        self._count = count
        self._records = records

    @classmethod
    def private(cls, most: int, width: int) -> Names:
        """Names in memory of their own."""
        return cls(np.zeros(1, np.uint64), np.zeros((most, width), np.uint8))

    def all(self) -> list[str]:
        """All of them, by index."""
        kept = self._records[: self._count.item(0)]
        return [bytes(row).rstrip(b"\0").decode() for row in kept]

    def add(self, text: str) -> int:
        """Keep another one; returns its index.

        Raises:
            NamesFullError: it cannot be kept; nothing was changed.
        """
        encoded = text.encode()
        most, width = self._records.shape
        index = self._count.item(0)
        if index == most or len(encoded) > width:
            raise NamesFullError(f"{text!r} cannot be kept: {most} names of {width} bytes at most")
        self._records[index] = np.frombuffer(encoded.ljust(width, b"\0"), np.uint8)
        self._count[0] = index + 1
        return index
