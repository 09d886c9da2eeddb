"""A swap device in memory: for tests, simulators, and measurements without a disk.

This module must not know what stands in it.
"""

from __future__ import annotations

from typing import Final

from vswapd_blockdev.device import EXTENT_BYTES


class MemoryDevice:
    """A RAM disk. See BlockDevice for the contract."""

    def __init__(self, extents: int, path: str = "memory") -> None:
        self.path: Final = path
        self.extents: Final = extents
        self.direct: Final = False
        self.encrypted: Final = False
        self.data: Final = memoryview(bytearray(extents * EXTENT_BYTES))
        """All extents, one behind the other: for tests to look at, and to damage."""

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        start = extent * EXTENT_BYTES + offset
        return memoryview(bytearray(self.data[start : start + length]))

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        view = memoryview(data).cast("B")
        start = extent * EXTENT_BYTES + offset
        self.data[start : start + len(view)] = view

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice. What was discarded reads as zeros."""
        start = extent * EXTENT_BYTES
        self.data[start : start + count * EXTENT_BYTES] = bytes(count * EXTENT_BYTES)

    def close(self) -> None:
        """See BlockDevice. The contents stay, to be looked at."""
