"""The dense tier: pages that got old are compressed again, by a codec that takes longer.

The same walk as compaction, from one pool into another: the coldest segments that are not dense are
taken apart, their entries decompressed and compressed again outside the lock, and what has become
smaller is put together in segments of the dense pool. A page that is loaded meanwhile, overwritten
or freed, has another word by then, and is left alone.

Invariants:
- Dense segments have the age of the youngest page that went into them: what is written back first
  is what has not been used for longest, whatever it is compressed with.
- A page that did not become smaller stays where it is, and is not tried again: its segment is
  marked, and keeps the mark through compaction.
- A page that was loaded since somebody looked goes to the young end of its stream once, unmarked,
  as with writeback.
- The pool does not grow beyond its limit by what is put together here, old and new both counted.
- Of processor time no more than its share is taken; no store ever waits for it.

This module must not know when to recompress, or what else could be done: the shrinker decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from vswapd.core import Core
from vswapd.swap_table import Tag, referenced
from vswapd_backends.base import I64, PAGE_BYTES, SEGMENT_BYTES, U64, Compute, Operation, Places
from vswapd_backends.codec import Codec, CorruptError
from vswapd_backends.segment import fits, payload_of
from vswapd_backends.zswap import Compressed, Pool, Stream, decode

BATCH: Final = 4
"""Segments that are taken apart at a time: about 700 pages, 20 ms of zstd:3. Fewer leave more
segments of the dense pool partly filled; more hold the old ones pinned for longer."""
LEAST_GAIN: Final = 0.95
"""A page is worth moving if it becomes smaller than this share of what it was."""
_BURST_S: Final = 0.25
"""Processor time that may be saved up while there is nothing to do."""


@dataclass(slots=True)
class _Batch:
    """Live entries of neighbouring segments, in their order."""

    segments: list[int]
    numbers: I64
    words: U64
    addresses: I64
    lengths: I64


class Recompression:
    """Moves old pages of the other pools into the dense one."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.busy: Callable[[], bool] = lambda: False
        """Whether the machine has something better to do; asked before pages go only by age."""
        self.cpu_clock: Callable[[], float] = time.thread_time
        """What the budget is held against: seconds of the thread that compresses."""
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
        batch = self._fitting(found[zswap.in_stream(found, stream)][:BATCH])
        if batch is None:
            return 0
        for segment in batch.segments:
            zswap.pin(segment)
        try:
            source = zswap.pools[stream[0]].codec
            # Pinned segments are not used again, and sealed ones not written to: their bytes can
            # be looked at without the lock.
            entries = zswap.entries(batch.addresses, batch.lengths)
            work = Compute(
                lambda: self._timed(source, target.codec, entries, batch.lengths), slow=True
            )
            yield work
            denser, seconds = work.result()
            self._tokens -= seconds
            core.stats.recompress_seconds += seconds
            if target is not self.target:
                return 0  # the tiers are others by now
            moved = self._move(batch, denser, (target.index, stream[1]))
            if moved is None:
                return 0
            for segment in batch.segments:
                self._rejuvenate(segment, stream)
                zswap.tried[segment] = True
        finally:
            for segment in batch.segments:
                zswap.unpin(segment)
        return max(1, int(batch.lengths.sum()))

    def _timed(
        self, source: Codec, target: Codec, entries: Sequence[memoryview], lengths: I64
    ) -> tuple[list[bytes], float]:
        begun = self.cpu_clock()
        denser = denser_form(source, target, entries, lengths)
        return denser, self.cpu_clock() - begun

    def _fitting(self, segments: I64) -> _Batch | None:
        """As many of these segments as there is room for what comes out of them; None: of none."""
        for count in range(len(segments), 0, -1):
            batch = self._gather(segments[:count].tolist())
            if self._has_room((batch.lengths * self._expected).astype(np.int64)):
                return batch
        return None

    def _has_room(self, lengths: I64) -> bool:
        """Whether entries of such lengths can be put beside all that is there."""
        need = Compressed(0, b"", lengths, int(lengths.sum()))
        zswap = self._core.zswap
        return zswap.growth(need) <= self._core.pool_room() and zswap.has_segments_for(need)

    def _gather(self, segments: list[int]) -> _Batch:
        """The entries of segments that are alive and were not loaded."""
        core, zswap = self._core, self._core.zswap
        numbers, words, addresses, lengths = [], [], [], []
        for segment in segments:
            directory = zswap.directory(segment)
            alive, current = core.live_words(
                Tag.ZSWAP, segment, directory.numbers, directory.offsets
            )
            cold = ~referenced(current)
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

    def _move(self, batch: _Batch, entries: Sequence[bytes], stream: Stream) -> int | None:
        """Put what became smaller into dense segments; returns how many pages, None: no room."""
        core, zswap = self._core, self._core.zswap
        lengths = np.array([len(entry) for entry in entries], np.int64)
        if len(lengths):
            after = np.where(lengths > 0, lengths, batch.lengths).sum() / batch.lengths.sum()
            self._expected += 0.25 * (min(1.0, 1.05 * float(after)) - self._expected)
        # Those that became no smaller, or could not be read, are empty.
        which = np.flatnonzero((lengths > 0) & (core.words_now(batch.numbers) == batch.words))
        if not len(which):
            return 0
        kept = [entries[i] for i in which.tolist()]
        if not self._has_room(lengths[which]):
            return None  # others have taken it meanwhile
        age = max(zswap.age_of(segment) for segment in batch.segments)
        stamp = float(zswap.stamps_of(np.array(batch.segments)).max())
        first = 0
        while first < len(which):
            segment, builder = zswap.new_segment(stream)
            last = first + fits(lengths[which[first:]], builder.room)
            some = which[first:last]
            offsets = builder.add(batch.numbers[some], lengths[some], payload_of(kept[first:last]))
            zswap.adopt(segment, builder, age=age, stamp=stamp)
            zswap.tried[segment] = True
            places = Places.within(segment, offsets, lengths[some])
            flipped = core.flip(
                batch.numbers[some], batch.words[some], Tag.ZSWAP, places, core.groups[stream[1]]
            )
            assert len(flipped) == len(some)
            saved = int((batch.lengths[some] - lengths[some]).sum())
            core.stats.recompress_pages += len(some)
            core.stats.recompress_saved_bytes += saved
            first = last
        return len(which)

    def _rejuvenate(self, segment: int, stream: Stream) -> None:
        """Move the entries of a segment that were loaded to the young end, unmarked."""
        core, zswap = self._core, self._core.zswap
        directory = zswap.directory(segment)
        alive, words = core.live_words(Tag.ZSWAP, segment, directory.numbers, directory.offsets)
        hot = referenced(words)
        if not hot.any():
            return
        left = directory.pick(alive[hot])
        core.clear_reference(left.numbers)
        payload = b"".join(zswap.stored(left.offsets + segment * SEGMENT_BYTES, left.lengths))
        compressed = Compressed(stream[0], payload, left.lengths, int(left.lengths.sum()))
        if not self._has_room(compressed.lengths):
            return
        expected = core.table.words[left.numbers]
        places = zswap.append(stream[1], left.numbers, compressed, core.clock())
        flipped = core.flip(left.numbers, expected, Tag.ZSWAP, places, core.groups[stream[1]])
        assert len(flipped) == len(left)
        core.stats.compact_bytes += compressed.compressed_bytes


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
