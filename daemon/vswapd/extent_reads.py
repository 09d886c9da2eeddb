"""What lives in extents, read back: whole if that can be, entry by entry if it cannot.

An extent is read with its directory, which is the short way to its entries. If the directory is not
to be had, or is not the one that the words of the table agree with, the table is walked: it is the
truth.

Invariants:
- Extents are pinned by the caller, from before the read to after the last use.
- Checks come along, made plain, and are not looked at: one that is wrong stays wrong.
- An entry that is found has a word that named it when it was looked for; whoever moves it compares
  that word.

This module must not know where entries go.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vswapd.clusters import slots_of
from vswapd.core import Core
from vswapd.swap_table import Tag, places_of, tags_of
from vswapd_backends.base import (
    I64,
    PAUSE,
    SEGMENT_BYTES,
    U64,
    IoBatch,
    IoKind,
    IoRequest,
    Operation,
    Places,
)
from vswapd_backends.segment import (
    CHECK_BYTES,
    Directory,
    LayoutError,
    digests,
    get_checks,
    parse_image,
    put_checks,
    salted,
)
from vswapd_backends.swapdev import SwapDevice
from vswapd_backends.zswap import Compressed

_WALK_CLUSTERS: Final = 16
"""Clusters of the table that are looked through in one step: 8192 words, 0.3 ms."""
_WALK_EXTENTS: Final = 256
"""Extents whose entries one walk of the table finds: it takes 40 ms per million slots in all."""


class Named(NamedTuple):
    """Slots, and the words by which they were found."""

    numbers: I64
    words: U64


class Live:
    """Live entries of one extent that was read."""

    __slots__ = ("directory", "image", "number", "words")

    def __init__(
        self, number: int, image: bytearray | memoryview, directory: Directory, words: U64
    ) -> None:
        self.number = number
        self.image = memoryview(image)
        """With plain checks."""
        self.directory = directory
        self.words = words

    def compressed(self, pool: int) -> Compressed:
        """The entries, ready to be appended elsewhere."""
        starts = self.directory.offsets
        lengths = self.directory.lengths
        ends = starts + CHECK_BYTES + lengths
        parts = [self.image[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        return Compressed(pool, b"".join(parts), lengths, int(lengths.sum()))

    def pick(self, which: npt.NDArray[np.bool_]) -> Live:
        """Only those entries."""
        return Live(self.number, self.image, self.directory.pick(which), self.words[which])

    def sound(self) -> npt.NDArray[np.bool_]:
        """Which entries agree with their checks; shape (n,)."""
        starts = self.directory.offsets + CHECK_BYTES
        ends = starts + self.directory.lengths
        bodies = [self.image[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        checks = get_checks(np.frombuffer(self.image, np.uint8), self.directory.offsets)
        agree: npt.NDArray[np.bool_] = digests(bodies) == checks
        return agree


class ExtentReads:
    """Reads extents for whoever moves what lives there."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def read(self, number: int) -> Operation[Live | None]:
        """The live entries of a pinned extent; None if it cannot be read."""
        core = self._core
        device, extent = core.devices.device_of(number)
        request = IoRequest(IoKind.READ, device.device, extent, 0, SEGMENT_BYTES)
        yield IoBatch([request])
        if request.result is None:
            device.read_errors += 1
            return None
        image = request.result
        try:
            header, directory = parse_image(image)
            damaged = header.sequence != int(device.sequence[extent])
        except LayoutError:
            damaged = True
        if damaged:
            directory = self.directory_from_table(number)
        alive, words = core.live_words(Tag.PHYS, number, directory.numbers, directory.offsets)
        live = directory.pick(alive)
        if len(live) != int(device.live_entries[extent]):
            # Intact, but not the directory of what the words name: trust the table.
            live = self.directory_from_table(number)
            words = core.table.words[live.numbers]
        plain = bytearray(image)
        self._unsalt(plain, live, int(device.sequence[extent]))
        return Live(number, plain, live, words)

    def entries_of(
        self, device: SwapDevice, extent: int, found: dict[int, Directory]
    ) -> Operation[Directory]:
        """The live entries of a draining device's extent, by the table: nothing on it can be read.

        A walk of the table takes long, and there may be thousands of such extents: it is made in
        turns, for many at a time. Nothing new comes to stand on the device meanwhile.
        """
        core, number = self._core, device.number_of(extent)
        if not device.live_entries[extent]:
            return Directory(*np.zeros((3, 0), np.int64))
        if extent not in found:
            found.clear()
            wanted = np.flatnonzero(device.live_entries)
            wanted = wanted[wanted >= extent][:_WALK_EXTENTS]
            found.update((yield from self._walk(device, wanted)))
        noted = found.pop(extent, None)
        if noted is None:
            return self.directory_from_table(number)
        alive, _ = core.live_words(Tag.PHYS, number, noted.numbers, noted.offsets)
        if len(alive) != int(device.live_entries[extent]):
            return self.directory_from_table(number)
        return noted.pick(alive)

    def _walk(self, device: SwapDevice, extents: I64) -> Operation[dict[int, Directory]]:
        """The entries that the table names in some extents of a device, ascending, by extent."""
        core = self._core
        wanted = np.zeros(len(device.live_entries), np.bool_)
        wanted[extents] = True
        clusters = core.clusters.open_clusters()
        numbers: list[I64] = []
        words: list[U64] = []
        for start in range(0, len(clusters), _WALK_CLUSTERS):
            if start:
                yield PAUSE
            some = slots_of(clusters[start : start + _WALK_CLUSTERS])
            found = core.words_now(some)
            of = places_of(found).number - device.number_of(0)
            there = (tags_of(found) == Tag.PHYS) & (of >= 0) & (of < len(wanted))
            there[there] = wanted[of[there]]
            numbers.append(some[there])
            words.append(found[there])
        slots, places = np.concatenate(numbers), places_of(np.concatenate(words))
        order = np.argsort(places.address, kind="stable")
        slots, places = slots[order], places.pick(order)
        of = places.number - device.number_of(0)
        firsts = np.searchsorted(of, extents)
        ends = np.searchsorted(of, extents, "right")
        return {
            extent: Directory(slots[a:b], places.offset[a:b], places.length[a:b])
            for extent, a, b in zip(extents.tolist(), firsts.tolist(), ends.tolist(), strict=True)
        }

    def read_apart(self, number: int, live: Directory) -> Operation[tuple[Live, Named]]:
        """Entries of a pinned extent: those that can be read, one by one, and those that cannot."""
        core, devices = self._core, self._core.devices
        device, extent = devices.device_of(number)
        words = core.table.words[live.numbers]
        plan = devices.plan_reads(Places.within(number, live.offsets, live.lengths))
        yield from devices.read(plan)
        image = bytearray(SEGMENT_BYTES)
        readable = np.zeros(len(live), np.bool_)
        for index, (entry, at) in enumerate(
            zip(devices.gather(plan), live.offsets.tolist(), strict=True)
        ):
            if entry is not None:
                image[at : at + len(entry)] = entry
                readable[index] = True
        there = live.pick(readable)
        self._unsalt(image, there, int(device.sequence[extent]))
        left = Named(live.numbers[~readable], words[~readable])
        return Live(number, image, there, words[readable]), left

    @staticmethod
    def _unsalt(image: bytearray, directory: Directory, sequence: int) -> None:
        """Make the checks plain; a check that is wrong stays wrong."""
        arena = np.frombuffer(image, np.uint8)
        checks = get_checks(arena, directory.offsets)
        put_checks(arena, directory.offsets, salted(checks, directory.numbers, sequence))

    def directory_from_table(self, number: int) -> Directory:
        """The entries that the table names in an extent, by a walk over all of it."""
        numbers = slots_of(self._core.clusters.open_clusters())
        words = self._core.table.words[numbers]
        found = (tags_of(words) == Tag.PHYS) & (places_of(words).number == number)
        places = places_of(words[found])
        order = np.argsort(places.offset, kind="stable")
        return Directory(numbers[found][order], places.offset[order], places.length[order])
