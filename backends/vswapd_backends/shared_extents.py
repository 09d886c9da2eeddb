"""One device's extents, dealt out to several shards in chunks.

Which shard has which chunk stands in shared memory, one byte each. A shard takes the lowest free
chunk when it has no free extent, and gives one back when all of it is free and it has others: so
each keeps to its own extents, and none is short while another has plenty.

Invariants:
- A chunk has one owner at most; only its owner reads, writes or discards what lies in it.
- An extent that went out of use keeps its chunk with its owner.

This module must not know devices, or what stands in an extent.
"""

from __future__ import annotations

import heapq
import os
import struct
from typing import Final

import numpy as np

from vswapd_backends.label import (
    LIFE_BYTES,
    ForeignMemoryError,
    Label,
    adopt_region,
    find_label,
    make_region,
)
from vswapd_backends.shared import SYSTEM_PAGE, SharedRegion
from vswapd_blockdev.extents import ExtentMap

LAYOUT_VERSION: Final = 1
_DETAILS: Final = struct.Struct("<QQ")
_MOST: Final = 64
"""Extents per chunk: 16 MiB of sequential writes before the next one is asked for."""
_PER_SHARD: Final = 8
"""Chunks per shard that there are at least, if the device has so many extents."""


def chunk_extents(extents: int, shards: int) -> int:
    """Extents per chunk."""
    return max(1, min(_MOST, extents // (shards * _PER_SHARD)))


def owners_region(extents: int, shards: int) -> SharedRegion:
    """The memory that says who owns which chunk, made before the shards put the device into use."""
    size = -(-owners_bytes(extents, shards) // SYSTEM_PAGE) * SYSTEM_PAGE
    label = Label(
        kind="extents",
        version=LAYOUT_VERSION,
        life=os.urandom(LIFE_BYTES),
        size=size,
        details=_DETAILS.pack(extents, shards),
    )
    return make_region(label)


def adopt_owners_region(extents: int, shards: int, fd: int) -> SharedRegion:
    """That memory, made elsewhere; the descriptor is owned from now on.

    Raises:
        ForeignMemoryError: it is none, of another layout version, or of another device; it was left
            alone, and the descriptor is still the caller's.
    """
    label = find_label("extents", LAYOUT_VERSION, fd)
    if _DETAILS.unpack_from(label.details) != (extents, shards):
        raise ForeignMemoryError("extents: this is for another device, or other shards")
    return adopt_region(label, fd)


def owners_bytes(extents: int, shards: int) -> int:
    """How many bytes of it are used."""
    return -(-extents // chunk_extents(extents, shards))


class SharedExtents(ExtentMap):
    """One shard's extents of a device that it shares."""

    def __init__(self, extents: int, region: SharedRegion, shard: int, shards: int) -> None:
        super().__init__(0)
        self.extents = extents
        self._region = region
        self._chunk = chunk_extents(extents, shards)
        self._owners = region.bytes_array()[: -(-extents // self._chunk)]
        self._me = shard + 1
        self._free_of: dict[int, int] = {}
        """Free extents of each chunk that is ours."""

    @property
    def free(self) -> int:
        """Extents that `take` can hand out, those of chunks that nobody has included."""
        nobodys = int(np.count_nonzero(self._owners == 0)) * self._chunk
        if nobodys and not self._owners[-1]:
            nobodys -= len(self._owners) * self._chunk - self.extents
        return len(self._returned) + nobodys

    def take(self) -> int | None:
        """The lowest free extent of those that are ours, or one that nobody had; None: none."""
        if not self._returned and not self._take_chunk():
            return None
        extent = super().take()
        assert extent is not None
        self._free_of[extent // self._chunk] -= 1
        return extent

    def give(self, extent: int) -> None:
        """Return an extent; with the last of a chunk perhaps the chunk."""
        before = len(self._returned)
        super().give(extent)
        if len(self._returned) == before:
            return  # it went out of use
        chunk = extent // self._chunk
        self._free_of[chunk] += 1
        if self._free_of[chunk] == self._size(chunk) < len(self._returned):
            self._give_chunk(chunk)

    def forgive(self, most: int) -> list[int]:
        """See ExtentMap."""
        some = super().forgive(most)
        for extent in some:
            self._free_of[extent // self._chunk] += 1
        return some

    def restore(self, taken: list[int], bad: list[int]) -> None:
        """See ExtentMap. The chunks are those that are marked as ours."""
        self._taken = set(taken)
        # Whoever died while it left the device has given its chunks back, and kept what it knew.
        self._bad = {extent for extent in bad if self._owners[extent // self._chunk] == self._me}
        retired = self._bad - self._taken
        self._retired = len(retired)
        for chunk in np.flatnonzero(self._owners == self._me).tolist():
            first = chunk * self._chunk
            extents = range(first, first + self._size(chunk))
            free = [e for e in extents if e not in self._taken and e not in retired]
            self._returned += free
            self._free_of[chunk] = len(free)
        heapq.heapify(self._returned)

    def leave(self) -> None:
        """Give all chunks back: nothing of ours is on the device any more."""
        with self._region.hold():
            self._owners[self._owners == self._me] = 0

    def _size(self, chunk: int) -> int:
        return min(self._chunk, self.extents - chunk * self._chunk)

    def _take_chunk(self) -> bool:
        with self._region.hold():
            nobodys = np.flatnonzero(self._owners == 0)
            if not len(nobodys):
                return False
            chunk = int(nobodys[0])
            self._owners[chunk] = self._me
        first = chunk * self._chunk
        self._add(range(first, first + self._size(chunk)))
        self._free_of[chunk] = self._size(chunk)
        return True

    def _give_chunk(self, chunk: int) -> None:
        del self._free_of[chunk]
        first = chunk * self._chunk
        self._drop(range(first, first + self._size(chunk)))
        with self._region.hold():
            self._owners[chunk] = 0
