"""Takes connections from a listening socket, a few per turn of the event loop.

Invariants:
- When the system has no more descriptors nothing is accepted for a while: to try again at once
  would be all that the loop did.

This module must not know what becomes of a connection.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Final

_LOG: Final = logging.getLogger(__name__)
_AT_ONCE: Final = 16
"""Connections that are accepted per turn."""
_NO_MORE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE_S: Final = 1.0


class Acceptor:
    """Accepts from the first moment until `close`."""

    def __init__(self, listener: socket.socket, welcome: Callable[[socket.socket], None]) -> None:
        """Begin.

        Args:
            listener: a listening socket; closed by `close`.
            welcome: takes each connection over, not blocking.
        """
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._welcome = welcome
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_MORE:
                    raise
                _LOG.error("no connection can be accepted for now: %s", error.strerror)
                self._loop.remove_reader(self._listener)
                self._pause = self._loop.call_later(_PAUSE_S, self._again)
                return
            sock.setblocking(False)
            self._welcome(sock)

    def _again(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def move(self, listener: socket.socket) -> None:
        """Accept from another socket from now on; the old one is closed, once who waits is in."""
        self._accept()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._listener = listener
        listener.setblocking(False)
        if self._pause is None:
            self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Accept no more, and close the socket."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
