"""The physical backend: segment images in extents of swap devices.

    extent number (29 bits): device:5 | extent:24

Invariants:
- `live_bytes` and `live_entries` of an extent count the entries that table words name.
- An extent whose last live entry went, and that is neither pinned nor being filled, is first
  discarded and only then handed out again: a discard that is still under way cannot hit new data.
- Extents are handed out by the device of the highest priority that has one, and never by one that
  is draining. An extent that failed a write is not used again until it is forgiven.
- One extent per device is kept in reserve for moving live entries together (`take(reserve=True)`).

This module performs no I/O: it makes requests and reads their outcomes. It must not know slots'
owners, limits, or why something is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from vswapd_backends.base import (
    I64,
    SEGMENT_BYTES,
    IoBatch,
    IoKind,
    IoRequest,
    Operation,
    Places,
)
from vswapd_backends.kept import DEVICE_ROWS, ExtentColumns
from vswapd_backends.segment import CHECK_BYTES, ENTRY_OVERHEAD, digests, salted
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, BlockDevice
from vswapd_blockdev.extents import ExtentMap

EXTENT_BITS: Final = 24
EXTENT_MASK: Final = (1 << EXTENT_BITS) - 1
MAX_DEVICES: Final = 1 << 5
assert EXTENT_BYTES == SEGMENT_BYTES
assert DEVICE_ROWS == 1 << EXTENT_BITS


@dataclass(slots=True)
class SwapDevice:
    """One device in use, and what is known of each of its extents."""

    index: int
    device: BlockDevice
    priority: int
    added: int
    """How many were put into use before it."""
    map: ExtentMap
    live_bytes: I64
    live_entries: I64
    pins: I64
    rows: npt.NDArray[np.void]
    """What is kept of each extent; see `kept.EXTENT_ROW`."""
    draining: bool = False
    read_errors: int = 0
    write_errors: int = 0
    discards: list[int] = field(default_factory=list)
    """Extents that wait for their discard."""
    discarding: int = 0

    @property
    def state(self) -> str:
        """`on`, `draining`, or `failing` once a read or write has failed."""
        if self.draining:
            return "draining"
        return "failing" if self.read_errors or self.write_errors else "on"

    @property
    def used(self) -> int:
        """Extents that hold something."""
        return self.map.used - len(self.discards) - self.discarding

    @property
    def sequence(self) -> I64:
        """The sequence number of each extent's image; 0: nothing was written to it."""
        found: I64 = self.rows["sequence"]
        return found

    @property
    def pool(self) -> npt.NDArray[np.int16]:
        """The pool of each extent's entries."""
        found: npt.NDArray[np.int16] = self.rows["pool"]
        return found

    @property
    def group(self) -> npt.NDArray[np.int32]:
        """The group of each extent's entries."""
        found: npt.NDArray[np.int32] = self.rows["group"]
        return found

    def number_of(self, extent: int) -> int:
        """The number that table words carry."""
        return (self.index << EXTENT_BITS) | extent

    def streams_of(self, extents: I64) -> I64:
        """A number per extent that only those of its own stream have; shape (n,)."""
        found: I64 = (self.pool[extents].astype(np.int64) << 32) | self.group[extents]
        return found


@dataclass(slots=True)
class ReadPlan:
    """Reads that together bring n entries, and where each entry will be found."""

    requests: list[IoRequest]
    which: I64
    """Per entry: index of its request."""
    start: I64
    """Per entry: offset of its check in the request's bytes."""
    places: Places


