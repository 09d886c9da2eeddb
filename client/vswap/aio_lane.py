"""A lane in an event loop: one socket to one shard, sent to and read from as it allows.

Theory: calls wait in `_queue`, the first sends its frames while the lane has room. Readiness of
the socket drives everything, by add_reader and add_writer: frames go out with sendmsg and replies
come straight into their results, where asyncio's transports and streams would copy both.

Invariants:
- A call that has frames left to send on this lane is in `_queue`. One that must undo itself is put
  back into it.
- Once the lane is closed nothing of it is registered with the loop.

This module must not know what the calls mean, or that there are other lanes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import weakref
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from vswap.address import Search, hung_up, unconnected_socket
from vswap.conversation import Conversation
from vswap.errors import Broken, TimedOut, VswapError
from vswap.window import receive

if TYPE_CHECKING:
    from pathlib import Path

    from vswap.pages import View
    from vswap.peer import Outcome
    from vswap.planner import Call
    from vswap.waiting import Wait

_GATHER_BYTES: Final = 65536
"""Small requests are sent together up to this many bytes, to save system calls."""
_GATHER_BUFFERS: Final = 512
"""... and up to this many of their pieces; the kernel takes 1024 (IOV_MAX)."""
_READ_BYTES: Final = 1 << 20
"""Most bytes read before the loop's other work has its turn."""
_RETRY_S: Final = 0.01
"""Pause before the next try when the daemon's queue of new connections is full: the kernel tells of
no event for that."""


@contextlib.contextmanager
def told(wait: Wait) -> Iterator[None]:
    """Have it said that there is a wait, if it lasts for long."""
    timer = asyncio.get_running_loop().call_later(wait.notice_s, wait.tell)
    try:
        yield
    finally:
        timer.cancel()


async def open_async(search: Search, wait: Wait) -> tuple[socket.socket, Path]:
    """A connected, non-blocking socket to the first daemon that answers, and where that is.

    Args:
        search: The places to try.
        wait: How long each of them is waited for. To be `told` by the caller.

    Raises:
        NoDaemon: none does.
    """
    for candidate in search.places:
        search.begin(candidate)
        wait.sign()
        try:
            sock = unconnected_socket(candidate)
        except OSError as error:
            search.note(candidate, error)
            continue
        try:
            sock.setblocking(False)
            async with asyncio.timeout(wait.left_s):
                await _connect(sock, candidate.path)
        except (OSError, ValueError) as error:
            sock.close()
            search.note(candidate, error)
        except BaseException:
            sock.close()
            raise
        else:
            search.sock = sock
            return sock, candidate.path.absolute()
    raise search.failure()


async def _connect(sock: socket.socket, path: Path) -> None:
    while True:
        try:
            sock.connect(os.fspath(path))
        except BlockingIOError:
            await asyncio.sleep(_RETRY_S)
        else:
            return


def silence(said: str, silence_s: float | None) -> TimedOut:
    """The error for a shard that says nothing. `said`: what is said of the daemon then."""
    return TimedOut(f"{said} (it was silent for {silence_s} s; the connection is closed)")


class Owner(Protocol):
    """Whom a lane tells what happens."""

    def answered(self, call: Call) -> None:
        """A reply for the call has come, or there will be none."""

    def lose(self, lane: AsyncLane, error: VswapError) -> None:
        """The lane is of no more use, unless it is taken up again."""


