"""One connection's state: which requests are unanswered, and where the next byte belongs.

The sans-I/O half of both clients. Whoever owns the socket asks `request` for what to send, fills
`wanted` with what arrives, and says so with `arrived`.

Invariants:
- Replies are matched with the oldest unanswered request, by id and operation. Anything else is a
  ProtocolError, after which the conversation is at an end.
- No more than `window` requests are unanswered.
- A request is in flight until it is answered, or is not sent again after an interruption.
- `wanted` is never empty, and never reaches beyond the reply that is being read.
- A request that was in flight when the daemon died is sent again alone: nothing else is unanswered
  until it is answered. So a further death is met by nothing but the one that causes it, which is
  not sent again after MOST_DEATHS.

This module must not know sockets, event loops, threads, or what the calls mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

import numpy as np

from vswap.errors import (
    NO_SLOTS,
    U64,
    DeadlyRequest,
    ProtocolError,
    Stopping,
    VswapError,
    error_for,
)
from vswap.pages import View
from vswap.peer import Outcome
from vswap.planner import Call, Frame
from vswap.protocol import (
    HEADER_BYTES,
    LISTS_SLOTS,
    MAX_FRAME_BYTES,
    MAX_TEXT_BYTES,
    SLOT_BYTES,
    FrameError,
    Header,
    Op,
    Status,
    pack_header,
    parse_header,
)

MOST_DEATHS: Final = 3
"""A request that has met so many deaths of the daemon is given up. It may meet one or two that are
not its own: somebody kills processes, or another client's request does."""


