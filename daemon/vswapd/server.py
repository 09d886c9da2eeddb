"""The listening socket and everybody who came through it.

Invariants:
- No more than there are places for are open (see `places`); one more is told so, and closed.
- One round of the loop serves one request of a connection, and one turn of all that is too large
  for a round (see `turns`): whatever one client sends, others wait for little of it at a time.
- Stopping answers what is under way, tells everybody else, and leaves no task behind.

This module must not know what requests mean, or how bytes become requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

from vswap.protocol import HEADER_BYTES, Header, Status
from vswapd.acceptor import Acceptor
from vswapd.buffers import Buffers
from vswapd.connection import CROWDED_S, Connection
from vswapd.driver import Driver, Pending
from vswapd.peer import Peer
from vswapd.places import Places
from vswapd.session import Session, failure

_LOG: Final = logging.getLogger(__name__)

_QUIET_S: Final = 60.0
"""Between two lines of the journal about clients that were refused."""
_CHECKS: Final = 4
"""Looks per time of patience: a connection is cut off at most a quarter late."""


class Server:
    """All connections of the listening sockets. See connection.Hub for what they use of it."""

    def __init__(
        self,
        *,
        driver: Driver,
        new_session: Callable[[Peer], Session],
        max_connections: int,
        max_user_connections: int,
        max_frame: int,
        buffer_memory: int,
        most_unsent: int,
        request_timeout: float,
    ) -> None:
        """Serve nobody yet.

        Args:
            driver: runs what is asked for.
            new_session: makes a peer's session.
            max_connections: open ones of clients.
            max_user_connections: of them those of one user.
            max_frame: bytes of a request.
            buffer_memory: bytes of requests and replies under way.
            most_unsent: bytes of unsent replies per connection; the kernel may hold as much. One of
                64 pages should fit: the loop is spared a second turn for its rest.
            request_timeout: seconds.
        """
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.driver = driver
        self.buffers = Buffers(buffer_memory, max_connections)
        self.max_frame = max_frame
        self.most_unsent = most_unsent
        self.request_timeout = request_timeout
        self.scratch = memoryview(bytearray(64 * 1024))
        self.stopping = False
        self._new_session = new_session
        self._places: Final = Places(max_connections, max_user_connections)
        self._refusals: Final = Refusals()
        self._connections: dict[Connection, tuple[int, Callable[[], None]]] = {}
        """And the user whose place it has, and whom to tell when it has gone."""
        self._acceptors: list[Acceptor] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.TimerHandle | None = None

    @property
    def clients(self) -> int:
        """Open connections, but for those of spaces that have their first one elsewhere."""
        return sum(not connection.session.joined for connection in self._connections)

    # Coming

    def listen(self, listener: socket.socket) -> Acceptor:
        """Serve the connections of a listening Unix socket. It is closed by `stop`."""
        self._acceptors.append(Acceptor(listener, self.welcome))
        return self._acceptors[-1]

    def welcome(self, sock: socket.socket, gone: Callable[[], None] = lambda: None) -> None:
        """Serve a connection that was accepted, here or elsewhere.

        Args:
            sock: the connection; owned from now on.
            gone: called once it has gone, which may be at once: there may be too many.
        """
        sock.setblocking(False)
        peer = Peer.of(sock)
        if why := self._places.refusal(peer.uid):
            self._refusals.refuse(sock, why, self.loop.time())
            gone()
            return
        self._places.take(peer.uid)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.most_unsent)
        connection = Connection(self, sock, self._new_session(peer))
        self._connections[connection] = peer.uid, gone
        self._empty.clear()
        if self._timer is None:
            self._timer = self.loop.call_later(self.request_timeout / _CHECKS, self._check)
        connection.start()

    # Going

    def parted(self, connection: Connection) -> None:
        """See connection.Hub."""
        uid, gone = self._connections.pop(connection)
        self._places.give(uid)
        gone()
        if not self.stopping:
            # At the end there is nothing to be freed for.
            outcome = self.driver.start(connection.session.close())
            if isinstance(outcome, Pending):
                self.spawn(self.driver.finish(outcome))
        if not self._connections:
            self._empty.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """See connection.Hub."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("a task failed by a mistake of ours", exc_info=error)

    def _check(self) -> None:
        """Cut off who keeps others waiting; nobody is looked at while nobody is there."""
        now = self.loop.time()
        for connection in list(self._connections):
            connection.check(now)
        self._timer = None
        if self._connections:
            self._timer = self.loop.call_later(self.request_timeout / _CHECKS, self._check)

    def crowded(self) -> None:
        """See connection.Hub."""
        if self._soon is None:
            self._soon = self.loop.call_later(CROWDED_S / _CHECKS, self._check_soon)

    def _check_soon(self) -> None:
        """Look more often while somebody waits for memory."""
        self._soon = None
        for connection in list(self._connections):
            connection.check(self.loop.time())
        if self.buffers.crowded:
            self.crowded()

    async def stop(self, patience: float) -> None:
        """Take no more connections, answer what is under way, tell and close the rest.

        Args:
            patience: seconds after which what is still under way is given up.
        """
        self.stopping = True
        for acceptor in self._acceptors:
            acceptor.close()
        for connection in list(self._connections):
            connection.stop()
        try:
            async with asyncio.timeout(patience):
                await self._empty.wait()
        except TimeoutError:
            _LOG.warning("%d connections were cut off: no end in %g s", self.clients, patience)
            for connection in list(self._connections):
                connection.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for timer in (self._timer, self._soon):
            if timer is not None:
                timer.cancel()


class Refusals:
    """Tells clients that there are as many connections as there may be; the journal, now and then.

    Who is refused may try in a loop, and may let a place become free in between: that is no news.
    """

    def __init__(self) -> None:
        self._quiet_until = -math.inf

    def refuse(self, sock: socket.socket, why: str, now: float) -> None:
        """Say why, and close the connection. `now` is in seconds, of any clock that only rises."""
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_S
            peer = Peer.of(sock)
            _LOG.warning("%s of user %d was refused: %s", peer.name, peer.uid, why)
        header = Header(HEADER_BYTES, 0, 0, 0, 0, 0)
        reply = failure(header, Status.TOO_MANY_CONNECTIONS, why)
        with sock:
            try:
                sock.sendmsg(reply.parts, (), socket.MSG_NOSIGNAL)
            except OSError:
                return  # gone already: it will not miss the answer
