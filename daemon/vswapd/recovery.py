"""What an engine knows besides the table, made again from it after its process was killed.

The table is the only truth: what a word names is alive, everything else is free. So one pass over
the words of the clusters that have an owner gives the live bytes of segments and extents, the
charges of groups and spaces, and what is left of clusters; the columns (see `kept`) say what stands
in a segment or an extent that lives. What was begun and not published is named by no word, and is
free by that alone: half a folio, a segment that was being filled by compaction, an extent whose
writeback was under way. Spaces that were being closed are not found again, and what they had is
wiped here.

Invariants:
- It may be killed at any point, and be begun again.
- Nothing is moved, and no word is changed but for the slots of a request that is undone, or done.

This module must not know who the clients are, or how devices are opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from vswapd.clusters import SlotSet
from vswapd.control import KeptDevice
from vswapd.core import Core
from vswapd.groups import Space
from vswapd.lost_device import LostDevice
from vswapd.swap_table import (
    BACKED,
    CLUSTER_SHIFT,
    CLUSTER_SLOTS,
    TAGS,
    Tag,
    addresses_of,
    lengths_of,
    runs,
    tags_of,
)
from vswapd_backends.base import I64, SEGMENT_BYTES, U64
from vswapd_backends.swapdev import EXTENT_BITS, EXTENT_MASK, extents_used
from vswapd_blockdev.device import BlockDevice
from vswapd_blockdev.extents import ExtentMap

_AT_ONCE: Final = 256
"""Clusters per step: 1 MiB of words, which stay in the cache from one look to the next."""
_SEGMENT_SHIFT: Final = SEGMENT_BYTES.bit_length() - 1


class RecoveryError(Exception):
    """What is kept does not fit together. It was not made by a kill: memory was damaged."""


Reopen = Callable[[KeptDevice], "tuple[BlockDevice, ExtentMap | None] | None"]
"""Opens a device that was in use, and says which of its extents are this engine's (None: all).
Returns None where it cannot be had: what lies on it is lost then, page by page."""


@dataclass(slots=True)
class _Live:
    """Entries that words name, by segment or extent."""

    entries: I64
    lengths: I64

    @classmethod
    def none(cls, count: int) -> _Live:
        return cls(np.zeros(count, np.int64), np.zeros(count, np.int64))

    def add(self, numbers: I64, lengths: I64) -> None:
        """Count entries at these numbers."""
        count = len(self.entries)
        self.entries += np.bincount(numbers, minlength=count)
        self.lengths += np.bincount(numbers, lengths, count).astype(np.int64)


@dataclass(slots=True)
class _Sums:
    """What one pass over the table finds; arrays of shape (clusters,)."""

    used: I64
    zero: I64
    backed: I64
    pool_bytes: I64
    device_bytes: I64
    segments: _Live
    extents: dict[int, _Live]
    """By device index."""
    tags: I64

    @classmethod
    def none(cls, clusters: int, segments: int, devices: list[KeptDevice]) -> _Sums:
        """Before the first look."""
        return cls(
            used=np.zeros(clusters, np.int64),
            zero=np.zeros(clusters, np.int64),
            backed=np.zeros(clusters, np.int64),
            pool_bytes=np.zeros(clusters, np.int64),
            device_bytes=np.zeros(clusters, np.int64),
            segments=_Live.none(segments),
            extents={device.index: _Live.none(extents_used(device)) for device in devices},
            tags=np.zeros(TAGS, np.int64),
        )


def recover(core: Core, reopen: Reopen) -> None:
    """Fill a new engine's state from the memory that it was made over.

    Raises:
        RecoveryError: what is kept does not fit together.
    """
    spaces = _spaces(core)
    devices = core.control.devices()
    clusters, owners = core.clusters.kept_clusters()
    # What a space had that is not there any more: it was being closed.
    orphaned = ~np.isin(owners, np.fromiter(spaces, np.int64, len(spaces)))
    core.clusters.disown(clusters[orphaned])
    clusters, owners = clusters[~orphaned], owners[~orphaned]
    for space in spaces.values():
        _finish_request(core, space)
    sums = _walk(core, clusters, devices)
    # Handed out, and killed before the first word was written.
    empty = sums.used == 0
    core.clusters.disown(clusters[empty])
    core.clusters.restore(
        {number: space.slots for number, space in spaces.items()},
        clusters[~empty],
        sums.used[~empty],
    )
    core.slot_counts[:] = sums.tags
    core.slot_counts[Tag.FREE] = 0
    core.spaces.update(spaces)
    _charge(list(spaces.values()), owners, sums)
    core.zswap.restore(sums.segments.entries, sums.segments.lengths)
    for kept in devices:
        _attach(core, kept, sums.extents[kept.index], reopen)
    _trim_table(core)
    core.enter_all()
    core.budget.enter()


def _spaces(core: Core) -> dict[int, Space]:
    """The spaces that are kept, as far as their records say, without clients."""
    groups, now = list(core.groups), core.clock()
    found = {}
    for kept in core.control.spaces():
        space = Space(
            id=kept.id,
            group=groups[kept.group],
            client=kept.client,
            holder=kept.holder,
            uid=kept.uid,
            opened_at=kept.opened_at,
            slots=SlotSet(kept.id),
            key=kept.key,
            joined=kept.joined,
            name=kept.name,
            record=kept.record,
            attached=False,
            since=now,
        )
        space.group.spaces += not space.joined
        found[space.id] = space
    return found


def _finish_request(core: Core, space: Space) -> None:
    """Take from a space what its last request was to take, or to give and did not."""
    answers = core.control.answers
    ids = answers.unfinished(space.record)
    if len(ids):
        numbers = core.clusters.kept_numbers(space.id, ids)
        core.table.words[numbers] = 0
        answers.finished(space.record)


def _walk(core: Core, clusters: I64, devices: list[KeptDevice]) -> _Sums:
    """The one pass over the words of these clusters."""
    sums = _Sums.none(len(clusters), core.zswap.arena.limit, devices)
    words = core.table.words
    done = 0
    for first, count in runs(clusters):
        for start in range(first, first + count, _AT_ONCE):
            some = min(_AT_ONCE, first + count - start)
            begin, end = start << CLUSTER_SHIFT, (start + some) << CLUSTER_SHIFT
            _look(words[begin:end], slice(done, done + some), sums)
            done += some
    return sums


def _look(words: U64, which: slice, sums: _Sums) -> None:
    """Add up the words of neighbouring clusters."""
    tags = tags_of(words)
    counts = np.bincount(tags, minlength=TAGS)
    sums.tags += counts
    in_pool = tags == Tag.ZSWAP
    on_device = tags == Tag.PHYS
    sums.used[which] = _per_cluster(tags != Tag.FREE)
    sums.zero[which] = _per_cluster(tags == Tag.ZERO)
    sums.backed[which] = _per_cluster(tags >= BACKED)
    lengths = lengths_of(words)
    numbers = addresses_of(words) >> _SEGMENT_SHIFT
    if counts[Tag.ZSWAP]:
        whole = counts[Tag.ZSWAP] == len(words)
        sums.pool_bytes[which] = _per_cluster(lengths if whole else lengths * in_pool)
        found = numbers if whole else numbers[in_pool]
        if found.max() >= len(sums.segments.entries):
            raise RecoveryError("words name segments that were never handed out")
        sums.segments.add(found, lengths if whole else lengths[in_pool])
    if counts[Tag.PHYS]:
        sums.device_bytes[which] = _per_cluster(lengths * on_device)
        _look_at_extents(numbers[on_device], lengths[on_device], sums)


def _look_at_extents(numbers: I64, lengths: I64, sums: _Sums) -> None:
    of, extents = numbers >> EXTENT_BITS, numbers & EXTENT_MASK
    for index in np.flatnonzero(np.bincount(of)).tolist():
        live = sums.extents.get(index)
        mine = of == index
        if live is None or extents[mine].max() >= len(live.entries):
            raise RecoveryError("words name extents of no device that was in use")
        live.add(extents[mine], lengths[mine])


def _per_cluster(values: np.ndarray[tuple[int], np.dtype[np.bool_ | np.int64]]) -> I64:
    found: I64 = values.reshape(-1, CLUSTER_SLOTS).sum(axis=1)
    return found


def _charge(spaces: list[Space], owners: I64, sums: _Sums) -> None:
    """Spaces and groups hold what their clusters' words add up to."""
    ids = np.array([space.id for space in spaces], np.int64)
    of = np.searchsorted(ids, owners)

    def per_space(values: I64) -> list[int]:
        found: list[int] = np.bincount(of, values, len(spaces)).astype(np.int64).tolist()
        return found

    zero, backed = per_space(sums.zero), per_space(sums.backed)
    pool, device = per_space(sums.pool_bytes), per_space(sums.device_bytes)
    for index, space in enumerate(spaces):
        space.zero_pages, space.backed_pages = zero[index], backed[index]
        space.compressed_bytes = pool[index] + device[index]
        space.group.pool_bytes += pool[index]
        space.group.device_bytes += device[index]


def _attach(core: Core, kept: KeptDevice, live: _Live, reopen: Reopen) -> None:
    """Put a device into use again, or something in its place that has none of its pages."""
    found = reopen(kept)
    lost = found is None
    device, extents_of = found or (LostDevice(kept.path, kept.extents), None)
    if extents_used(device) != len(live.entries):
        raise RecoveryError(f"{kept.path} has {device.extents} extents, it had {kept.extents}")
    entry = core.devices.restore(
        kept.index,
        device,
        priority=kept.priority,
        added=kept.added,
        extents_of=extents_of,
        entries=live.entries,
        lengths=live.lengths,
    )
    if lost:
        entry.map.retire_free()
        entry.read_errors += 1


def _trim_table(core: Core) -> None:
    """Give pages of table back that no open cluster has: a process was killed before it did."""
    table, clusters = core.table, core.clusters
    if table.resident_bytes == clusters.in_use * CLUSTER_SLOTS * 8:
        return
    gone = np.ones(clusters.limit, np.bool_)
    gone[clusters.open_clusters()] = False
    table.wipe(np.flatnonzero(gone))
