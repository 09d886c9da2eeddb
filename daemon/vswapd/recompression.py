"""The dense tier: pages that got old are compressed again, by a codec that takes longer.

The same walk as compaction, from one pool into another: the coldest segments that are not dense are
taken apart, their entries decompressed and compressed again outside the lock, and what has become
smaller is put together in segments of the dense pool, one per step. A page that is loaded
meanwhile, overwritten or freed, has another word by then, and is left alone.

Invariants:
- Dense segments have the age of the youngest page that went into them: what is written back first
  is what has not been used for longest, whatever it is compressed with.
- A page that did not become smaller stays where it is, and is not tried again: its segment is
  marked, and keeps the mark through compaction. One that is kept raw is not tried at all.
- An entry that does not agree with its check is left alone: compressed again it would get a right
  check, and nobody would ever know.
- A page that was loaded since somebody looked goes to the young end of its stream once, unmarked,
  as with writeback.
- The pool does not grow beyond its limit by what is put together here, old and new both counted.
- Of processor time no more than its share is taken. No store waits for it: one that needs room
  writes back what is not in hand here. (A pool without room for the store has none for the dense
  segment either, so that waiting would seldom help.)

This module must not know when to recompress, or what else could be done: the shrinker decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from vswapd.admission import Admission, Growth
from vswapd.core import Core
from vswapd.groups import Group
from vswapd.swap_table import Tag, referenced
from vswapd_backends.base import (
    I64,
    PAGE_BYTES,
    PAUSE,
    SEGMENT_BYTES,
    U64,
    Compute,
    Operation,
    Places,
)
from vswapd_backends.codec import Codec, CorruptError
from vswapd_backends.segment import CAPACITY, fits, payload_of
from vswapd_backends.zswap import Compressed, Pool, Stream, decode

BATCH: Final = 4
"""Segments that are taken apart at a time: about 700 pages, 20 ms of zstd:3. Fewer leave more
segments of the dense pool partly filled; more hold the old ones pinned for longer."""
_PIECE: Final = 4
"""Pages that are compressed again at a time."""
LEAST_GAIN: Final = 0.95
"""A page is worth moving if it becomes smaller than this share of what it was."""
_BURST_S: Final = 0.25
"""Processor time that may be saved up while there is nothing to do."""


@dataclass(slots=True)
class _Batch:
    """Entries of neighbouring segments that are to be tried, in their order."""

    segments: list[int]
    numbers: I64
    words: U64
    addresses: I64
    lengths: I64


@dataclass(slots=True)
class _Denser:
    """What became of a batch's entries; nothing of those that are not worth moving, or damaged."""

    stored: list[bytes]
    """Check and compressed bytes of each; empty: nothing."""
    lengths: I64
    """Compressed bytes; 0: nothing."""
    seconds: float
    """Processor time that it took."""


