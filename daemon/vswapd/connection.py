"""One client's connection: bytes from a socket to requests, replies back, and the bounds on both.

Theory: a turn of the event loop receives what is there, up to the end of one request, and carries
that request out. The header is received first, and tells how large a buffer the body needs; the
body is received into it where the codec will read it. Then at most the next header is received with
it, so that nothing has to be moved. Pages of replies are sent from where the engine left them.
Bodies and replies larger than a client's frames come and go in turns of their own (see `turns`).

Invariants:
- One request is carried out at a time, and none while an earlier one's reply is far from sent:
  a client that does not read its replies is not read from.
- Memory is bounded: the request being received or carried out, its reply, and `most_unsent` bytes
  of earlier replies. All but the latter is taken from the budget before a body is received, and
  given back once no more than the latter is left: who waits for memory holds none. A connection
  that has nothing under way holds 24 bytes.
- What is wrong by its header is skipped, not received.
- Where spaces outlive the process, a request that changes anything is not begun before all earlier
  replies are on their way: so at most one is in doubt when it dies.
- A request that was begun is driven to its end, whatever becomes of the connection; only then is
  the space closed.

This module must not know what requests mean.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, Final, Protocol

from vswap.address import hung_up
from vswap.protocol import HEADER_BYTES, PAGE_BYTES, FrameError, Header, Status, parse_header
from vswapd.buffers import Buffers
from vswapd.driver import Driver, Pending
from vswapd.session import Reply, Session, failure, work_bytes
from vswapd_backends.base import SHORT_PAGES

_LOG: Final = logging.getLogger(__name__)

_TURN_BYTES: Final = (SHORT_PAGES + 1) * PAGE_BYTES
"""Most bytes of one frame that are received in one turn: 0.1 ms. Who has more to receive, or to
send, stands in line for its turns with all other long work."""
_TURN_PARTS: Final = SHORT_PAGES
"""Most parts of a reply that are sent in one turn: 0.1 to 0.2 ms if they are pages. Unlike the
socket's buffer this bounds it: a client on another core takes them while they are sent."""
_INT: Final = struct.Struct("i")
_EMPTY: Final = memoryview(b"")
_NOTHING: Final = Header(HEADER_BYTES, 0, 0, 0, 0, 0)
"""What an error answers that no request caused."""


CROWDED_S: Final = 1.0
"""Patience with whoever holds memory that others wait for, and neither sends nor reads: nothing
over a local socket takes so long. Else a few clients that stop in the middle of large requests
would stop all others for request_timeout."""


class _State(Enum):
    """What a connection waits for."""

    HEADER = "the next request"
    REPLIES = "earlier replies to be sent"
    MEMORY = "memory for a body"
    BODY = "the rest of a body"
    SKIP = "the end of a body that nobody wants"
    ENGINE = "the engine"
    OVER = "the last reply to be sent, or nothing"


class Hub(Protocol):
    """What a connection needs of the server."""

    loop: asyncio.AbstractEventLoop
    driver: Driver
    buffers: Buffers
    max_frame: int
    most_unsent: int
    """Unsent bytes of replies beyond which a connection's next request is not carried out."""
    request_timeout: float
    scratch: memoryview
    """Where bytes go that nobody wants."""

    def crowded(self) -> None:
        """Somebody waits for memory: whoever holds some and does nothing is to be found soon."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something to its end, whatever becomes of its connection."""

    def parted(self, connection: Connection) -> None:
        """A connection is at its end: its socket is closed and its space is to be."""


class _Outgoing:
    """A reply that is not sent yet."""

    __slots__ = ("closes", "descriptor", "left", "parts")

    def __init__(self, reply: Reply) -> None:
        self.parts = reply.parts
        self.left = reply.size
        self.closes = reply.closes
        self.descriptor = reply.descriptor


