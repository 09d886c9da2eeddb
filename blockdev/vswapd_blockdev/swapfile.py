"""A file or block device as a swap device.

Invariants:
- The file is private (0600), locked, and has all its space reserved from `open` on. Discarding an
  extent gives its space back, as swap on flash does, and with it the reservation: when the disk has
  filled up by the time that extent is written again, that is a WriteError of that extent and no
  other. `discard=False` keeps the reservation for good instead. (File systems that copy on write
  promise no room for later writes in either case.)
- Reads and writes are of whole blocks, past the page cache where the file system can.
- Any error of a read or write, or less than was asked for, raises: there are no short results.

This module must not know what is written, encryption, or which extents are in use.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

from vswapd_blockdev.buffers import RUN_BYTES, Scratch, aligned
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, ReadError, WriteError
from vswapd_blockdev.header import DATA_OFFSET, DeviceHeader
from vswapd_blockdev.opening import NO_BOOT, Opened, open_swap_device, reopen_swap_device
from vswapd_blockdev.raw import discard_blocks, punch_hole


class SwapFile:
    """See vswapd_blockdev.device.BlockDevice for the contract; `open` makes one."""

    def __init__(self, path: str, opened: Opened, *, discard: bool = True) -> None:
        self.path: Final = path
        self.extents: Final = opened.extents
        self.direct: Final = opened.direct
        self.encrypted: Final = False
        self.discards: Final = discard
        """Whether discarded extents give their space back."""
        self._fd = opened.fd
        self._discard = discard_blocks if opened.block_device else punch_hole
        self._scratch = Scratch()

    @classmethod
    def open(
        cls,
        path: str,
        *,
        size: int | None = None,
        boot_id: bytes = NO_BOOT,
        encrypted: bool = False,
        discard: bool = True,
    ) -> SwapFile:
        """Open or create a swap device.

        Args:
            path: a file (made if it is missing) or a block device.
            size: bytes it shall have; None: what it has already.
            boot_id: 16 bytes for the header, that name the daemon's run.
            encrypted: for the header; whether what comes will be encrypted.
            discard: whether discarded extents give their space back.

        Raises:
            OpenError: missing without a size, a directory, somebody's data, somebody's file, too
                small, in use, not permitted, or no room. No file is made then.
        """
        opened = open_swap_device(path, size=size, boot_id=boot_id, encrypted=encrypted)
        return cls(path, opened, discard=discard)

    @classmethod
    def reopen(
        cls, path: str, *, extents: int, boot_id: bytes, encrypted: bool, discard: bool = True
    ) -> SwapFile:
        """Open a swap device again that another process had in use, to read what it has left.

        Args:
            path: as for `open`.
            extents: how many it had.
            boot_id: what `open` was told.
            encrypted: what `open` was told.
            discard: as for `open`.

        Raises:
            OpenError: it is missing, in use, or not what it was. Nothing was changed.
        """
        header = DeviceHeader(extents=extents, boot_id=boot_id, encrypted=encrypted)
        return cls(path, reopen_swap_device(path, header), discard=discard)

    def _position(self, extent: int, offset: int, length: int) -> int:
        assert 0 <= extent < self.extents
        assert offset % BLOCK_BYTES == length % BLOCK_BYTES == 0
        assert 0 <= offset < offset + length
        assert offset + length <= EXTENT_BYTES or (offset == 0 and length <= RUN_BYTES)
        return DATA_OFFSET + extent * EXTENT_BYTES + offset

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        position = self._position(extent, offset, length)
        buffer = aligned(length)
        done = 0
        while done < length:
            try:
                count = os.preadv(self._fd, [buffer[done:]], position + done)
            except OSError as error:
                raise ReadError(self.path, f"reading at {position}: {error.strerror}") from None
            done += count
            if count == 0 or done % BLOCK_BYTES:
                raise ReadError(self.path, f"ends before {position + length}: was it truncated?")
        return buffer

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        view = memoryview(data).cast("B")
        position = self._position(extent, offset, len(view))
        done = 0
        while done < len(view):
            try:
                count = self._pwrite(view[done:], position + done)
            except OSError as error:
                raise WriteError(self.path, f"writing at {position}: {error.strerror}") from None
            done += count
            if count == 0 or done % BLOCK_BYTES:
                raise WriteError(self.path, f"writing at {position}: only {done} bytes went")

    def _pwrite(self, view: memoryview, position: int) -> int:
        try:
            return os.pwrite(self._fd, view, position)
        except OSError as error:
            # Most often the buffer is not aligned; finding out is cheaper than asking each time.
            if not self.direct or error.errno != errno.EINVAL:
                raise
        bounce = self._scratch.buffer[: len(view)]
        bounce[:] = view
        return os.pwrite(self._fd, bounce, position)

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice."""
        assert 0 <= extent < extent + count <= self.extents
        if not self.discards:
            return
        # What cannot be discarded stays there as garbage: nothing depends on it.
        with contextlib.suppress(OSError):
            self._discard(self._fd, DATA_OFFSET + extent * EXTENT_BYTES, count * EXTENT_BYTES)

    def close(self) -> None:
        """See BlockDevice. The lock goes with it; a file stays, with its header."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
