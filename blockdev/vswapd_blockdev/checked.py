"""A wrapper that holds any device, and whoever uses it, to the contract.

Every test puts its devices behind one, as nbdkit asserts its plugins' contract in one place.

This module must not know what the device below is.
"""

from __future__ import annotations

from typing import Final

from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, BlockDevice


class CheckedDevice:
    """Asserts alignment, bounds, lengths, and that nobody calls a closed device."""

    def __init__(self, device: BlockDevice) -> None:
        assert isinstance(device, BlockDevice)
        assert device.extents > 0
        self.device: Final = device
        self.path: Final = device.path
        self.extents: Final = device.extents
        self.direct: Final = device.direct
        self.encrypted: Final = device.encrypted
        self.closed = False

    def _check(self, extent: int, offset: int, length: int) -> None:
        assert not self.closed, "a closed device was called"
        assert 0 <= extent < self.extents, f"extent {extent} of {self.extents}"
        assert offset % BLOCK_BYTES == 0, f"offset {offset} is not of a block"
        assert length % BLOCK_BYTES == 0, f"length {length} is not of blocks"
        assert length > 0, "nothing is read or written"
        assert offset + length <= EXTENT_BYTES, f"{offset} + {length} is beyond the extent"

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        self._check(extent, offset, length)
        data = self.device.read(extent, offset, length)
        assert len(data) == length, f"{len(data)} bytes instead of {length}"
        return data

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        self._check(extent, offset, len(data))
        self.device.write(extent, offset, data)

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice."""
        assert not self.closed, "a closed device was called"
        assert count > 0, "nothing is discarded"
        assert 0 <= extent <= extent + count <= self.extents, "beyond the device"
        self.device.discard(extent, count)

    def close(self) -> None:
        """See BlockDevice."""
        self.closed = True
        self.device.close()
