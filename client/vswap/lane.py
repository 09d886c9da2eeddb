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
import time
from typing import TYPE_CHECKING, Final, NoReturn

from vswap.address import hung_up, limit_receive_or_send
from vswap.conversation import Conversation
from vswap.errors import Broken, ConnectionLost, NoDaemon, Stopping, TimedOut
from vswap.protocol import MAX_BATCH
from vswap.waiting import NOTICE_S, Wait
from vswap.window import receive

if TYPE_CHECKING:
    from collections.abc import Callable

    from vswap.pages import View
    from vswap.planner import Call

_SEND_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET})
_SAID_NOTHING: Final = "the daemon closed the connection (did it stop, or die?)"


class Lane:
    """One connected socket, owned.

    Args:
        sock: Connected and blocking; closed by `close`.
        timeout: Seconds of silence in the middle of a call after which the daemon is given up;
            None: wait for ever.
        silent: What to say of it when it is silent; it is given the socket.
    """

    def __init__(
        self,
        sock: socket.socket,
        timeout: float | None,
        silent: Callable[[socket.socket], str] = lambda _: "vswapd is not answering",
    ) -> None:
        self.shard = 0
        """Which shard answers. Written by whoever has said HELLO."""
        self.conversation: Final = Conversation()
        self.broken = False
        """Whether the socket has ended without a word; `reopen` may help."""
        self._timeout = timeout
        self.silent = silent
        """What to say of a daemon that is silent."""
        self.extend: Callable[[], bool] | None = None
        """Asked when it has been silent for `timeout`: whether to wait on all the same."""
        self._first_step = NOTICE_S if timeout is None else min(timeout, NOTICE_S)
        """Seconds of silence after which there may be something to be said or done."""
        self._outgoing: list[View] = []
        """What is left of a frame that could not be sent whole; of calls over several lanes."""
        self._use(sock)

    def _use(self, sock: socket.socket) -> None:
        self.sock = sock
        self._poll = select.poll()
        self._limit_silence(self._first_step)
        self._poll.register(sock, select.POLLIN | select.POLLOUT)

    def _limit_silence(self, seconds: float | None) -> None:
        limit_receive_or_send(self.sock, socket.SO_RCVTIMEO, seconds)

    @property
    def gone(self) -> bool:
        """Whether the daemon's end has gone, whether that was noticed or not."""
        return self.broken or hung_up(self.sock)

    def reopen(self, sock: socket.socket) -> None:
        """Go on over another socket. HELLO is to be said there, then `conversation.resume`."""
        self.sock.close()
        self.interrupt()
        self._use(sock)
        self.broken = False

    def interrupt(self) -> int:
        """Let go of what was under way, until it is taken up again; see Conversation.interrupt."""
        if self._outgoing:
            self.conversation.not_sent()
            self._outgoing.clear()
        return self.conversation.interrupt()

    def be_quiet(self, seconds: float) -> None:
        """Let some time pass in which nothing is asked; the daemon may end the connection in it.

        Raises:
            ConnectionLost, ProtocolError: as `exchange`.
        """
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        end = time.monotonic() + seconds
        while poll.poll(max(0.0, end - time.monotonic()) * 1000):
            self.pull()

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
        except ConnectionLost:
            self.conversation.not_sent()
            raise
        finally:
            buffers.clear()  # a traceback must not hold the caller's memory

    def _wait(self) -> None:
        """Wait until something can be sent; read the replies that come before."""
        ready = self.wait_for(self._poll)
        if ready[0][1] & select.POLLIN:
            self._read_reply()

    def wait_for(self, poll: select.poll) -> list[tuple[int, int]]:
        """What is ready of what is polled, once something is.

        Raises:
            TimedOut: the daemon was silent for too long.
        """
        ready = poll.poll(self._first_step * 1000)
        if not ready:
            wait = self._wait_on()
            while not ready:
                if wait.over():
                    raise self.silence()
                ready = poll.poll(_ms(wait.step_s()))
            wait.end()
        return ready

    def _wait_on(self) -> Wait:
        """The rest of a wait that has lasted for its first step."""
        return Wait(
            self._timeout,
            lambda: self.silent(self.sock),
            extend=self.extend,
            passed_s=self._first_step,
        )

    def _read_reply(self) -> None:
        conversation = self.conversation
        while True:
            try:
                count = self.sock.recv_into(conversation.wanted, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                self._await_reply()
                continue
            except OSError as error:
                raise self._break(f"the connection to the daemon broke: {error}") from error
            if not count:
                raise self._break(_SAID_NOTHING)
            if self._arrived(count):
                return

    def _await_reply(self) -> None:
        """Nothing has come for the first step of a wait: wait on, until something does."""
        wait = self._wait_on()
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while True:
            if wait.over():
                raise self.silence()
            if poll.poll(_ms(wait.step_s())):
                wait.end()
                return

    def greet(self, call: Call, wait: Wait, *, away: bool) -> int | None:
        """Carry HELLO through; returns the descriptor that came with the answer, if any did.

        Args:
            call: HELLO.
            wait: For its answer, all of it.
            away: Whether the daemon may not be back yet: it has been connected to, since somebody
                listens for it, but nobody may answer for long, or ever.

        Raises:
            ConnectionLost, ProtocolError: as `exchange`.
        """
        buffers = self.conversation.request(call, self.shard)
        assert buffers is not None
        self._send(buffers)
        self._await_greeting(wait, away=away)
        count, descriptor = self._receive_first()
        try:
            self._arrived(count)
            while call.in_flight:
                self._await_greeting(wait, away=away)
                self.pull()
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        wait.end()
        return descriptor

    def _await_greeting(self, wait: Wait, *, away: bool) -> None:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while not poll.poll(_ms(wait.step_s())):
            if wait.over():
                raise NoDaemon("nobody answers there") if away else self.silence()

    def _receive_first(self) -> tuple[int, int | None]:
        """Bytes, and the descriptor that came with them."""
        try:
            count, descriptor = receive(self.sock, self.conversation.wanted)
        except OSError as error:
            raise self._break(f"the connection to the daemon broke: {error}") from error
        if not count:
            raise self._break(_SAID_NOTHING)
        return count, descriptor

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
            try:
                if not self._send_some(self._outgoing):
                    return False
            except ConnectionLost:
                self.conversation.not_sent()
                raise

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
            while done < len(buffers) and sent >= buffers[done].nbytes:
                sent -= buffers[done].nbytes
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
        said = self.silent(self.sock)
        return TimedOut(f"{said} (it was silent for {self._timeout} s; the connection is closed)")


def _ms(seconds: float | None) -> float | None:
    """As poll(2) takes it."""
    return None if seconds is None else seconds * 1000
