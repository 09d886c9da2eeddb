"""A connection in an event loop: calls of many tasks, sent and answered as the socket allows.

Theory: calls wait in `_queue`, the first sends its frames while the window has room. Readiness of
the socket drives everything, by add_reader and add_writer: frames go out with sendmsg and replies
come straight into their results, where asyncio's transports and streams would copy both.

Invariants:
- A call is in `_waiting` until it is over, has been abandoned, or the connection is lost; each of
  these happens once.
- A call that has frames left to send is in `_queue`. One that must undo itself comes back into it.
- Once the connection is lost nothing of it is registered with the loop.

This module must not know what the calls mean.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

from vswap.address import Candidate, Search, unconnected_socket
from vswap.conversation import Conversation
from vswap.errors import ConnectionLost, TimedOut, VswapError

if TYPE_CHECKING:
    from vswap.planner import Call, View

_GATHER_BYTES: Final = 65536
"""Small requests are sent together up to this many bytes, to save system calls."""
_GATHER_BUFFERS: Final = 512
"""... and up to this many of their pieces; the kernel takes 1024 (IOV_MAX)."""
_READ_BYTES: Final = 1 << 20
"""Most bytes read before the loop's other work has its turn."""
_RETRY_S: Final = 0.01
"""Pause before the next try when the daemon's queue of new connections is full: the kernel tells of
no event for that."""


async def open_async(
    path: str | os.PathLike[str] | None, silence_s: float | None
) -> AsyncConnection:
    """Connect to the first daemon that answers.

    Raises:
        NoDaemon: none does.
    """
    search = Search(path, silence_s)
    for candidate in search.places:
        try:
            sock = unconnected_socket(candidate)
        except OSError as error:
            search.note(candidate, error)
            continue
        try:
            sock.setblocking(False)
            async with asyncio.timeout(silence_s):
                await _connect(sock, candidate)
            return AsyncConnection(sock, silence_s)
        except OSError as error:
            sock.close()
            search.note(candidate, error)
        except BaseException:
            sock.close()
            raise
    raise search.failure()


async def _connect(sock: socket.socket, candidate: Candidate) -> None:
    while True:
        try:
            sock.connect(os.fspath(candidate.path))
        except BlockingIOError:
            await asyncio.sleep(_RETRY_S)
        else:
            return


