"""The second rung: pages that the pool refused go straight to a device, already compressed.

Each stream has at most one extent that is being filled. A folio is written before its words are
published, so an acknowledged page never depends on a write that is still to come; the next folio
begins on a block of its own, so that no acknowledged byte is written twice.

Invariants:
- An extent that is being filled carries one pin of ours; each folio on its way has one more per
  extent that it uses, until its words are published or it is given up.
- One folio at a time per stream: header and directory are shared by all that lie in the extent.
- Blocks with acknowledged entries are never written again: a write that fails leaves garbage.
- All that a folio may write is taken from the write budget before its first write, so folios that
  overlap cannot pass it together (but for writes that fail, and are tried again elsewhere).

This module must not know the pool, or how slots get their words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from vswapd.core import Core
from vswapd.groups import Group
from vswapd.writeback import WRITE_ATTEMPTS, Cause, Stop, Writeback
from vswapd_backends.base import (
    I64,
    SEGMENT_BYTES,
    WAIT,
    IoBatch,
    IoKind,
    IoRequest,
    Operation,
    Places,
)
from vswapd_backends.segment import DIRECTORY_ENTRY_BYTES, ImageBuilder, fits
from vswapd_backends.swapdev import SwapDevice
from vswapd_backends.zswap import Compressed, Stream, concatenate_places
from vswapd_blockdev.buffers import aligned
from vswapd_blockdev.device import BLOCK_BYTES


@dataclass(slots=True)
class _Filling:
    """A stream's extent that is being filled, with the image of what it holds."""

    number: int
    builder: ImageBuilder


@dataclass(slots=True)
class _Progress:
    """How far a folio has come."""

    parts: list[Places] = field(default_factory=list)
    """Places of the entries that are written, or being written; each part's extent is pinned."""
    written: int = 0
    """Bytes that writes which succeeded have put on devices."""


