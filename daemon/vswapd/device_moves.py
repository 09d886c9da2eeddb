"""Entries on the move between extents: swapoff drains a device, merging frees sparse extents.

Both read what lives in extents (see `extent_reads`), and write it elsewhere before any word is
flipped.

Invariants:
- While a device is being drained no new extent of it is used; if something cannot be moved, it is
  back in use when swapoff fails, with everything that is still on it.
- Extents are pinned from the read to the flip.
- Checks are carried over, not made anew: an entry that rotted on the device is still found out
  where it was moved to. Into the pool, where loads need not look at checks, only sound ones go.

This module must not know when to merge, or who asks for swapoff.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from vswapd.admission import Admission, Growth
from vswapd.core import Core
from vswapd.errors import NoSuchDeviceError, SwapoffError
from vswapd.extent_reads import ExtentReads, Live, Named
from vswapd.fallback import Fallback
from vswapd.groups import Group
from vswapd.swap_table import Tag
from vswapd.writeback import Cause, Writeback
from vswapd_backends.base import (
    I64,
    SEGMENT_BYTES,
    WAIT,
    Operation,
    Places,
)
from vswapd_backends.segment import (
    CAPACITY,
    Directory,
    ImageBuilder,
)
from vswapd_backends.swapdev import SwapDevice, footprint
from vswapd_backends.zswap import Compressed, Stream

_MERGE_AT_ONCE: Final = 8
"""Sparse extents that are read to be merged into one: 2 MiB of buffers."""


class Drained(NamedTuple):
    """What has become of the pages of a device."""

    moved: int
    lost: int
    """Given up: nobody could have read them."""


class _StuckError(SwapoffError):
    """Pages of one extent cannot be moved by anybody; others can."""

    def __init__(self, text: str, stuck: Named, moved: int) -> None:
        super().__init__(text)
        self.stuck = stuck
        self.moved = moved


class DeviceMoves:
    """Drains devices and merges extents."""

    def __init__(
        self, core: Core, admission: Admission, writeback: Writeback, fallback: Fallback
    ) -> None:
        self._core = core
        self._admission = admission
        self._writeback = writeback
        self._fallback = fallback
        self._reads: Final = ExtentReads(core)

    # swapoff

    def swapoff(self, path: str, *, give_up: bool) -> Operation[Drained]:
        """See Engine.swapoff."""
        devices = self._core.devices
        device = devices.find(path)
        if device is None:
            known = ", ".join(d.device.path for d in devices) or "none"
            raise NoSuchDeviceError(f"{path} is not in use; in use: {known}")
        if device.draining:
            raise SwapoffError(f"{path} is being drained already")
        device.draining = True
        try:
            drained = yield from self._empty(device, give_up=give_up)
        except BaseException:
            device.draining = False
            raise
        devices.remove(device)
        self._core.control.forget_device(device.index)
        return drained

    def _empty(self, device: SwapDevice, *, give_up: bool) -> Operation[Drained]:
        """Move everything from a device.

        Raises:
            SwapoffError: some cannot be moved, or there is no room. The rest has been.
        """
        moved = lost = 0
        found: dict[int, Directory] = {}
        """Entries of extents that cannot be read, as one walk of the table has found them."""
        stuck: dict[int, _StuckError] = {}
        """By extent: what is left there cannot be moved."""
        while True:
            self._fallback.leave(device)
            live = np.flatnonzero(device.live_entries).tolist()
            extents = [extent for extent in live if extent not in stuck]
            if extents:
                try:
                    done = yield from self._drain_or_give_up(
                        device, extents[0], found, stuck, give_up=give_up
                    )
                except SwapoffError as error:
                    if lost:
                        raise SwapoffError(f"{error}; {lost} page(s) were given up") from None
                    raise
                moved += done.moved
                lost += done.lost
            elif live:
                raise self._stuck(device, stuck[live[0]], moved)
            elif device.pins.any() or device.discarding:
                # Requests of others that are still under way.
                yield WAIT
            elif device.discards:
                yield from self._core.devices.discard()
            else:
                return Drained(moved, lost)

    def _drain_or_give_up(
        self,
        device: SwapDevice,
        extent: int,
        found: dict[int, Directory],
        stuck: dict[int, _StuckError],
        *,
        give_up: bool,
    ) -> Operation[Drained]:
        """Move what lives in an extent; what cannot be moved is given up, or noted in `stuck`."""
        try:
            return Drained((yield from self._drain(device, extent, found)), 0)
        except _StuckError as error:
            if give_up:
                group = self._core.groups[int(device.group[extent])]
                return Drained(error.moved, self._core.lose(*error.stuck, group))
            if not error.moved:
                # Else there may be some that were loaded while they were about to move.
                stuck[extent] = error
            return Drained(error.moved, 0)

    @staticmethod
    def _stuck(device: SwapDevice, first: _StuckError, moved: int) -> SwapoffError:
        """The error for what is left when all that can be moved has been."""
        left = int(device.live_entries.sum())
        return SwapoffError(f"{first}; {moved} page(s) were moved, {left} such are left on it")

    def _drain(
        self, device: SwapDevice, extent: int, found: dict[int, Directory]
    ) -> Operation[int]:
        number = device.number_of(extent)
        if self._fallback.is_writing(number):
            # What we read now might be older than the words that name it when we are done.
            yield WAIT
            return 0
        core, devices = self._core, self._core.devices
        devices.pin(number)
        try:
            moving = yield from self._reads.read(number)
            if moving is not None:
                return (yield from self._move(moving, device, extent))
            live = yield from self._reads.entries_of(device, extent, found)
            if not len(live):
                return 0  # all of it was freed or overwritten meanwhile
            moving, unreadable = yield from self._reads.read_apart(number, live)
            moved = yield from self._move(moving, device, extent)
            if (core.words_now(unreadable.numbers) == unreadable.words).any():
                raise _StuckError(
                    f"{device.device.path}: pages in extent {extent} cannot be read; the device "
                    "stays in use until they are freed, overwritten, or given up",
                    unreadable,
                    moved,
                )
            return moved
        finally:
            devices.unpin(number)

    def _to_pool(self, moving: Live, compressed: Compressed, group: Group) -> int:
        """Entries that were admitted; returns how many have moved."""
        core = self._core
        numbers = moving.directory.numbers
        places = core.zswap.append(group.index, numbers, compressed, core.clock())
        flipped = core.flip(numbers, moving.words, Tag.ZSWAP, places, group)
        self._give_up_unflipped(places, flipped, group)
        return len(flipped)

    def _move(self, moving: Live, device: SwapDevice, extent: int) -> Operation[int]:
        """To the pool if it has room, else to another device."""
        core = self._core
        stream = self._stream_of(device, extent)
        group = core.groups[stream[1]]
        compressed = moving.compressed(stream[0])
        if not len(compressed):
            return 0
        sound = moving.sound()
        if sound.all() and self._pool_takes(group, compressed):
            return self._to_pool(moving, compressed, group)
        left = core.budget_left()
        spent = left is not None and left < SEGMENT_BYTES
        target = None if spent else (yield from self._writeback.take_extent(stream))
        if target is None and not sound.all():
            good = moving.pick(sound)
            some = good.compressed(stream[0])
            if not len(some) or self._pool_takes(group, some):
                moved = self._to_pool(good, some, group) if len(some) else 0
                raise _StuckError(
                    f"{device.device.path}: pages in extent {extent} are damaged, and loads from "
                    "the pool would not notice; the device stays in use: add another to move them "
                    "to, or give them up",
                    Named(moving.directory.numbers[~sound], moving.words[~sound]),
                    moved,
                )
        if spent:
            raise SwapoffError(f"{device.device.path}: the write budget is spent; it stays in use")
        if target is None:
            raise SwapoffError(
                f"{device.device.path}: neither the pool nor another device has room for what lies "
                "on it; it stays in use: raise pool.max, add a device, or free pages"
            )
        flipped_count = yield from self._write(moving, target, stream, Cause.SWAPOFF)
        if flipped_count is None:
            raise SwapoffError(
                f"{device.device.path}: writing to another device failed; it stays in use"
            )
        return flipped_count

    def _pool_takes(self, group: Group, compressed: Compressed) -> bool:
        """Whether the pool takes entries, to be put there in this very step."""
        return self._admission.admit(group, compressed, Growth.RETURN) is None

    def _give_up_unflipped(self, places: Places, flipped: I64, group: Group) -> None:
        stale = np.ones(len(places.number), np.bool_)
        stale[flipped] = False
        if stale.any():
            self._core.zswap.give_up(places.pick(stale))
            self._core.enter(group)

    # Merging

    def merge_pays(self) -> bool:
        """Whether a device is nearly full although much on it is dead. Cheap enough per scan."""
        return any(self._sparse(device) is not None for device in self._core.devices)

    def _sparse(self, device: SwapDevice) -> I64 | None:
        """Extents of one stream that fit into one, if the device is short of room: the smallest.

        Of all streams the one in which that frees the most.
        """
        if device.draining or device.map.free + len(device.discards) > max(
            2, len(device.pins) // 16
        ):
            return None
        extents = np.flatnonzero((device.live_entries > 0) & (device.pins == 0))
        if len(extents) < 2:  # noqa: PLR2004 - one extent has nothing to be merged with
            return None
        streams = device.streams_of(extents)
        need = footprint(device, extents)
        order = np.lexsort((need, streams))
        _, first, of = np.unique(streams[order], return_index=True, return_inverse=True)
        sums = np.cumsum(need[order])
        sums -= (sums[first] - need[order][first])[of]
        together = (sums <= CAPACITY) & (np.arange(len(order)) - first[of] < _MERGE_AT_ONCE)
        counts = np.bincount(of[together], minlength=len(first))
        stream = int(np.argmax(counts))
        if counts[stream] < 2:  # noqa: PLR2004 - as above
            return None
        return extents[order[first[stream] : first[stream] + counts[stream]]]

    def merge(self) -> Operation[int]:
        """Put the entries of sparse extents together; returns how many extents became free."""
        devices = self._core.devices
        for device in devices:
            extents = self._sparse(device)
            if extents is None:
                continue
            stream = self._stream_of(device, int(extents[0]))
            target = yield from self._writeback.take_extent(stream, reserve=True)
            if target is None:
                continue
            # That may have waited for discards: extents were given up, and taken, meanwhile.
            extents = self._sparse(device)
            if extents is None or stream != self._stream_of(device, int(extents[0])):
                devices.unpin(target)
                continue
            freed = yield from self._merge(device, extents, target, stream)
            if freed > 0:
                return freed
        return 0

    def _merge(
        self, device: SwapDevice, extents: I64, target: int, stream: Stream
    ) -> Operation[int]:
        core, devices = self._core, self._core.devices
        numbers = [device.number_of(extent) for extent in extents.tolist()]
        for number in numbers:
            devices.pin(number)
        buffer = self._writeback.buffers.take()
        held: int | None = target
        try:
            builder = self._builder(buffer, stream)
            sources: list[tuple[Live, I64]] = []
            for number in numbers:
                moving = yield from self._reads.read(number)
                if moving is not None and len(moving.directory):
                    sources.append((moving, self._add(builder, moving, stream[0])))
            if not sources:
                return 0
            held = None
            _, held = yield from self._writeback.write_image(
                builder, target, stream, Cause.DEVICE_COMPACT
            )
            if held is None:
                return 0
            for moving, offsets in sources:
                self._flip(moving, held, offsets, core.groups[stream[1]])
        finally:
            if held is not None:
                devices.unpin(held)
            for number in numbers:
                devices.unpin(number)
            self._writeback.buffers.give(buffer)
        return int((device.live_entries[extents] == 0).sum()) - 1

    # Shared

    @staticmethod
    def _stream_of(device: SwapDevice, extent: int) -> Stream:
        return int(device.pool[extent]), int(device.group[extent])

    def _builder(self, buffer: memoryview, stream: Stream) -> ImageBuilder:
        return ImageBuilder(
            buffer,
            codec=self._core.zswap.pools[stream[0]].codec.spec,
            sequence=self._core.zswap.next_sequence(),
            group=stream[1],
            salt=True,
        )

    @staticmethod
    def _add(builder: ImageBuilder, moving: Live, pool: int) -> I64:
        compressed = moving.compressed(pool)
        return builder.add(moving.directory.numbers, compressed.lengths, compressed.payload)

    def _write(
        self, moving: Live, target: int, stream: Stream, cause: Cause
    ) -> Operation[int | None]:
        """Write one extent's live entries to another; returns how many words flipped."""
        buffer = self._writeback.buffers.take()
        held: int | None = target
        try:
            builder = self._builder(buffer, stream)
            offsets = self._add(builder, moving, stream[0])
            held = None
            _, held = yield from self._writeback.write_image(builder, target, stream, cause)
            if held is None:
                return None
            return self._flip(moving, held, offsets, self._core.groups[stream[1]])
        finally:
            if held is not None:
                self._core.devices.unpin(held)
            self._writeback.buffers.give(buffer)

    def _flip(self, moving: Live, target: int, offsets: I64, group: Group) -> int:
        lengths = moving.directory.lengths
        places = Places.within(target, offsets, lengths)
        flipped = self._core.flip(moving.directory.numbers, moving.words, Tag.PHYS, places, group)
        self._core.devices.keep(target, len(flipped), int(lengths[flipped].sum()))
        return len(flipped)
