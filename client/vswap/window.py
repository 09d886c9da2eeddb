"""The client's side of a window: memory that it shares with one shard of the daemon.

Pages in it need not go through the socket. `Window.buffer` lends parts of it out; a part comes back
when nothing looks at it any more.

Invariants:
- A part is lent to one borrower at a time.
- The memory stays mapped as long as anything looks at it, also after the connection has ended.
- Memory, its address and its generation change together, under the lock: a thread that takes the
  connection up again must not meet another that is finding out where its pages are.
- A forked child lends nothing of it: its parent, and the daemon, would see what the child writes.
- Returning a part takes no lock: it happens wherever the interpreter drops the last reference.

This module must not know frames, or whether the caller waits or awaits.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import socket
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from vswap.locking import Lock
from vswap.pages import Place
from vswap.protocol import PAGE_BYTES

if TYPE_CHECKING:
    from vswap.pages import Pages, View

WINDOW_BYTES: Final = 4 << 20
"""What a client wishes for: a few large calls' worth. It costs nothing until it is written to."""
_ONE_LOOK: Final = "a call that looks at the shared memory"


class Window:
    """`size` bytes, mapped; whole pages.

    Args:
        fd: The memory file that came with the daemon's answer; closed here.
        size: Its size.
        shard: Which shard looks at it.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, fd: int, size: int, shard: int) -> None:
        self._shard = shard
        self.wish = size
        """What was given once, and is asked for again."""
        self.generation = 0
        """How often the memory was replaced by another."""
        self._lock = Lock(_ONE_LOOK)
        self._map(fd, size)
        _windows.add(self)

    def _map(self, fd: int, size: int) -> None:
        try:
            self._memory = np.frombuffer(mmap.mmap(fd, size), np.uint8)
        finally:
            os.close(fd)
        self.size = size
        self._address = _address(self._memory)
        self._lent = bytearray(size // PAGE_BYTES)
        """Per page: 1 if it is lent."""
        self._returned: deque[tuple[int, int]] = deque()
        self._used = False
        """Whether any part was ever lent."""

    def replace(self, descriptor: int | None, size: int) -> None:
        """The connection was taken up again, and has another window, or none.

        What was lent out stays with its borrowers, as memory that nobody shares.
        """
        self._lock.run(self._replace, descriptor, size)

    def _replace(self, descriptor: int | None, size: int) -> None:
        self.generation += 1
        if descriptor is not None and size and size % PAGE_BYTES == 0:
            with contextlib.suppress(OSError, ValueError):
                self._map(descriptor, size)
                return
        elif descriptor is not None:
            os.close(descriptor)
        self._address = self.size = 0
        self._memory = np.empty(0, np.uint8)
        self._lent = bytearray()
        self._returned = deque()

    def leave_to_the_parent(self) -> None:
        """In a forked child: lend nothing, and know nothing of what was lent."""
        self._lock = Lock(_ONE_LOOK)  # another thread of the parent may hold it
        self.replace(None, 0)

    def buffer(self, pages: int) -> View | None:
        """Memory for `pages` pages, its content undefined; None: there is no such part left."""
        return self._lock.run(self._lend, pages)

    def _lend(self, pages: int) -> View | None:
        while self._returned:
            start, count = self._returned[0]
            self._lent[start : start + count] = bytes(count)
            self._returned.popleft()  # last: a signal may end this before
        start = self._lent.find(bytes(pages))
        if start < 0:
            return None
        self._lent[start : start + pages] = b"\1" * pages
        self._used = True
        part = self._memory[start * PAGE_BYTES : (start + pages) * PAGE_BYTES]
        # Views keep the object alive that they were made from: this one, not the whole window.
        keeper = np.frombuffer(part, np.uint8)
        weakref.finalize(keeper, self._returned.append, (start, pages)).atexit = False
        return keeper.data

    def locate(self, pages: Pages) -> Pages:
        """Note in `pages` where in the window they are, if they are in it. Returns them."""
        if self._used and pages.whole.nbytes:
            address = _address(np.frombuffer(pages.whole, np.uint8))
            pages.place = self._lock.run(self._place_of, address, pages.whole.nbytes)
        return pages

    def _place_of(self, address: int, size: int) -> Place | None:
        offset = address - self._address
        inside = offset >= 0 and offset + size <= self._memory.nbytes
        if not inside or offset % PAGE_BYTES:
            return None
        return Place(self, self.generation, self._shard, offset)


_windows: weakref.WeakSet[Window] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    for window in list(_windows):
        window.leave_to_the_parent()


os.register_at_fork(after_in_child=_leave_to_the_parent)


def _address(array: npt.NDArray[np.uint8]) -> int:
    # array.ctypes.data is the same, and takes twice as long.
    address: int = array.__array_interface__["data"][0]
    return address


def receive(sock: socket.socket, wanted: View) -> tuple[int, int | None]:
    """Receive bytes, and the descriptor that may come with them.

    Raises:
        OSError: as recvmsg(2).
    """
    count, ancillary, _, _ = sock.recvmsg_into(
        [wanted], socket.CMSG_SPACE(_INT_BYTES), socket.MSG_CMSG_CLOEXEC
    )
    found = None
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors = array.array("i", data[: len(data) - len(data) % _INT_BYTES])
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            found = descriptors[0]
    return count, found


def window_of(descriptor: int | None, size: int, shard: int) -> Window | None:
    """The window that came with HELLO's answer; None: none did, or it cannot be used."""
    if descriptor is None:
        return None
    if not size or size % PAGE_BYTES:
        os.close(descriptor)
        return None
    with contextlib.suppress(OSError, ValueError):
        return Window(descriptor, size, shard)
    return None


_INT_BYTES: Final = array.array("i").itemsize