class AsyncConnection:
    """One connected, non-blocking socket, owned, and the conversation over it."""

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._timeout = timeout
        self._why_closed: str | None = None
        self.conversation = Conversation()
        self._queue: deque[Call] = deque()
        self._waiting: dict[Call, asyncio.Future[None]] = {}
        self._buffers: list[View] = []
        """What is being sent, in order."""
        self._writer_added = False
        self._mute = False
        """The daemon reads no more; what it said before is still to be read."""
        self._heard_at = self._loop.time()
        self._watch: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock, self._read)

    @property
    def closed(self) -> bool:
        """Whether calls can only fail."""
        return self._why_closed is not None

    def close(self) -> None:
        """Close it; calls that run fail with ConnectionLost."""
        if not self.closed:
            self._lose(ConnectionLost("the connection was closed"))

    async def run(self, call: Call) -> None:
        """Carry a call through. Its own errors are kept in it; ask it for its result.

        Raises:
            ConnectionLost: the connection is closed, or was.
            ProtocolError: the daemon answered nonsense; the connection is closed now.
        """
        if self._why_closed is not None:
            raise ConnectionLost(f"the connection is closed: {self._why_closed}; connect() again")
        if call.over:
            return
        future = self._loop.create_future()
        self._waiting[call] = future
        self._queue.append(call)
        if self.conversation.idle:
            self._heard_at = self._loop.time()
        if self._timeout is not None and self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._look)
        self._write()
        try:
            await future
        except asyncio.CancelledError:
            self._abandon(call)
            raise

    def _abandon(self, call: Call) -> None:
        """The caller is gone; his buffers are his again."""
        self._waiting.pop(call, None)
        if self.closed:
            return
        self.conversation.abandon(call)
        # Some of what is being sent may be his; it cannot be left out any more, so it is copied.
        self._buffers = [memoryview(bytes(view)) for view in self._buffers]
        call.release()
        self._queue.append(call)
        self._write()

    def _write(self) -> None:
        """Send what can be sent now."""
        while not self._mute and not self.closed:
            self._gather()
            if not self._buffers:
                break
            try:
                sent = self._sock.sendmsg(self._buffers, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not self._writer_added:
                    self._loop.add_writer(self._sock, self._write)
                    self._writer_added = True
                return
            except (BrokenPipeError, ConnectionResetError):
                # The reader will meet the end too, behind the daemon's last words.
                self._mute = True
                break
            except OSError as error:
                self._lose(ConnectionLost(f"the connection to the daemon broke: {error}"))
                return
            self._drop(sent)
        if self._writer_added:
            self._loop.remove_writer(self._sock)
            self._writer_added = False

    def _gather(self) -> None:
        """Fill up `_buffers` with the next frames."""
        pending = sum(map(len, self._buffers))
        while self._queue and pending < _GATHER_BYTES and len(self._buffers) < _GATHER_BUFFERS:
            frame = self.conversation.request(self._queue[0])
            if frame is not None:
                self._buffers += frame
                pending += sum(map(len, frame))
            elif self.conversation.full:
                return
            else:
                self._queue.popleft()

    def _drop(self, sent: int) -> None:
        buffers, done = self._buffers, 0
        while done < len(buffers) and sent >= len(buffers[done]):
            sent -= len(buffers[done])
            done += 1
        del buffers[:done]
        if sent:
            buffers[0] = buffers[0][sent:]

    def _read(self) -> None:
        """Take what has arrived; then send what the answers made room for."""
        self._heard_at = self._loop.time()
        try:
            self._take()
        except BlockingIOError:
            pass
        except VswapError as error:
            self._lose(error)
            return
        except OSError as error:
            self._lose(ConnectionLost(f"the connection to the daemon broke: {error}"))
            return
        self._write()

    def _take(self) -> None:
        conversation, left = self.conversation, _READ_BYTES
        while left > 0:
            wanted = conversation.wanted
            count = self._sock.recv_into(wanted)
            if not count:
                raise ConnectionLost("the daemon closed the connection (did it stop, or die?)")
            call = conversation.arrived(count)
            if call is not None:
                self._answered(call)
            if count < len(wanted):
                return  # there is no more
            left -= count

    def _answered(self, call: Call) -> None:
        if call.over:
            call.release()
            future = self._waiting.pop(call, None)
            if future is not None and not future.done():
                future.set_result(None)
        elif call.error is not None or call.abandoned:
            self._queue.append(call)

    def _look(self) -> None:
        """Whether the daemon has been silent for too long."""
        self._watch = None
        if self._timeout is None or self.closed or self.conversation.idle:
            return
        silence = self._loop.time() - self._heard_at
        if silence >= self._timeout:
            self._lose(TimedOut(f"the daemon was silent for {self._timeout} s"))
        else:
            self._watch = self._loop.call_later(self._timeout - silence, self._look)

    def _lose(self, error: VswapError) -> None:
        """The end: every call that waits fails."""
        self._why_closed = str(error)
        self._loop.remove_reader(self._sock)
        if self._writer_added:
            self._loop.remove_writer(self._sock)
        if self._watch is not None:
            self._watch.cancel()
        self._sock.close()
        self._queue.clear()
        self._buffers.clear()
        self.conversation.end()
        waiting, self._waiting = self._waiting, {}
        first = True
        for call, future in waiting.items():
            call.release()
            if not future.done():
                # One exception object must not be raised in two tasks.
                future.set_exception(error if first else ConnectionLost(str(error)))
                first = False
