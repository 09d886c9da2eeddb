"""System calls that the standard library has no names for: giving space back.

This module must not know what is given back.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_BLKDISCARD: Final = 0x1277


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give a file's bytes back to its file system; they read as zeros from then on.

    Raises:
        OSError: the file system cannot, or did not.
    """
    result = _LIBC.fallocate(
        fd,
        _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE,
        ctypes.c_long(offset),
        ctypes.c_long(length),
    )
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def discard_blocks(fd: int, offset: int, length: int) -> None:
    """Tell a block device that it may forget these bytes.

    Raises:
        OSError: the device cannot, or did not.
    """
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("<QQ", offset, length))
