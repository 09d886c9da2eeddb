"""A wrapper that makes any device fail, on demand and always in the same way.

For tests, like nbdkit's error, delay and pause filters in one: the Nth operation fails, or those on
chosen extents; bytes flip on the way back; writes tear or are lost; an operation waits until a test
lets it go on. All are recorded.

This module must not know randomness or time: what fails, and when, is said by the caller.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, BlockDevice, ReadError, WriteError

Kind = Literal["read", "write", "discard"]
FLIPPED_BYTE: Final = 64
"""Which byte of a block is flipped."""


class Call(NamedTuple):
    """One operation as it came."""

    kind: Kind
    extent: int
    offset: int
    length: int
    """Bytes; extents, for a discard."""


@dataclass(slots=True, kw_only=True)
class Faults:
    """What shall go wrong; may be changed at any time."""

    fail_nth: int | None = None
    """This operation (from 1, of the `counted` kinds) fails, once."""
    fail_from: int | None = None
    """This operation and all later ones fail."""
    counted: tuple[Kind, ...] = ("read", "write")
    gated: tuple[Kind, ...] = ("read", "write", "discard")
    """What waits at the gate."""
    bad_reads: set[int] = field(default_factory=set)
    """Extents whose reads fail."""
    bad_writes: set[int] = field(default_factory=set)
    """Extents whose writes fail."""
    flip: set[int] = field(default_factory=set)
    """Extents of which each read block comes back with one bit flipped."""
    tear: bool = False
    """A write that fails has written the first half of its blocks."""
    torn_writes: set[int] = field(default_factory=set)
    """Extents whose writes are said to have worked, and of which the second half has not."""
    lose_writes: set[int] = field(default_factory=set)
    """Extents whose writes are said to have worked, and have not."""


class FaultyDevice:
    """Passes everything on to another device, unless `faults` says otherwise."""

    def __init__(self, device: BlockDevice, faults: Faults | None = None) -> None:
        self.device: Final = device
        self.faults: Final = Faults() if faults is None else faults
        self.path: Final = device.path
        self.extents: Final = device.extents
        self.direct: Final = device.direct
        self.encrypted: Final = device.encrypted
        self.operations: Final[list[Call]] = []
        """Each, in the order in which they came to the gate."""
        self.counted = 0
        """Operations of the kinds that `faults` counts."""
        self.gate: Final = threading.Event()
        """Operations wait here while it is clear; it is set at first."""
        self.gate.set()
        self.arrived: Final = threading.Semaphore(0)
        """Released once for each operation that has to wait at the gate."""
        self._lock = threading.Lock()

    def _enter(self, kind: Kind, extent: int, offset: int, length: int) -> bool:
        """Record an operation, wait at the gate; whether it shall fail."""
        faults = self.faults
        with self._lock:
            self.operations.append(Call(kind, extent, offset, length))
            number = 0
            if kind in faults.counted:
                self.counted += 1
                number = self.counted
        if kind in faults.gated and not self.gate.is_set():
            self.arrived.release()
            self.gate.wait()
        return number > 0 and (
            number == faults.fail_nth
            or (faults.fail_from is not None and number >= faults.fail_from)
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
                data[start + FLIPPED_BYTE] ^= 1
        return data

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        view = memoryview(data).cast("B")
        fails = self._enter("write", extent, offset, len(view))
        for start in range(0, len(view), EXTENT_BYTES):
            part = view[start : start + EXTENT_BYTES]
            self._write(extent + start // EXTENT_BYTES, offset, part, fails=fails)

    def _write(self, extent: int, offset: int, view: memoryview, *, fails: bool) -> None:
        """One extent of a write, and what goes wrong with it."""
        fails = fails or extent in self.faults.bad_writes
        if fails or extent in self.faults.torn_writes:
            half = len(view) // BLOCK_BYTES // 2 * BLOCK_BYTES
            if half and (self.faults.tear or not fails):
                self.device.write(extent, offset, view[:half])
            if fails:
                raise WriteError(self.path, f"injected: writing extent {extent}")
        elif extent not in self.faults.lose_writes:
            self.device.write(extent, offset, view)

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice. A discard that is to fail is left out: it never raises."""
        if not self._enter("discard", extent, 0, count):
            self.device.discard(extent, count)

    def close(self) -> None:
        """See BlockDevice."""
        self.device.close()
