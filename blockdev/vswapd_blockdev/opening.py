"""Taking a file or block device into use as a swap device: all that can be refused is refused here.

Invariants:
- What is not ours is never written to: only what is empty, all zeros, or an earlier swap device of
  ours. Contents behind an own header are left as they are; only the header is written anew.
- The lock comes before the first look at the contents, and stays until the descriptor is closed.
- A refusal leaves no file that was not there before. One of ours that was there may have become
  shorter or longer; its contents mean nothing to anybody.

This module must not know what is read or written later.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from typing import Final

from vswapd_blockdev.buffers import aligned
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, LockedError, OpenError
from vswapd_blockdev.header import (
    BOOT_ID_BYTES,
    DATA_OFFSET,
    MIN_BYTES,
    DeviceHeader,
    ForeignHeaderError,
    HeaderError,
    pack_header,
    parse_header,
)
from vswapd_blockdev.raw import block_device_bytes

PRIVATE: Final = 0o600
_MIB: Final = 1 << 20
NO_BOOT: Final = bytes(BOOT_ID_BYTES)
_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A descriptor that holds the lock, and what was found out about what it names."""

    fd: int
    extents: int
    direct: bool
    block_device: bool


def open_swap_device(
    path: str, *, size: int | None, boot_id: bytes = NO_BOOT, encrypted: bool = False
) -> Opened:
    """Open or create, lock, reserve, and put a header on it.

    Args:
        path: a file (made if it is missing and a size is given) or a block device.
        size: bytes it shall have, header included, rounded down to whole extents; None: what it
            has already.
        boot_id: goes into the header.
        encrypted: goes into the header.

    Raises:
        OpenError: see the module's invariants; the text says what to do.
    """
    try:
        fd, created = _open(path, create=size is not None)
    except OSError as error:
        raise _refusal(path, error, create=size is not None) from None
    except ValueError:
        raise OpenError(path.encode("utf-8", "replace").decode(), "is no file name") from None
    try:
        return _take(path, fd, size, boot_id, encrypted=encrypted)
    except BaseException as error:
        if created:
            _remove(path, fd)
        os.close(fd)
        if isinstance(error, OSError):
            raise OpenError(path, f"cannot be used: {error.strerror}") from None
        raise


def reopen_swap_device(path: str, header: DeviceHeader) -> Opened:
    """Open a device again that a process had in use which is no more; nothing is written to it.

    Args:
        path: a file or a block device.
        header: what was put on it when it was taken into use.

    Raises:
        OpenError: it is missing, in use, or not what it was: what stood on it is lost.
    """
    try:
        fd, _ = _open(path, create=False)
    except OSError as error:
        raise _refusal(path, error, create=False) from None
    try:
        return _take_again(path, fd, header)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise OpenError(path, f"cannot be used: {error.strerror}") from None
        raise


def _take_again(path: str, fd: int, header: DeviceHeader) -> Opened:
    status = os.fstat(fd)
    block_device = stat.S_ISBLK(status.st_mode)
    _lock(path, fd)
    if not block_device:
        _refuse_shared(path, fd, status)
    has = block_device_bytes(fd) if block_device else status.st_size
    try:
        found = parse_header(os.pread(fd, BLOCK_BYTES, 0))
    except HeaderError as error:
        raise OpenError(path, f"is not what it was ({error}): its pages are lost") from None
    if found != header:
        raise OpenError(path, "was taken into use by another run since: its pages are lost")
    if has < header.size_bytes:
        raise OpenError(path, f"has become shorter, {has} bytes: its pages are lost")
    return Opened(fd=fd, extents=header.extents, direct=_go_direct(fd), block_device=block_device)


