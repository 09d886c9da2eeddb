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
        self.data: Final = bytearray(extents * EXTENT_BYTES)

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        start = extent * EXTENT_BYTES + offset
        return memoryview(self.data[start : start + length])

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        start = extent * EXTENT_BYTES + offset
        self.data[start : start + len(data)] = data

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice."""
        start = extent * EXTENT_BYTES
        self.data[start : start + count * EXTENT_BYTES] = bytes(count * EXTENT_BYTES)

    def close(self) -> None:
        """See BlockDevice."""