class SwapDevices:
    """All devices. Slots' words name extents by number; `device_of` finds the way back."""

    def __init__(self, columns: ExtentColumns | None = None) -> None:
        self._columns = columns or ExtentColumns()
        self._devices: list[SwapDevice | None] = []
        self._added = 0
        self.failures = 0
        """Writes that have failed, of all devices that there have been."""

    def __iter__(self) -> Iterator[SwapDevice]:
        """Devices in use, highest priority first, then in the order of swapon."""
        found = [device for device in self._devices if device is not None]
        return iter(sorted(found, key=lambda device: (-device.priority, device.added)))

    @property
    def any(self) -> bool:
        """Whether there is a device that may take pages."""
        return any(d is not None and not d.draining for d in self._devices)

    def add(
        self, device: BlockDevice, priority: int, extents_of: ExtentMap | None = None
    ) -> SwapDevice | None:
        """Attach a device; None if there are MAX_DEVICES already.

        Args:
            device: the device.
            priority: devices of a higher one are filled first.
            extents_of: which of its extents may be used; None: all.
        """
        try:
            index = self._devices.index(None)
        except ValueError:
            if len(self._devices) == MAX_DEVICES:
                return None
            index = len(self._devices)
            self._devices.append(None)
        extents = extents_used(device)
        entry = SwapDevice(
            index=index,
            device=device,
            priority=priority,
            added=self._added,
            map=ExtentMap(extents) if extents_of is None else extents_of,
            live_bytes=_zeros(extents),
            live_entries=_zeros(extents),
            pins=_zeros(extents),
            rows=self._columns.fresh(index, extents),
        )
        self._devices[index] = entry
        self._added += 1
        return entry

    def restore(
        self,
        index: int,
        device: BlockDevice,
        *,
        priority: int,
        added: int,
        extents_of: ExtentMap | None,
        entries: I64,
        lengths: I64,
    ) -> SwapDevice:
        """Take up a device that another process has left.

        Extents that something was written to, and that no word names, are to be discarded.

        Args:
            index: the one that it had.
            device: the device, open again.
            priority: as for `add`.
            added: its place in the order of swapon.
            extents_of: as for `add`.
            entries: how many entries of each extent the table names; shape (extents,).
            lengths: their compressed bytes; shape (extents,).
        """
        extents = extents_used(device)
        entry = SwapDevice(
            index=index,
            device=device,
            priority=priority,
            added=added,
            map=ExtentMap(extents) if extents_of is None else extents_of,
            live_bytes=lengths,
            live_entries=entries,
            pins=_zeros(extents),
            rows=self._columns.of(index, extents),
        )
        dead = np.flatnonzero((entry.sequence != 0) & (entries == 0))
        taken = np.union1d(np.flatnonzero(entries), dead)
        entry.map.restore(taken.tolist(), np.flatnonzero(entry.rows["bad"]).tolist())
        entry.discards = dead.tolist()
        self._devices += [None] * (index + 1 - len(self._devices))
        assert self._devices[index] is None
        self._devices[index] = entry
        self._added = max(self._added, added + 1)
        return entry

    def remove(self, entry: SwapDevice) -> None:
        """Forget a device on which nothing lives."""
        assert not entry.live_entries.any()
        assert not entry.pins.any()
        entry.map.leave()
        self._devices[entry.index] = None

    def find(self, path: str) -> SwapDevice | None:
        """The device of that path."""
        return next((d for d in self._devices if d is not None and d.device.path == path), None)

    def device_of(self, number: int) -> tuple[SwapDevice, int]:
        """Device and extent that a number names."""
        entry = self._devices[number >> EXTENT_BITS]
        assert entry is not None
        return entry, number & EXTENT_MASK

    # Extents

    def take(self, pool: int, group: int, sequence: int, *, reserve: bool = False) -> int | None:
        """A free extent's number, pinned once; None if no device has one.

        The pin belongs to whoever fills the extent: until it is undone the extent stays, empty or
        not.
        """
        for entry in self:
            if entry.draining or entry.map.free <= (0 if reserve else 1):
                continue
            extent = entry.map.take()
            if extent is None:
                continue
            entry.sequence[extent] = sequence
            entry.pool[extent] = pool
            entry.group[extent] = group
            entry.pins[extent] = 1
            return entry.number_of(extent)
        return None

    @property
    def free_extents(self) -> int:
        """Extents that `take` could hand out, those that wait for their discard included."""
        return sum(
            max(0, d.map.free + len(d.discards) + d.discarding - 1)
            for d in self._devices
            if d is not None and not d.draining
        )

    @property
    def ready_extents(self) -> int:
        """Extents that `take` can hand out without waiting for a discard."""
        return sum(
            max(0, d.map.free - 1) for d in self._devices if d is not None and not d.draining
        )

    def pin(self, number: int) -> None:
        """Keep an extent's bytes as they are while somebody reads or writes them."""
        entry, extent = self.device_of(number)
        entry.pins[extent] += 1

    def unpin(self, number: int) -> None:
        """Undo one pin; an extent in which nothing lives goes to be discarded."""
        entry, extent = self.device_of(number)
        assert entry.pins[extent] > 0
        entry.pins[extent] -= 1
        self._maybe_discard(entry, extent)

    def fail(self, number: int) -> None:
        """A write to this extent failed: count it, and do not hand the extent out again."""
        entry, extent = self.device_of(number)
        self.failures += 1
        entry.write_errors += 1
        entry.rows["bad"][extent] = 1
        entry.map.mark_bad(extent)

    def forgive(self, entry: SwapDevice, most: int) -> int:
        """Hand out extents again that failed a write, at most so many; returns how many."""
        extents = entry.map.forgive(most)
        entry.rows["bad"][extents] = 0
        return len(extents)

    def _maybe_discard(self, entry: SwapDevice, extent: int) -> None:
        if not entry.live_entries[extent] and not entry.pins[extent]:
            entry.discards.append(extent)

    def discard(self) -> Operation[int]:
        """Discard what was given up and make it free; returns how many extents that were."""
        batches: list[tuple[SwapDevice, list[int]]] = []
        requests: list[IoRequest] = []
        for entry in self._devices:
            if entry is None or not entry.discards:
                continue
            extents, entry.discards = sorted(entry.discards), []
            entry.discarding += len(extents)
            batches.append((entry, extents))
            requests += [
                IoRequest(IoKind.DISCARD, entry.device, first, 0, count)
                for first, count in _runs(extents)
            ]
        if not requests:
            return 0
        try:
            yield IoBatch(requests)
        finally:
            for entry, extents in batches:
                entry.discarding -= len(extents)
                entry.sequence[extents] = 0
                for extent in extents:
                    entry.map.give(extent)
        return sum(len(extents) for _, extents in batches)

    @property
    def discards_waiting(self) -> bool:
        """Whether `discard` has something to do."""
        return any(d is not None and d.discards for d in self._devices)

    @property
    def discarding(self) -> bool:
        """Whether discards are under way: extents will be free when they are done."""
        return any(d is not None and d.discarding for d in self._devices)

    # Entries

    def keep(self, number: int, entries: int, length: int) -> None:
        """Entries of an extent that words name from now on."""
        entry, extent = self.device_of(number)
        entry.live_entries[extent] += entries
        entry.live_bytes[extent] += length

    def give_up(self, places: Places) -> None:
        """Entries that no word names any more."""
        numbers = places.number
        of = numbers >> EXTENT_BITS
        for index in np.unique(of).tolist():
            entry = self._devices[index]
            assert entry is not None
            which = of == index
            extents = numbers[which] & EXTENT_MASK
            np.subtract.at(entry.live_bytes, extents, places.length[which])
            np.subtract.at(entry.live_entries, extents, 1)
            for extent in np.unique(extents[entry.live_entries[extents] == 0]).tolist():
                self._maybe_discard(entry, extent)

    # Reading

    def plan_reads(self, places: Places) -> ReadPlan:
        """Reads for n entries, whole blocks, neighbours in one. Pins each extent that is read."""
        numbers = places.number
        first = places.address // BLOCK_BYTES * BLOCK_BYTES
        end = places.address + CHECK_BYTES + places.length
        last = -(-end // BLOCK_BYTES) * BLOCK_BYTES
        order = np.argsort(first, kind="stable")
        furthest = np.maximum.accumulate(last[order])
        fresh = np.ones(len(order), np.bool_)
        fresh[1:] = (first[order][1:] > furthest[:-1]) | (np.diff(numbers[order]) != 0)
        heads = np.flatnonzero(fresh)
        firsts = first[order][heads]
        lasts = furthest[np.append(heads[1:], len(order)) - 1]
        which = np.empty(len(order), np.int64)
        which[order] = np.cumsum(fresh) - 1
        requests = []
        for begin, finish in zip(firsts.tolist(), lasts.tolist(), strict=True):
            number = begin // SEGMENT_BYTES
            entry, extent = self.device_of(number)
            entry.pins[extent] += 1
            requests.append(
                IoRequest(IoKind.READ, entry.device, extent, begin % SEGMENT_BYTES, finish - begin)
            )
        start = places.address - firsts[which]
        return ReadPlan(requests, which, start, places)

    def read(self, plan: ReadPlan) -> Operation[None]:
        """Have the reads of a plan performed; `collect` or `gather` is next. Given up: `abandon`.

        A read for several entries that fails is done again for each of them: a block that cannot
        be read takes only those with it that lie on it.
        """
        try:
            yield IoBatch(plan.requests)
            again = self._apart(plan)
            if again:
                yield IoBatch(again)
        except BaseException:
            self.abandon(plan)
            raise

    def _apart(self, plan: ReadPlan) -> list[IoRequest]:
        """Reads of their own for entries whose read has failed for them all; now in the plan."""
        if all(request.error is None for request in plan.requests):
            return []
        failed = np.array([request.error is not None for request in plan.requests])
        shared = np.bincount(plan.which, minlength=len(failed)) > 1
        first = len(plan.requests)
        for index in np.flatnonzero((failed & shared)[plan.which]).tolist():
            old = plan.requests[plan.which[index]]
            at = old.offset + int(plan.start[index])
            begin = at // BLOCK_BYTES * BLOCK_BYTES
            end = at + CHECK_BYTES + int(plan.places.length[index])
            length = -(-end // BLOCK_BYTES) * BLOCK_BYTES - begin
            plan.which[index] = len(plan.requests)
            plan.start[index] = at - begin
            plan.requests.append(IoRequest(IoKind.READ, old.device, old.extent, begin, length))
            self.pin(self._number_of(old))
        return plan.requests[first:]

    def collect(self, plan: ReadPlan, numbers: I64) -> list[memoryview | None]:
        """The entries of a plan whose reads are done: None where read or check failed. Unpins."""
        found = self._outcome(plan)
        entries = self._checked(found, plan.places, numbers)
        self.abandon(plan)
        return entries

    def gather(self, plan: ReadPlan) -> list[memoryview | None]:
        """The same with their checks, which were not looked at: None where the read failed."""
        found = self._outcome(plan)
        self.abandon(plan)
        return found

    def _outcome(self, plan: ReadPlan) -> list[memoryview | None]:
        for request in plan.requests:
            if request.error is not None:
                self.device_of(self._number_of(request))[0].read_errors += 1
        found: list[memoryview | None] = []
        ends = plan.start + CHECK_BYTES + plan.places.length
        for index, start, end in zip(
            plan.which.tolist(), plan.start.tolist(), ends.tolist(), strict=True
        ):
            result = plan.requests[index].result
            found.append(None if result is None else result[start:end])
        return found

    def abandon(self, plan: ReadPlan) -> None:
        """Let go of a plan whose reads nobody waits for, or needs the extents of, any more."""
        for request in plan.requests:
            self.unpin(self._number_of(request))

    def _number_of(self, request: IoRequest) -> int:
        entry = next(d for d in self._devices if d is not None and d.device is request.device)
        return entry.number_of(request.extent)

    def _checked(
        self, found: Sequence[memoryview | None], places: Places, numbers: I64
    ) -> list[memoryview | None]:
        """Strip the checks; an entry that does not agree with its own becomes None."""
        present = [i for i, entry in enumerate(found) if entry is not None]
        if not present:
            return list(found)
        views = [entry for entry in found if entry is not None]
        checks = np.frombuffer(b"".join(v[:CHECK_BYTES] for v in views), np.uint64)
        bodies = [v[CHECK_BYTES:] for v in views]
        plain = digests(bodies)
        entries: list[memoryview | None] = [None] * len(found)
        sequences = self.sequences_of(places.number[present])
        for sequence in np.unique(sequences).tolist():
            mine = np.flatnonzero(sequences == sequence)
            index = np.array(present)[mine]
            good = salted(checks[mine], numbers[index], sequence) == plain[mine]
            for position in mine[good].tolist():
                entries[present[position]] = bodies[position]
        return entries

    def sequences_of(self, numbers: I64) -> I64:
        """The sequence numbers of the images in n extents."""
        return self._column("sequence", numbers)

    def pools_of(self, numbers: I64) -> I64:
        """The pool indices (codecs) of n extents."""
        return self._column("pool", numbers)

    def _column(self, name: str, numbers: I64) -> I64:
        """One field of the rows of n extents."""
        result = np.empty(len(numbers), np.int64)
        for index in np.unique(numbers >> EXTENT_BITS).tolist():
            entry = self._devices[index]
            which = (numbers >> EXTENT_BITS) == index
            assert entry is not None
            result[which] = entry.rows[name][numbers[which] & EXTENT_MASK]
        return result


def image_writes(
    device: BlockDevice, extent: int, image: memoryview, payload_end: int, count: int
) -> list[IoRequest]:
    """The writes that put an image on a device: all of it, or its two ends if that saves a lot."""
    low = -(-payload_end // BLOCK_BYTES) * BLOCK_BYTES
    high = (SEGMENT_BYTES - count * 8) // BLOCK_BYTES * BLOCK_BYTES
    if high - low < SEGMENT_BYTES // 16:
        return [IoRequest(IoKind.WRITE, device, extent, 0, SEGMENT_BYTES, image)]
    return [
        IoRequest(IoKind.WRITE, device, extent, 0, low, image[:low]),
        IoRequest(IoKind.WRITE, device, extent, high, SEGMENT_BYTES - high, image[high:]),
    ]


class _HasExtents(Protocol):
    @property
    def extents(self) -> int: ...


def extents_used(device: _HasExtents) -> int:
    """How many extents of a device words can name."""
    return min(device.extents, EXTENT_MASK)


def footprint(entry: SwapDevice, extents: I64) -> I64:
    """Bytes that the live entries of extents need in an image."""
    need: I64 = entry.live_bytes[extents] + ENTRY_OVERHEAD * entry.live_entries[extents]
    return need


def _zeros(count: int) -> I64:
    return np.zeros(count, np.int64)


def _runs(ordered: list[int]) -> list[tuple[int, int]]:
    """Ascending distinct numbers as (first, count) of neighbouring ones."""
    found: list[tuple[int, int]] = []
    for number in ordered:
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found