def _open(path: str, *, create: bool) -> tuple[int, bool]:
    """A descriptor, and whether this call made the file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not create:
            raise
        with contextlib.suppress(FileExistsError):
            return os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, PRIVATE), True
        # Somebody else has made it since, or it is a link to nowhere: the flags tell which.
        mode = stat.S_IFREG
    if stat.S_ISBLK(mode):
        # The usual names of block devices are links. O_EXCL without O_CREAT: refuse one that is
        # mounted, swapped on, or part of something.
        fd = os.open(path, _FLAGS & ~os.O_NOFOLLOW | os.O_EXCL)
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            # The link leads somewhere else by now: what is no device is not opened through links.
            os.close(fd)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return fd, False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        # Opening a device can be an act in itself (a watchdog, a tape), so it is not even tried.
        raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))
    return os.open(path, _FLAGS), False


def _refusal(path: str, error: OSError, *, create: bool) -> OpenError:
    # A block device that another process has is busy before its lock can be asked for.
    kind = LockedError if error.errno == errno.EBUSY else OpenError
    return kind(path, _open_text(error, create=create))


def _open_text(error: OSError, *, create: bool) -> str:
    match error.errno:
        case errno.EISDIR:
            return "is a directory: name a file in it"
        case errno.ENOENT if create:
            return "its directory does not exist: make it first"
        case errno.ENOENT:
            return "does not exist: give a size, and it is made"
        case errno.ENOTDIR:
            return "is not below a directory"
        case errno.ELOOP:
            return "is a symbolic link: name the file itself"
        case errno.ENOTBLK:
            return "is neither a file nor a block device"
        case errno.EBUSY:
            return "is in use: mounted, swapped on, or part of another device"
        case _:
            return f"cannot be opened: {error.strerror}"


def _take(path: str, fd: int, size: int | None, boot_id: bytes, *, encrypted: bool) -> Opened:
    status = os.fstat(fd)
    block_device = stat.S_ISBLK(status.st_mode)
    if not block_device and not stat.S_ISREG(status.st_mode):
        raise OpenError(path, "is neither a file nor a block device")
    _lock(path, fd)
    if not block_device:
        _refuse_shared(path, fd, status)
    has = block_device_bytes(fd) if block_device else os.fstat(fd).st_size
    extents = _extents(path, has, size, block_device=block_device)
    _refuse_foreign(path, fd, has, block_device=block_device)
    header = DeviceHeader(extents=extents, boot_id=boot_id, encrypted=encrypted)
    if not block_device:
        os.fchmod(fd, PRIVATE)
        _reserve(path, fd, has, header.size_bytes)
    os.pwrite(fd, pack_header(header), 0)
    os.fsync(fd)
    return Opened(fd=fd, extents=extents, direct=_go_direct(fd), block_device=block_device)


def _lock(path: str, fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(path, "is in use: another vswapd has locked it, or this one") from None


def _refuse_shared(path: str, fd: int, status: os.stat_result) -> None:
    """A file that others can reach by right of their own is not private, whatever its mode."""
    if status.st_uid != os.geteuid():
        raise OpenError(path, f"belongs to uid {status.st_uid}: remove it, or name another file")
    if os.fstat(fd).st_nlink > 1:
        raise OpenError(path, "has more than one name: remove the others, or name another file")
    if not _names(path, fd):
        raise OpenError(path, "was removed while it was opened: try again")


def _extents(path: str, has: int, size: int | None, *, block_device: bool) -> int:
    if size is None and not has and not block_device:
        raise OpenError(path, "is empty: give a size")
    wanted = has if size is None else size
    if wanted < MIN_BYTES:
        raise OpenError(path, f"{wanted} bytes are too small: at least {MIN_BYTES} are needed")
    if block_device and wanted > has:
        raise OpenError(path, f"has {has} bytes, less than the {wanted} that were asked for")
    return (wanted - DATA_OFFSET) // EXTENT_BYTES


def _refuse_foreign(path: str, fd: int, has: int, *, block_device: bool) -> None:
    """Never write to what is not ours: only to nothing, to zeros, or to a swap device of ours."""
    try:
        parse_header(os.pread(fd, BLOCK_BYTES, 0))
    except ForeignHeaderError as error:
        if not block_device:
            blank = _is_blank(fd, 0, has)
        else:
            # Where file systems, RAID, LVM, LUKS and partition tables put their marks.
            blank = _is_blank(fd, 0, _MIB) and _is_blank(fd, max(0, has - _MIB), has)
        if not blank:
            raise OpenError(path, _foreign_text(error, path, block_device=block_device)) from None
    except HeaderError as error:
        raise OpenError(path, _foreign_text(error, path, block_device=block_device)) from None
    else:
        # Some formats leave the first block alone; the space behind ours is never written by us.
        if not _is_blank(fd, BLOCK_BYTES, min(has, DATA_OFFSET)):
            text = _foreign_text("behind an old header of ours", path, block_device=block_device)
            raise OpenError(path, text)


def _foreign_text(why: object, path: str, *, block_device: bool) -> str:
    erase = f"`blkdiscard --zeroout {path}` erases it" if block_device else "remove it first"
    return f"holds data that is not ours ({why}): if nobody needs it, {erase}"


def _is_blank(fd: int, begin: int, end: int) -> bool:
    """Whether all bytes from `begin` to `end` are zeros; skips holes, stops at the first other."""
    position = begin
    while position < end:
        position = _next_data(fd, position)
        piece = os.pread(fd, min(_MIB, end - position), position) if position < end else b""
        if not piece:
            return True
        if piece.count(0) != len(piece):
            return False
        position += len(piece)
    return True


def _next_data(fd: int, position: int) -> int:
    """Where the next byte that is in no hole may be; the end of the file if there is none."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return os.lseek(fd, 0, os.SEEK_END)
        if error.errno == errno.EINVAL:  # block devices know no holes
            return position
        raise


def _reserve(path: str, fd: int, has: int, wanted: int) -> None:
    """All of a file's space, holes of an earlier use included, or nothing more than it had."""
    file_system = os.fstatvfs(fd)
    # Ask before taking: a disk that is filled to the brim, if only for a moment, hurts others.
    missing = wanted - os.fstat(fd).st_blocks * 512
    free = file_system.f_bfree * file_system.f_frsize
    if missing > free and file_system.f_blocks:  # a tmpfs without a limit says 0 and 0
        raise OpenError(path, f"no room for {wanted} bytes: {free} are free on its file system")
    try:
        if has > wanted:
            os.ftruncate(fd, wanted)
        os.posix_fallocate(fd, 0, wanted)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, min(has, wanted))
        raise OpenError(path, f"no room for {wanted} bytes: {error.strerror}") from None


def _go_direct(fd: int) -> bool:
    """Switch to O_DIRECT if a read with it works; whether it does."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [aligned(BLOCK_BYTES)], 0)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def _names(path: str, fd: int) -> bool:
    """Whether a path still leads to this file."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(fd))


def _remove(path: str, fd: int) -> None:
    """Remove the file that was made, unless somebody has put another one in its place.

    In the folder where it is: what leads there may be a link to another one by now.
    """
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            name = os.path.basename(path)
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if os.path.samestat(found, os.fstat(fd)):
                os.unlink(name, dir_fd=folder)
        finally:
            os.close(folder)
