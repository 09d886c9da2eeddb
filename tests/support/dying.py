"""A process that dies at its n-th write to memory or devices that outlive it.

What counts as a write, each of them a step at which the process may be killed:
- every word of an array that lies in a memfd, one by one, also where numpy writes many at once;
- of longer runs of bytes (payload, records, device blocks) each half;
- every header of a segment, and both halves of every hole that is punched.

So words are whole, as they are on any machine that stores aligned words at once, and everything
else is torn. `Dying.watch` finds all arrays and views of an engine that lie in the memfds, and puts
watched ones in their place: there is no write that does not go through one of them, through
`SharedRegion.punch`, or through a header.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import signal
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from vswapd.core import Core
from vswapd_backends.segment import ImageBuilder
from vswapd_backends.shared import SharedRegion
from vswapd_blockdev.device import EXTENT_BYTES

_OURS: Final = ("vswapd.", "vswapd_backends.", "vswapd_blockdev.")
_WORD: Final = 8
_DISCARDED: Final = 0xDD


class Dying:
    """Counts writes, and ends the process at one of them. One per process."""

    current: Dying | None = None

    def __init__(self, fatal: int, told: mmap.mmap) -> None:
        """For a process that is to die before its `fatal`-th write from `watch` on.

        Args:
            fatal: which write; 0: none.
            told: where the number of writes so far is told, in its first 8 bytes.
        """
        self._fatal = fatal
        self._told = told
        self._count = 0
        self._spans: list[tuple[int, int]] = []

    def step(self) -> None:
        """One write is about to be done."""
        self._count += 1
        self._told[:8] = self._count.to_bytes(8, "little")
        if self._count == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def covers(self, array: np.ndarray[Any, Any]) -> bool:
        """Whether an array lies in memory that outlives the process."""
        address = array.__array_interface__["data"][0]
        return any(begin <= address < end for begin, end in self._spans)

    def watch(self, core: Core, *others: object, shared: Sequence[SharedRegion] = ()) -> None:
        """Count from now on what this engine writes.

        Args:
            core: the engine's.
            others: its other parts.
            shared: memory of others that it writes to, besides its own.
        """
        memory = core.memory
        for region in (memory.table, memory.pool, memory.state, *shared):
            begin = region.bytes_array().__array_interface__["data"][0]
            self._spans.append((begin, begin + region.size))
        Dying.current = self
        self._replace([core, *others], set())
        self._patch()

    def _replace(self, thing: Any, seen: set[int]) -> None:
        """Put watched arrays in the place of all that lie in the memory, wherever they are kept."""
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, dict):
            children: list[Any] = list(thing.values())
        elif isinstance(thing, (list, tuple, set)):
            children = list(thing)
        elif type(thing).__module__.startswith(_OURS):
            children = []
            for name, value in _attributes(thing):
                watched = self._watched(value)
                if watched is None:
                    children.append(value)
                else:
                    object.__setattr__(thing, name, watched)
        else:
            return
        for child in children:
            self._replace(child, seen)

    def _watched(self, value: object) -> Watched | None:
        if isinstance(value, memoryview):
            if value.readonly or not value.contiguous:
                return None
            value = np.frombuffer(value, np.int64 if value.format == "l" else np.uint8)
        if isinstance(value, np.ndarray) and self.covers(value):
            return value.view(Watched)
        return None

    def _patch(self) -> None:
        """What is written by other means than an array."""
        step = self.step
        finish, begin, punch = ImageBuilder.finish, ImageBuilder.__init__, SharedRegion.punch

        def watched_finish(builder: ImageBuilder) -> None:
            if isinstance(builder.buffer, Watched):
                step()
            finish(builder)

        def watched_begin(builder: ImageBuilder, buffer: Any, **rest: Any) -> None:
            begin(builder, buffer, **rest)
            if isinstance(buffer, Watched):
                builder._words = buffer.view(np.uint64)
                builder._bytes = buffer

        def watched_punch(region: SharedRegion, offset: int, length: int) -> None:
            half = length // 2 // mmap.PAGESIZE * mmap.PAGESIZE
            step()
            if half:
                punch(region, offset, half)
                step()
            punch(region, offset + half, length - half)

        for kind, name, watched in (
            (ImageBuilder, "finish", watched_finish),
            (ImageBuilder, "__init__", watched_begin),
            (SharedRegion, "punch", watched_punch),
        ):
            setattr(kind, name, watched)


class Watched(np.ndarray[Any, Any]):
    """An array in memory that outlives the process; its copies are arrays like any other."""

    def __setitem__(self, key: Any, value: Any) -> None:
        plain = self.view(np.ndarray)
        dying = Dying.current
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = np.frombuffer(value, self.dtype)
        if dying is None or not dying.covers(self):
            plain[key] = value
            return
        where = _indices(key, self.shape[0])
        if where is None or self.ndim > 1:
            dying.step()
            plain[key] = value
            return
        values = np.broadcast_to(value, where.shape)
        if self.itemsize < _WORD:
            half = len(where) // 2
            for part in (slice(0, half), slice(half, None)):
                dying.step()
                plain[where[part]] = values[part]
            return
        for index, word in zip(where.tolist(), values.tolist(), strict=True):
            dying.step()
            plain[index] = word


def _indices(key: Any, length: int) -> np.ndarray[Any, Any] | None:
    """The elements that a key names, in order; None: just one."""
    if isinstance(key, slice):
        return np.arange(*key.indices(length))
    if isinstance(key, (int, np.integer)):
        return None
    found = np.asarray(key)
    return np.flatnonzero(found) if found.dtype == bool else found


def _attributes(thing: object) -> list[tuple[str, Any]]:
    names = list(getattr(thing, "__dict__", {}))
    for kind in type(thing).__mro__:
        slots = getattr(kind, "__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    if dataclasses.is_dataclass(thing):
        names += [field.name for field in dataclasses.fields(thing)]
    return [(name, getattr(thing, name)) for name in dict.fromkeys(names) if hasattr(thing, name)]


class KeptDevice:
    """A swap device whose bytes outlive the process; each half of a write is a step."""

    def __init__(self, extents: int, path: str) -> None:
        self.path = path
        self.extents = extents
        self.direct = False
        self.encrypted = False
        self.region = SharedRegion("test-device", extents * EXTENT_BYTES)

    @property
    def is_discarded(self) -> bool:
        """Whether nothing stands on it but what was never written, or was discarded since."""
        end = 0
        while True:
            try:
                begin = os.lseek(self.region.fd, end, os.SEEK_DATA)
            except OSError:
                return True
            end = os.lseek(self.region.fd, begin, os.SEEK_HOLE)
            found = np.frombuffer(os.pread(self.region.fd, end - begin, begin), np.uint8)
            if ((found != 0) & (found != _DISCARDED)).any():
                return False

    def _step(self) -> None:
        if Dying.current is not None:
            Dying.current.step()

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        start = extent * EXTENT_BYTES + offset
        return memoryview(bytearray(self.region.view[start : start + length]))

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        start, half = extent * EXTENT_BYTES + offset, len(data) // 2
        self._step()
        self.region.view[start : start + half] = memoryview(data)[:half]
        self._step()
        self.region.view[start + half : start + len(data)] = memoryview(data)[half:]

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice: what was discarded is garbage."""
        start, size = extent * EXTENT_BYTES, count * EXTENT_BYTES
        self._step()
        self.region.view[start : start + size] = bytes([_DISCARDED]) * size

    def close(self) -> None:
        """See BlockDevice."""
