"""A call, cut into frames, and what comes back put together: no I/O.

A call of any size is a row of requests of at most `frame_pages` pages. Each frame knows where the
body of its reply belongs, so pages go from the caller's buffer to the socket and from the socket to
the result without a copy between. Only where slots of several shards are mixed page by page are the
pages of a frame gathered, or scattered, through one buffer of its own.

A call says which shards it goes to (`routes`); each of them is then asked for by itself
(`next_frame`), so that pages which any shard may take go to the one that has room first.

Invariants:
- A call that failed sends no more of its row; what is on the way is still answered and digested, so
  the connection stays in step. It is over when nothing is unanswered and nothing is left to send.
- A store of new slots that fails, or is abandoned, frees what it had stored: all or nothing.
- An abandoned call touches its caller's buffers no more.

This module must not know sockets, event loops, request ids, or the order of calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from vswap.errors import (
    NO_SLOTS,
    U64,
    BadArgument,
    BadBuffer,
    DeadlyRequest,
    DuplicateSlot,
    ProtocolError,
    VswapError,
    merge,
)
from vswap.pages import I64, LEAST_ROW, Pages, View, cut_row
from vswap.protocol import (
    HEADER_BYTES,
    MAX_ASKED_BYTES,
    PAGE_BYTES,
    SHARD_SHIFT,
    SLOT_BYTES,
    Flag,
    Op,
)

_U64: Final = np.dtype("<u8")
_SHARD_SHIFT: Final = np.uint64(SHARD_SHIFT)
_NO_PAGES: Final = slice(0, 0)

LEAST_SPREAD: Final = 64
"""Pages below which a frame is not cut to give another shard something to do: each frame costs a
shard about 100 us beside its pages, and a page about 6."""


class Frame:
    """One request and where the body of its reply goes. `where` are its pages in the call."""

    __slots__ = (
        "body",
        "count",
        "deaths",
        "flags",
        "held",
        "op",
        "scratch",
        "shard",
        "targets",
        "undoes",
        "where",
    )

    def __init__(
        self,
        op: Op,
        body: list[View],
        targets: list[View] | None,
        where: slice | I64 = _NO_PAGES,
        *,
        count: int = 0,
        flags: int = 0,
        scratch: View | None = None,
    ) -> None:
        self.op = op
        self.flags = flags
        self.count = count
        self.body = body
        self.targets = targets
        """Views that the reply's body fills, in order; None: text of any length."""
        self.where = where
        self.scratch = scratch
        """Where pages arrive that belong to many places."""
        self.held: View | None = None
        """Where the daemon may put pages, or take them from, until it has answered, though nobody
        waits any more."""
        self.undoes: list[View] = []
        """The slots that a FREE gives back for a store that failed."""
        self.deaths = 0
        """How often the daemon has died when this was unanswered. Written by Conversation."""
        self.shard = 0
        """Where new slots were given out, so that they can be freed there."""


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

    def routes(self, home: int, shards: int) -> list[int]:
        """The shards that this call is to be sent to. To be asked once, before `next_frame`.

        Args:
            home: The shard for what any can do.
            shards: How many there are.
        """
        del shards
        return [home]

    @property
    def needs_all(self) -> bool:
        """Whether every one of its routes is needed; else those that can be had will do."""
        return True

    def next_frame(self, shard: int) -> Frame | None:
        """The next request for a shard; None: it gets none (now, or ever: see `over`)."""
        if self.error is not None or self.abandoned or self.sent_pages >= self.pages:
            return None
        start = self.sent_pages
        self.sent_pages = stop = min(start + self.frame_pages, self.pages)
        return self.frame(slice(start, stop), stop - start, shard)

    @property
    def over(self) -> bool:
        """Whether everything was sent that will be, and answered."""
        if self.in_flight:
            return False
        return self.sent_pages >= self.pages or self.error is not None or self.abandoned

    def frame(self, where: slice | I64, count: int, shard: int) -> Frame:
        """Cut the request to a shard for the `count` pages at `where`."""
        raise NotImplementedError

    def again(self, frame: Frame, shard: int) -> Frame | None:
        """The same request once more, since it was not carried out; None: no need of it now."""
        if self.error is not None or self.abandoned:
            return None
        return self.frame(frame.where, frame.count, shard)

    def named(self, frame: Frame) -> U64:
        """The slots that a frame names."""
        del frame
        return NO_SLOTS

    def accept(self, frame: Frame, body: bytes) -> None:
        """A frame succeeded; its targets are full. `body`: the text, where it had no targets."""

    def refuse(self, frame: Frame, error: VswapError) -> None:
        """A frame failed. The call goes on until its other frames are answered."""
        del frame
        self.error = error if self.error is None else merge(self.error, error)

    def abandon(self) -> None:
        """Nobody waits for the result any more, and the caller's buffers are the caller's again.

        It may be not `over` even if nothing of it was sent: what is left is still to be done.
        """
        self.abandoned = True

    def release(self) -> None:
        """Let go of the caller's buffers; the call is over or its connection is."""


