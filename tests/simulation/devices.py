"""Devices of the simulated world: they fail, tear and rot as a run's rates say, and know where.

Invariants:
- `damage` is what is not as its owner must believe it to be, to the byte: what was acknowledged and
  did not arrive, and what has changed by itself. Garbage that the owner was told of is no damage.
- Whoever reads damage is not told; `World` is, at that moment.

This module must not know what stands on a device.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Final

from support.engine import UnkindDevice
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, ReadError, WriteError

Span = tuple[int, int]
"""Bytes of a device: from the first to before the last."""


class FaultyDevice(UnkindDevice):
    """A device at the whim of a seed."""

    def __init__(
        self,
        extents: int,
        path: str,
        chooser: random.Random,
        rates: dict[str, float],
        note: Callable[[object], None],
        happened: Counter[str],
    ) -> None:
        super().__init__(extents, path)
        self.chooser: Final = chooser
        self.rates: Final = rates
        self.note: Final = note
        self.happened: Final = happened
        self.dead = False
        """Whether everything fails from now on."""
        self.full = False
        """Whether writes fail for now: its file has holes, and the disk below has no room."""
        self.damage: list[Span] = []
        self.failed_reads: list[Span] = []
        self.on_damage_read: Callable[[FaultyDevice, Span], None] = lambda _device, _span: None
        """Called with damage that is about to be read, by whomever."""
        self._arrived = 0
        """Bytes of the last write that are there."""
        self.fails = self._fails
        self.tears = self._tears

    def _fails(self, kind: str, nth: int) -> bool:
        self.note((self.path, kind, nth))
        if self.full and kind == "write":
            self.happened["write to a full disk"] += 1
            return True
        if self.dead or self.chooser.random() < self.rates[f"{kind} error"]:
            self.happened[f"{kind} error"] += 1
            return True
        return False

    def _tears(self, _: int, length: int) -> int:
        self._arrived = length
        if self.rates["tear"] and self.chooser.random() < self.rates["tear"]:
            self.note((self.path, "torn"))
            self.happened["torn write"] += 1
            self._arrived = BLOCK_BYTES * self.chooser.randrange(length // BLOCK_BYTES)
        return self._arrived

    def flip(self) -> None:
        """A bit changes by itself."""
        extent = self.chooser.randrange(self.extents)
        at = extent * EXTENT_BYTES + self.chooser.randrange(EXTENT_BYTES)
        self.data[at] ^= 1 << 3
        self.damage.append((at, at + 1))
        self.happened["flipped bit"] += 1

    def spoil(self) -> None:
        """A block cannot be read any more, whatever is written to it."""
        self.bad_blocks.add(self.chooser.randrange(len(self.data) // BLOCK_BYTES))
        self.happened["a bad block"] += 1

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        begin = extent * EXTENT_BYTES + offset
        try:
            found = super().read(extent, offset, length)
        except ReadError:
            self.failed_reads.append((begin, begin + length))
            raise
        for span in self.damage:
            if span[0] < begin + length and span[1] > begin:
                self.on_damage_read(self, span)
        return found

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        begin = extent * EXTENT_BYTES + offset
        end = begin + len(data)
        try:
            super().write(extent, offset, data)
        except WriteError:
            # Garbage, at least the last block of it; but everybody knows.
            blocks = len(data) // BLOCK_BYTES
            arrived = BLOCK_BYTES * self.chooser.randrange(blocks)
            self.data[begin + arrived : end] = b"\xee" * (end - begin - arrived)
            self._sound_again(begin, end)
            raise
        self._sound_again(begin, begin + self._arrived)
        if begin + self._arrived < end:
            self.damage.append((begin + self._arrived, end))

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice."""
        super().discard(extent, count)
        self._sound_again(extent * EXTENT_BYTES, (extent + count) * EXTENT_BYTES)

    def _sound_again(self, begin: int, end: int) -> None:
        """No damage from `begin` to `end` any more."""
        if self.damage:
            parts = (
                part
                for first, last in self.damage
                for part in ((first, min(last, begin)), (max(first, end), last))
            )
            self.damage = [(first, last) for first, last in parts if first < last]
