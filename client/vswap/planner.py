"""A call, cut into frames, and what comes back put together: no I/O.

A call of any size is a row of requests of at most `frame_pages` pages. Each frame knows where the
body of its reply belongs, so pages go from the caller's buffer to the socket and from the socket to
the result without a copy between.

Invariants:
- A call that failed sends no more of its row; what is on the way is still answered and digested, so
  the connection stays in step. It is over when nothing is unanswered and nothing is left to send.
- A store of new slots that fails, or is abandoned, frees what it had stored: all or nothing.
- An abandoned call touches its caller's buffers no more.

This module must not know sockets, event loops, request ids, or the order of calls.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from vswap.errors import (
    NO_SLOTS,
    U64,
    BadBuffer,
    DuplicateSlot,
    ProtocolError,
    VswapError,
    merge,
)
from vswap.protocol import HEADER_BYTES, MAX_TEXT_BYTES, PAGE_BYTES, SLOT_BYTES, Flag, Op

View = memoryview
_U64: Final = np.dtype("<u8")


class Frame:
    """One request and where the body of its reply goes. `start:stop` are its pages in the call."""

    __slots__ = ("body", "count", "flags", "op", "start", "stop", "targets")

    def __init__(
        self,
        op: Op,
        body: list[View],
        targets: list[View] | None,
        start: int = 0,
        stop: int = 0,
        flags: int = 0,
    ) -> None:
        self.op = op
        self.flags = flags
        self.count = stop - start
        self.body = body
        self.targets = targets
        """Views that the reply's body fills, in order; None: text of any length."""
        self.start = start
        self.stop = stop


class Call:
    """The base: a row of frames of which `start` pages are cut off already.

    `in_flight`, `error` and `abandoned` are written by Conversation and by `refuse` only.
    """

    op: Op

    def __init__(self, pages: int, frame_pages: int) -> None:
        self.pages = pages
        self.frame_pages = frame_pages
        self.sent_pages = 0
        self.in_flight = 0
        self.error: VswapError | None = None
        self.abandoned = False

    def next_frame(self) -> Frame | None:
        """The next request, or None if there is none to send (now, or ever: see `over`)."""
        if self.error is not None or self.abandoned or self.sent_pages >= self.pages:
            return None
        start = self.sent_pages
        self.sent_pages = stop = min(start + self.frame_pages, self.pages)
        return self.frame(start, stop)

    @property
    def over(self) -> bool:
        """Whether everything was sent that will be, and answered."""
        if self.in_flight:
            return False
        return self.sent_pages >= self.pages or self.error is not None or self.abandoned

    def frame(self, start: int, stop: int) -> Frame:
        """Cut the request for pages start:stop."""
        raise NotImplementedError

    def accept(self, frame: Frame, body: bytes) -> None:
        """A frame succeeded; its targets are full. `body`: the text, where it had no targets."""

    def refuse(self, frame: Frame, error: VswapError) -> None:
        """A frame failed. The call goes on until its other frames are answered."""
        del frame
        self.error = error if self.error is None else merge(self.error, error)

    def abandon(self) -> None:
        """Nobody waits for the result any more, and the caller's buffers are the caller's again."""
        self.abandoned = True

    def release(self) -> None:
        """Let go of the caller's buffers; the call is over or its connection is."""


class SlotsCall(Call):
    """The base of calls about slots that exist: remembers for which of them it took effect."""

    def __init__(self, slots: U64, frame_pages: int) -> None:
        super().__init__(len(slots), frame_pages)
        self.slots = slots
        self._slot_bytes = slots.view(np.uint8).data
        self._accepted: list[tuple[int, int]] = []

    def packed(self, start: int, stop: int) -> View:
        """Slots start:stop as they stand on the wire."""
        return self._slot_bytes[start * SLOT_BYTES : stop * SLOT_BYTES]

    def accept(self, frame: Frame, body: bytes) -> None:
        """Remember the frame's slots as done."""
        del body
        self._accepted.append((frame.start, frame.stop))

    @property
    def done(self) -> U64:
        """The slots of all frames that succeeded."""
        if not self._accepted:
            return NO_SLOTS
        return np.concatenate([self.slots[start:stop] for start, stop in self._accepted])

    def finish(self) -> None:
        """Raise what went wrong, with what was done before it did."""
        if self.error is not None:
            self.error.done = self.done
            raise self.error


class Overwrite(SlotsCall):
    """STORE into slots that the caller has. Each frame takes effect as a whole, or not at all."""

    op = Op.STORE

    def __init__(self, slots: U64, pages: Pages, frame_pages: int) -> None:
        if len(slots) != pages.count:
            raise BadBuffer(
                f"{len(slots)} slots do not fit {pages.count} pages: give one slot for each page"
            )
        super().__init__(slots, frame_pages)
        if self.pages > frame_pages:
            check_unique(slots)
        self._source = pages

    def frame(self, start: int, stop: int) -> Frame:
        """Slots, then pages; the reply repeats the slots, and they are not needed."""
        body = [self.packed(start, stop), *self._source.cut(start, stop)]
        echo = memoryview(bytearray((stop - start) * SLOT_BYTES))
        return Frame(Op.STORE, body, [echo], start, stop, Flag.SLOTS)

    def result(self) -> U64:
        """The slots, as given."""
        self.finish()
        return self.slots

    def release(self) -> None:
        """The pages are not looked at again."""
        self._source.let_go()


