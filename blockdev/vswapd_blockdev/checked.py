"""A wrapper that holds any device, and whoever uses it, to the contract.

Every test puts its devices behind one, as nbdkit asserts its plugins' contract in one place.

This module must not know what the device below is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from vswapd_blockdev.device import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    RUN_EXTENTS,
    BlockDevice,
    DeviceError,
    ReadError,
    WriteError,
)


class CheckedDevice:
    """Asserts alignment, bounds, lengths, error types, and that nobody calls a closed device."""

    def __init__(self, device: BlockDevice) -> None:
        assert isinstance(device, BlockDevice)
        assert device.extents > 0
        self.device: Final = device
        self.path: Final = device.path
        self.extents: Final = device.extents
        self.direct: Final = device.direct
        self.encrypted: Final = device.encrypted
        self.closed = False
        self._under_way = 0
        self._lock = threading.Lock()

    @contextmanager
    def _call(self, *may_raise: type[DeviceError]) -> Iterator[None]:
        """Around each call to the device below: not closed, and no other error than these."""
        with self._lock:
            assert not self.closed, "a closed device was called"
            self._under_way += 1
        try:
            yield
        except may_raise as error:
            if error.path != self.path:
                raise AssertionError(f"the error names {error.path}, not {self.path}") from error
            raise
        except Exception as error:
            raise AssertionError(f"{error!r} is no error that a device may raise here") from error
        finally:
            with self._lock:
                self._under_way -= 1

    def _check(self, extent: int, offset: int, length: int) -> None:
        assert 0 <= extent < self.extents, f"extent {extent} of {self.extents}"
        assert offset % BLOCK_BYTES == 0, f"offset {offset} is not of a block"
        assert length % BLOCK_BYTES == 0, f"length {length} is not of blocks"
        assert length > 0, "nothing is read or written"
        assert 0 <= offset <= EXTENT_BYTES - length, f"{offset} + {length} is beyond the extent"

    def _check_run(self, extent: int, offset: int, length: int) -> None:
        count, rest = divmod(length, EXTENT_BYTES)
        assert rest == 0, f"length {length} is beyond the extent, and not of extents"
        assert offset == 0, f"offset {offset}: a run begins where an extent does"
        assert count <= RUN_EXTENTS, f"{count} extents are too long a run"
        assert 0 <= extent <= self.extents - count, f"{extent} + {count} is beyond the device"

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        self._check(extent, offset, length)
        with self._call(ReadError):
            data = self.device.read(extent, offset, length)
        assert data.contiguous, "the bytes read are scattered"
        assert data.format == "B", f"items of format {data.format} were read, not bytes"
        assert len(data) == length, f"{len(data)} bytes instead of {length}"
        return data

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        view = memoryview(data)
        assert view.contiguous, "the bytes to be written are scattered"
        if view.nbytes <= EXTENT_BYTES:
            self._check(extent, offset, view.nbytes)
        else:
            self._check_run(extent, offset, view.nbytes)
        with self._call(WriteError):
            self.device.write(extent, offset, data)

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice."""
        assert count > 0, "nothing is discarded"
        assert 0 <= extent <= self.extents - count, f"{extent} + {count} is beyond the device"
        with self._call():
            self.device.discard(extent, count)

    def close(self) -> None:
        """See BlockDevice."""
        with self._lock:
            assert not self._under_way, "closed while it is read or written"
            self.closed = True
        self.device.close()