class Recompression:
    """Moves old pages of the other pools into the dense one."""

    def __init__(self, core: Core, admission: Admission) -> None:
        self._core = core
        self._admission = admission
        self.busy: Callable[[], bool] = lambda: False
        """Whether the machine has something better to do; asked before pages go only by age."""
        self.cpu_clock: Callable[[], float] = time.thread_time
        """What the budget is held against: seconds of the thread that compresses."""
        self.step_back: Callable[[], None] = lambda: None
        """Called by that thread after each piece of some 200 us: others may want to run."""
        self._expected = 0.75
        """What becomes of a byte, with a margin: a running mean."""
        self._tokens = _BURST_S
        self._tokens_at = core.clock()

    # What there is to do

    @property
    def target(self) -> Pool | None:
        """The dense pool; None: there is none, or it may take no time at all."""
        return self._core.zswap.dense if self._core.settings.recompress_share > 0 else None

    def candidates(self, groups: I64 | None = None) -> I64:
        """Sealed segments that could be tried, coldest first; of these groups, or of all."""
        target = self.target
        if target is None:
            return np.empty(0, np.int64)
        return self._core.zswap.untried(target, groups)

    def due(self) -> I64:
        """Those of the candidates that are old enough to go by themselves, coldest first."""
        found = self.candidates()
        if not len(found):
            return found
        now, age = self._core.clock(), self._core.settings.dense_age
        due: I64 = found[self._core.zswap.stamps_of(found) + age <= now]
        return due

    def next_due(self) -> float | None:
        """The clock's time at which the next candidate is old enough; None: there is none."""
        found = self.candidates()
        if not len(found):
            return None
        due = self._core.zswap.stamps_of(found) + self._core.settings.dense_age
        return float(due.min())

    def seconds(self) -> float:
        """Processor time that may be taken now; fills up by its share of the clock's time."""
        share, now = self._core.settings.recompress_share, self._core.clock()
        self._tokens = min(_BURST_S, self._tokens + (now - self._tokens_at) * share)
        self._tokens_at = now
        return self._tokens

    def affordable_at(self) -> float:
        """The clock's time at which there is processor time again."""
        missing = max(0.0, -self.seconds())
        return self._core.clock() + missing / self._core.settings.recompress_share + 1e-3

    # Doing it

    def step(self, groups: I64 | None = None, *, young: bool = False) -> Operation[int]:
        """Take the coldest candidates of one stream apart.

        Args:
            groups: whose; None: anybody's.
            young: whether those may go, too, that are not old enough to go by themselves.

        Returns:
            Compressed bytes that were looked at: moved, or found not to shrink. 0: nothing could
            be done, for lack of candidates or of room.
        """
        core, zswap, target = self._core, self._core.zswap, self.target
        found = self.candidates(groups) if young else self.due()
        if target is None or not len(found):
            return 0
        stream = zswap.stream_of(int(found[0]))
        group = core.groups[stream[1]]
        batch = self._fitting(found[zswap.in_stream(found, stream)][:BATCH], group)
        if batch is None:
            return 0
        pinned = list(batch.segments)
        for segment in pinned:
            zswap.pin(segment, leaving=False)
        try:
            done, moved = True, 0
            if len(batch.numbers):
                source = zswap.pools[stream[0]].codec
                # Pinned segments are not used again, and sealed ones not written to: their bytes
                # can be looked at without the lock.
                work = Compute(lambda: self._denser(source, target.codec, batch), slow=True)
                yield work
                denser = work.result()
                self._tokens -= denser.seconds
                core.stats.recompress_seconds += denser.seconds
                done, moved = yield from self._move(batch, denser, target, stream[1])
            if not done:
                return moved
            while pinned and target is self.target:
                self._rejuvenate(pinned[0], stream)
                zswap.tried[pinned[0]] = True
                core.unpin(pinned.pop(0), leaving=False)
                yield PAUSE
        finally:
            for segment in pinned:
                core.unpin(segment, leaving=False)
        return max(1, int(batch.lengths.sum()))

    def _denser(self, source: Codec, target: Codec, batch: _Batch) -> _Denser:
        """Compress a batch again. Needs no lock; its segments must be pinned."""
        begun = self.cpu_clock()
        zswap = self._core.zswap
        stored: list[bytes] = []
        lengths: list[int] = []
        for first in range(0, len(batch.lengths), _PIECE):
            piece = slice(first, first + _PIECE)
            addresses = batch.addresses[piece]
            entries = zswap.entries(addresses, batch.lengths[piece])
            denser = denser_form(source, target, entries, batch.lengths[piece])
            for index in zswap.wrong(addresses, batch.lengths[piece]):
                denser[index] = b""
            stored += [payload_of([entry]) if entry else b"" for entry in denser]
            lengths += map(len, denser)
            self.step_back()
        return _Denser(stored, np.array(lengths, np.int64), self.cpu_clock() - begun)

    def _fitting(self, segments: I64, group: Group) -> _Batch | None:
        """As many of these segments as there is room for what comes out of them; None: of none."""
        for count in range(len(segments), 0, -1):
            batch = self._gather(segments[:count].tolist())
            need = _of_lengths((batch.lengths * self._expected).astype(np.int64))
            if self._admission.judge(group, need, Growth.REWRITE) is None:
                return batch
        return None

    def _gather(self, segments: list[int]) -> _Batch:
        """The entries of segments that are alive, were not loaded, and are not raw."""
        core, zswap = self._core, self._core.zswap
        numbers, words, addresses, lengths = [], [], [], []
        for segment in segments:
            directory = zswap.directory(segment)
            alive, current = core.live_words(
                Tag.ZSWAP, segment, directory.numbers, directory.offsets
            )
            cold = ~referenced(current) & (directory.lengths[alive] < PAGE_BYTES)
            live = directory.pick(alive[cold])
            numbers.append(live.numbers)
            words.append(current[cold])
            addresses.append(live.offsets + segment * SEGMENT_BYTES)
            lengths.append(live.lengths)
        return _Batch(
            segments,
            np.concatenate(numbers),
            np.concatenate(words),
            np.concatenate(addresses),
            np.concatenate(lengths),
        )

    def _move(
        self, batch: _Batch, denser: _Denser, target: Pool, group: int
    ) -> Operation[tuple[bool, int]]:
        """Put what became smaller into dense segments, each in a step of its own.

        Returns:
            Whether all was put there that could be, and the compressed bytes that were. Not all is
            if there was no room left, or the tiers are others by now.
        """
        after = np.where(denser.lengths > 0, denser.lengths, batch.lengths).sum()
        share = float(after / batch.lengths.sum())
        self._expected += 0.25 * (min(1.0, 1.05 * share) - self._expected)
        # Of sealed segments that are pinned: ages and stamps do not change.
        age = max(self._core.zswap.age_of(segment) for segment in batch.segments)
        stamp = float(self._core.zswap.stamps_of(np.array(batch.segments)).max())
        which = np.flatnonzero(denser.lengths)
        first = moved = 0
        while first < len(which):
            yield PAUSE
            last = first + fits(denser.lengths[which[first:]], CAPACITY)
            if target is not self.target:
                return False, moved
            put = self._put(batch, denser, which[first:last], (target.index, group), age, stamp)
            if put is None:
                return False, moved
            moved += put
            first = last
        return target is self.target, moved

    def _put(
        self, batch: _Batch, denser: _Denser, which: I64, stream: Stream, age: int, stamp: float
    ) -> int | None:
        """Make a dense segment of those entries whose words have not changed.

        Returns:
            Their compressed bytes before; None: there is no room for them.
        """
        core, zswap = self._core, self._core.zswap
        which = which[core.words_now(batch.numbers[which]) == batch.words[which]]
        if not len(which):
            return 0
        numbers, lengths = batch.numbers[which], denser.lengths[which]
        group = core.groups[stream[1]]
        if self._admission.admit(group, _of_lengths(lengths), Growth.REWRITE) is not None:
            return None  # others have taken it meanwhile
        segment, builder = zswap.new_segment(stream)
        payload = b"".join([denser.stored[i] for i in which.tolist()])
        offsets = builder.add(numbers, lengths, payload)
        zswap.adopt(segment, builder, age=age, stamp=stamp)
        zswap.tried[segment] = True
        places = Places.within(segment, offsets, lengths)
        flipped = core.flip(numbers, batch.words[which], Tag.ZSWAP, places, group)
        assert len(flipped) == len(which)
        before = int(batch.lengths[which].sum())
        core.stats.recompress_pages += len(which)
        core.stats.recompress_saved_bytes += before - int(lengths.sum())
        return before

    def _rejuvenate(self, segment: int, stream: Stream) -> None:
        """Move the entries of a segment that were loaded to the young end, unmarked."""
        core, zswap = self._core, self._core.zswap
        directory = zswap.directory(segment)
        alive, words = core.live_words(Tag.ZSWAP, segment, directory.numbers, directory.offsets)
        hot = referenced(words)
        if not hot.any():
            return
        left = directory.pick(alive[hot])
        payload = b"".join(zswap.stored(left.offsets + segment * SEGMENT_BYTES, left.lengths))
        compressed = Compressed(stream[0], payload, left.lengths, int(left.lengths.sum()))
        group = core.groups[stream[1]]
        if self._admission.admit(group, compressed, Growth.REWRITE) is not None:
            return
        core.clear_reference(left.numbers)
        expected = core.table.words[left.numbers]
        places = zswap.append(stream[1], left.numbers, compressed, core.clock())
        flipped = core.flip(left.numbers, expected, Tag.ZSWAP, places, group)
        assert len(flipped) == len(left)
        core.stats.compact_bytes += compressed.compressed_bytes


def _of_lengths(lengths: I64) -> Compressed:
    """What entries of such lengths are to an admission."""
    return Compressed(0, b"", lengths, int(lengths.sum()))


def denser_form(
    source: Codec, target: Codec, entries: Sequence[memoryview], lengths: I64
) -> list[bytes]:
    """Entries taken from one codec to another. Needs no lock.

    Args:
        source: what they are compressed with.
        target: what they are to be compressed with.
        entries: n of them.
        lengths: their bytes; PAGE_BYTES where they are raw pages; shape (n,).

    Returns:
        n entries; empty where that is not worth it, or what there was could not be read.
    """
    try:
        pages = decode(source, entries, lengths)
    except CorruptError as error:
        # Whoever loads them is told; here they are left alone.
        good = np.setdiff1d(np.arange(len(entries)), error.indices)
        found = [b""] * len(entries)
        some = denser_form(source, target, [entries[i] for i in good.tolist()], lengths[good])
        for index, entry in zip(good.tolist(), some, strict=True):
            found[index] = entry
        return found
    most = np.minimum(lengths * LEAST_GAIN, PAGE_BYTES - 1).tolist()
    return [
        entry if len(entry) <= limit else b""
        for entry, limit in zip(target.compress(pages), most, strict=True)
    ]
