"""Writeback of several whole segments at once: one extent each, one look and one flip for all.

Most of what gathering and flipping an extent costs is the price of a numpy call, whatever its size:
four segments together cost little more than one. This is the common case, of segments that are
full, all alive, and not loaded since they were last looked at; everything else is `writeback`'s.

The order is writeback's: room on the device, then the look, the write, the flip, the free.

Invariants:
- Only a prefix of the stream's order is taken: the coldest, with none left out between.
- An image whose write failed flips nothing; its segment stays, its extent goes out of use.

This module must not know when to write back, or what is done about segments it does not take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from vswapd.core import Core
from vswapd.groups import Group
from vswapd.swap_table import Tag, referenced
from vswapd_backends.base import (
    I64,
    PAUSE,
    SEGMENT_BYTES,
    U64,
    IoKind,
    IoRequest,
    Operation,
    Places,
)
from vswapd_backends.segment import Directory, ImageBuilder
from vswapd_backends.zswap import Stream
from vswapd_blockdev.device import RUN_EXTENTS, BlockDevice

WHOLE_AT_ONCE: Final = 4
"""Segments per operation. Microseconds of one core per extent, all but the write itself, medians of
6 rounds on a busy machine: 249 for one at a time, 223 for 2, 140 for 4, 110 for 8, 103 for 16. What
is done for all of them in one step keeps loads waiting: so not more."""
_FULL: Final = SEGMENT_BYTES * 9 // 10
"""A segment that needs less than this is better packed together with others."""


@dataclass(slots=True)
class WholeBatch:
    """Segments, and their entries one segment after the other."""

    segments: list[int]
    counts: list[int]
    directory: Directory
    words: U64

    def part(self, index: int) -> slice:
        """The entries of one segment."""
        first = sum(self.counts[:index])
        return slice(first, first + self.counts[index])


class WholeSegments:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def choose(self, stream: Stream, most: int) -> WholeBatch | None:
        """The coldest segments of a stream that can go as they are; None if the coldest cannot."""
        zswap = self._core.zswap
        chosen = zswap.oldest_first(stream)[:most]
        whole = zswap.all_alive(chosen) & (zswap.footprints(chosen) >= _FULL)
        whole &= zswap.are_sealed(chosen)
        segments = chosen[: int(np.argmin(whole)) if not whole.all() else len(chosen)].tolist()
        if len(segments) < 2:  # noqa: PLR2004 - one alone gains nothing here
            return None
        parts = [zswap.directory(segment) for segment in segments]
        counts = [len(part) for part in parts]
        directory = Directory(
            np.concatenate([part.numbers for part in parts]),
            np.concatenate([part.offsets for part in parts]),
            np.concatenate([part.lengths for part in parts]),
        )
        batch = WholeBatch(segments, counts, directory, self._core.table.words[directory.numbers])
        return self._cold(batch)

    def _cold(self, batch: WholeBatch) -> WholeBatch | None:
        """Cut a batch before the first segment with an entry that was loaded."""
        hot = np.flatnonzero(referenced(batch.words))
        if not len(hot):
            return batch
        ends = np.cumsum(batch.counts)
        return self._cut(batch, int(np.searchsorted(ends, hot[0], side="right")))

    def first(self, batch: WholeBatch, segments: int) -> WholeBatch:
        """The first `segments` of a batch, at least one."""
        found = self._cut(batch, segments)
        assert found is not None
        return found

    def _cut(self, batch: WholeBatch, segments: int) -> WholeBatch | None:
        """The first `segments` of a batch; None if none is left."""
        if segments == 0:
            return None
        if segments >= len(batch.segments):
            return batch
        entries = sum(batch.counts[:segments])
        return WholeBatch(
            batch.segments[:segments],
            batch.counts[:segments],
            Directory(
                batch.directory.numbers[:entries],
                batch.directory.offsets[:entries],
                batch.directory.lengths[:entries],
            ),
            batch.words[:entries],
        )

    def within(self, batch: WholeBatch, allowance: int | None) -> WholeBatch | None:
        """As much of a batch as a group's device limit leaves room for."""
        if allowance is None:
            return batch
        ends = np.cumsum(batch.counts)
        sums = np.cumsum(batch.directory.lengths)[ends - 1]
        return self._cut(batch, int(np.searchsorted(sums, allowance, side="right")))

    def images(
        self, batch: WholeBatch, numbers: list[int], stream: Stream, buffer: memoryview
    ) -> Operation[list[IoRequest]]:
        """Images of the batch's segments in `buffer`, and the writes that put them in place.

        The writes are in the batch's order; one covers as many extents as are neighbours.
        """
        core = self._core
        requests: list[IoRequest] = []
        for index, (segment, number) in enumerate(zip(batch.segments, numbers, strict=True)):
            if not index % 2:
                yield PAUSE  # each takes about 90 us
            entry, extent = core.devices.device_of(number)
            builder = ImageBuilder(
                buffer[index * SEGMENT_BYTES : (index + 1) * SEGMENT_BYTES],
                codec=core.zswap.pools[stream[0]].codec.spec,
                sequence=core.zswap.next_sequence(),
                group=stream[1],
                salt=True,
            )
            part = batch.part(index)
            builder.age = core.zswap.age_of(segment)
            builder.copy(
                core.zswap.arena.segment_view(segment),
                Directory(
                    batch.directory.numbers[part],
                    batch.directory.offsets[part],
                    batch.directory.lengths[part],
                ),
            )
            builder.finish()
            entry.sequence[extent] = builder.sequence
            last = requests[-1] if requests else None
            if last is not None and _goes_on(last, entry.device, extent):
                last.length += SEGMENT_BYTES
                end = (index + 1) * SEGMENT_BYTES
                last.data = buffer[end - last.length : end]
            else:
                requests.append(
                    IoRequest(IoKind.WRITE, entry.device, extent, 0, SEGMENT_BYTES, builder.buffer)
                )
        return requests

    def flip(self, batch: WholeBatch, numbers: list[int], good: list[bool], group: Group) -> int:
        """Let the words of the images that were written name their extents; returns how many."""
        core = self._core
        written = np.repeat(np.array(good), batch.counts)
        addresses = np.repeat(np.array(numbers, np.int64) * SEGMENT_BYTES, batch.counts)
        places = Places(addresses + batch.directory.offsets, batch.directory.lengths)
        which = np.flatnonzero(written)
        if not len(which):
            return 0
        places = places.pick(which)
        flipped = core.flip(
            batch.directory.numbers[which], batch.words[which], Tag.PHYS, places, group
        )
        self._keep(batch, numbers, which[flipped])
        core.stats.writeback_pages += len(flipped)
        return len(flipped)

    def _keep(self, batch: WholeBatch, numbers: list[int], flipped: I64) -> None:
        """Count entries of a batch, by index and in order, as live in their extents."""
        lengths = batch.directory.lengths[flipped]
        ends = np.searchsorted(flipped, np.cumsum(batch.counts)).tolist()
        first = 0
        for number, end in zip(numbers, ends, strict=True):
            if end > first:
                self._core.devices.keep(number, end - first, int(lengths[first:end].sum()))
            first = end