class Connection:
    """See the module. `start` begins; the hub is told of the end."""

    def __init__(self, hub: Hub, sock: socket.socket, session: Session) -> None:
        self._hub = hub
        self._sock = sock
        self.session = session
        session.hung_up = self._hung_up
        self._state = _State.HEADER
        self._stopping = False
        # Receiving
        self._head = bytearray(HEADER_BYTES)
        self._head_view = memoryview(self._head)
        self._got = 0
        """Bytes of the next header."""
        self._frame = _NOTHING
        self._buffer: bytearray | None = None
        self._body = _EMPTY
        self._need = 0
        """Bytes of the body, or of it that are still to be skipped."""
        self._filled = 0
        self._taken = 0
        """Of the budget, for the frame being received or carried out."""
        self._awaited = 0
        """Of the budget, for the frame that waits for it."""
        self._verdict: Reply | None = None
        self._reading = False
        # Sending
        self._out: deque[_Outgoing] = deque()
        self._unsent = 0
        self._owed = 0
        """Of the budget, for the last reply: until `most_unsent` bytes are left to be sent."""
        self._writing = False
        # For `check`
        self._moved = 0
        """Bytes, either way."""
        self._requests = 0
        self._seen = self._seen_requests = -1
        self._since = self._begun = 0.0

    def start(self) -> None:
        """Begin to read."""
        self._read(True)

    # Receiving

    def _turn(self) -> None:
        """What there is to receive has come, or memory to receive it into."""
        self._guard(self._receive_some)

    def _long_turn(self) -> None:
        """It is its turn to receive a part of a large body."""
        if self._state is _State.BODY:  # else it has been given up meanwhile
            self._read(True)
            self._guard(self._receive_body)

    def _guard(self, receive: Callable[[], None]) -> None:
        """Receive, and let nobody else feel what goes wrong."""
        try:
            receive()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._lost()
        except Exception:  # noqa: BLE001 - a border: one connection ends, and it is logged
            _LOG.exception("a connection failed by a mistake of ours")
            self._lost()

    def _receive_some(self) -> None:
        if self._state is _State.HEADER:
            self._receive_header()
        if self._state is _State.BODY and self._need - self._filled > _TURN_BYTES:
            self._read(False)
            self._hub.driver.turns.ask(self._long_turn)
        elif self._state is _State.BODY:
            self._receive_body()
        elif self._state is _State.SKIP:
            self._skip()

    def _receive(self, into: memoryview) -> int:
        """Bytes that were received; 0 if the client has closed, which is taken note of."""
        count = self._sock.recv_into(into)
        self._moved += count
        if not count:
            self._end_of_stream()
        return count

    def _receive_header(self) -> None:
        while self._got < HEADER_BYTES:
            count = self._receive(self._head_view[self._got :])
            if not count:
                return
            self._got += count
        self._got = 0
        self._requests += 1
        try:
            frame = parse_header(self._head, 0, self._hub.max_frame)
        except FrameError as error:
            broken = Header(HEADER_BYTES, error.op, 0, 0, 0, error.request_id)
            self._answer(failure(broken, error.status, str(error)))
            return
        self._frame = frame
        self._verdict = self.session.admit(frame)
        if self._verdict is not None and self._verdict.closes:
            self._answer(self._verdict)
        elif self._verdict is not None:
            self._state = _State.SKIP
            self._need = frame.body_bytes
        elif self._out and self.session.waits(frame):
            self._state = _State.REPLIES
            self._read(False)
        else:
            self._find_memory(frame)

    def _find_memory(self, frame: Header) -> None:
        """Take what body and reply need, or wait for it."""
        self._need = frame.body_bytes
        amount = self._need + work_bytes(frame)
        self._state = _State.MEMORY
        if not amount or self._hub.buffers.lane(amount).take(amount, self._granted):
            self._taken = amount
            self._make_buffer()
        else:
            self._awaited = amount
            self._read(False)
            self._hub.crowded()

    def _granted(self) -> None:
        """There is memory now, and it has been taken."""
        self._taken, self._awaited = self._awaited, 0
        if self._state is not _State.MEMORY:
            self._return_memory()
            return
        # Not here and now: whoever has returned the memory is in the middle of something.
        self._hub.loop.call_soon(self._guard, self._begin_body)

    def _begin_body(self) -> None:
        """Receive the body for which there is memory now."""
        if self._state is not _State.MEMORY or not self._taken:
            return  # it has ended meanwhile, and what it had is returned, or its reply's
        self._make_buffer()
        self._read(True)
        self._receive_some()

    def _make_buffer(self) -> None:
        if self._need:
            # A header of the next frame may follow in the same buffer.
            self._buffer = self._hub.buffers.take(self._need + HEADER_BYTES)
            self._body = memoryview(self._buffer)
        self._filled = 0
        self._state = _State.BODY

    def _receive_body(self) -> None:
        need, body = self._need, self._body
        end = min(need + HEADER_BYTES, self._filled + _TURN_BYTES)
        while self._filled < need:
            wanted = end - self._filled
            if not wanted:
                return  # enough for one turn
            count = self._receive(body[self._filled : end])
            if not count:
                return
            self._filled += count
            if count < wanted and self._filled < need:
                return  # that was all there is
        self._got = self._filled - need if need else 0
        if self._got:
            self._head_view[: self._got] = body[need : self._filled]
        self._execute(body[:need])

    def _skip(self) -> None:
        """Receive and forget; then answer."""
        scratch = self._hub.scratch
        end = max(0, self._need - _TURN_BYTES)
        while self._need > end:
            wanted = min(len(scratch), self._need - end)
            count = self._receive(scratch[:wanted])
            if not count:
                return
            self._need -= count
            if count < wanted:
                break  # that was all there is
        if not self._need:
            assert self._verdict is not None
            self._answer(self._verdict)

    # Carrying out

    def _execute(self, body: memoryview) -> None:
        """Carry out the request that was received; most end here."""
        self._state = _State.ENGINE
        outcome = self._hub.driver.start(self.session.execute(self._frame, body))
        if isinstance(outcome, Pending):
            self._read(False)
            self._hub.spawn(self._finish(outcome))
        else:
            self._answer(outcome)

    async def _finish(self, pending: Pending[Reply]) -> None:
        try:
            reply = await self._hub.driver.finish(pending)
        except BaseException:  # the driver's own failure, or the daemon's end: sessions reply
            self._lost()
            raise
        finally:
            if self._state is _State.OVER:
                self._return_memory()
                self._hub.parted(self)
        if self._state is not _State.OVER:
            self._answer(reply)

    def _answer(self, reply: Reply) -> None:
        """The request has its reply: send it, and look for the next."""
        self._verdict = None
        self._return_buffer()
        if self._taken:  # then nothing is owed: it was received when little was left to be sent
            self._owed, self._taken = self._taken, 0
        self._state = _State.OVER if reply.closes else _State.HEADER
        self._out.append(_Outgoing(reply))
        self._unsent += reply.size
        if len(self._out) == 1:
            self._flush()
        self._settle()
        if self._stopping and self._state is _State.HEADER:
            self._say_stopping()
        elif self._sock.fileno() >= 0:
            self._next()

    def _next(self) -> None:
        """Read on, unless the client has too much to read itself."""
        ready = self._state is _State.HEADER and self._unsent <= self._hub.most_unsent
        self._read(ready or self._state is _State.SKIP)
        if ready and self._got == HEADER_BYTES and self._head[0] == HEADER_BYTES:
            # It may be a whole request, and no more bytes may come to tell of it.
            self._hub.loop.call_soon(self._turn_if_ready)

    def _turn_if_ready(self) -> None:
        if self._state is _State.HEADER and self._reading:
            self._turn()

    # Sending

    def _flush(self) -> None:
        """Send what the socket takes."""
        out = self._out
        try:
            while out:
                first = out[0]
                parts = first.parts
                some = parts if len(parts) <= _TURN_PARTS else parts[:_TURN_PARTS]
                if first.descriptor is None:
                    sent = self._sock.sendmsg(some, (), socket.MSG_NOSIGNAL)
                else:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(first.descriptor))]
                    sent = self._sock.sendmsg(some, rights, socket.MSG_NOSIGNAL)
                    first.descriptor = None
                self._moved += sent
                self._unsent -= sent
                first.left -= sent
                if not first.left:
                    out.popleft()
                    if first.closes:
                        self._lost()
                        return
                else:
                    # No more in this turn: what the client takes meanwhile would be sent in morsels
                    # while all others wait; the loop comes back when most of the socket is free.
                    _drop(parts, sent)
                    self._write(True)
                    return
        except (BlockingIOError, InterruptedError):
            self._write(True)
        except OSError:
            self._lost()
        else:
            self._write(False)

    def _writable(self) -> None:
        if self._out and self._out[0].left > _TURN_BYTES:
            self._write(False)
            self._hub.driver.turns.ask(self._send_on)
        else:
            self._send_on()

    def _send_on(self) -> None:
        before = self._unsent
        self._flush()
        self._settle()
        if self._sock.fileno() < 0:
            return
        if not self._out and self._state is _State.OVER:
            self._lost()
        elif not self._out and self._state is _State.REPLIES:
            self._read(True)
            self._find_memory(self._frame)
            self._hub.loop.call_soon(self._turn)
        elif before > self._hub.most_unsent >= self._unsent:
            self._next()

    # Ends

    def stop(self) -> None:
        """The daemon stops: say so, once what is under way is answered."""
        self._stopping = True
        if self._state not in {_State.ENGINE, _State.OVER}:
            self._say_stopping()

    def _say_stopping(self) -> None:
        reply = failure(_NOTHING, Status.STOPPING, "the daemon is shutting down")
        self._state = _State.HEADER
        self._answer(reply)

    def _hung_up(self) -> bool:
        """Whether the client has closed its end, whether that was noticed or not."""
        return hung_up(self._sock)

    def abort(self) -> None:
        """Close without a word."""
        self._lost()

    def _end_of_stream(self) -> None:
        """The client sends no more; it may still read."""
        self._state = _State.OVER
        if self._out:
            self._read(False)
        else:
            self._lost()

    def _lost(self) -> None:
        """Close the socket, and part unless the engine still works on a request."""
        if self._sock.fileno() < 0:
            return
        self._read(False)
        self._write(False)
        self._sock.close()
        busy = self._state is _State.ENGINE
        # First of all: what is given back may be granted to whoever waits, this one included.
        self._state = _State.OVER
        self._out.clear()
        self._unsent = 0
        self._settle()
        if not busy:
            self._return_memory()
            self._hub.parted(self)

    # Patience

    def check(self, now: float) -> None:
        """Called now and then: whether the client has kept everybody waiting for too long."""
        receiving = self._state in {_State.BODY, _State.SKIP} or (
            self._state is _State.HEADER and self._got > 0 and self._reading
        )
        if not receiving and not self._unsent:
            self._seen = -1
            return
        if self._seen < 0 or self._seen_requests != self._requests:
            self._begun = now
        if self._seen != self._moved or self._seen_requests != self._requests:
            self._since = now
        self._seen, self._seen_requests = self._moved, self._requests
        held = max(self._taken, self._owed)
        crowded = held > 0 and self._hub.buffers.lane(held).crowded
        patience = self._hub.request_timeout
        if crowded:
            patience = min(patience, CROWDED_S)
        # Bytes that trickle are progress, as long as nobody waits for the memory.
        if now - self._since < patience and not (crowded and now - self._begun >= patience):
            return
        if self._unsent or not receiving:
            _LOG.info("%s does not read its replies: closed", self.session.peer.name)
            self._lost()
        else:
            text = f"a frame was begun and did not end within {patience:g} s"
            header = _NOTHING if self._state is _State.HEADER else self._frame
            self._answer(failure(header, Status.TIMED_OUT, text))

    # Small things

    def _read(self, wanted: bool) -> None:  # noqa: FBT001 - a switch
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self._hub.loop.add_reader(self._sock, self._turn)
            else:
                self._hub.loop.remove_reader(self._sock)

    def _write(self, wanted: bool) -> None:  # noqa: FBT001 - a switch
        if wanted != self._writing:
            self._writing = wanted
            if wanted:
                self._hub.loop.add_writer(self._sock, self._writable)
            else:
                self._hub.loop.remove_writer(self._sock)

    def _settle(self) -> None:
        """Give back what replies have taken, once little of them is left."""
        if self._owed and self._unsent <= self._hub.most_unsent:
            owed, self._owed = self._owed, 0
            self._give(owed)

    def _give(self, taken: int) -> None:
        if taken:
            self._hub.buffers.lane(taken).give(taken)

    def _return_buffer(self) -> None:
        buffer, self._buffer, self._body = self._buffer, None, _EMPTY
        if buffer is not None:
            self._hub.buffers.give(buffer)

    def _return_memory(self) -> None:
        self._return_buffer()
        taken, self._taken = self._taken, 0
        self._give(taken)


def _drop(parts: list[bytes | memoryview], sent: int) -> None:
    """Forget the first `sent` bytes, so that the pages they were in can be freed."""
    index = 0
    while sent >= len(parts[index]):
        sent -= len(parts[index])
        index += 1
    del parts[:index]
    if sent:
        parts[0] = memoryview(parts[0])[sent:]
