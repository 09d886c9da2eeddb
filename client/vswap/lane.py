"""A lane: one blocking socket to one shard of the daemon, and the conversation over it.

Theory: while a call has frames left and the lane has room, send; otherwise read one reply. When
a send would block, whichever comes first is done: reading a reply or sending on. So it does not
matter whose socket buffers are full; the two ends cannot wait for each other. Reading a reply to
its end, once it has begun, is safe, since the daemon needs nothing from us to finish it.

A call that has the lane to itself is exchanged blocking, which costs the fewest system calls. Calls
that go over several lanes push and pull each of them as far as it goes without waiting.

Invariants:
- After a typed error all replies of the call have been read: the lane is in step.
- After anything else it is not, and must be closed.

This module must not know what the calls mean, or that there are other lanes.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from typing import TYPE_CHECKING, Final, NoReturn

from vswap.address import hung_up
from vswap.conversation import Conversation
from vswap.errors import Broken, NoDaemon, Stopping, TimedOut
from vswap.protocol import MAX_BATCH
from vswap.window import receive

if TYPE_CHECKING:
    from vswap.pages import View
    from vswap.planner import Call

_SEND_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_TIMEVAL: Final = struct.Struct("@ll")
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET})
_SAID_NOTHING: Final = "the daemon closed the connection (did it stop, or die?)"


class Lane:
    """One connected socket, owned.

    Args:
        sock: Connected and blocking; closed by `close`.
        timeout: Seconds of silence in the middle of a call after which the daemon is given up;
            None: wait for ever.
    """

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        self.shard = 0
        """Which shard answers. Written by whoever has said HELLO."""
        self.conversation: Final = Conversation()
        self.broken = False
        """Whether the socket has ended without a word; `reopen` may help."""
        self._timeout = timeout
        self._outgoing: list[View] = []
        """What is left of a frame that could not be sent whole; of calls over several lanes."""
        self._use(sock)

    def _use(self, sock: socket.socket) -> None:
        self.sock = sock
        self._poll = select.poll()
        if self._timeout is not None:
            self._limit_silence(self._timeout)
        self._poll.register(sock, select.POLLIN | select.POLLOUT)

    def _limit_silence(self, seconds: float | None) -> None:
        # The kernel's own timeout costs nothing; Python's would poll before every receive.
        whole = int(seconds or 0)
        value = (0, 0) if seconds is None else (whole, max(1, int((seconds - whole) * 1e6)))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(*value))

    @property
    def gone(self) -> bool:
        """Whether the daemon's end has gone, whether that was noticed or not."""
        return self.broken or hung_up(self.sock)

    def reopen(self, sock: socket.socket) -> None:
        """Go on over another socket. HELLO is to be said there, then `conversation.resume`."""
        self.sock.close()
        self._outgoing.clear()
        self.conversation.interrupt()
        self._use(sock)
        self.broken = False

    def close(self) -> None:
        """Close the socket, and let go of the calls."""
        self.sock.close()
        self._outgoing.clear()
        self.conversation.end()

    # For one lane: blocking

    def exchange(self, call: Call) -> None:
        """Carry a call through that goes over no other lane.

        Raises:
            ConnectionLost: the daemon is gone.
            ProtocolError: it answered nonsense.
        """
        request, shard = self.conversation.request, self.shard
        while True:
            buffers = request(call, shard)
            if buffers is not None:
                self._send(buffers)
            elif call.in_flight:
                self._read_reply()
            elif call.over:
                return

    def _send(self, buffers: list[View]) -> None:
        try:
            while not self._send_some(buffers):
                self._wait()
        finally:
            buffers.clear()  # a traceback must not hold the caller's memory

    def _wait(self) -> None:
        """Wait until something can be sent; read the replies that come before."""
        limit = None if self._timeout is None else self._timeout * 1000
        ready = self._poll.poll(limit)
        if not ready:
            raise self.silence()
        if ready[0][1] & select.POLLIN:
            self._read_reply()

    def _read_reply(self) -> None:
        conversation = self.conversation
        while True:
            try:
                count = self.sock.recv_into(conversation.wanted, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise self.silence() from None
            except OSError as error:
                raise self._break(f"the connection to the daemon broke: {error}") from error
            if not count:
                raise self._break(_SAID_NOTHING)
            if self._arrived(count):
                return

    def greet(self, call: Call, patience: float | None = None) -> int | None:
        """Carry HELLO through; returns the descriptor that came with the answer, if any did.

        Args:
            call: HELLO.
            patience: Seconds for which a daemon is waited for that is not back yet: it has been
                connected to, since somebody listens for it, but nobody may answer for long, or
                ever. None: it is there, and as silent as any other may be.

        Raises:
            ConnectionLost, ProtocolError: as `exchange`.
        """
        buffers = self.conversation.request(call, self.shard)
        assert buffers is not None
        self._send(buffers)
        if patience is not None:
            self._limit_silence(patience)
        try:
            count, descriptor = receive(self.sock, self.conversation.wanted)
        except BlockingIOError:
            silent = self.silence() if patience is None else NoDaemon("nobody answers there")
            raise silent from None
        except OSError as error:
            raise self._break(f"the connection to the daemon broke: {error}") from error
        if not count:
            raise self._break(_SAID_NOTHING)
        if patience is not None:
            self._limit_silence(self._timeout)
        try:
            self._arrived(count)
            if call.in_flight:
                self._read_reply()
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        return descriptor

    # For several: without waiting

    def push(self, call: Call, most: int = MAX_BATCH) -> bool:
        """Send what is to be sent; False: there is more, once the socket can take it.

        Args:
            call: whose frames.
            most: how many of them at most.

        Raises:
            ConnectionLost, ProtocolError: as `exchange`.
        """
        while True:
            if not self._outgoing:
                if not most:
                    return True
                most -= 1
                self._outgoing = self.conversation.request(call, self.shard) or []
                if not self._outgoing:
                    return True
            if not self._send_some(self._outgoing):
                return False

    def pull(self) -> None:
        """Read what has arrived, to the end of one reply at most.

        Raises:
            ConnectionLost, ProtocolError: as `exchange`.
        """
        conversation = self.conversation
        while True:
            try:
                count = self.sock.recv_into(conversation.wanted, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._break(f"the connection to the daemon broke: {error}") from error
            if not count:
                raise self._break(_SAID_NOTHING)
            if self._arrived(count):
                return

    def settle(self) -> None:
        """Wait until all is answered that was asked; nothing more is.

        Raises:
            ConnectionLost, ProtocolError: as `exchange`.
        """
        self._send(self._outgoing)
        while not self.conversation.idle:
            self._read_reply()

    def _send_some(self, buffers: list[View]) -> bool:
        """Send as much as the socket takes; `buffers` is what is left. False: it takes no more."""
        while buffers:
            try:
                sent = self.sock.sendmsg(buffers, (), _SEND_FLAGS)
            except BlockingIOError:
                return False
            except OSError as error:
                buffers.clear()
                self._read_last_words(error)
            done = 0
            while done < len(buffers) and sent >= len(buffers[done]):
                sent -= len(buffers[done])
                done += 1
            del buffers[:done]
            if sent:
                buffers[0] = buffers[0][sent:]
        return True

    def _read_last_words(self, error: OSError) -> NoReturn:
        """The daemon takes no more; it may have said why before it closed.

        Raises:
            Broken: always, unless the daemon said why; then that.
        """
        if error.errno in _GONE:
            while not self.conversation.idle:
                self._read_reply()
        raise self._break(f"the connection to the daemon broke: {error}") from error

    def _arrived(self, count: int) -> bool:
        """Take note of bytes; whether they complete a reply."""
        try:
            return self.conversation.arrived(count) is not None
        except Stopping:
            self.broken = True
            raise

    def _break(self, text: str) -> Broken:
        self.broken = True
        return Broken(text)

    def silence(self) -> TimedOut:
        """The error for a daemon that says nothing."""
        return TimedOut(f"the daemon was silent for {self._timeout} s; the connection is closed")