def _goes_on(request: IoRequest, device: BlockDevice, extent: int) -> bool:
    """Whether a write can take the extent's image along."""
    count = request.length // SEGMENT_BYTES
    return request.device is device and request.extent + count == extent and count < RUN_EXTENTS


def one_by_one(writes: list[IoRequest]) -> list[IoRequest]:
    """What failed of writes that covered several extents, again, each extent by itself.

    The error does not say which of them it was, and one bad extent must not take the others along.
    """
    return [
        IoRequest(
            IoKind.WRITE,
            write.device,
            write.extent + at // SEGMENT_BYTES,
            0,
            SEGMENT_BYTES,
            memoryview(write.data)[at : at + SEGMENT_BYTES],
        )
        for write in writes
        if write.error is not None and write.length > SEGMENT_BYTES
        for at in range(0, write.length, SEGMENT_BYTES)
    ]


def outcomes(writes: list[IoRequest], alone: list[IoRequest]) -> list[bool]:
    """Whether each extent of a batch was written: at once, or in the end by itself."""
    second = iter(alone)
    good: list[bool] = []
    for write in writes:
        count = write.length // SEGMENT_BYTES
        if write.error is None or count == 1:
            good += [write.error is None] * count
        else:
            good += [next(second).error is None for _ in range(count)]
    return good
