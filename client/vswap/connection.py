"""A blocking connection: sends a call's frames and reads its replies, one call at a time.

Theory: while a call has frames left and the window has room, send; otherwise read one reply. When
a send would block, whichever comes first is done: reading a reply or sending on. So it does not
matter whose socket buffers are full; the two ends cannot wait for each other. Reading a reply to
its end, once it has begun, is safe, since the daemon needs nothing from us to finish it.

Invariants:
- One lock; a call has the connection to itself. Threads wait for each other.
- After a typed error all replies of the call have been read: the connection is in step.
- After anything else (an I/O error, silence, an exception out of a signal handler, which may strike
  between the arrival of bytes and their being counted) the connection is closed, and later calls
  say why.
- A forked child does not share it: there it is closed, without harm to the parent's.

This module must not know what the calls mean.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
import weakref
from typing import TYPE_CHECKING, Final, NoReturn

from vswap.conversation import Conversation
from vswap.errors import ConnectionLost, TimedOut

if TYPE_CHECKING:
    from vswap.planner import Call, View

_SEND_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_TIMEVAL: Final = struct.Struct("@ll")
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET})


class Connection:
    """One connected socket, owned, and the conversation over it.

    Args:
        sock: Connected and blocking; closed by `close`.
        timeout: Seconds of silence in the middle of a call after which the daemon is given up;
            None: wait for ever.
    """

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        self._sock = sock
        self._timeout = timeout
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._why_closed: str | None = None
        self._poll = select.poll()
        self.conversation = Conversation()
        if timeout is not None:
            # The kernel's own timeout costs nothing; Python's would poll before every receive.
            whole = int(timeout)
            value = _TIMEVAL.pack(whole, max(1, int((timeout - whole) * 1e6)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._poll.register(sock, select.POLLIN | select.POLLOUT)
        _open_connections.add(self)

    @property
    def closed(self) -> bool:
        """Whether calls can only fail."""
        return self._why_closed is not None

    def close(self, why: str = "it was closed") -> None:
        """Close it; the daemon then frees the space. A call in another thread is waited for."""
        self._enter()
        try:
            self._shut(why)
        finally:
            self._leave()

    def run(self, call: Call) -> None:
        """Carry a call through. Its own errors are kept in it; ask it for its result.

        Raises:
            ConnectionLost: the connection is closed, or was.
            ProtocolError: the daemon answered nonsense; the connection is closed now.
        """
        self._enter()
        try:
            self._check_open()
            self._exchange(call)
        except BaseException as error:
            self._shut(str(error) or type(error).__name__)
            raise
        finally:
            call.release()
            self._leave()

    def _enter(self) -> None:
        if not self._lock.acquire(blocking=False):
            if self._owner == threading.get_ident():
                raise RuntimeError("a call on this connection is running in this very thread")
            self._lock.acquire()
        self._owner = threading.get_ident()

    def _leave(self) -> None:
        self._owner = None
        self._lock.release()

    def _check_open(self) -> None:
        if self._why_closed is not None:
            raise ConnectionLost(f"the connection is closed: {self._why_closed}; connect() again")

    def _shut(self, why: str) -> None:
        if self._why_closed is None:
            self._why_closed = why
            self._sock.close()
            self.conversation.end()

    def _exchange(self, call: Call) -> None:
        request = self.conversation.request
        while True:
            buffers = request(call)
            if buffers is not None:
                self._send(buffers)
            elif call.in_flight:
                self._read_reply()
            elif call.over:
                return

    def _send(self, buffers: list[View]) -> None:
        try:
            self._send_all(buffers)
        finally:
            buffers.clear()  # a traceback must not hold the caller's memory

    def _send_all(self, buffers: list[View]) -> None:
        while True:
            try:
                sent = self._sock.sendmsg(buffers, (), _SEND_FLAGS)
            except BlockingIOError:
                self._wait()
                continue
            except OSError as error:
                self._read_last_words(error)
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers[0])
                del buffers[0]
            if not buffers:
                return
            buffers[0] = buffers[0][sent:]

    def _wait(self) -> None:
        """Wait until something can be sent; read the replies that come before."""
        limit = None if self._timeout is None else self._timeout * 1000
        ready = self._poll.poll(limit)
        if not ready:
            raise self._silence()
        if ready[0][1] & select.POLLIN:
            self._read_reply()

    def _read_reply(self) -> None:
        conversation = self.conversation
        while True:
            try:
                count = self._sock.recv_into(conversation.wanted, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise self._silence() from None
            except OSError as error:
                raise ConnectionLost(f"the connection to the daemon broke: {error}") from error
            if not count:
                raise ConnectionLost("the daemon closed the connection (did it stop, or die?)")
            if conversation.arrived(count) is not None:
                return

    def _read_last_words(self, error: OSError) -> NoReturn:
        """The daemon takes no more; it may have said why before it closed.

        Raises:
            ConnectionLost: always; its text is the daemon's, if it said anything.
        """
        if error.errno in _GONE:
            while not self.conversation.idle:
                self._read_reply()
        raise ConnectionLost(f"the connection to the daemon broke: {error}") from error

    def _silence(self) -> TimedOut:
        return TimedOut(f"the daemon was silent for {self._timeout} s; the connection is closed")


_open_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child: two processes in one conversation would garble it."""
    for connection in list(_open_connections):
        connection._lock = threading.Lock()  # noqa: SLF001 - another thread of the parent may hold it
        connection._owner = None  # noqa: SLF001
        connection._shut("it belongs to the process that this one was forked from")  # noqa: SLF001


os.register_at_fork(after_in_child=_leave_to_the_parent)