class AsyncLane:
    """One connected, non-blocking socket, owned, and the conversation over it."""

    def __init__(self, sock: socket.socket, owner: Owner) -> None:
        self._loop = asyncio.get_running_loop()
        self.owner = owner
        """Whom to tell."""
        self.shard = 0
        """Which shard answers. Written by whoever has said HELLO."""
        self.heard_at = self._loop.time()
        """When something has come from it, or it was asked something with nothing unanswered. The
        latter is written by the owner."""
        self.conversation: Final = Conversation()
        self._queue: deque[Call] = deque()
        self._parked: deque[Call] | None = None
        """Calls that wait until the lane is taken up again; None: it is in use."""
        self._buffers: list[View] = []
        """What is being sent, in order."""
        self.descriptor: int | None = None
        """What came with the first bytes. Whoever has said HELLO takes it, or closes it."""
        self._use(sock)
        _lanes.add(self)

    def _use(self, sock: socket.socket) -> None:
        self._sock = sock
        self._writer_added = False
        self._mute = False
        """The daemon reads no more; what it said before is still to be read."""
        self._closed = False
        self._unheard = True
        self._loop.add_reader(sock, self._read)

    @property
    def gone(self) -> bool:
        """Whether the daemon's end has gone, whether the loop has seen it or not."""
        return self._closed or hung_up(self._sock)

    def interrupt(self) -> None:
        """Let go of the socket; calls wait until `resume`, those too that come meanwhile."""
        self._hang_up()
        if self._buffers:
            self.conversation.not_sent()
            self._buffers.clear()
        self.conversation.interrupt()
        if self._parked is None:
            self._parked = self._queue
        self._queue = deque()

    def reopen(self, sock: socket.socket) -> None:
        """Go on over another socket. HELLO is to be said there (`greet`), then `resume`."""
        self._use(sock)

    def greet(self, call: Call) -> None:
        """Send HELLO."""
        self._queue.append(call)
        self._write()

    def resume(self, last: Outcome | None) -> None:
        """HELLO has been answered: go on with what was interrupted, then with what has waited."""
        assert self._parked is not None
        self.conversation.resume(last)
        self._queue, self._parked = self._parked, None
        self._write()

    def put(self, call: Call) -> None:
        """Send what the call has for this lane, after the calls before it."""
        if self._parked is not None:
            self._parked.append(call)
            return
        self._queue.append(call)
        self._write()

    def abandon(self, call: Call) -> None:
        """The caller is gone; his buffers are his again."""
        self.conversation.abandon(call)
        # Some of what is being sent may be his; it cannot be left out any more, so it is copied.
        self._buffers = [memoryview(bytes(view)) for view in self._buffers]

    def close(self) -> None:
        """Close the socket, and let go of the calls."""
        self._hang_up()
        self._queue.clear()
        self._parked = None
        self._buffers.clear()
        self.conversation.end()

    def _hang_up(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        if self._writer_added:
            self._loop.remove_writer(self._sock)
        self._sock.close()

    def _write(self) -> None:
        """Send what can be sent now."""
        while not self._mute and not self._closed:
            self._gather()
            while self.conversation.dropped:
                self.owner.answered(self.conversation.dropped.pop())
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
                self.owner.lose(self, Broken(f"the connection to the daemon broke: {error}"))
                return
            self._drop(sent)
        if self._writer_added and not self._closed:
            self._loop.remove_writer(self._sock)
            self._writer_added = False

    def _gather(self) -> None:
        """Fill up `_buffers` with the next frames."""
        pending = sum(map(len, self._buffers))
        conversation, queue = self.conversation, self._queue
        while pending < _GATHER_BYTES and len(self._buffers) < _GATHER_BUFFERS:
            if not queue and not conversation.repeats:
                return
            frame = conversation.request(queue[0] if queue else None, self.shard)
            if frame is not None:
                self._buffers += frame
                pending += sum(view.nbytes for view in frame)
            elif conversation.full:
                return
            elif queue:
                queue.popleft()

    def _drop(self, sent: int) -> None:
        buffers, done = self._buffers, 0
        while done < len(buffers) and sent >= buffers[done].nbytes:
            sent -= buffers[done].nbytes
            done += 1
        del buffers[:done]
        if sent:
            buffers[0] = buffers[0][sent:]

    def _read(self) -> None:
        """Take what has arrived; then send what the answers made room for."""
        self.heard_at = self._loop.time()
        try:
            self._take()
        except BlockingIOError:
            pass
        except VswapError as error:
            self.owner.lose(self, error)
            return
        except OSError as error:
            self.owner.lose(self, Broken(f"the connection to the daemon broke: {error}"))
            return
        self._write()

    def _take(self) -> None:
        conversation, left = self.conversation, _READ_BYTES
        while left > 0:
            # No variable for it: a traceback must not hold the caller's memory.
            wanted_bytes = conversation.wanted.nbytes
            if self._unheard:
                count, self.descriptor = receive(self._sock, conversation.wanted)
                self._unheard = False
            else:
                count = self._sock.recv_into(conversation.wanted)
            if not count:
                raise Broken("the daemon closed the connection (did it stop, or die?)")
            call = conversation.arrived(count)
            if call is not None:
                self.owner.answered(call)
            if count < wanted_bytes:
                return  # there is no more
            left -= count

    def leave_to_the_parent(self) -> None:
        """In a forked child: close its copy of the socket, or the daemon would not see ours end.

        The loop is left alone: it has its events in common with the parent's.
        """
        if not self._closed:
            self._closed = True
            self._sock.close()


_lanes: weakref.WeakSet[AsyncLane] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    for lane in list(_lanes):
        lane.leave_to_the_parent()


os.register_at_fork(after_in_child=_leave_to_the_parent)
