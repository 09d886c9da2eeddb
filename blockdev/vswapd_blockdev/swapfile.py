"""A file or block device as a swap device.

Opening one is where most goes wrong, so that is where most is checked: what is not ours is never
written to, a disk without room is an error at once and not at the first writeback, and a second
daemon is kept out by a lock.

Invariants:
- The file is private (0600), locked, and has all its space reserved from `open` on. Discarding an
  extent gives its space back, as swap on flash does; a disk that has filled up meanwhile then shows
  as a WriteError of that extent. `discard=False` keeps the reservation instead.
- Reads and writes are of whole blocks, with O_DIRECT where the file system has it.

This module must not know what is written, encryption, or which extents are in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
import threading
from typing import Final

from vswapd_blockdev.device import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    OpenError,
    ReadError,
    WriteError,
)
from vswapd_blockdev.header import (
    DATA_OFFSET,
    MIN_BYTES,
    DeviceHeader,
    HeaderError,
    pack_header,
    parse_header,
)
from vswapd_blockdev.raw import discard_blocks, punch_hole

_BLKGETSIZE64: Final = 0x80081272
_PRIVATE: Final = 0o600


class SwapFile:
    """See vswapd_blockdev.device.BlockDevice for the contract; `open` makes one."""

    def __init__(
        self, path: str, fd: int, *, extents: int, direct: bool, block_device: bool, discard: bool
    ) -> None:
        self.path: Final = path
        self.extents: Final = extents
        self.direct: Final = direct
        self.encrypted: Final = False
        self.discards: Final = discard
        self._fd = fd
        self._block_device = block_device
        self._local = threading.local()

    @property
    def size_bytes(self) -> int:
        """Bytes that extents take."""
        return self.extents * EXTENT_BYTES

    @classmethod
    def open(
        cls,
        path: str,
        *,
        size: int | None = None,
        boot_id: bytes = bytes(16),
        encrypted: bool = False,
        discard: bool = True,
    ) -> SwapFile:
        """Open or create a swap device.

        Args:
            path: a file (made if it is missing) or a block device.
            size: bytes it shall have; None: what it has already.
            boot_id: written to the header, for people who look at the file.
            encrypted: written to the header.
            discard: whether discarded extents give their space back.

        Raises:
            OpenError: missing without a size, a directory, somebody's data, too small, in use,
                not permitted, or no room; what was there is unchanged, what was not is not made.
        """
        existed = os.path.lexists(path)
        fd = _open(path, create=size is not None)
        try:
            return cls._prepare(path, fd, size, boot_id, encrypted=encrypted, discard=discard)
        except BaseException:
            os.close(fd)
            if not existed:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            raise

    @classmethod
    def _prepare(
        cls,
        path: str,
        fd: int,
        size: int | None,
        boot_id: bytes,
        *,
        encrypted: bool,
        discard: bool,
    ) -> SwapFile:
        status = os.fstat(fd)
        block_device = stat.S_ISBLK(status.st_mode)
        if not block_device and not stat.S_ISREG(status.st_mode):
            raise OpenError(path, "neither a file nor a block device")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OpenError(path, "in use by another process") from None
        has = _device_bytes(fd) if block_device else status.st_size
        _refuse_foreign(path, fd, has)
        wanted = has if size is None else size
        if block_device and wanted > has:
            raise OpenError(path, f"has {has} bytes, {wanted} were asked for")
        if wanted < MIN_BYTES:
            raise OpenError(path, f"{wanted} bytes are too small: at least {MIN_BYTES} are needed")
        extents = (wanted - DATA_OFFSET) // EXTENT_BYTES
        if not block_device:
            os.fchmod(fd, _PRIVATE)
            _reserve(path, fd, has, DATA_OFFSET + extents * EXTENT_BYTES)
        header = DeviceHeader(extents=extents, boot_id=boot_id, encrypted=encrypted)
        try:
            os.pwrite(fd, pack_header(header), 0)
            os.fsync(fd)
        except OSError as error:
            raise OpenError(path, f"cannot be written: {error.strerror}") from None
        direct = _go_direct(fd)
        return cls(
            path,
            fd,
            extents=extents,
            direct=direct,
            block_device=block_device,
            discard=discard,
        )

    def _offset(self, extent: int, offset: int, length: int) -> int:
        assert 0 <= extent < self.extents
        assert offset % BLOCK_BYTES == 0
        assert length % BLOCK_BYTES == 0
        assert 0 <= offset <= offset + length <= EXTENT_BYTES
        return DATA_OFFSET + extent * EXTENT_BYTES + offset

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        position = self._offset(extent, offset, length)
        # Anonymous maps are aligned as O_DIRECT wants it; the caller keeps it as its own.
        buffer = memoryview(mmap.mmap(-1, max(length, 1)))[:length]
        done = 0
        while done < length:
            try:
                count = os.preadv(self._fd, [buffer[done:]], position + done)
            except OSError as error:
                raise ReadError(self.path, f"reading at {position}: {error.strerror}") from None
            if count == 0:
                raise ReadError(self.path, f"ends before {position + length}: was it truncated?")
            done += count
            if done % BLOCK_BYTES:
                raise ReadError(self.path, f"ends before {position + length}: was it truncated?")
        return buffer

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        view = memoryview(data).cast("B")
        position = self._offset(extent, offset, len(view))
        done = 0
        while done < len(view):
            try:
                count = self._pwrite(view[done:], position + done)
            except OSError as error:
                raise WriteError(self.path, f"writing at {position}: {error.strerror}") from None
            done += count
            if count == 0 or done % BLOCK_BYTES:
                raise WriteError(self.path, f"writing at {position}: short write")

    def _pwrite(self, view: memoryview, position: int) -> int:
        if self.direct:
            try:
                return os.pwrite(self._fd, view, position)
            except OSError as error:
                # Most often the buffer is not aligned; it is cheaper to find out than to ask.
                if error.errno != errno.EINVAL:
                    raise
            bounce = self._bounce()
            bounce[: len(view)] = view
            return os.pwrite(self._fd, bounce[: len(view)], position)
        return os.pwrite(self._fd, view, position)

    def _bounce(self) -> memoryview:
        """This thread's aligned buffer of one extent."""
        found: memoryview | None = getattr(self._local, "bounce", None)
        if found is None:
            found = memoryview(mmap.mmap(-1, EXTENT_BYTES))
            self._local.bounce = found
        return found

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice."""
        if not self.discards or not count:
            return
        position = self._offset(extent, 0, 0)
        assert extent + count <= self.extents
        # What a device cannot discard stays on it as garbage: nothing depends on it.
        with contextlib.suppress(OSError):
            if self._block_device:
                discard_blocks(self._fd, position, count * EXTENT_BYTES)
            else:
                punch_hole(self._fd, position, count * EXTENT_BYTES)

    def close(self) -> None:
        """See BlockDevice. The lock goes with it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: str, *, create: bool) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        is_block = stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        is_block = False
    if is_block:
        # For a block device, O_EXCL without O_CREAT refuses one that is mounted or in use.
        flags |= os.O_EXCL
    elif create:
        flags |= os.O_CREAT
    try:
        return os.open(path, flags, _PRIVATE)
    except IsADirectoryError:
        raise OpenError(path, "is a directory: name a file in it") from None
    except FileNotFoundError:
        text = "no such directory" if create else "does not exist: give a size, and it is made"
        raise OpenError(path, text) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OpenError(path, "is a symbolic link: name the file itself") from None
        if error.errno == errno.EBUSY:
            raise OpenError(path, "is mounted or in use") from None
        raise OpenError(path, f"cannot be opened: {error.strerror}") from None


def _refuse_foreign(path: str, fd: int, has: int) -> None:
    """Never write to what is not ours: only to nothing, to zeros, or to a swap device of ours."""
    if not has:
        return
    block = os.pread(fd, BLOCK_BYTES, 0)
    if not block.strip(b"\0"):
        return
    try:
        parse_header(block)
    except HeaderError as error:
        raise OpenError(
            path, f"holds other data ({error}): wipe its first block if it may be overwritten"
        ) from None


def _reserve(path: str, fd: int, has: int, wanted: int) -> None:
    try:
        if has > wanted:
            os.ftruncate(fd, wanted)
        # Away with holes of an earlier use first: posix_fallocate fills only what is missing.
        os.posix_fallocate(fd, 0, wanted)
    except OSError as error:
        if has < wanted:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, has)
        raise OpenError(path, f"no room for {wanted} bytes: {error.strerror}") from None


def _go_direct(fd: int) -> bool:
    """Switch to O_DIRECT if a read with it works; whether it does."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [memoryview(mmap.mmap(-1, BLOCK_BYTES))], 0)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def _device_bytes(fd: int) -> int:
    answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
    size: int = struct.unpack("<Q", answer)[0]
    return size
