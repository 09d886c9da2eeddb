"""What every backend of a slot shares: where an entry lies, and how device I/O is asked for.

A backend never performs I/O by itself. An *operation* is a generator: it yields what it needs
(`IoBatch`, `Submit`, `Compute`, `WAIT`, `PAUSE`), whoever drives it does that outside the engine's
lock and resumes it with the outcome. Between two yields the engine's state is consistent, and
anything may have changed when an operation is resumed: it must look again. So the same code runs
under an event loop, in the shrinker's thread, in a plain loop in a test, and in a simulator that
reorders the I/O at will.

This module must not know the swap table, sockets, threads, or any concrete backend.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from vswapd_blockdev.device import BlockDevice, DeviceError

if TYPE_CHECKING:
    from collections.abc import Sequence

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

PAGE_BYTES: Final = 4096
SEGMENT_BYTES: Final = 256 * 1024


_OFFSET_MASK: Final = SEGMENT_BYTES - 1
_NUMBER_SHIFT: Final = SEGMENT_BYTES.bit_length() - 1


class Places(NamedTuple):
    """Where n entries lie: arrays of shape (n,), int64."""

    address: I64
    """number * SEGMENT_BYTES + offset, where number is the segment's (zswap) or the extent's
    (device), and offset is where the entry begins in it."""
    length: I64
    """Compressed bytes; PAGE_BYTES for a page that is kept raw."""

    @property
    def number(self) -> I64:
        """Segments or extents, shape (n,)."""
        return self.address >> _NUMBER_SHIFT

    @property
    def offset(self) -> I64:
        """Offsets in them, shape (n,)."""
        return self.address & _OFFSET_MASK

    @classmethod
    def within(cls, number: int, offsets: I64, lengths: I64) -> Places:
        """Places in one segment or extent."""
        return cls(offsets + (number << _NUMBER_SHIFT), lengths)

    def pick(self, which: npt.NDArray[np.bool_ | np.intp]) -> Places:
        """Only those entries."""
        return Places(self.address[which], self.length[which])


class IoKind(Enum):
    """What is asked of a device."""

    READ = "read"
    WRITE = "write"
    DISCARD = "discard"


@dataclass(slots=True)
class IoRequest:
    """One device request. `perform` may block; it touches nothing but the device and itself."""

    kind: IoKind
    device: BlockDevice
    extent: int
    offset: int
    length: int
    """READ, WRITE: bytes; DISCARD: extents."""
    data: bytes | bytearray | memoryview = b""
    result: memoryview | None = field(default=None, init=False)
    error: DeviceError | None = field(default=None, init=False)

    def perform(self) -> None:
        """Do it; a DeviceError is kept in `error`, anything else is our mistake and is raised."""
        try:
            match self.kind:
                case IoKind.READ:
                    self.result = self.device.read(self.extent, self.offset, self.length)
                case IoKind.WRITE:
                    self.device.write(self.extent, self.offset, self.data)
                case IoKind.DISCARD:
                    self.device.discard(self.extent, self.length)
        except DeviceError as error:
            self.error = error


@dataclass(slots=True)
class IoBatch:
    """Requests that may be performed at the same time, in any order; resumed when all are done."""

    requests: Sequence[IoRequest]
    ticket: object = field(default=None, init=False)
    """The driver's own, from `Submit` to the yield of the batch."""

    def perform(self) -> None:
        """All of them, one after the other."""
        for request in self.requests:
            request.perform()


@dataclass(slots=True)
class Submit:
    """Begin a batch and resume me at once; I yield the batch itself when I need its outcome."""

    batch: IoBatch


class Breath(Enum):
    """What an operation may ask for besides I/O."""

    WAIT = "wait"
    """Somebody else's I/O must end first: resume me after the next one has."""
    PAUSE = "pause"
    """Long work: let others have the lock, then resume me."""


WAIT: Final = Breath.WAIT
PAUSE: Final = Breath.PAUSE

SHORT_PAGES: Final = 128
"""Requests of up to so many pages are carried out in one go: a client's frame is no larger."""
TURN_PAGES: Final = 32
"""Pages that are decompressed in one turn of a larger request: 0.08 ms with lz4."""


def turns_of(count: int, pages: int = TURN_PAGES) -> list[slice]:
    """The turns, of so many pages each, in which a request for `count` pages is carried out."""
    if count <= SHORT_PAGES:
        return [slice(0, count)]
    return [slice(first, min(first + pages, count)) for first in range(0, count, pages)]


T = TypeVar("T")


@dataclass(slots=True)
class Compute(Generic[T]):
    """What an operation yields to have something computed outside the lock."""

    call: Callable[[], T]
    slow: bool = False
    """Whether it is to be done in a worker, so that the event loop can go on meanwhile."""
    _outcome: list[T] = field(default_factory=list, init=False)
    _error: BaseException | None = field(default=None, init=False)

    def perform(self) -> None:
        """Do it; errors wait for `result`."""
        try:
            self._outcome.append(self.call())
        except BaseException as error:  # noqa: BLE001 - `result` raises it where it belongs
            self._error = error

    def result(self) -> T:
        """What came out of it, once the operation is resumed."""
        if self._error is not None:
            raise self._error
        return self._outcome[0]


Need = IoBatch | Submit | Breath | Compute[Any]
"""What an operation can yield."""
Operation = Generator[Need, None, T]


class StuckError(RuntimeError):
    """A lone operation waits for others, and there are none: a mistake of ours."""


def run(operation: Operation[T]) -> T:
    """Drive one operation to its end on the spot, I/O included. For tests, tools and benchmarks."""
    try:
        while True:
            need = next(operation)
            if isinstance(need, Submit):
                need.batch.perform()
                need.batch.ticket = run
            elif isinstance(need, IoBatch):
                if need.ticket is None:
                    need.perform()
            elif isinstance(need, Compute):
                need.perform()
            elif need is WAIT:
                raise StuckError("the operation waits for I/O that nobody else has under way")
    except StopIteration as end:
        result: T = end.value
        return result