class SlotsCall(Call):
    """The base of calls about slots that exist: remembers for which of them it took effect."""

    def __init__(self, slots: U64, frame_pages: int) -> None:
        super().__init__(len(slots), frame_pages)
        self.slots = slots
        self._slot_bytes = slots.view(np.uint8).data
        self._accepted: list[slice | I64] = []
        self._rows: dict[int, Iterator[tuple[slice | I64, int]]] | None = None
        """By shard: what is still to be sent to it. None: all goes one way, in one row."""

    @property
    def _may_be_several_frames(self) -> bool:
        """Whether some daemon's shards might get more than one frame each; see `cut_row`."""
        if self.pages > self.frame_pages:
            return True
        if self.pages < 2 * LEAST_ROW:
            return False
        shard_of = self.slots >> _SHARD_SHIFT
        return not (shard_of == shard_of[0]).all()

    def routes(self, home: int, shards: int) -> list[int]:
        """The shards that the slots name; `home` answers for what no shard can have given out."""
        if shards == 1 or not self.pages:
            return [home]
        shard_of = self.slots >> _SHARD_SHIFT
        first = int(shard_of[0])
        if self.pages == 1 or (shard_of == shard_of[0]).all():
            return [first if first < shards else home]
        shard_of[shard_of >= shards] = home
        found: list[int] = np.unique(shard_of).tolist()
        if len(found) > 1:
            self._rows = {
                shard: cut_row(np.flatnonzero(shard_of == shard), self.frame_pages)
                for shard in found
            }
        return found

    def next_frame(self, shard: int) -> Frame | None:
        """The next of the shard's own slots."""
        if self._rows is None:
            return super().next_frame(shard)
        if self.error is not None or self.abandoned:
            return None
        piece = next(self._rows[shard], None)
        if piece is None:
            return None
        where, count = piece
        self.sent_pages += count
        return self.frame(where, count, shard)

    def packed(self, where: slice | I64) -> View:
        """Slots as they stand on the wire."""
        if isinstance(where, slice):
            return self._slot_bytes[where.start * SLOT_BYTES : where.stop * SLOT_BYTES]
        return self.slots[where].view(np.uint8).data

    def named(self, frame: Frame) -> U64:
        """Those at its places."""
        return self.slots[frame.where]

    def accept(self, frame: Frame, body: bytes) -> None:
        """Remember the frame's slots as done."""
        del body
        self._accepted.append(frame.where)

    @property
    def done(self) -> U64:
        """The slots of all frames that succeeded, in the order of the call."""
        taken = np.zeros(self.pages, bool)
        for where in self._accepted:
            taken[where] = True
        return self.slots[taken]

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
        if self._may_be_several_frames:
            check_unique(slots)
        self._source = pages

    def frame(self, where: slice | I64, count: int, shard: int) -> Frame:
        """Slots, then pages; the reply repeats the slots, and they are not needed."""
        echo = memoryview(bytearray(count * SLOT_BYTES))
        offset = self._source.offset(where, shard)
        if offset is None:
            body = [self.packed(where), *self._source.cut(where)]
            return Frame(Op.STORE, body, [echo], where, count=count, flags=Flag.SLOTS)
        body, flags = [offset, self.packed(where)], Flag.SLOTS | Flag.WINDOW
        frame = Frame(Op.STORE, body, [echo], where, count=count, flags=flags)
        frame.held = self._source.whole
        return frame

    def again(self, frame: Frame, shard: int) -> Frame | None:
        """Also after an error: whoever is told of it is to know what became of each slot.

        But for a frame that may have killed the daemon as well as the one that is known to.
        """
        if self.abandoned:
            return None
        if isinstance(self.error, DeadlyRequest) and frame.deaths:
            self.refuse(frame, DeadlyRequest(str(self.error), self.named(frame)))
            return None
        return self.frame(frame.where, frame.count, shard)

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

    def frame(self, where: slice | I64, count: int, shard: int) -> Frame:
        """Slots; the reply's pages go straight to where they belong, if that is one place."""
        body = [self.packed(where)]
        if isinstance(where, slice):
            offset = self._target.offset(where, shard)
            if offset is not None:
                frame = Frame(Op.LOAD, [offset, *body], [], where, count=count, flags=Flag.WINDOW)
                frame.held = self._target.whole
                return frame
            return Frame(Op.LOAD, body, self._target.cut(where), where, count=count)
        scratch = np.empty(count * PAGE_BYTES, np.uint8).data
        return Frame(Op.LOAD, body, [scratch], where, count=count, scratch=scratch)

    def accept(self, frame: Frame, body: bytes) -> None:
        """Put scattered pages where they belong."""
        super().accept(frame, body)
        if frame.scratch is not None and not self.abandoned:
            assert not isinstance(frame.where, slice)
            self._target.scatter(frame.where, frame.scratch)

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
        if self._may_be_several_frames:
            check_unique(slots)

    def frame(self, where: slice | I64, count: int, shard: int) -> Frame:
        """Slots."""
        del shard
        return Frame(Op.FREE, [self.packed(where)], [], where, count=count)

    def abandon(self) -> None:
        """It is carried through, whoever waits: there is nothing of the caller's in it.

        Given up in the middle, it would leave slots of which nobody knows whether they are free
        already, and given out to somebody else, or still to be freed.
        """

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

    def routes(self, home: int, shards: int) -> list[int]:
        """All shards for what is more than one frame, in equal parts if it is not many."""
        if self.pages <= self.frame_pages or shards == 1:
            return [home]
        self.frame_pages = min(self.frame_pages, max(LEAST_SPREAD, -(-self.pages // shards)))
        return [home, *(shard for shard in range(shards) if shard != home)]

    @property
    def needs_all(self) -> bool:
        """No: who has room takes the next frame."""
        return False

    def frame(self, where: slice | I64, count: int, shard: int) -> Frame:
        """Pages; the reply's slots go straight into the result."""
        assert isinstance(where, slice)  # new slots come in whole frames
        target = self._slot_bytes[where.start * SLOT_BYTES : where.stop * SLOT_BYTES]
        offset = self._source.offset(where, shard)
        if offset is not None:
            body, flags = [offset], Flag.WINDOW
        else:
            body, flags = self._source.cut(where), Flag(0)
        frame = Frame(Op.STORE, body, [target], where, count=count, flags=flags)
        frame.shard = shard
        return frame

    def next_frame(self, shard: int) -> Frame | None:
        """The next STORE; after a failure, once all is answered, what frees the stored again."""
        if self.error is None and not self.abandoned:
            return super().next_frame(shard)
        if self.in_flight and not self._undoing:
            return None
        mine = next((stored for stored in self._to_free if stored.shard == shard), None)
        if mine is None:
            return None
        self._undoing = True
        self._to_free.remove(mine)
        return self._undo(mine.targets or [], mine)

    @staticmethod
    def _undo(slots: list[View], stored: Frame) -> Frame:
        frame = Frame(Op.FREE, slots, [], stored.where, count=stored.count)
        frame.undoes = slots
        return frame

    def again(self, frame: Frame, shard: int) -> Frame | None:
        """As for every call; what undoes the store is needed always."""
        if frame.op is Op.FREE:
            return self._undo(frame.undoes, frame)
        return super().again(frame, shard)

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

    def __init__(self, op: Op, said: dict[str, Any] | None = None, flags: int = 0) -> None:
        """Of an object that can be written as JSON, or of nothing.

        Raises:
            BadArgument: it cannot, or is longer than a request may be.
        """
        super().__init__(1, 1)
        self.op = op
        self._body = b"" if said is None else _written(said)
        self._flags = flags
        self._answer = b""

    def frame(self, where: slice | I64, count: int, shard: int) -> Frame:
        """The text; count is 0, since there are no pages."""
        del where, count, shard
        body = [memoryview(self._body)] if self._body else []
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


def _written(said: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(said).encode()
    except (TypeError, ValueError) as error:
        raise BadArgument(f"only text, numbers, true and false can be asked for: {error}") from None
    if len(text) > MAX_ASKED_BYTES:
        raise BadArgument(f"{len(text)} bytes of text, where a request has {MAX_ASKED_BYTES}")
    return text


class Listing(Ask):
    """LIST: the slots that a space has on one shard, after one."""

    def __init__(self, shard: int, after: int, most: int) -> None:
        super().__init__(Op.LIST)
        self._body = after.to_bytes(SLOT_BYTES, "little")
        self._at = shard
        self._most = most

    def routes(self, home: int, shards: int) -> list[int]:
        """The shard that is asked."""
        del home, shards
        return [self._at]

    def frame(self, where: slice | I64, count: int, shard: int) -> Frame:
        """One slot; the count is how many are wanted."""
        frame = super().frame(where, count, shard)
        frame.count = self._most
        return frame

    def slots(self) -> U64:
        """What was answered, ascending."""
        return np.frombuffer(self.result(), "<u8").astype(_U64)


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
