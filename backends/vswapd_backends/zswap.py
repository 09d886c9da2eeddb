"""The zswap backend: compressed pages in RAM, appended to logs, oldest first out.

A *stream* is one pool's log for one group: it has at most one open segment, to which entries are
appended; full segments are sealed and numbered by age. So each group's oldest pages are known, and
a group over its limit pays with its own.

Invariants:
- `live_bytes[s]` and `live_entries[s]` count the entries of segment s that table words name; who
  publishes or gives up a word says so here (`keep`, `give_up`).
- A segment whose last live entry went is returned at once, unless it is pinned: a pinned segment's
  place numbers cannot come to mean something else while its writeback runs.
- A sealed segment never changes again, except that its entries die.

This module must not know slots' owners, devices, or why entries move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vswapd_backends.base import I64, PAGE_BYTES, SEGMENT_BYTES, Places
from vswapd_backends.codec import Codec, CorruptError, codec_from_spec
from vswapd_backends.kept import F64, Names
from vswapd_backends.segment import (
    CAPACITY,
    CHECK_BYTES,
    DIRECTORY_ENTRY_BYTES,
    ENTRY_OVERHEAD,
    SEGMENT_WORDS,
    Directory,
    ImageBuilder,
    digests,
    get_checks,
    parse_directory,
)
from vswapd_backends.zpool import ZPool

MOST_POOLS: Final = 256
SPEC_BYTES: Final = 32
_NEVER: Final = np.iinfo(np.int64).max
_TWO_PAGES: Final = 2 * PAGE_BYTES
_SEGMENT_SHIFT: Final = SEGMENT_BYTES.bit_length() - 1


@dataclass(slots=True)
class Pool:
    """The entries of one codec."""

    index: int
    codec: Codec
    entries: int = 0
    live_bytes: int = 0


@dataclass(slots=True)
class Compressed:
    """n pages in compressed form, on their way into a log or onto a device."""

    pool: int
    payload: bytes | memoryview
    """The entries one after the other: each one's plain check, then its compressed bytes."""
    lengths: I64
    """Compressed bytes of each entry, without its check."""
    compressed_bytes: int
    """Sum of the lengths: asked for so often that it is kept."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def footprint(self) -> int:
        """Bytes of segments that the entries take, overhead included."""
        return self.compressed_bytes + ENTRY_OVERHEAD * len(self.lengths)

    def slice(self, first: int, last: int) -> Compressed:
        """Entries first to last - 1."""
        if first == 0 and last == len(self.lengths):
            return self
        lengths = self.lengths[first:last]
        length = int(lengths.sum())
        begin = int(self.lengths[:first].sum()) + CHECK_BYTES * first
        end = begin + length + CHECK_BYTES * (last - first)
        return Compressed(self.pool, memoryview(self.payload)[begin:end], lengths, length)


Stream = tuple[int, int]
"""(pool index, group index)"""


class Zswap:
    """All pools, their streams, and the segments that these are made of."""

    def __init__(self, arena: ZPool, codec: str, specs: Names | None = None) -> None:
        """Pools in an arena.

        Args:
            arena: their memory.
            codec: what new pages are compressed with.
            specs: the codecs of the pools that there were, by index; new ones are added to it.

        Raises:
            UnknownCodecError: one of them is no codec.
        """
        self.arena: Final = arena
        self.pools: list[Pool] = []
        self._by_spec: dict[str, Pool] = {}
        self._specs = specs or Names.private(MOST_POOLS, SPEC_BYTES)
        columns = arena.columns
        self._kept_sequence = columns.head[1:]
        self._sequence = columns.head.item(1)
        self._open: dict[Stream, tuple[int, ImageBuilder]] = {}
        shape = arena.segments
        self.live_bytes: Final[I64] = np.zeros(shape, np.int64)
        self.live_entries: Final[I64] = np.zeros(shape, np.int64)
        # Ages of free segments are _NEVER. Set lazily, so that the array costs nothing up front:
        # what is at or above arena.limit is not looked at.
        self._age: Final[I64] = columns.age
        self._stamp: Final[F64] = columns.stamp
        self._count: Final[I64] = columns.count
        self._pool: Final[I64] = columns.pool
        self._group: Final[I64] = columns.group
        self._sealed: Final[I64] = columns.sealed
        self._pins: Final[I64] = np.zeros(shape, np.int64)
        self._leaving: Final[I64] = np.zeros(shape, np.int64)
        """Of the pins, those of whoever makes all entries of the segment go."""
        self.tried: Final = np.zeros(shape, np.bool_)
        """Segments of which no page would become smaller in the dense pool, as far as is known."""
        self.dense: Pool | None = None
        """The pool that old pages are moved to; None: they stay where they are."""
        self.corrupt_entries = 0
        self.total_live_bytes = 0
        self.total_entries = 0
        for spec in self._specs.all():
            self._add_pool(spec)
        self.current = self.pool_of(codec)

    # Pools

    def pool_of(self, spec: str) -> Pool:
        """The pool of a codec, made if there is none yet.

        Raises:
            UnknownCodecError: the spec names no codec; nothing changed.
        """
        found = self._by_spec.get(spec)
        if found is None:
            found = self._add_pool(spec)
            index = self._specs.add(spec)
            assert index == found.index
        return found

    def _add_pool(self, spec: str) -> Pool:
        pool = Pool(len(self.pools), codec_from_spec(spec))
        self.pools.append(pool)
        self._by_spec[spec] = pool
        return pool

    def next_sequence(self) -> int:
        """A number that no segment and no extent had before."""
        self._sequence += 1
        self._kept_sequence[0] = self._sequence
        return self._sequence

    # Append

    @staticmethod
    def growth(compressed: Compressed) -> int:
        """The most bytes by which the arena grows if these entries are appended."""
        total = compressed.footprint
        return total + _TWO_PAGES * (2 + total // (CAPACITY - PAGE_BYTES))

    def has_segments_for(self, compressed: Compressed) -> bool:
        """Whether the arena has segments enough for these entries."""
        return self.arena.available >= 2 + compressed.footprint // (
            CAPACITY - PAGE_BYTES - ENTRY_OVERHEAD
        )

    def append(self, group: int, numbers: I64, compressed: Compressed, now: float) -> Places:
        """Append entries for n slots to a stream; they count as live from now on.

        The caller has made sure of room (`growth`, `has_segments_for`), and publishes the words.
        """
        stream = (compressed.pool, group)
        segment, builder = self._open.get(stream) or self._open_segment(stream)
        if compressed.footprint <= builder.room:
            offsets = builder.add(numbers, compressed.lengths, compressed.payload)
            self._appended(segment, builder, len(compressed), compressed.compressed_bytes, now)
            places = Places.within(segment, offsets, compressed.lengths)
        else:
            places = self._append_across(stream, numbers, compressed, now)
        pool = self.pools[compressed.pool]
        self._account(pool, len(compressed), compressed.compressed_bytes)
        return places

    def _append_across(
        self, stream: Stream, numbers: I64, compressed: Compressed, now: float
    ) -> Places:
        """Append entries that the open segment has not room enough for to it and to the next."""
        lengths, payload = compressed.lengths, memoryview(compressed.payload)
        needs = (lengths + ENTRY_OVERHEAD).cumsum()
        total = needs.item(-1)
        addresses = np.empty(len(lengths), np.int64)
        first = placed = begin = 0
        while first < len(lengths):
            segment, builder = self._open.get(stream) or self._open_segment(stream)
            last = len(lengths)
            if total - placed > builder.room:
                last = int(needs.searchsorted(placed + builder.room, "right"))
            if last == first:
                self.seal(stream)
                continue
            placed = needs.item(last - 1)
            end = placed - DIRECTORY_ENTRY_BYTES * last
            offsets = builder.add(numbers[first:last], lengths[first:last], payload[begin:end])
            addresses[first:last] = offsets + segment * SEGMENT_BYTES
            entries = last - first
            self._appended(segment, builder, entries, end - begin - CHECK_BYTES * entries, now)
            first, begin = last, end
        return Places(addresses, lengths)

    def _appended(
        self, segment: int, builder: ImageBuilder, entries: int, length: int, now: float
    ) -> None:
        self.arena.touched(segment, builder.payload_end, builder.count)
        self._count[segment] = builder.count
        self._stamp[segment] = now
        self.live_bytes[segment] += length
        self.live_entries[segment] += entries

    def _account(self, pool: Pool, entries: int, length: int) -> None:
        pool.entries += entries
        pool.live_bytes += length
        self.total_entries += entries
        self.total_live_bytes += length

    def _open_segment(self, stream: Stream) -> tuple[int, ImageBuilder]:
        segment, builder = self.new_segment(stream)
        self._open[stream] = (segment, builder)
        return segment, builder

    def new_segment(self, stream: Stream) -> tuple[int, ImageBuilder]:
        """A segment that belongs to a stream but is not its open one: for compaction."""
        segment = self.arena.take()
        sequence = self.next_sequence()
        pool, group = stream
        builder = ImageBuilder(
            self.arena.segment_view(segment),
            codec=self.pools[pool].codec.spec,
            sequence=sequence,
            group=group,
            salt=False,
        )
        builder.age = sequence
        builder.finish()
        self.arena.touched(segment, builder.payload_end, 0)
        self._age[segment] = sequence
        self._pool[segment] = pool
        self._group[segment] = group
        self._count[segment] = 0
        self._sealed[segment] = 0
        self.tried[segment] = False
        return segment, builder

    def adopt(self, segment: int, builder: ImageBuilder, *, age: int, stamp: float) -> None:
        """Make a segment from `new_segment` a sealed one of the given age, its entries live."""
        builder.age = age
        builder.finish()
        self.arena.touched(segment, builder.payload_end, builder.count)
        self.arena.finished(segment, builder.payload_end, builder.count)
        self._age[segment] = age
        self._stamp[segment] = stamp
        self._count[segment] = builder.count
        directory = self.directory(segment)
        length = int(directory.lengths.sum())
        self.live_bytes[segment] = length
        self.live_entries[segment] = len(directory)
        self._sealed[segment] = 1
        self._account(self.pools[int(self._pool[segment])], len(directory), length)

    def seal(self, stream: Stream) -> None:
        """Close a stream's open segment; the next append opens another."""
        segment, builder = self._open.pop(stream)
        builder.finish()
        if self.live_entries[segment]:
            self.arena.finished(segment, builder.payload_end, builder.count)
            self._sealed[segment] = 1
        else:
            self._maybe_return(segment)

    def restore(self, entries: I64, lengths: I64) -> None:
        """Take up what another process has left, all of it sealed. Nothing is known yet.

        Args:
            entries: how many entries of each segment the table names; shape (arena.limit,).
            lengths: their compressed bytes; shape (arena.limit,).
        """
        limit = self.arena.limit
        self.live_entries[:limit] = entries
        self.live_bytes[:limit] = lengths
        used = entries > 0
        free = np.flatnonzero(~used)
        self._age[free] = _NEVER
        self._count[free] = 0
        for segment in np.flatnonzero(used & (self._sealed[:limit] == 0)).tolist():
            # What was appended, but not counted, is named by no word: the directory ends before it.
            directory = self.directory(segment)
            end = int(directory.offsets[-1] + CHECK_BYTES + directory.lengths[-1])
            self.arena.shape(segment, end, len(directory))
            self._sealed[segment] = 1
        self.arena.restore(used)
        of = self._pool[:limit][used]
        count = np.bincount(of, entries[used], len(self.pools)).astype(np.int64)
        length = np.bincount(of, lengths[used], len(self.pools)).astype(np.int64)
        for pool in self.pools:
            self._account(pool, int(count[pool.index]), int(length[pool.index]))

    # Entries die

    def give_up(self, places: Places) -> None:
        """Entries that no word names any more: account them, and return segments left empty."""
        if len(places.length) == 1:
            self.give_up_one(places.address.item(), places.length.item())
            return
        segments = places.number
        first, last = segments.item(0), segments.item(-1)
        count = len(segments)
        length = int(places.length.sum())
        if (segments == first).all():
            # As after writeback, or of pages that were stored together: one segment's entries.
            self._take_off(first, count, length)
        elif ((segments == first) | (segments == last)).all():
            # Stored together, over the end of one segment into the next.
            mine = segments == first
            some, part = int(mine.sum()), int(places.length[mine].sum())
            self._take_off(first, some, part)
            self._take_off(last, count - some, length - part)
        else:
            np.subtract.at(self.live_bytes, segments, places.length)
            np.subtract.at(self.live_entries, segments, 1)
            for segment in set(segments[self.live_entries[segments] == 0].tolist()):
                self._maybe_return(segment)
        only = self._only_pool(segments)
        if only is not None:
            self._account(only, -count, -length)
            return
        of = self._pool[segments]
        entries = np.bincount(of, minlength=len(self.pools)).tolist()
        lengths = np.bincount(of, places.length, minlength=len(self.pools)).tolist()
        for pool, some, part in zip(self.pools, entries, lengths, strict=True):
            self._account(pool, -some, -int(part))

    def give_up_one(self, address: int, length: int) -> None:
        """The same for one entry."""
        segment = address // SEGMENT_BYTES
        self._take_off(segment, 1, length)
        self._account(self.pools[self._pool.item(segment)], -1, -length)

    def _take_off(self, segment: int, entries: int, length: int) -> None:
        """Entries of one segment have died."""
        left = self.live_entries.item(segment) - entries
        self.live_entries[segment] = left
        self.live_bytes[segment] -= length
        if not left:
            self._maybe_return(segment)

    def _maybe_return(self, segment: int) -> None:
        if self.live_entries[segment] or self._pins[segment]:
            return
        stream = self.stream_of(segment)
        found = self._open.get(stream)
        if found is not None and found[0] == segment:
            del self._open[stream]
        self._return(segment)

    def _return(self, segment: int) -> None:
        assert self.live_bytes[segment] == 0
        self._age[segment] = _NEVER
        self._count[segment] = 0
        self.arena.give(segment)

    def pin(self, segment: int, *, leaving: bool = True) -> None:
        """Keep a segment's number from being used again, whatever dies in it.

        Args:
            segment: which.
            leaving: whether its memory will be free when this is over, unless something fails.
        """
        self._pins[segment] += 1
        self._leaving[segment] += leaving

    def unpin(self, segment: int, *, leaving: bool = True) -> None:
        """Undo one `pin` of the same kind; the segment is returned if nothing lives in it."""
        assert self._pins[segment] > 0
        self._pins[segment] -= 1
        self._leaving[segment] -= leaving
        self._maybe_return(segment)

    def any_leaving(self, group: int | None = None) -> bool:
        """Whether there are segments (of one group) that may soon be free."""
        leaving = self._leaving[: self.arena.limit] > 0
        if group is not None:
            leaving &= self._group[: self.arena.limit] == group
        return bool(leaving.any())

    # Load

    def read(self, addresses: I64, lengths: I64) -> list[bytes | memoryview]:
        """The pages of n entries, in order.

        Args:
            addresses: where the entries begin in the arena; shape (n,).
            lengths: their compressed bytes; shape (n,).

        Raises:
            CorruptError: entries that do not decompress; they stay where they are, and are counted.
        """
        entries = self.entries(addresses, lengths)
        if not entries:
            return []
        segments = addresses >> _SEGMENT_SHIFT
        only = self._only_pool(segments)
        if only is not None:
            return self._decode(only, entries, lengths)
        pages: list[bytes | memoryview] = [b""] * len(entries)
        corrupt: list[int] = []
        of = self._pool[segments]
        for pool in self.pools:
            which = np.flatnonzero(of == pool.index)
            picked = which.tolist()
            try:
                decoded = self._decode(pool, [entries[i] for i in picked], lengths[which])
            except CorruptError as error:
                corrupt += [picked[i] for i in error.indices]
                continue
            for index, page in zip(picked, decoded, strict=True):
                pages[index] = page
        if corrupt:
            raise CorruptError(corrupt)
        return pages

    def read_one(self, address: int, length: int) -> bytes:
        """The page of one entry, as `read` returns it.

        Raises:
            CorruptError: it does not decompress; it stays where it is, and is counted.
        """
        begin = address + CHECK_BYTES
        entry = self.arena.view[begin : begin + length]
        if length == PAGE_BYTES:
            return bytes(entry)
        pool = self.pools[self._pool.item(address >> _SEGMENT_SHIFT)]
        try:
            (page,) = pool.codec.decompress([entry])
        except CorruptError:
            self.corrupt_entries += 1
            raise
        return page

    def _only_pool(self, segments: I64) -> Pool | None:
        """The pool that these segments, at least one, are all of; None: they are of several."""
        if len(self.pools) == 1:
            return self.pools[0]
        first = self._pool.item(segments.item(0))
        if len(segments) > 1 and (self._pool[segments] != first).any():
            return None
        return self.pools[first]

    def entries(self, addresses: I64, lengths: I64) -> list[memoryview]:
        """The compressed bytes of n entries, as views of the arena."""
        starts = addresses + CHECK_BYTES
        ends = starts + lengths
        return list(map(self.arena.view.__getitem__, map(slice, starts.tolist(), ends.tolist())))

    def _decode(
        self, pool: Pool, entries: list[memoryview], lengths: I64
    ) -> list[bytes | memoryview]:
        try:
            return decode(pool.codec, entries, lengths)
        except CorruptError as error:
            self.corrupt_entries += len(error.indices)
            raise

    def stored(self, addresses: I64, lengths: I64) -> list[memoryview]:
        """Entries with their plain checks, as views of the arena: ready to be copied."""
        ends = addresses + CHECK_BYTES + lengths
        spans = map(slice, addresses.tolist(), ends.tolist())
        return list(map(self.arena.view.__getitem__, spans))

    def wrong(self, addresses: I64, lengths: I64) -> list[int]:
        """Which of n entries do not agree with their checks: indices into the batch."""
        found = digests(self.entries(addresses, lengths))
        bad: list[int] = np.flatnonzero(get_checks(self.arena.bytes, addresses) != found).tolist()
        return bad

    # What the shrinker and the compactor ask

    def directory(self, segment: int) -> Directory:
        """All entries of a segment, dead ones included, in the order in which they came."""
        top = (segment + 1) * SEGMENT_WORDS
        count = int(self._count[segment])
        return parse_directory(self.arena.words[top - count : top][::-1])

    def stream_of(self, segment: int) -> Stream:
        """The stream that a segment belongs to."""
        return int(self._pool[segment]), int(self._group[segment])

    def streams_of(self, segments: I64) -> I64:
        """A number per segment that only those of its own stream have; shape (n,)."""
        found: I64 = (self._pool[segments] << 32) | self._group[segments]
        return found

    def pools_of(self, segments: I64) -> I64:
        """The pool indices of n segments."""
        found: I64 = self._pool[segments]
        return found

    def age_of(self, segment: int) -> int:
        """A segment's place in the order of coldness; lower is colder."""
        return int(self._age[segment])

    def stamps_of(self, segments: I64) -> F64:
        """The engine's clock when each of n segments was last appended to."""
        found: F64 = self._stamp[segments]
        return found

    def is_open(self, segment: int) -> bool:
        """Whether the segment is its stream's open one."""
        found = self._open.get(self.stream_of(segment))
        return found is not None and found[0] == segment

    def all_alive(self, segments: I64) -> npt.NDArray[np.bool_]:
        """Which of the segments have no dead entry."""
        alive: npt.NDArray[np.bool_] = self.live_entries[segments] == self._count[segments]
        return alive

    def sealed(self, segments: I64) -> I64:
        """Those of the segments that are no stream's open one."""
        return segments[self.are_sealed(segments)]

    def are_sealed(self, segments: I64) -> npt.NDArray[np.bool_]:
        """Which of the segments, all in use, are no stream's open one."""
        sealed: npt.NDArray[np.bool_] = self._sealed[segments] != 0
        return sealed

    def untried(self, target: Pool, groups: I64 | None = None) -> I64:
        """Sealed segments that are not of the target pool and were not tried; coldest first."""
        limit = self.arena.limit
        which = (self._pool[:limit] != target.index) & ~self.tried[:limit]
        which &= (self._sealed[:limit] != 0) & (self._age[:limit] != _NEVER)
        which &= self._pins[:limit] == 0
        if groups is not None:
            which &= np.isin(self._group[:limit], groups)
        segments = np.flatnonzero(which)
        ordered: I64 = segments[np.argsort(self._age[segments], kind="stable")]
        return ordered

    def resident_of(self, pool: Pool) -> int:
        """Memory that the segments of a pool take."""
        limit = self.arena.limit
        mine = (self._pool[:limit] == pool.index) & (self._age[:limit] != _NEVER)
        return int(self.arena.occupied(np.flatnonzero(mine)).sum())

    def in_groups(self, segments: I64, groups: I64) -> npt.NDArray[np.bool_]:
        """Which of the segments belong to one of these groups."""
        return np.isin(self._group[segments], groups)

    def in_stream(self, segments: I64, stream: Stream) -> npt.NDArray[np.bool_]:
        """Which of the segments belong to a stream."""
        mine: npt.NDArray[np.bool_] = (self._pool[segments] == stream[0]) & (
            self._group[segments] == stream[1]
        )
        return mine

    def oldest(self, stream: Stream | None = None, groups: I64 | None = None) -> int | None:
        """The coldest segment that is in use and not pinned; None if there is none.

        Args:
            stream: only of this stream.
            groups: only of these groups; None: of any.
        """
        limit = self.arena.limit
        if not limit:
            return None
        segments = np.arange(limit)
        ages = np.where(self._pins[:limit] == 0, self._age[:limit], _NEVER)
        if stream is not None:
            ages[~self.in_stream(segments, stream)] = _NEVER
        if groups is not None:
            ages[~self.in_groups(segments, groups)] = _NEVER
        segment = int(ages.argmin())
        return None if ages[segment] == _NEVER else segment

    def oldest_first(self, stream: Stream | None = None, groups: I64 | None = None) -> I64:
        """Segments that are in use and not pinned, coldest first; shape (k,).

        Args:
            stream: only those of this stream.
            groups: only those of these groups.
        """
        limit = self.arena.limit
        ages = self._age[:limit]
        which = (ages != _NEVER) & (self._pins[:limit] == 0)
        if stream is not None:
            which &= (self._pool[:limit] == stream[0]) & (self._group[:limit] == stream[1])
        if groups is not None:
            which &= np.isin(self._group[:limit], groups)
        segments = np.flatnonzero(which)
        ordered: I64 = segments[np.argsort(ages[segments], kind="stable")]
        return ordered

    def all_segments(self) -> I64:
        """Segments that are in use, pinned or not, ascending."""
        return np.flatnonzero(self._age[: self.arena.limit] != _NEVER)

    def footprints(self, segments: I64) -> I64:
        """Bytes that the live entries of segments need, overhead included."""
        footprint: I64 = self.live_bytes[segments] + ENTRY_OVERHEAD * self.live_entries[segments]
        return footprint

    @property
    def open_streams(self) -> int:
        """How many streams have an open segment."""
        return len(self._open)

    @property
    def resident_bytes(self) -> int:
        """What all pools together occupy, spare segments included."""
        return self.arena.resident_bytes

    @property
    def in_use_bytes(self) -> int:
        """What the segments of all pools occupy; what limits are held against."""
        return self.arena.in_use_bytes

    @property
    def needed_bytes(self) -> int:
        """What the live entries would occupy if they were packed."""
        return self.total_live_bytes + ENTRY_OVERHEAD * self.total_entries


def decode(codec: Codec, entries: Sequence[memoryview], lengths: I64) -> list[bytes | memoryview]:
    """Pages of n entries of one codec; an entry of PAGE_BYTES is the page itself.

    Raises:
        CorruptError: with indices into the batch.
    """
    raw = lengths == PAGE_BYTES
    if not raw.any():
        return codec.decompress(entries)  # type: ignore[return-value]
    pages: list[bytes | memoryview] = list(entries)
    packed = np.flatnonzero(~raw).tolist()
    try:
        decoded = codec.decompress([entries[i] for i in packed])
    except CorruptError as error:
        raise CorruptError([packed[i] for i in error.indices]) from None
    for index, page in zip(packed, decoded, strict=True):
        pages[index] = page
    for index in np.flatnonzero(raw).tolist():
        # A copy: the arena's bytes may be reused before the reply has gone out.
        pages[index] = bytes(entries[index])
    return pages


def concatenate_places(parts: Sequence[Places]) -> Places:
    """Several batches of places as one."""
    if not parts:
        none = np.empty(0, np.int64)
        return Places(none, none)
    return Places(
        np.concatenate([part.address for part in parts]),
        np.concatenate([part.length for part in parts]),
    )
