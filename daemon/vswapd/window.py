"""A connection's window: memory that client and daemon share, so that pages need no socket.

The daemon makes it and seals it, so that nobody can take memory away that it looks at. The client
may write in it at any time, also while it is read: what the daemon works with is always a copy.

This module must not know requests, or who the client is.
"""

from __future__ import annotations

from typing import Final

from vswap.protocol import PAGE_BYTES
from vswapd.errors import ArgumentError
from vswapd_backends.shared import SharedRegion


class Windows:
    """How much the windows of all connections may take together."""

    def __init__(self, size: int) -> None:
        """`size` bytes."""
        self._left = size

    def open(self, size: int) -> Window | None:
        """A window of so many bytes, or of as many as there may be still; None: of none.

        Raises:
            OSError: see Window.
        """
        size = min(size, self._left // PAGE_BYTES * PAGE_BYTES)
        if not size:
            return None
        window = Window(size)
        self._left -= size
        return window

    def closed(self, window: Window) -> None:
        """A window's connection has gone."""
        self._left += window.size


class Window:
    """`size` bytes, whole pages."""

    def __init__(self, size: int) -> None:
        """Make a window.

        Raises:
            OSError: there are no descriptors or no address space left.
        """
        self._region = SharedRegion("vswapd-window", size)
        self.size: Final = size
        self.fd: Final = self._region.fd

    def take(self, offset: int, count: int) -> bytes:
        """A copy of `count` pages.

        Raises:
            ArgumentError: they are not in the window.
        """
        return bytes(self._region.view[self._span(offset, count)])

    def put(self, offset: int, pages: list[bytes | memoryview]) -> None:
        """Write pages one behind the other.

        Raises:
            ArgumentError: they are not in the window.
        """
        self._region.view[self._span(offset, len(pages))] = b"".join(pages)

    def check(self, offset: int, count: int) -> None:
        """Raise if pages are not in the window.

        Raises:
            ArgumentError: they are not.
        """
        self._span(offset, count)

    def _span(self, offset: int, count: int) -> slice:
        end = offset + count * PAGE_BYTES
        if offset % PAGE_BYTES or end > self.size:
            raise ArgumentError(
                f"{count} pages at {offset} are not in the window of {self.size} bytes: offsets "
                f"are multiples of {PAGE_BYTES}"
            )
        return slice(offset, end)