class Fallback:
    """Puts folios onto devices."""

    def __init__(self, core: Core, writeback: Writeback) -> None:
        self._core = core
        self._writeback = writeback
        self._filling: Final[dict[Stream, _Filling]] = {}
        self._busy: Final[set[Stream]] = set()

    def obstacle(self, group: Group, length: int) -> Stop | None:
        """What keeps a folio of `length` compressed bytes from going to a device, or None."""
        core = self._core
        if not core.devices.any:
            return Stop.NO_DEVICE
        if not group.limits.writeback:
            return Stop.WRITEBACK_DISABLED
        room = group.device_room()
        if room is not None and length > room:
            return Stop.GROUP_LIMIT
        left = core.budget_left()
        if left is not None and length > left:
            return Stop.WRITE_BUDGET
        return None

    def place(self, group: Group, numbers: I64, compressed: Compressed) -> Operation[Places | Stop]:
        """Write a folio's entries. The caller publishes the words, then calls `settle`.

        Returns:
            Their places, each extent pinned; or why they could not be written.
        """
        stop = self.obstacle(group, compressed.compressed_bytes)
        if stop is not None:
            return stop
        stream = (compressed.pool, group.index)
        done = _Progress()
        if not group.take_device(compressed.compressed_bytes):
            return Stop.GROUP_LIMIT
        try:
            while stream in self._busy:
                yield WAIT
            stop = yield from self._write(stream, numbers, compressed, done)
        except BaseException:
            self._give_up(group, compressed, done)
            raise
        if stop is not None:
            self._give_up(group, compressed, done)
            return stop
        return concatenate_places(done.parts)

    def _give_up(self, group: Group, compressed: Compressed, done: _Progress) -> None:
        group.settle_device(compressed.compressed_bytes)
        for places in done.parts:
            self._unpin(places)
        self.close_idle()

    def _write(
        self, stream: Stream, numbers: I64, compressed: Compressed, done: _Progress
    ) -> Operation[Stop | None]:
        core = self._core
        filling = self._filling.get(stream)
        most = _most_written(compressed, 0 if filling is None else filling.builder.count)
        left = core.budget_left()
        if left is not None and most > left:
            return Stop.WRITE_BUDGET
        self._busy.add(stream)
        core.budget.pending += most
        core.budget.enter()
        try:
            return (yield from self._write_portions(stream, numbers, compressed, done))
        finally:
            core.budget.pending -= most
            self._writeback.account(Cause.FALLBACK, done.written)
            self._busy.discard(stream)

    def _write_portions(
        self, stream: Stream, numbers: I64, compressed: Compressed, done: _Progress
    ) -> Operation[Stop | None]:
        first = failures = 0
        while first < len(compressed):
            filling = self._filling.get(stream)
            if filling is None:
                filling = yield from self._open(stream)
                if filling is None:
                    return Stop.DEVICE_FULL
            builder = filling.builder
            count = fits(compressed.lengths[first:], builder.room)
            if not count:
                self._close(stream)
                continue
            portion = compressed.slice(first, first + count)
            begin = builder.payload_end
            offsets = builder.add(
                numbers[first : first + count],
                portion.lengths,
                portion.payload,
            )
            builder.finish()
            entry, extent = self._core.devices.device_of(filling.number)
            requests = _portion_writes(entry, extent, builder, begin)
            self._core.devices.pin(filling.number)
            done.parts.append(Places.within(filling.number, offsets, portion.lengths))
            yield IoBatch(requests)
            done.written += sum(r.length for r in requests if r.error is None)
            if any(request.error for request in requests):
                self._core.devices.fail(filling.number)
                self._close(stream)
                self._core.devices.unpin(int(done.parts.pop().number[0]))
                failures += 1
                if failures == WRITE_ATTEMPTS:
                    return Stop.DEVICE_ERROR
                continue
            builder.round_up()
            if builder.payload_end % BLOCK_BYTES:
                # No room to round up: what came next would share a block with what is acknowledged.
                self._close(stream)
            first += count
        return None

    def settle(self, group: Group, places: Places) -> None:
        """The words of a folio are published, or it is given up: let go of its extents."""
        self._core.housekeeping.do(
            "extents cannot be let go of", lambda: self._settle(group, places)
        )

    def _settle(self, group: Group, places: Places) -> None:
        group.settle_device(int(places.length.sum()))
        self._unpin(places)
        self.close_idle()

    def _unpin(self, places: Places) -> None:
        for number in np.unique(places.number).tolist():
            self._core.devices.unpin(number)

    def _open(self, stream: Stream) -> Operation[_Filling | None]:
        core = self._core
        number = yield from self._writeback.take_extent(stream)
        if number is None:
            return None
        builder = ImageBuilder(
            # One that stays for as long as anything lives in the extent: not a huge page each.
            aligned(SEGMENT_BYTES),
            codec=core.zswap.pools[stream[0]].codec.spec,
            sequence=core.zswap.next_sequence(),
            group=stream[1],
            salt=True,
        )
        entry, extent = core.devices.device_of(number)
        entry.sequence[extent] = builder.sequence
        # The header is written with every folio: no entry may share its block.
        builder.round_up()
        filling = _Filling(number, builder)
        self._filling[stream] = filling
        return filling

    def _close(self, stream: Stream) -> None:
        filling = self._filling.pop(stream)
        self._core.devices.unpin(filling.number)

    def is_writing(self, number: int) -> bool:
        """Whether a folio is on its way into this extent."""
        return any(
            filling.number == number and stream in self._busy
            for stream, filling in self._filling.items()
        )

    def close_idle(self) -> None:
        """Let go of extents in which nothing lives (any more). Cheap when there are none."""
        if self._filling:
            self._core.housekeeping.do("extents cannot be let go of", self._close_idle)

    def _close_idle(self) -> None:
        for stream, filling in list(self._filling.items()):
            entry, extent = self._core.devices.device_of(filling.number)
            if not entry.live_entries[extent] and stream not in self._busy:
                self._close(stream)

    def leave(self, device: SwapDevice) -> None:
        """Fill no extent of this device any further: it is being drained."""
        for stream, filling in list(self._filling.items()):
            on_it = self._core.devices.device_of(filling.number)[0] is device
            if on_it and stream not in self._busy:
                self._close(stream)


def _most_written(compressed: Compressed, entries: int) -> int:
    """The most bytes that are written for a folio, into an extent with so many entries at first.

    Of each extent: a block of header, and those in which the payload begins and ends, the
    directory begins, and the next folio's entries are kept from following. The directory is
    written again from its end on.
    """
    blocks = 5 * BLOCK_BYTES
    extents = 2 + compressed.footprint // (SEGMENT_BYTES - blocks)
    return compressed.footprint + extents * blocks + entries * DIRECTORY_ENTRY_BYTES


def _portion_writes(
    entry: SwapDevice, extent: int, builder: ImageBuilder, begin: int
) -> list[IoRequest]:
    """Whole blocks around what was added from `begin` on, the header, and the directory."""
    image = builder.buffer
    low = begin // BLOCK_BYTES * BLOCK_BYTES
    high = -(-builder.payload_end // BLOCK_BYTES) * BLOCK_BYTES
    directory = (SEGMENT_BYTES - builder.count * DIRECTORY_ENTRY_BYTES) // BLOCK_BYTES * BLOCK_BYTES
    spans = [(0, BLOCK_BYTES), (low, high), (directory, SEGMENT_BYTES)]
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return [
        IoRequest(IoKind.WRITE, entry.device, extent, start, end - start, image[start:end])
        for start, end in merged
    ]
