"""A wrapper that makes any device fail, on demand and always in the same way.

For tests: the Nth operation fails, or those on chosen extents; bytes flip on the way back; writes
tear; an operation waits until a test lets it go on. Everything is counted and recorded.

This module must not know randomness or time: what fails, and when, is said by the caller.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final, Literal

from vswapd_blockdev.device import BLOCK_BYTES, BlockDevice, ReadError, WriteError

Kind = Literal["read", "write", "discard"]


@dataclass(slots=True)
class Faults:
    """What shall go wrong; may be changed at any time."""

    fail_nth: int | None = None
    """This operation (from 1, of the `counted` kinds) fails, once."""
    fail_from: int | None = None
    """This operation and all later ones fail."""
    counted: tuple[Kind, ...] = ("read", "write")
    bad_reads: set[int] = field(default_factory=set)
    """Extents whose reads fail."""
    bad_writes: set[int] = field(default_factory=set)
    """Extents whose writes fail."""
    flip: set[int] = field(default_factory=set)
    """Extents of which each read block comes back with one bit flipped."""
    tear: bool = False
    """A write that fails has written its first half of blocks."""
    lose_writes: set[int] = field(default_factory=set)
    """Extents whose writes are said to have worked and have not."""


class FaultyDevice:
    """Passes everything on to another device, unless `faults` says otherwise."""

    def __init__(self, device: BlockDevice, faults: Faults | None = None) -> None:
        self.device: Final = device
        self.faults: Final = Faults() if faults is None else faults
        self.path: Final = device.path
        self.extents: Final = device.extents
        self.direct: Final = device.direct
        self.encrypted: Final = device.encrypted
        self.operations: Final[list[tuple[Kind, int, int, int]]] = []
        """Kind, extent, offset and length (extents, for discard) of each, in order."""
        self.counted = 0
        self.gate: Final = threading.Event()
        """Operations wait here while it is clear; it is set at first."""
        self.gate.set()
        self._lock = threading.Lock()

    def _enter(self, kind: Kind, extent: int, offset: int, length: int) -> bool:
        """Record an operation; whether it shall fail."""
        self.gate.wait()
        faults = self.faults
        with self._lock:
            self.operations.append((kind, extent, offset, length))
            if kind not in faults.counted:
                return False
            self.counted += 1
            return self.counted == faults.fail_nth or (
                faults.fail_from is not None and self.counted >= faults.fail_from
            )

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        fails = self._enter("read", extent, offset, length)
        if fails or extent in self.faults.bad_reads:
            raise ReadError(self.path, f"injected: reading extent {extent}")
        data = self.device.read(extent, offset, length)
        if extent in self.faults.flip:
            data = memoryview(bytearray(data))
            for start in range(0, length, BLOCK_BYTES):
                data[start + 64] ^= 1
        return data

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        fails = self._enter("write", extent, offset, len(data))
        if fails or extent in self.faults.bad_writes:
            half = len(data) // BLOCK_BYTES // 2 * BLOCK_BYTES
            if self.faults.tear and half:
                self.device.write(extent, offset, memoryview(data)[:half])
            raise WriteError(self.path, f"injected: writing extent {extent}")
        if extent not in self.faults.lose_writes:
            self.device.write(extent, offset, data)

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice. A discard that is to fail is left out: it never raises."""
        if not self._enter("discard", extent, 0, count):
            self.device.discard(extent, count)

    def close(self) -> None:
        """See BlockDevice."""
        self.device.close()