class Load(SlotsCall):
    """LOAD of slots into whole pages of a buffer."""

    op = Op.LOAD

    def __init__(self, slots: U64, target: Pages, frame_pages: int) -> None:
        super().__init__(slots, frame_pages)
        self._target = target

    def frame(self, start: int, stop: int) -> Frame:
        """Slots; the reply's pages go straight to where they belong."""
        body = [self.packed(start, stop)]
        return Frame(Op.LOAD, body, self._target.cut(start, stop), start, stop)

    def result(self) -> None:
        """Nothing: the target is full."""
        self.finish()

    def release(self) -> None:
        """The target is not written again."""
        self._target.let_go()


class Free(SlotsCall):
    """FREE of slots."""

    op = Op.FREE

    def __init__(self, slots: U64, frame_pages: int) -> None:
        super().__init__(slots, frame_pages)
        if self.pages > frame_pages:
            check_unique(slots)

    def frame(self, start: int, stop: int) -> Frame:
        """Slots."""
        return Frame(Op.FREE, [self.packed(start, stop)], [], start, stop)

    def result(self) -> None:
        """Nothing: they are free."""
        self.finish()


class Store(Call):
    """STORE of pages into new slots: all of them, or the error and none."""

    op = Op.STORE

    def __init__(self, pages: Pages, frame_pages: int) -> None:
        super().__init__(pages.count, frame_pages)
        self._source = pages
        self.slots: U64 = np.empty(pages.count, _U64)
        self._slot_bytes = self.slots.view(np.uint8).data
        self._to_free: list[Frame] = []
        self._undoing = False

    def frame(self, start: int, stop: int) -> Frame:
        """Pages; the reply's slots go straight into the result."""
        target = self._slot_bytes[start * SLOT_BYTES : stop * SLOT_BYTES]
        return Frame(Op.STORE, self._source.cut(start, stop), [target], start, stop)

    def next_frame(self) -> Frame | None:
        """The next STORE; after a failure, once all is answered, what frees the stored again."""
        if self.error is None and not self.abandoned:
            return super().next_frame()
        if not self._to_free or (self.in_flight and not self._undoing):
            return None
        self._undoing = True
        stored = self._to_free.pop()
        return Frame(Op.FREE, stored.targets or [], [], stored.start, stored.stop)

    @property
    def over(self) -> bool:
        """Whether everything was sent and answered, undoing included."""
        if self.error is None and not self.abandoned:
            return super().over
        return not self.in_flight and not self._to_free

    def accept(self, frame: Frame, body: bytes) -> None:
        """Remember what would have to be freed again."""
        del body
        if frame.op is Op.STORE:
            self._to_free.append(frame)

    def refuse(self, frame: Frame, error: VswapError) -> None:
        """Keep the first cause; an undoing that fails is only mentioned in it."""
        if self._undoing:
            if self.error is not None:
                self.error.add_note(f"pages stored before could not be freed again: {error}")
            return
        super().refuse(frame, error)

    def result(self) -> U64:
        """The new slots, one for each page, in order."""
        if self.error is not None:
            raise self.error
        return self.slots

    def release(self) -> None:
        """The pages are not looked at again."""
        self._source.let_go()


class Ask(Call):
    """A request without pages (HELLO, PING, STATUS, CONTROL): one frame, one text back."""

    def __init__(self, op: Op, text: bytes = b"", flags: int = 0) -> None:
        super().__init__(1, 1)
        self.op = op
        self._text = text
        self._flags = flags
        self._answer = b""

    def frame(self, start: int, stop: int) -> Frame:
        """The text; count is 0, since there are no pages."""
        del start, stop
        assert len(self._text) <= MAX_TEXT_BYTES
        body = [memoryview(self._text)] if self._text else []
        targets: list[View] | None = [] if self.op is Op.PING else None
        return Frame(self.op, body, targets, flags=self._flags)

    def accept(self, frame: Frame, body: bytes) -> None:
        """Keep the answer."""
        del frame
        self._answer = body

    def result(self) -> bytes:
        """The answer's text."""
        if self.error is not None:
            raise self.error
        return self._answer


class Pages:
    """Whole pages in a caller's buffer; the last may be short and stand in a page of its own.

    Shapes: `whole` is n*4096 bytes; `tail`, if any, is exactly one page.
    """

    __slots__ = ("count", "tail", "whole")

    def __init__(self, whole: View, tail: View | None = None) -> None:
        assert whole.nbytes % PAGE_BYTES == 0
        self.whole = whole
        self.tail = tail
        self.count = whole.nbytes // PAGE_BYTES + (tail is not None)

    def cut(self, start: int, stop: int) -> list[View]:
        """Pages start:stop as views."""
        views = [self.whole[start * PAGE_BYTES : stop * PAGE_BYTES]]
        if self.tail is not None and stop == self.count:
            views.append(self.tail)
        return views

    def let_go(self) -> None:
        """Hold the buffer no more, whoever may still hold this object (a traceback, for one)."""
        self.whole, self.tail = _NOTHING, None


_NOTHING: Final = memoryview(b"")


def frame_limit(frame_pages: int, max_batch: int, max_frame_bytes: int) -> int:
    """Most pages in one frame: the wish, as far as the daemon's limits allow it; at least 1."""
    fits = (max_frame_bytes - HEADER_BYTES) // (PAGE_BYTES + SLOT_BYTES)
    if min(fits, max_batch) < 1:
        raise ProtocolError(
            f"the daemon takes no pages (max_batch {max_batch}, max_frame_bytes {max_frame_bytes})"
        )
    return max(1, min(frame_pages, max_batch, fits))


def check_unique(slots: U64) -> None:
    """Refuse a slot that stands twice.

    Within one frame the daemon sees it; over several frames only the client can. Sorting costs
    about 60 ns a slot, against 2 us and more for the page.

    Raises:
        DuplicateSlot: before anything was sent.
    """
    ordered = np.sort(slots)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(twice):
        raise DuplicateSlot(f"{len(twice)} slots stand twice: name every slot once", twice)
