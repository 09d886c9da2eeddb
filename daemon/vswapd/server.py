"""Connections: bytes from sockets to sessions, replies back, and the bounds on both.

Invariants:
- One request of a connection is carried out at a time; its replies go out in order.
- A connection's memory is bounded: BASE_BUFFER for receiving, and beyond that what it is granted of
  the budget that all share, for one large frame and one large reply. Without a grant it is not read
  from.
- A connection that does not read its replies is not read from either, and is closed if it goes on
  so; half a frame that does not become a whole one in time ends the connection.
- One turn of the loop serves one request of a connection: many small ones of one client do not keep
  the others waiting.

This module must not know what requests mean.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from vswap.protocol import (
    HEADER_BYTES,
    PAGE_BYTES,
    FrameError,
    Header,
    Op,
    Status,
    parse_header,
)
from vswapd.session import Peer, Reply, Session, failure

_LOG: Final = logging.getLogger(__name__)
BASE_BUFFER: Final = 320 * 1024
"""A frame of 64 pages and the beginning of the next."""
_BACKLOG: Final = 128
_HIGH_WATER: Final = 512 * 1024
"""Unsent bytes beyond which no further request of the connection is looked at."""


class Budget:
    """Memory that all connections share for what is larger than their base buffers."""

    def __init__(self, size: int) -> None:
        self.size: Final = size
        self.free = size
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

    def take(self, amount: int, when_granted: Callable[[], None]) -> bool:
        """Take `amount` now, or have `when_granted` called once it was taken for the caller."""
        assert amount <= self.size
        if not self._waiting and amount <= self.free:
            self.free -= amount
            return True
        self._waiting.append((amount, when_granted))
        return False

    def give(self, amount: int) -> None:
        """Return what was taken."""
        self.free += amount
        while self._waiting and self._waiting[0][0] <= self.free:
            amount, when_granted = self._waiting.popleft()
            self.free -= amount
            when_granted()


class Connection(asyncio.BufferedProtocol):
    """One client's connection. See the module."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray(BASE_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._granted = 0
        """Of the budget, for the large frame that is being received."""
        self._reply_granted = 0
        self._waiting_for_grant = False
        self._busy = False
        self._scheduled = False
        self._unread = False
        """The peer does not read: too much is waiting to be sent."""
        self._reading = True
        self._closing = False
        self._lost = False
        self._frame_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport
        self.session: Session

    # Transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_HIGH_WATER, low=0)
        self._server.welcome(self, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes shall go."""
        del sizehint
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        self._end += nbytes
        if self._frame_since is None:
            self._frame_since = self._loop.time()
        self._pump()

    def eof_received(self) -> bool:
        """The client will send no more: the transport is closed."""
        return False

    def pause_writing(self) -> None:
        """Too much is unsent."""
        self._unread = True
        self._watch()

    def resume_writing(self) -> None:
        """All that was unsent is sent."""
        self._unread = False
        self._return_reply_grant()
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        del exc
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
        self._return_reply_grant()
        if not self._busy:
            self._part()

    # Requests

    def _pump(self) -> None:
        """Serve the next whole request, if nothing speaks against it."""
        self._scheduled = False
        if self._busy or self._unread or self._closing or self._lost or self._waiting_for_grant:
            self._throttle()
            return
        have = self._end - self._start
        if have < HEADER_BYTES:
            self._rest(have)
            return
        try:
            header = parse_header(self._buffer, self._start, self._server.max_frame)
        except FrameError as error:
            broken = Header(HEADER_BYTES, error.op, 0, 0, 0, error.request_id)
            self._send(failure(broken, error.status, str(error)))
            return
        if have < header.length:
            self._make_room(header.length)
            self._rest(have)
            return
        if self._server.stopping:
            self._send(failure(header, Status.STOPPING, "the daemon is shutting down"))
            return
        if not self._grant_reply(header):
            return
        body = self._view[self._start + HEADER_BYTES : self._start + header.length]
        self._frame_since = None
        answer = self.session.handle(header, body)
        del body
        self._consume(header.length)
        if isinstance(answer, Reply):
            self._send(answer)
            self._soon()
        else:
            self._busy = True
            self._server.spawn(self._await(answer))

    async def _await(self, answer: Awaitable[Reply]) -> None:
        try:
            reply = await answer
        finally:
            self._busy = False
        if self._lost:
            self._part()
            return
        self._send(reply)
        self._soon()

    def _soon(self) -> None:
        """Another turn for this connection, after the others had theirs."""
        if self._end - self._start >= HEADER_BYTES and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump)
        elif not self._scheduled:
            self._rest(self._end - self._start)

    def _send(self, reply: Reply) -> None:
        if self._lost or self._closing:
            return
        # One write: a header of its own would be a packet, and a wake-up, of its own.
        self._transport.write(b"".join(reply.parts))
        if not self._unread:
            self._return_reply_grant()
        if reply.closes:
            self._closing = True
            self._transport.close()

    # Buffers

    def _consume(self, length: int) -> None:
        """A frame is done with: forget its bytes, and its large buffer."""
        self._start += length
        have = self._end - self._start
        if self._granted and have <= BASE_BUFFER:
            self._move(bytearray(BASE_BUFFER), have)
            granted, self._granted = self._granted, 0
            self._server.budget.give(granted)
        elif have == 0:
            self._start = self._end = 0
        if have:
            self._frame_since = self._loop.time()

    def _move(self, buffer: bytearray, have: int) -> None:
        buffer[:have] = self._view[self._start : self._end]
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._start, self._end = 0, have

    def _make_room(self, length: int) -> None:
        """Make the buffer large enough for the frame that begins at its start."""
        if length <= len(self._buffer):
            if self._start + length > len(self._buffer):
                self._move(self._buffer, self._end - self._start)
            return
        if self._server.budget.take(length, self._granted_frame):
            self._take_over(length)
        else:
            self._waiting_for_grant = True

    def _granted_frame(self) -> None:
        """The budget had room at last."""
        self._waiting_for_grant = False
        length = self._frame_length()
        if self._lost or self._closing:
            self._server.budget.give(length)
            return
        self._take_over(length)
        self._pump()

    def _frame_length(self) -> int:
        return parse_header(self._buffer, self._start, self._server.max_frame).length

    def _take_over(self, length: int) -> None:
        self._granted = length
        self._move(bytearray(length), self._end - self._start)

    def _grant_reply(self, header: Header) -> bool:
        """Whether the reply's memory is granted; if not, the request waits for it."""
        size = header.count * PAGE_BYTES if header.op == Op.LOAD else 0
        if size <= BASE_BUFFER or size > self._server.max_frame or self._reply_granted:
            return True

        def granted() -> None:
            self._waiting_for_grant = False
            if self._lost or self._closing:
                self._server.budget.give(size)
                return
            self._reply_granted = size
            self._pump()

        if self._server.budget.take(size, granted):
            self._reply_granted = size
            return True
        self._waiting_for_grant = True
        self._throttle()
        return False

    def _return_reply_grant(self) -> None:
        granted, self._reply_granted = self._reply_granted, 0
        if granted:
            self._server.budget.give(granted)

    # Reading or not, and for how long

    def _rest(self, have: int) -> None:
        """Nothing whole is there: read on."""
        if have and self._frame_since is None:
            self._frame_since = self._loop.time()
        if not have:
            self._frame_since = None
            if self._start:
                self._start = self._end = 0
        elif self._end == len(self._buffer) and self._start:
            self._move(self._buffer, have)
        self._throttle()
        if have:
            self._watch()

    def _throttle(self) -> None:
        """Read only while there is room for what comes, and somebody to serve it."""
        wanted = self._end < len(self._buffer) and not self._unread and not self._waiting_for_grant
        if wanted != self._reading and not self._lost and not self._transport.is_closing():
            self._reading = wanted
            if wanted:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _watch(self) -> None:
        """Look again in request_timeout whether the peer has moved on."""
        if self._timer is None and not self._lost:
            unsent = self._transport.get_write_buffer_size()
            self._timer = self._loop.call_later(
                self._server.request_timeout, self._look, self._frame_since, unsent
            )

    def _look(self, frame_since: float | None, unsent: int) -> None:
        self._timer = None
        if self._lost or self._closing:
            return
        if self._unread and self._transport.get_write_buffer_size() >= unsent > 0:
            _LOG.warning("%s does not read its replies: closed", self._server.name_of(self))
            self._transport.abort()
            return
        stuck = frame_since is not None and frame_since == self._frame_since
        if stuck and not self._busy and not self._waiting_for_grant and not self._unread:
            broken = Header(HEADER_BYTES, 0, 0, 0, 0, 0)
            text = f"half a frame, and no more for {self._server.request_timeout:.0f} s"
            self._send(failure(broken, Status.TIMED_OUT, text))
            return
        if self._unread or self._end > self._start:
            self._watch()

    # The end

    def refuse(self, reply: Reply) -> None:
        """Answer before anything was asked, and close."""
        self._send(reply)

    def stop_if_idle(self) -> None:
        """The daemon is stopping: nothing is under way here, so part now."""
        if not self._busy and self._end == self._start:
            self._closing = True
            self._transport.close()

    def abort(self) -> None:
        """Close without waiting for anything."""
        if not self._lost:
            self._transport.abort()

    def _part(self) -> None:
        """The connection is gone and nothing is under way: let go of everything."""
        granted, self._granted = self._granted, 0
        if granted:
            self._server.budget.give(granted)
        self._server.parted(self)


class Server:
    """All connections of one listening socket."""

    def __init__(
        self,
        *,
        new_session: Callable[[Peer], Session],
        peer_of: Callable[[asyncio.Transport], Peer],
        max_connections: int,
        max_frame: int,
        buffer_memory: int,
        request_timeout: float,
    ) -> None:
        self._new_session = new_session
        self._peer_of = peer_of
        self.max_connections: Final = max_connections
        self.max_frame: Final = max_frame
        # Less than two of the largest frames, and a large request could wait for its own reply.
        self.budget: Final = Budget(max(buffer_memory, 2 * max_frame))
        self.request_timeout: Final = request_timeout
        self.stopping = False
        self.connections: Final[dict[Connection, Peer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[asyncio.Server] = []
        self._empty = asyncio.Event()
        self._empty.set()

    async def listen(self, listener: socket.socket) -> None:
        """Serve the connections of a listening Unix socket."""
        self._listeners.append(
            await asyncio.get_running_loop().create_unix_server(
                lambda: Connection(self), sock=listener, backlog=_BACKLOG
            )
        )

    def welcome(self, connection: Connection, transport: asyncio.Transport) -> None:
        """A client has connected: give it a session, or an answer why not."""
        peer = self._peer_of(transport)
        connection.session = self._new_session(peer)
        refused = len(self.connections) >= self.max_connections
        self.connections[connection] = peer
        self._empty.clear()
        if refused:
            text = f"{self.max_connections} connections are open: close one, or raise "
            text += "server.max_connections"
            header = Header(HEADER_BYTES, Op.HELLO, 0, 0, 0, 0)
            connection.refuse(failure(header, Status.TOO_MANY_CONNECTIONS, text))

    def name_of(self, connection: Connection) -> str:
        """How a client is called in the log."""
        peer = self.connections[connection]
        return f"{peer.name} (pid {peer.pid}, uid {peer.uid})"

    def spawn(self, work: Awaitable[None]) -> None:
        """Run something to its end, whatever becomes of its connection."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def parted(self, connection: Connection) -> None:
        """A connection is gone: free what its space holds."""
        self.spawn(self._close(connection))

    async def _close(self, connection: Connection) -> None:
        try:
            await connection.session.close()
        finally:
            del self.connections[connection]
            if not self.connections:
                self._empty.set()

    async def stop(self, patience: float) -> None:
        """Take no more connections, finish running requests, close the rest."""
        self.stopping = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.stop_if_idle()
        try:
            await asyncio.wait_for(self._empty.wait(), patience)
        except TimeoutError:
            _LOG.warning("%d connections did not end in time", len(self.connections))
            for connection in list(self.connections):
                connection.abort()
        while self._tasks:
            await asyncio.wait(self._tasks)