class Conversation:
    """Requests out, replies in, in step."""

    def __init__(self, window: int = 1) -> None:
        self.window = window
        self._unanswered: deque[tuple[int, Call, Frame]] = deque()
        self._again: deque[tuple[Call, Frame]] = deque()
        """What has to be sent once more, before anything else."""
        self._interrupted: list[tuple[int, Call, Frame]] = []
        """What was unanswered when the connection broke, in order; with the id it had."""
        self.dropped: list[Call] = []
        """Calls of which a request was not sent again, since nobody wants it now. For the owner to
        look at, and to clear."""
        self._last_id = 0
        self._farewell = False
        """Whether the daemon has said that it stops: then no request is to blame."""
        self._part_sent = False
        """Whether the last request was not sent whole: then it is not to blame."""
        self._header_bytes = bytearray(HEADER_BYTES)
        self._header_view = memoryview(self._header_bytes)
        self._header: Header | None = None
        """The reply whose body is being read."""
        self._text: bytearray | None = None
        """Its body, where that is text."""
        self._later: deque[View] = deque()
        self.wanted: View = self._header_view
        """Where the next bytes of the socket go; put at least one there, then call `arrived`."""

    @property
    def full(self) -> bool:
        """Whether nothing may be sent before something is answered."""
        return len(self._unanswered) >= self.window or self._alone

    @property
    def _alone(self) -> bool:
        """Whether a request that has met a death is unanswered, or is to be sent next."""
        if not self._unanswered:
            return False
        return bool(self._unanswered[0][2].deaths or (self._again and self._again[0][1].deaths))

    @property
    def idle(self) -> bool:
        """Whether everything is answered."""
        return not self._unanswered

    @property
    def repeats(self) -> bool:
        """Whether something has to be sent once more."""
        return bool(self._again)

    def request(self, call: Call | None, shard: int) -> list[View] | None:
        """The next frame of `call` for a shard as buffers to send whole, in order; None: not now.

        None has two reasons: the window is `full`, or the call has nothing to send. What has to be
        sent once more goes before, whosever it is.
        """
        if self.full:
            return None
        owner, frame = self._once_more(shard)
        if owner is None and call is not None:
            owner, frame = call, call.next_frame(shard)
            call.in_flight += frame is not None
        if owner is None or frame is None:
            return None
        self._last_id += 1
        self._unanswered.append((self._last_id, owner, frame))
        body, frame.body = frame.body, []  # only what is being sent holds on to the pages
        body_bytes = 0
        for view in body:
            body_bytes += view.nbytes
        header = pack_header(
            frame.op,
            body_bytes,
            count=frame.count,
            flags=frame.flags,
            request_id=self._last_id,
        )
        return [memoryview(header), *body]

    def _once_more(self, shard: int) -> tuple[Call, Frame] | tuple[None, None]:
        """The next request that has to be sent again, and is still wanted."""
        while self._again:
            owner, old = self._again.popleft()
            frame = owner.again(old, shard)
            if frame is not None:
                frame.deaths = old.deaths
                return owner, frame
            owner.in_flight -= 1
            self.dropped.append(owner)
        return None, None

    def arrived(self, count: int) -> Call | None:
        """`count` bytes were put into `wanted`.

        Returns:
            The call that a reply was completed for by them (see whether it is `over`), if any.

        Raises:
            ProtocolError: what arrived cannot be the reply; close the connection.
            ConnectionLost: the daemon says that it closes the connection.
        """
        if count < self.wanted.nbytes:
            self.wanted = self.wanted[count:]
            return None
        if self._header is None:
            self._begin_body()
        while self._later:
            view = self._later.popleft()
            if view.nbytes:
                self.wanted = view
                return None
        return self._end_reply()

    def abandon(self, call: Call) -> None:
        """Nobody waits for `call`: its replies go nowhere, and the caller's buffers stay alone."""
        call.abandon()
        if self._header is not None and self._text is None:
            _, owner, frame = self._unanswered[0]
            # Not so for the slots of a store: they are to be freed.
            if owner is call and frame.op is Op.LOAD:
                left = self.wanted.nbytes + _bytes_of(self._later)
                self._later.clear()
                self.wanted = memoryview(bytearray(left))
        for _, owner, frame in self._unanswered:
            if owner is call and frame.op is Op.LOAD and frame.targets is not None:
                frame.targets = [memoryview(bytearray(_bytes_of(frame.targets)))]
        for owner, frame in (*(each[1:] for each in self._interrupted), *self._again):
            if owner is call and frame.op is Op.LOAD:
                frame.targets = []  # it is not sent again

    def not_sent(self) -> None:
        """The last request could not be sent whole, and cannot any more."""
        self._part_sent = True

    def interrupt(self) -> int:
        """The connection has broken, and is to be taken up again: nothing is awaited on it now.

        What was unanswered waits for `resume`, but for a HELLO, which belongs to one connection.

        Returns:
            How many deaths of the daemon one of them has met, at most.
        """
        last = self._unanswered[-1][0] if self._part_sent and self._unanswered else None
        for request_id, call, frame in self._unanswered:
            if frame.op is not Op.HELLO:
                frame.deaths += not self._farewell and request_id != last
                self._interrupted.append((request_id, call, frame))
        self._farewell = self._part_sent = False
        self.dropped.clear()
        self._interrupted += [(0, call, frame) for call, frame in self._again]
        self._again.clear()
        self._unanswered.clear()
        self._later.clear()
        self._header, self._text, self.wanted = None, None, self._header_view
        return max((frame.deaths for *_, frame in self._interrupted), default=0)

    def resume(self, last: Outcome | None) -> None:
        """The connection has been taken up again.

        Args:
            last: The last request that the daemon carried out and that changed anything. If its
                answer was not heard, this is it; all others are sent again.

        Raises:
            ProtocolError: it cannot be the answer; close the connection.
        """
        interrupted, self._interrupted = self._interrupted, []
        for request_id, call, frame in interrupted:
            if last is None or not request_id or request_id != last.request_id:
                if frame.deaths >= MOST_DEATHS:
                    call.in_flight -= 1
                    call.refuse(frame, _deadly(frame, call.named(frame)))
                else:
                    self._again.append((call, frame))
                continue
            call.in_flight -= 1
            if last.status == Status.OK:
                if frame.op is Op.STORE and frame.targets:
                    if len(last.slots) != frame.count:
                        raise ProtocolError(
                            f"the daemon says that a store of {frame.count} pages"
                            f" was answered with {len(last.slots)} slots"
                        )
                    frame.targets[0][:] = last.slots.astype("<u8").tobytes()
                call.accept(frame, b"")
            else:
                call.refuse(frame, error_for(last.status, "", last.slots, flags=last.flags))

    def end(self) -> None:
        """The connection is lost: let go of all calls and their buffers."""
        self._unanswered.clear()
        self._again.clear()
        self._interrupted.clear()
        self._later.clear()
        self._header, self._text, self.wanted = None, None, self._header_view

    def _begin_body(self) -> None:
        """The header is complete: find out where the body goes."""
        try:
            header = parse_header(self._header_bytes, 0, MAX_FRAME_BYTES)
        except FrameError as error:
            raise ProtocolError(f"this is no vswapd, or one of another version: {error}") from error
        self._header = header
        closing = header.status != Status.OK and _closes(header.status)
        if closing:
            # It may answer no request at all (id 0), for example when the daemon stops.
            self._want_text(header)
            return
        if not self._unanswered:
            raise ProtocolError("the daemon answered what was not asked")
        request_id, _, frame = self._unanswered[0]
        if header.request_id != request_id or header.op != frame.op:
            raise ProtocolError(
                f"the daemon answered request {header.request_id} (operation {header.op})"
                f" where {request_id} (operation {frame.op}) was next"
            )
        if header.status != Status.OK or frame.targets is None:
            self._want_text(header)
            return
        expected = _bytes_of(frame.targets)
        if header.body_bytes != expected:
            raise ProtocolError(
                f"the daemon's reply to {frame.op.name} has {header.body_bytes} bytes of body,"
                f" not {expected}"
            )
        self._later.extend(frame.targets)

    def _want_text(self, header: Header) -> None:
        if header.body_bytes > MAX_TEXT_BYTES:
            raise ProtocolError(f"the daemon sent {header.body_bytes} bytes of text")
        self._text = bytearray(header.body_bytes)
        self._later.append(memoryview(self._text))

    def _end_reply(self) -> Call:
        """The body is complete: hand it to its call."""
        header, text = self._header, self._text
        assert header is not None
        self._header, self._text, self.wanted = None, None, self._header_view
        body = bytes(text) if text is not None else b""
        if header.status != Status.OK and _closes(header.status):
            error = self._error(header, body)
            self._farewell = isinstance(error, Stopping)
            raise error
        _, call, frame = self._unanswered.popleft()
        call.in_flight -= 1
        if header.status == Status.OK:
            call.accept(frame, body)
        else:
            call.refuse(frame, self._error(header, body))
        return call

    def _error(self, header: Header, body: bytes) -> VswapError:
        slots = NO_SLOTS
        if header.status in LISTS_SLOTS:
            end = header.count * SLOT_BYTES
            if end > len(body):
                raise ProtocolError(f"the daemon's error names {header.count} slots and ends early")
            slots, body = np.frombuffer(body[:end], "<u8").astype(np.uint64), body[end:]
        text = body.decode(errors="replace")
        return error_for(header.status, text, slots, flags=header.flags)


def _deadly(frame: Frame, slots: U64) -> DeadlyRequest:
    return DeadlyRequest(
        f"the daemon died {frame.deaths} times, each time when it had this {frame.op.name} of"
        f" {frame.count} pages: it is not sent again (the daemon's journal has the cause)",
        slots,
    )


def _bytes_of(views: Iterable[View]) -> int:
    return sum(view.nbytes for view in views)


def _closes(status: int) -> bool:
    """Whether the connection ends with this status; an unknown one does not, as to the wire."""
    try:
        return Status(status).closes
    except ValueError:
        return False
