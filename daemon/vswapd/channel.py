"""Messages between the supervisor and one shard: requests with answers, news, and descriptors.

Over a stream socket pair that the supervisor makes before it makes the shard. What is sent are
Python objects; both ends are the same program, and nobody else has the socket.

    message:  length u32 | id u64 | kind u8 | descriptors u8 | pickled object

Invariants:
- Messages arrive in the order in which they were sent, each with its descriptors.
- Each request gets one answer: a value, an error that is raised where the request was made,
  ChannelClosedError, or ChannelSilentError if the other end gives no sign of life.
- Sending never waits: what the socket does not take at once is kept.

This module must not know what the messages mean.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import copyreg
import logging
import os
import pickle
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import MappingProxyType
from typing import Any, Final

from vswapd.errors import OutOfServiceError

_LOG: Final = logging.getLogger(__name__)
_HEAD: Final = struct.Struct("<IQBB")


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


def _reduce(mapping: MappingProxyType[Any, Any]) -> tuple[Any, ...]:
    return _read_only, (dict(mapping),)


# Settings hold read-only mappings: pickle knows neither what is in them nor where their type is.
copyreg.pickle(MappingProxyType, _reduce)
_REQUEST, _VALUE, _ERROR, _NEWS, _PING, _PONG = range(6)
_READ: Final = 256 * 1024
MOST_DESCRIPTORS: Final = 16
"""In one message."""
_LOOK_S: Final = 1.0
"""What is not answered in so long is a reason to ask for a sign of life."""


class ChannelClosedError(Exception):
    """The other process has gone."""


class ChannelSilentError(Exception):
    """The other process is there, and gives no sign of life: it is stopped, or hangs."""


Handler = Callable[[Any, list[int]], Awaitable[Any]]
"""Carries out a request or takes news; owns the descriptors, of which there are none for news whose
descriptors could not be received. What it raises goes back."""


class Channel:
    """One end, served by the running event loop."""

    def __init__(
        self, sock: socket.socket, handler: Handler, closed: Callable[[], None] = lambda: None
    ) -> None:
        """Serve a connected stream socket.

        Args:
            sock: this end; closed by `close`.
            handler: for what comes from the other one.
            closed: called once the other end has gone.
        """
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._handler = handler
        self._closed = closed
        self._input = bytearray()
        self._descriptors: deque[int] = deque()
        self._output: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._sign: asyncio.Future[None] = self._loop.create_future()
        """What ends when the other end has given the last sign of life that it was asked for."""
        self._sign.set_result(None)
        self._sign_asked_at = 0.0
        self._open = True
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    # Out

    def tell(self, message: object, descriptors: Sequence[int] = ()) -> None:
        """Send news. The descriptors stay the caller's. Dropped if the other end has gone."""
        if self._open:
            self._send(_NEWS, 0, message, descriptors)

    async def ask(
        self, message: object, descriptors: Sequence[int] = (), silence_s: float | None = None
    ) -> Any:
        """Send a request and wait for its answer.

        Args:
            message: what is asked.
            descriptors: what goes with it; they stay the caller's.
            silence_s: seconds after which an end that gives no sign of life is given up, and what
                it answers later is forgotten; None: never.

        Raises:
            ChannelClosedError: the other end has gone, now or meanwhile.
            ChannelSilentError: it gives no sign of life. If it did not when this was asked, nothing
                was sent; else the request may still be carried out.
            OutOfServiceError: there are no descriptors to send it with; nothing was sent.
            Exception: whatever the other end's handler raised.
        """
        if not self._open:
            raise ChannelClosedError("the other process has gone")
        if silence_s is not None and self.silent(silence_s):
            raise ChannelSilentError("the other process gives no sign of life")
        self._last_id += 1
        number = self._last_id
        answer = self._loop.create_future()
        self._asked[number] = answer
        try:
            try:
                self._send(_REQUEST, number, message, descriptors)
            except OSError as error:
                raise OutOfServiceError(f"{error.strerror}: raise RLIMIT_NOFILE") from None
            while silence_s is not None and not answer.done():
                await asyncio.wait([answer], timeout=_LOOK_S)
                if not answer.done() and not await self.answers(silence_s):
                    raise ChannelSilentError("the other process gives no sign of life")
            return await answer
        finally:
            self._asked.pop(number, None)

    def silent(self, seconds: float) -> bool:
        """Whether the other end owes a sign of life for so long already."""
        return not self._sign.done() and self._loop.time() - self._sign_asked_at >= seconds

    async def answers(self, within_s: float) -> bool:
        """Whether the other end's event loop moves: asks it for a sign of life.

        Args:
            within_s: seconds after which it does not. One that owes a sign for so long already is
                not waited for again.
        """
        if self._open and self._sign.done():
            self._sign = self._loop.create_future()
            self._sign_asked_at = self._loop.time()
            self._send(_PING, 0, None, ())
        sign = self._sign
        left = self._sign_asked_at + within_s - self._loop.time()
        if left > 0 and not sign.done():
            await asyncio.wait([sign], timeout=left)
        return sign.done()

    def _send(self, kind: int, number: int, message: object, descriptors: Sequence[int]) -> None:
        body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        head = _HEAD.pack(len(body), number, kind, len(descriptors))
        # Ours to close once they are sent: the caller may close its own at once.
        duplicates = _copies(descriptors) if descriptors else []
        self._output.append((memoryview(head + body), duplicates))
        if len(self._output) == 1:
            self._writable()

    def _writable(self) -> None:
        try:
            self._flush()
        except BlockingIOError:
            self._loop.add_writer(self._sock, self._writable)
        except OSError:
            self._end()

    def _flush(self) -> None:
        while self._output:
            data, descriptors = self._output[0]
            ancillary = []
            if descriptors:
                rights = array.array("i", descriptors)
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            sent = self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            for fd in descriptors:
                os.close(fd)
            if sent < len(data):
                self._output[0] = (data[sent:], ())
            else:
                self._output.popleft()
        self._loop.remove_writer(self._sock)

    # In

    def _readable(self) -> None:
        room = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self._sock.recvmsg(_READ, room, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, ancillary = b"", []
        for _, _, rights in ancillary:
            received = array.array("i")
            received.frombytes(rights[: len(rights) - len(rights) % received.itemsize])
            self._descriptors.extend(received)
        if not data:
            self._end()
            return
        self._input += data
        while self._take():
            pass

    def _take(self) -> bool:
        """Handle the first message that has arrived as a whole; False if there is none."""
        if len(self._input) < _HEAD.size:
            return False
        length, number, kind, count = _HEAD.unpack_from(self._input)
        end = _HEAD.size + length
        if len(self._input) < end:
            return False
        message = pickle.loads(self._input[_HEAD.size : end])  # noqa: S301 - see the module
        del self._input[:end]
        if len(self._descriptors) < count:
            self._refuse(kind, number)
            if kind == _REQUEST:
                return True
            count = 0
        descriptors = [self._descriptors.popleft() for _ in range(count)]
        if kind in {_PING, _PONG}:
            self._take_sign(kind)
            return self._open
        if kind in {_VALUE, _ERROR}:
            answer = self._asked.get(number)
            if answer is not None and not answer.done():
                if kind == _VALUE:
                    answer.set_result(message)
                else:
                    answer.set_exception(message)
            return True
        task = self._loop.create_task(self._handle(kind, number, message, descriptors))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def _take_sign(self, kind: int) -> None:
        """The other end asks for a sign of life, or gives one."""
        if kind == _PING:
            self._send(_PONG, 0, None, ())
        elif not self._sign.done():
            self._sign.set_result(None)

    def _refuse(self, kind: int, number: int) -> None:
        """A message came without its descriptors: this process may not have so many."""
        while self._descriptors:
            os.close(self._descriptors.popleft())
        text = "no more descriptors are to be had: raise RLIMIT_NOFILE"
        _LOG.error("a message came without what goes with it: %s", text)
        if kind == _REQUEST:
            self._send(_ERROR, number, OutOfServiceError(text), ())

    async def _handle(self, kind: int, number: int, message: Any, descriptors: list[int]) -> None:
        try:
            value = await self._handler(message, descriptors)
            if kind == _REQUEST and self._open:
                self._send(_VALUE, number, value, ())
        except Exception as error:
            if kind == _NEWS:
                raise
            if self._open:
                self._send(_ERROR, number, error, ())

    # The end

    def _end(self) -> None:
        """The other end has gone."""
        if self._open:
            self.close()
            self._closed()

    def close(self) -> None:
        """Close this end; requests that wait end with ChannelClosedError."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for fd in (*self._descriptors, *(fd for _, fds in self._output for fd in fds)):
            os.close(fd)
        self._descriptors.clear()
        self._output.clear()
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(ChannelClosedError("the other process has gone"))
        if not self._sign.done():
            self._sign.set_result(None)

    async def end(self) -> None:
        """Close this end, and give up what is being handled; then nothing of it is at work."""
        self.close()
        for task in self._tasks:
            task.cancel()
        await self.drained()

    async def drained(self) -> None:
        """Wait until what came so far has been handled."""
        while self._tasks:
            # Not gather: of tasks that have ended but not yet left the set, it comes back at once,
            # and they never leave it.
            await asyncio.wait(self._tasks)


def _copies(descriptors: Sequence[int]) -> list[int]:
    """Copies of all of them, or of none: that of a device would keep it locked.

    Raises:
        OSError: there are not so many descriptors to be had.
    """
    copies: list[int] = []
    with contextlib.ExitStack() as undo:
        for fd in descriptors:
            copies.append(os.dup(fd))
            undo.callback(os.close, copies[-1])
        undo.pop_all()
    return copies
