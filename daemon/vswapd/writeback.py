"""Writeback: the oldest segments of a stream, packed into one extent, words flipped afterwards.

The order is what keeps pages: find room on the device, read the entries, write, and only when the
write has succeeded flip each word that still is the very word that was read; then free. Losing a
race costs a wasted write, never a page. (Linux flips before the data is on disk and frees at
submit; a lock hides it there.)

Invariants:
- Segments are pinned from the look at their words to the flip: a place cannot be reused between,
  so a word that compares equal names the bytes that were written.
- Entries loaded since the last look go to the young end of their stream once, unmarked, instead of
  to the device (second chance).
- A failed write takes the extent out of use and tries the next; the entries stay where they were.

This module must not know when to write back: the shrinker and the stores decide.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import numpy as np

from vswapd.core import Core
from vswapd.groups import Group
from vswapd.image_buffers import ImageBuffers
from vswapd.swap_table import Tag, referenced
from vswapd.whole_segments import WHOLE_AT_ONCE, WholeBatch, WholeSegments, one_by_one, outcomes
from vswapd_backends.base import (
    I64,
    PAGE_BYTES,
    PAUSE,
    SEGMENT_BYTES,
    U64,
    WAIT,
    IoBatch,
    IoKind,
    IoRequest,
    Operation,
    Places,
    Submit,
)
from vswapd_backends.segment import ENTRY_OVERHEAD, ImageBuilder, fits
from vswapd_backends.swapdev import image_writes
from vswapd_backends.zswap import Compressed, Stream


class Cause(Enum):
    """Why bytes are written to a device; each has its own counter."""

    WRITEBACK = "writeback_bytes"
    RECLAIM = "reclaim_bytes"
    FALLBACK = "fallback_bytes"
    SWAPOFF = "swapoff_bytes"
    DEVICE_COMPACT = "device_compact_bytes"


class Stop(Enum):
    """Why nothing (more) is written back."""

    NO_DEVICE = "no_device"
    DEVICE_FULL = "device_full"
    DEVICE_ERROR = "device_error"
    WRITE_BUDGET = "write_budget"
    WRITEBACK_DISABLED = "writeback_disabled"
    GROUP_LIMIT = "group_limit"
    NOTHING_LEFT = "nothing_left"


@dataclass(frozen=True, slots=True)
class Written:
    """What one step of writeback did. `stopped` is None if there may be more to do."""

    bytes: int = 0
    pages: int = 0
    moved: int = 0
    """Entries that got their second chance."""
    stopped: Stop | None = None


@dataclass(slots=True)
class _Gathered:
    """Entries that were copied into an image, by segment, and the segments that are done."""

    numbers: list[I64] = field(default_factory=list)
    words: list[U64] = field(default_factory=list)
    offsets: list[I64] = field(default_factory=list)
    lengths: list[I64] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    """Segments of which every cold entry is in the image."""


WRITE_ATTEMPTS: Final = 4
"""Extents that one image is offered to: a device on which all of them fail is not worn down in one
operation, and whoever wanted the write hears of it soon."""

_SMALLEST_ROOM: Final = PAGE_BYTES + ENTRY_OVERHEAD
"""An image with less room than this is full. So a segment that is all alive becomes an image by
itself: one copy, and no segment is left behind with a few entries missing."""

PIPELINE: Final = 2
"""Operations of one writeback that are under way at a time: the extents of one are gathered while
those of the other are written."""


class Writeback:
    """Moves entries from pools to devices."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._whole = WholeSegments(core)
        self.buffers: Final = ImageBuffers((1, WHOLE_AT_ONCE), PIPELINE)

    # What could go

    def obstacle(self) -> Stop | None:
        """What keeps any page from being written back, or None."""
        core = self._core
        if not core.devices.any:
            return Stop.NO_DEVICE
        left = core.budget_left()
        if left is not None and left < SEGMENT_BYTES:
            return Stop.WRITE_BUDGET
        if not core.devices.free_extents:
            return Stop.DEVICE_FULL
        return None

    def eligible(self) -> I64:
        """Indices of the groups whose pages may be written back now."""
        return np.array(
            [
                g.index
                for g in self._core.groups
                if g.limits.writeback and (g.limits.device_max is None or _room(g))
            ],
            np.int64,
        )

    def _stream(self, only: Group | None) -> Stream | Stop:
        """The stream that holds the coldest segment that may go."""
        groups = self.eligible()
        if only is not None:
            groups = groups[groups == only.index]
        everybody = len(groups) == len(self._core.groups)
        segment = self._core.zswap.oldest(groups=None if everybody else groups)
        if segment is not None:
            return self._core.zswap.stream_of(segment)
        concerned = [only] if only is not None else list(self._core.groups)
        holding = [g for g in concerned if g.pool_bytes]
        if any(not g.limits.writeback for g in holding):
            return Stop.WRITEBACK_DISABLED
        if any(g.index not in groups for g in holding):
            return Stop.GROUP_LIMIT
        return Stop.NOTHING_LEFT

    # Some extents

    def write_some(
        self, cause: Cause, only: Group | None = None, most: int = WHOLE_AT_ONCE
    ) -> Operation[Written]:
        """Write up to `most` extents of the coldest entries (of one group, if `only` is given)."""
        stop = self.obstacle()
        if stop is not None:
            return Written(stopped=stop)
        stream = self._stream(only)
        if isinstance(stream, Stop):
            return Written(stopped=stream)
        batch = self._whole.choose(stream, self._affordable(most))
        if batch is not None:
            batch = self._whole.within(batch, self._core.groups[stream[1]].device_room())
        if batch is None:
            return (yield from self._write_extent(stream, cause))
        return (yield from self._write_whole(stream, cause, batch))

    def _affordable(self, most: int) -> int:
        """As many extents as the write budget and the devices have room for."""
        left = self._core.budget_left()
        if left is not None:
            most = min(most, left // SEGMENT_BYTES)
        return min(most, self._core.devices.ready_extents)

    def _write_whole(self, stream: Stream, cause: Cause, batch: WholeBatch) -> Operation[Written]:
        """Write segments as they are, one extent each."""
        core, group = self._core, self._core.groups[stream[1]]
        taken = self._take_extents(stream, len(batch.segments))
        if not taken:
            return Written(stopped=Stop.DEVICE_FULL)
        batch = self._whole.first(batch, len(taken))
        pending = int(batch.directory.lengths.sum())
        if not group.take_device(pending):
            # Another shard was faster.
            for number in taken:
                core.devices.unpin(number)
            return Written(stopped=Stop.GROUP_LIMIT)
        buffer = self.buffers.take(WHOLE_AT_ONCE)
        pinned = list(batch.segments)
        for segment in pinned:
            core.zswap.pin(segment)
        try:
            with self._budgeted(SEGMENT_BYTES * len(taken)):
                writes = yield from self._whole.images(batch, taken, stream, buffer)
            yield from self.write(writes)
            alone = one_by_one(writes)
            if alone:
                yield from self.write(alone)
            good = outcomes(writes, alone)
            for number, well in zip(taken, good, strict=True):
                if not well:
                    core.devices.fail(number)
            self.account(cause, SEGMENT_BYTES * sum(good))
            yield PAUSE
            pages = self._whole.flip(batch, taken, good, group)
            group.settle_device(pending)
            pending = 0
            moved = yield from self._let_go(pinned, good, stream)
        finally:
            group.settle_device(pending)
            for number in taken:
                core.devices.unpin(number)
            for segment in pinned:
                core.unpin(segment)
            self.buffers.give(buffer)
        stopped = None if any(good) else Stop.DEVICE_ERROR
        return Written(SEGMENT_BYTES * sum(good), pages, moved, stopped)

    def _take_extents(self, stream: Stream, most: int) -> list[int]:
        """Free extents, pinned: fewer than `most` if that is all there is."""
        taken: list[int] = []
        while len(taken) < most:
            number = self._core.devices.take(*stream, 0)
            if number is None:
                break  # another shard was faster: what `ready_extents` counts is there for all
            taken.append(number)
        return taken

    def _let_go(self, pinned: list[int], written: list[bool], stream: Stream) -> Operation[int]:
        """Give segments up one by one; what still lives in those that were written stays young.

        Args:
            pinned: the segments; each is taken out of it with its pin.
            written: whether each one's image was.
            stream: whose they are.

        Returns:
            How many entries were moved.
        """
        moved = 0
        for index, well in enumerate(written):
            if not index % 2:
                yield PAUSE  # each takes 85 us if its memory goes back to the system
            if well:
                moved += self.rejuvenate(pinned[0], stream)
            self._core.unpin(pinned.pop(0))
        return moved

    def _write_extent(self, stream: Stream, cause: Cause) -> Operation[Written]:
        """Write one extent's worth of a stream's coldest entries, whatever state they are in."""
        core = self._core
        number = yield from self.take_extent(stream)
        if number is None:
            return Written(stopped=Stop.DEVICE_FULL)
        left = core.budget_left()
        if left is not None and left < SEGMENT_BYTES:
            # Spent by others while a discard was waited for.
            core.devices.unpin(number)
            return Written(stopped=Stop.WRITE_BUDGET)
        # The room was found first; the entries are looked at only now.
        buffer = self.buffers.take()
        builder = ImageBuilder(
            buffer,
            codec=core.zswap.pools[stream[0]].codec.spec,
            sequence=core.zswap.next_sequence(),
            group=stream[1],
            salt=True,
        )
        gathered = self._gather(stream, builder)
        group = core.groups[stream[1]]
        pending = sum(int(lengths.sum()) for lengths in gathered.lengths)
        admitted = group.take_device(pending)
        try:
            if not admitted:
                # Another shard was faster.
                return Written(stopped=Stop.GROUP_LIMIT)
            if builder.count:
                target, number = number, None
                written, number = yield from self.write_image(builder, target, stream, cause)
                if number is None:
                    return Written(stopped=Stop.DEVICE_ERROR)
                pages = self._flip(gathered, number, group)
            else:
                written = pages = 0
            moved = self._second_chance(gathered, stream)
        finally:
            if admitted:
                group.settle_device(pending)
            if number is not None:
                core.devices.unpin(number)
            for segment in gathered.pinned:
                core.unpin(segment)
            self.buffers.give(buffer)
        if not (written or moved or gathered.finished):
            return Written(stopped=Stop.NOTHING_LEFT)
        return Written(written, pages, moved)

    def take_extent(self, stream: Stream, *, reserve: bool = False) -> Operation[int | None]:
        """A free extent, pinned; None if the devices are full. May wait for discards."""
        devices = self._core.devices
        while (number := devices.take(*stream, 0, reserve=reserve)) is None:
            if devices.discards_waiting:
                yield from devices.discard()
            elif devices.discarding:
                # Somebody else's discards: what they free is free for all.
                yield WAIT
            else:
                break
        return number

    def write_image(
        self, builder: ImageBuilder, number: int, stream: Stream, cause: Cause
    ) -> Operation[tuple[int, int | None]]:
        """Write an image to an extent, or to the next one where that fails.

        The pin that comes with `number` is the caller's no more: it is undone here, unless the
        extent is returned. So an operation that ends while it waits leaves none behind.

        Returns:
            The bytes written, and the extent that holds the image now, pinned; None if none does.
        """
        core = self._core
        builder.finish()
        for attempt in range(WRITE_ATTEMPTS):
            if attempt:
                following = yield from self.take_extent(stream)
                if following is None:
                    return 0, None
                number = following
            entry, extent = core.devices.device_of(number)
            entry.sequence[extent] = builder.sequence
            requests = image_writes(
                entry.device, extent, builder.buffer, builder.payload_end, builder.count
            )
            try:
                yield from self.write(requests)
            except BaseException:
                core.devices.unpin(number)
                raise
            size = sum(request.length for request in requests if request.error is None)
            self.account(cause, size)
            if not any(request.error for request in requests):
                return size, number
            core.devices.fail(number)
            core.devices.unpin(number)
        return 0, None

    def write(self, requests: list[IoRequest]) -> Operation[None]:
        """Have writes performed; while they are under way others know of them, and the budget."""
        with self._budgeted(sum(request.length for request in requests)):
            yield IoBatch(requests)

    @contextlib.contextmanager
    def _budgeted(self, size: int) -> Iterator[None]:
        """Let others know of bytes that are about to be written, and the budget."""
        core = self._core
        core.budget.pending += size
        core.budget.enter()
        try:
            yield
        finally:
            core.budget.pending -= size
            core.budget.enter()

    def account(self, cause: Cause, size: int) -> None:
        """Count bytes that were written to a device under their cause, and against the budget."""
        stats = self._core.stats
        setattr(stats, cause.value, getattr(stats, cause.value) + size)
        self._core.spend(size)

    def _gather(self, stream: Stream, builder: ImageBuilder) -> _Gathered:
        """Copy cold entries of the oldest segments into the image, until it is full."""
        core, zswap = self._core, self._core.zswap
        gathered = _Gathered()
        hot_bytes = 0
        allowance = core.groups[stream[1]].device_room()
        while (segment := zswap.oldest(stream)) is not None:
            if zswap.is_open(segment):
                zswap.seal(stream)
                core.enter()
                if not zswap.live_entries[segment]:
                    continue
            zswap.pin(segment)
            gathered.pinned.append(segment)
            directory = zswap.directory(segment)
            alive, words = core.live_words(Tag.ZSWAP, segment, directory.numbers, directory.offsets)
            hot = referenced(words)
            cold = (
                directory.pick(alive[~hot])
                if len(alive) < len(directory) or hot.any()
                else directory
            )
            count = fits(cold.lengths, builder.room)
            if allowance is not None:
                count = min(
                    count, int(np.searchsorted(np.cumsum(cold.lengths), allowance, "right"))
                )
                allowance -= int(cold.lengths[:count].sum())
            if count:
                chosen = cold if count == len(cold) else cold.pick(np.arange(count))
                if count == len(directory) and not builder.count:
                    offsets = builder.copy(zswap.arena.segment_view(segment), directory)
                else:
                    addresses = chosen.offsets + segment * SEGMENT_BYTES
                    payload = b"".join(zswap.stored(addresses, chosen.lengths))
                    offsets = builder.add(chosen.numbers, chosen.lengths, payload)
                builder.age = zswap.age_of(segment)
                gathered.numbers.append(chosen.numbers)
                gathered.words.append(words[~hot][:count])
                gathered.offsets.append(offsets)
                gathered.lengths.append(chosen.lengths)
            if count < len(cold):
                break
            gathered.finished.append(segment)
            hot_bytes += int(directory.lengths.sum() - cold.lengths.sum())
            if builder.room < _SMALLEST_ROOM or hot_bytes >= SEGMENT_BYTES:
                # A stream that was loaded as a whole is not moved as a whole in one step.
                break
        return gathered

    def _flip(self, gathered: _Gathered, number: int, group: Group) -> int:
        """Let the words that did not change name the extent; returns how many did."""
        core = self._core
        numbers = np.concatenate(gathered.numbers)
        lengths = np.concatenate(gathered.lengths)
        places = Places.within(number, np.concatenate(gathered.offsets), lengths)
        flipped = core.flip(numbers, np.concatenate(gathered.words), Tag.PHYS, places, group)
        core.devices.keep(number, len(flipped), int(lengths[flipped].sum()))
        core.stats.writeback_pages += len(flipped)
        return len(flipped)

    def _second_chance(self, gathered: _Gathered, stream: Stream) -> int:
        """Move what still lives in finished segments to the young end, unmarked.

        Each is let go of before the next is moved: the pool grows by one at most.
        """
        moved = 0
        for segment in gathered.finished:
            moved += self.rejuvenate(segment, stream)
            gathered.pinned.remove(segment)
            self._core.unpin(segment)
        return moved

    def rejuvenate(self, segment: int, stream: Stream) -> int:
        """Move all live entries of a pinned segment to its stream's open one; returns how many.

        The pool grows by them for a moment, until the segment is unpinned: at most one segment.
        """
        core, zswap = self._core, self._core.zswap
        if not zswap.live_entries[segment]:
            return 0
        directory = zswap.directory(segment)
        alive, _ = core.live_words(Tag.ZSWAP, segment, directory.numbers, directory.offsets)
        left = directory.pick(alive)
        if not len(left):
            return 0
        core.clear_reference(left.numbers)
        addresses = left.offsets + segment * SEGMENT_BYTES
        compressed = Compressed(
            stream[0],
            b"".join(zswap.stored(addresses, left.lengths)),
            left.lengths,
            int(left.lengths.sum()),
        )
        if not zswap.has_segments_for(compressed):
            return 0
        expected = core.table.words[left.numbers]
        # Nobody was asked for room: no more than what is needed, and given up in the same step.
        zswap.arena.warm_bytes = 0
        places = zswap.append(stream[1], left.numbers, compressed, core.clock())
        flipped = core.flip(left.numbers, expected, Tag.ZSWAP, places, core.groups[stream[1]])
        assert len(flipped) == len(left)
        core.stats.compact_bytes += compressed.compressed_bytes
        return len(left)

    # Many extents

    def write_back(
        self,
        nbytes: int,
        cause: Cause,
        only: Group | None = None,
        still: Callable[[], int] | None = None,
    ) -> Operation[Written]:
        """Write at least `nbytes`, in whole extents, or until something stops it.

        Several extents are under way at a time: each is an operation of its own, and this one
        drives them by turns.

        Args:
            nbytes: how much.
            cause: what it is counted under.
            only: whose pages; None: anybody's.
            still: asked before each next write: bytes of the pool that are still to go, those
                counted that are being written. Others may have made them go meanwhile.
        """
        total = Written()
        flights: deque[tuple[Operation[Written], IoBatch]] = deque()
        try:
            while True:
                while (
                    total.stopped is None
                    and len(flights) < PIPELINE
                    and (missing := _missing(nbytes - total.bytes, still) - _bytes(flights)) > 0
                ):
                    most = min(WHOLE_AT_ONCE, -(-missing // SEGMENT_BYTES))
                    if still is not None:
                        self._core.leaving(_bytes(flights) + most * SEGMENT_BYTES, only)
                    flight = self.write_some(cause, only, most)
                    landed = yield from _advance(flight, flights)
                    total = _sum(total, landed)
                    if landed.moved:
                        yield PAUSE  # it has only moved pages, and may go on doing so
                if not flights:
                    return total
                flight, batch = flights[0]
                yield batch
                flights.popleft()
                landed = yield from _advance(flight, flights)
                total = _sum(total, landed)
                if still is not None:
                    self._core.leaving(_bytes(flights), only)
                yield PAUSE
        finally:
            if still is not None:
                self._core.leaving(0, only)
            for flight, _ in flights:
                flight.close()


def _advance(
    flight: Operation[Written], flights: deque[tuple[Operation[Written], IoBatch]]
) -> Operation[Written]:
    """Resume one extent's operation until it has begun to write, or has ended."""
    try:
        while True:
            need = next(flight)
            if isinstance(need, IoBatch) and need.requests[0].kind is IoKind.WRITE:
                yield Submit(need)
                flights.append((flight, need))
                return Written()
            yield need
    except StopIteration as end:
        landed: Written = end.value
        return landed
    except BaseException:
        # Nobody else has it in hand: what it pins and reserves is given back now.
        flight.close()
        raise


def _missing(nbytes: int, still: Callable[[], int] | None) -> int:
    """The lesser of what was asked for, and what is still to go."""
    return nbytes if nbytes <= 0 or still is None else min(nbytes, still())


def _bytes(flights: deque[tuple[Operation[Written], IoBatch]]) -> int:
    """Bytes that are being written."""
    return sum(request.length for _, batch in flights for request in batch.requests)


def _sum(one: Written, other: Written) -> Written:
    return Written(
        one.bytes + other.bytes,
        one.pages + other.pages,
        one.moved + other.moved,
        one.stopped or other.stopped,
    )


def _room(group: Group) -> bool:
    """Whether a group's device limit leaves room for at least one page of any size."""
    room = group.device_room()
    return room is None or room >= SEGMENT_BYTES // 64 + ENTRY_OVERHEAD
