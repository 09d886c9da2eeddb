"""The contract of a swap device: extents of 256 KiB that are read, written and discarded.

What every device promises (and `CheckedDevice` asserts, for each of them):
- Offsets and lengths are multiples of BLOCK_BYTES and stay inside the extent; no length is 0. Only
  a write of 2 to RUN_EXTENTS whole extents, from the beginning of one, goes on over its neighbours.
- `read` returns exactly the bytes of the last successful `write`, or raises ReadError. Whether they
  are the right ones is for the reader's checksum to say: a device can lie.
- `write` returns only when the bytes will be read back by a later `read`; it raises WriteError
  otherwise, and then the contents of those blocks are unknown.
- `discard` never raises for I/O: what was discarded is garbage from then on, read or not.
- `read`, `write` and `discard` may be called from several threads at a time. A write leaves all
  other blocks alone, those of its extent too; of calls for the same block at the same time, nothing
  is promised.
- A read's buffer is not used for anything else afterwards; a write keeps nothing of its `data`.
- Nothing else than the errors below is raised, and they name the device by its `path`.

A device must not know what stands in an extent, which extents are in use, or why it is written to.
"""

from __future__ import annotations

from typing import Final, Protocol, runtime_checkable

EXTENT_BYTES: Final = 256 * 1024
"""One extent holds one segment image (design: the unit of allocation, writeback, device space)."""
BLOCK_BYTES: Final = 4096
"""Alignment of every read and write: what O_DIRECT wants on any disk, and one encryption unit."""


RUN_EXTENTS: Final = 4
"""Extents that one write can fill. One request of 1 MiB keeps a disk as busy as four of 256 KiB,
and the thread that waits for it needs the interpreter once instead of four times: each time it
waits for whoever runs in it. Writeback by runs of 1, 4: 0.59, 0.95 of the speed of plain writes."""


class DeviceError(Exception):
    """A device could not do what was asked. `path` names it."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(f"{path}: {text}")
        self.path = path


class OpenError(DeviceError):
    """swapon refused: missing, a directory, too small, in use, disk full, not permitted."""


class LockedError(OpenError):
    """swapon refused: another process has the device in use."""


class ReadError(DeviceError):
    """The bytes of a read could not be had."""


class WriteError(DeviceError):
    """The bytes of a write did not reach the device."""


@runtime_checkable
class BlockDevice(Protocol):
    """A file or block device cut into extents."""

    @property
    def path(self) -> str:
        """What it is called in status and errors."""

    @property
    def extents(self) -> int:
        """How many extents there are; their numbers are 0 to extents - 1."""

    @property
    def direct(self) -> bool:
        """Whether reads and writes go past the page cache (O_DIRECT)."""

    @property
    def encrypted(self) -> bool:
        """Whether what lies on the device is encrypted."""

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """`length` bytes at `offset` of an extent, in a buffer that is the caller's own.

        Raises:
            ReadError: an I/O error, or the device has become shorter.
        """

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset` of an extent, or over up to RUN_EXTENTS whole ones from it on.

        Raises:
            WriteError: an I/O error, or no room. Of which extent, the error does not say.
        """

    def discard(self, extent: int, count: int = 1) -> None:
        """Give the space of `count` extents from `extent` on back, as far as the device can."""

    def close(self) -> None:
        """Let go of the device; idempotent. No call may follow."""
