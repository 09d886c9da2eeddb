"""System calls that the standard library has no names for.

This module must not know why space is given back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_BLKDISCARD: Final = 0x1277
_BLKGETSIZE64: Final = 0x80081272


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give a file's bytes back to its file system; they read as zeros from then on.

    Raises:
        OSError: the file system cannot, or did not.
    """
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    while _LIBC.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def discard_blocks(fd: int, offset: int, length: int) -> None:
    """Tell a block device that it may forget these bytes.

    Raises:
        OSError: the device cannot, or did not.
    """
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("<QQ", offset, length))


def block_device_bytes(fd: int) -> int:
    """How long a block device is.

    Raises:
        OSError: it is none.
    """
    answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
    size: int = struct.unpack("<Q", answer)[0]
    return size
