"""A sparse file in memory (memfd), mapped once at its full size and touched on demand.

The swap table and the pool live in such regions: address space costs nothing, pages of it appear at
the first write and go back with `punch`, and the descriptor can outlive the process.

Invariants:
- The file is sealed against shrinking: nobody who is handed the descriptor can turn a read of ours
  into SIGBUS (see memfd_create(2), F_SEAL_SHRINK).
- It is left out of core dumps: it holds other programs' memory.
- A label, where there is one, is the file's last page, behind the region: what stands in the region
  keeps its alignment and its addresses. It is written before anything else.

This module must not know what stands in a region.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_MLOCK_ONFAULT: Final = 1
_F_SEAL_GROW: Final = 0x0004
SYSTEM_PAGE: Final = mmap.PAGESIZE


class SharedRegion:
    """`size` bytes of sparse shared memory; `size` is rounded up to whole pages."""

    def __init__(self, name: str, size: int, *, fd: int = -1, label: bytes = b"") -> None:
        """Make a region, or take over one that was made elsewhere.

        Args:
            name: what the system calls it.
            size: bytes, the label not counted.
            fd: of one that was made by another process; owned from now on.
            label: what says what the region is (see `read_label`), at most SYSTEM_PAGE bytes;
                empty: nothing does. Of one that was made elsewhere: what it was made with.

        Raises:
            OSError: the system does not give so much, or none at all; the text says what.
        """
        assert len(label) <= SYSTEM_PAGE
        self._label_bytes: Final = SYSTEM_PAGE if label else 0
        self.size: Final = -(-size // SYSTEM_PAGE) * SYSTEM_PAGE
        made = fd < 0
        self.fd: Final = _memory_file(name) if made else fd
        try:
            if made:
                os.ftruncate(self.fd, self.size + self._label_bytes)
                if label:
                    os.pwrite(self.fd, label, self.size)
                seals = fcntl.F_SEAL_SHRINK | _F_SEAL_GROW | fcntl.F_SEAL_SEAL
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            self._map: Final = mmap.mmap(self.fd, self.size)
        except OSError as error:
            os.close(self.fd)
            text = f"{self.size} bytes cannot be reserved for {name}: {error.strerror}"
            raise OSError(error.errno, text) from None
        # Arrays over the region keep the mapping alive by themselves; the descriptor goes with us.
        weakref.finalize(self, os.close, self.fd)
        self._map.madvise(mmap.MADV_DONTDUMP)
        self.view: Final = memoryview(self._map)
        self.on_refusal: Callable[[OSError], None] | None = None
        """Told when the kernel does not take memory back."""

    def bytes_array(self) -> npt.NDArray[np.uint8]:
        """The whole region as bytes, shape (size,); shares its memory."""
        return np.frombuffer(self._map, np.uint8)

    def words_array(self) -> npt.NDArray[np.uint64]:
        """The whole region as words, shape (size/8,); shares its memory."""
        return np.frombuffer(self._map, np.uint64)

    def punch(self, offset: int, length: int) -> None:
        """Give whole pages back to the system; they read as zeros from then on.

        Raises:
            OSError: the kernel refused; the bytes are what they were.
        """
        result = _LIBC.fallocate(
            self.fd,
            _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE,
            ctypes.c_long(offset),
            ctypes.c_long(length),
        )
        if result != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"punching {length} bytes at {offset}: {os.strerror(code)}")

    def give_back(self, offset: int, length: int) -> bool:
        """The same for pages that nobody needs any more: False if the kernel refused.

        They occupy what they did then, which is no reason for anything else to fail.

        Raises:
            OSError: the kernel refused, and there is no `on_refusal` to tell.
        """
        try:
            self.punch(offset, length)
        except OSError as error:
            if self.on_refusal is None:
                raise
            self.on_refusal(error)
            return False
        return True

    def wipe(self, offset: int, length: int) -> None:
        """Make whole pages zeros, and give them back to the system if it takes them."""
        if not self.give_back(offset, length):
            self.view[offset : offset + length] = bytes(length)

    def lock(self) -> None:
        """Keep pages of the region in RAM, each from its first touch on (MLOCK_ONFAULT).

        Locking it whole would fill it: the region is as large as the limit could ever be. All of it
        counts at once against RLIMIT_MEMLOCK, however little is touched: what could be locked here
        can be touched later, and nothing fails then.

        Raises:
            OSError: RLIMIT_MEMLOCK is below the region's size, or the kernel refused.
        """
        address, size = self._span()
        if _LIBC.mlock2(address, size, _MLOCK_ONFAULT) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"locking {self.size} bytes in memory: {os.strerror(code)}")

    def unlock(self) -> None:
        """Let the system move its pages out again; they need not be locked."""
        _LIBC.munlock(*self._span())

    def _span(self) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        return ctypes.c_void_p(address), ctypes.c_size_t(self.size)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """No other process holds the region meanwhile. For short times, and not to be nested.

        A record lock of the file: it goes with a process that is killed, and knows no threads.
        """
        fcntl.lockf(self.fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN)

    @property
    def resident_bytes(self) -> int:
        """What the region really occupies, as the system counts it; the label not counted."""
        return os.fstat(self.fd).st_blocks * 512 - self._label_bytes


def _memory_file(name: str) -> int:
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        text = f"no memory can be had (memfd_create): {error.strerror}"
        raise OSError(error.errno, text) from None


def read_label(fd: int) -> bytes:
    """The last page of a region's file: its label, if it was made with one, and zeros.

    Raises:
        OSError: the descriptor is no file.
    """
    return os.pread(fd, SYSTEM_PAGE, max(0, os.fstat(fd).st_size - SYSTEM_PAGE))
