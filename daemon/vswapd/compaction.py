"""Compaction of pools: live entries of sparse segments are copied together, and the segments go.

The same walk as writeback, without the device: no I/O, so a step can be atomic under the lock. The
shrinker gives the lock back between the look for sparse segments and the copying (`paused_step`).

Invariants:
- Entries keep their reference bits, and the new segment the age of the youngest that went into it:
  compaction neither warms nor cools a page by more than its neighbours.
- A step copies at most one segment's worth of entries, and leaves at least one sparse segment less:
  a step may free nothing by itself, but no sequence of steps goes on for ever.

This module must not know when to compact: the shrinker and the stores decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from vswapd.admission import Admission, Growth
from vswapd.core import Core
from vswapd.groups import Group
from vswapd.swap_table import Tag
from vswapd_backends.base import I64, PAGE_BYTES, PAUSE, SEGMENT_BYTES, Operation, Places
from vswapd_backends.segment import CAPACITY, Directory, fits
from vswapd_backends.zswap import Compressed

SPARSE: Final = 0.85
"""Segments of which less than this share is needed are worth copying together with others."""
LEAST_GAIN: Final = 64 * 1024
"""Memory that packing must free at least; less is not worth the copying."""
_TRIM_AT_ONCE: Final = 1
"""Segments that are given back to the system in one step: 85 us each."""
_EDGES: Final = 2 * PAGE_BYTES
"""Partly filled pages, at the payload's end and the directory's start, of a short segment."""
SLACK: Final = 0.12
"""Share of the needed bytes that may lie waste before the compactor starts by itself: the bound on
resident bytes is 1.25 times the compressed ones, directories and open segments included."""


@dataclass(frozen=True, slots=True)
class CompactResult:
    """What compaction did: compressed bytes copied, and pool memory given back."""

    moved_bytes: int
    freed_bytes: int


class Compaction:
    """Packs sparse segments."""

    def __init__(self, core: Core, admission: Admission) -> None:
        self._core = core
        self._admission = admission

    def waste(self) -> int:
        """Pool memory that no live entry needs."""
        return self._core.zswap.in_use_bytes - self._core.zswap.needed_bytes

    def wanted(self) -> bool:
        """Whether enough lies waste for the compactor to start by itself. Cheap."""
        zswap = self._core.zswap
        waste = zswap.in_use_bytes - zswap.needed_bytes
        return waste > SLACK * zswap.needed_bytes + SEGMENT_BYTES * zswap.open_streams

    def step(self) -> CompactResult | None:
        """Copy one batch of sparse segments together; None if there is none."""
        sources = self._choose()
        if not len(sources) or not self._core.zswap.arena.available:
            return None
        return self._copy(sources)

    def paused_step(self) -> Operation[CompactResult | None]:
        """The same, with the lock for others between the look and the copying."""
        zswap = self._core.zswap
        sources = self._choose()
        for segment in sources.tolist():
            zswap.pin(segment)
        try:
            if len(sources):
                yield PAUSE
            if not len(sources) or not zswap.arena.available:
                return None
            return self._copy(sources[zswap.live_entries[sources] > 0])
        finally:
            for segment in sources.tolist():
                self._core.unpin(segment)

    def _copy(self, sources: I64) -> CompactResult:
        """Copy sealed segments of one stream together, each with live entries; there is a free one.

        Perhaps not all that lives in them: what does not fit stays. (A segment that is copied in
        part stays as it is, and what was taken from it is there twice. That needs room.)
        """
        if not len(sources):
            return CompactResult(0, 0)
        core, zswap = self._core, self._core.zswap
        before = zswap.in_use_bytes
        stream = zswap.stream_of(int(sources[0]))
        group = core.groups[stream[1]]
        target, builder = zswap.new_segment(stream)
        numbers, words, offsets, lengths = [], [], [], []
        for segment in sources.tolist():
            directory = zswap.directory(segment)
            alive, current = core.live_words(
                Tag.ZSWAP, segment, directory.numbers, directory.offsets
            )
            count = fits(directory.lengths[alive], builder.room)
            live = directory.pick(alive[:count])
            if count < len(alive) and not self._has_room_for(live, group):
                break
            entries = zswap.stored(live.offsets + segment * SEGMENT_BYTES, live.lengths)
            numbers.append(live.numbers)
            words.append(current[:count])
            lengths.append(live.lengths)
            offsets.append(
                builder.add(
                    live.numbers,
                    live.lengths,
                    b"".join(entries),
                )
            )
        zswap.adopt(
            target,
            builder,
            age=max(zswap.age_of(s) for s in sources.tolist()),
            stamp=float(zswap.stamps_of(sources).max()),
        )
        zswap.tried[target] = zswap.tried[sources[0]]
        length = np.concatenate(lengths)
        places = Places.within(target, np.concatenate(offsets), length)
        flipped = core.flip(
            np.concatenate(numbers),
            np.concatenate(words),
            Tag.ZSWAP,
            places,
            group,
        )
        assert len(flipped) == len(length)
        moved = int(length.sum())
        core.stats.compact_bytes += moved
        return CompactResult(moved, before - zswap.in_use_bytes)

    def _has_room_for(self, live: Directory, group: Group) -> bool:
        """Whether entries can be there twice until the rest of their segment is copied, too."""
        need = Compressed(0, b"", live.lengths, int(live.lengths.sum()))
        return len(live) > 0 and self._admission.admit(group, need, Growth.REWRITE) is None

    def _choose(self) -> I64:
        """Sparse sealed segments of one stream, the sparsest, enough to fill one; by age.

        The stream is the one that packing frees the most of; empty if that is not enough. (Not the
        one with the sparsest segment: a small one that nothing can be done about would keep the
        dead entries of all others in memory.)
        """
        zswap = self._core.zswap
        none = np.empty(0, np.int64)
        segments = zswap.sealed(zswap.oldest_first())
        need = zswap.footprints(segments)
        # Measured against what they occupy: a segment sealed early is small, not sparse.
        occupied = zswap.arena.occupied(segments)
        share = need / np.maximum(occupied, 1)
        sparse = np.flatnonzero(share < SPARSE)
        if not len(sparse):
            return none
        # What was tried with the dense codec is kept apart from what was not.
        kinds = zswap.streams_of(segments[sparse]) * 2 + zswap.tried[segments[sparse]]
        _, of = np.unique(kinds, return_inverse=True)
        total = np.bincount(of, need[sparse])
        packed = np.minimum(np.ceil(total / CAPACITY) * SEGMENT_BYTES, total + _EDGES)
        gain = np.bincount(of, occupied[sparse]) - packed
        stream = int(np.argmax(gain))
        if gain[stream] < LEAST_GAIN:
            return none
        which: I64 = sparse[of == stream]
        order = which[np.argsort(share[which], kind="stable")]
        count = int(np.searchsorted(np.cumsum(need[order]), CAPACITY, side="right")) + 1
        picked = segments[order[:count]]
        ages = np.array([zswap.age_of(s) for s in picked.tolist()])
        return picked[np.argsort(ages)]

    def run(self) -> Operation[CompactResult]:
        """Compact until no step pays any more."""
        before = self._core.zswap.resident_bytes
        moved = 0
        while (step := (yield from self.paused_step())) is not None:
            moved += step.moved_bytes
            yield PAUSE
        yield from self.trim()
        return CompactResult(moved, before - self._core.zswap.resident_bytes)

    def trim(self) -> Operation[int]:
        """Give the spare memory that there is back to the system; returns how many bytes."""
        arena = self._core.zswap.arena
        freed = 0
        for left in range(arena.spare_segments, 0, -_TRIM_AT_ONCE):
            freed += arena.trim(min(left, _TRIM_AT_ONCE))
            self._core.enter()
            yield PAUSE
        return freed
