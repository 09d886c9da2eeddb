"""What stands in the place of a swap device that is not to be had any more.

Its pages are lost, each by itself: whoever asks for one is told so, and all others are served.

This module must not know why it is lost.
"""

from __future__ import annotations

from typing import Final

from vswapd_blockdev.device import ReadError, WriteError


class LostDevice:
    """See BlockDevice for the contract; every read and write fails."""

    def __init__(self, path: str, extents: int) -> None:
        self.path: Final = path
        self.extents: Final = extents
        self.direct: Final = False
        self.encrypted: Final = False

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        raise ReadError(self.path, f"is lost: {length} bytes at {offset} of extent {extent}")

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        raise WriteError(self.path, f"is lost: {len(data)} bytes at {offset} of extent {extent}")

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice: nothing is left to give back."""

    def close(self) -> None:
        """See BlockDevice."""
