"""verify: walk table, pools and devices; check every checksum, and that every sum agrees.

Sums are taken in one step, under the lock, so that they are of one moment. Checksums are checked
segment by segment and extent by extent, with pauses between: what changed meanwhile is judged by
the words of its own moment.

This module must not change anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from vswapd.clusters import slots_of
from vswapd.core import Core
from vswapd.ledger import Column
from vswapd.swap_table import (
    BACKED,
    CLUSTER_SLOTS,
    TAGS,
    Tag,
    lengths_of,
    places_of,
    tags_of,
)
from vswapd_backends.base import I64, PAUSE, U64, Operation, Places
from vswapd_backends.codec import CorruptError
from vswapd_backends.segment import CHECK_BYTES
from vswapd_backends.zswap import decode

_BATCH: Final = 1024
"""Entries per step of the checksum walk: about 4 ms under the lock."""
_CLUSTERS: Final = 64


@dataclass(slots=True)
class VerifyReport:
    """What was looked at and what was wrong with it."""

    slots: int = 0
    entries: int = 0
    checked_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


def verify(core: Core) -> Operation[VerifyReport]:
    """See Engine.verify."""
    report = VerifyReport()
    report.problems += check_sums(core)
    report.slots = int(core.slot_counts[1:].sum())
    yield PAUSE
    clusters = core.clusters.open_clusters()
    for first in range(0, len(clusters), _CLUSTERS):
        still_open = np.isin(clusters[first : first + _CLUSTERS], core.clusters.open_clusters())
        numbers = slots_of(clusters[first : first + _CLUSTERS][still_open])
        in_pool = numbers[tags_of(core.table.words[numbers]) == Tag.ZSWAP]
        for start in range(0, len(in_pool), _BATCH):
            _check_pool(core, in_pool[start : start + _BATCH], report)
            yield PAUSE
        still_open = np.isin(clusters[first : first + _CLUSTERS], core.clusters.open_clusters())
        numbers = slots_of(clusters[first : first + _CLUSTERS][still_open])
        on_device = numbers[tags_of(core.table.words[numbers]) == Tag.PHYS]
        for start in range(0, len(on_device), _BATCH):
            yield from _check_device(core, on_device[start : start + _BATCH], report)
    return report


def _check_pool(core: Core, numbers: I64, report: VerifyReport) -> None:
    """Checks and decompression of what still is in the pool."""
    words = core.words_now(numbers)
    still = tags_of(words) == Tag.ZSWAP
    numbers, words = numbers[still], words[still]
    if not len(numbers):
        return
    places = places_of(words)
    addresses = places.address
    bad = set(core.zswap.wrong(addresses, places.length))
    good = np.array([i for i in range(len(numbers)) if i not in bad], np.int64)
    entries = core.zswap.entries(addresses, places.length)
    pools = core.zswap.pools_of(places.number)
    for pool in np.unique(pools[good]).tolist():
        mine = good[pools[good] == pool]
        try:
            decode(core.zswap.pools[pool].codec, [entries[i] for i in mine], places.length[mine])
        except CorruptError as error:
            bad |= set(mine[error.indices].tolist())
    _report(report, numbers, places.length, sorted(bad), "in the pool")


def _check_device(core: Core, numbers: I64, report: VerifyReport) -> Operation[None]:
    words = core.words_now(numbers)
    still = tags_of(words) == Tag.PHYS
    numbers, words = numbers[still], words[still]
    if not len(numbers):
        return
    places = places_of(words)
    plan = core.devices.plan_reads(places)
    yield from core.devices.read(plan)
    entries = core.devices.collect(plan, numbers)
    bad = [i for i, entry in enumerate(entries) if entry is None]
    _report(report, numbers, places.length, bad, "on a device")


def _report(report: VerifyReport, numbers: I64, lengths: I64, bad: list[int], where: str) -> None:
    report.entries += len(numbers)
    report.checked_bytes += int(lengths.sum())
    if bad:
        some = ", ".join(str(n) for n in numbers[bad][:5].tolist())
        report.problems.append(
            f"{len(bad)} entries {where} do not agree with their checksums: slot numbers {some}"
        )


def check_sums(core: Core) -> list[str]:
    """Table against pools, devices, groups, spaces and clusters, all of one moment."""
    numbers = slots_of(core.clusters.open_clusters())
    words = core.table.words[numbers]
    tags = tags_of(words)
    problems = [
        *_check_table(core, words, tags),
        *_check_segments(core, words, tags),
        *_check_extents(core, words, tags),
        *_check_groups(core, words, tags),
        *_check_ledger(core),
    ]
    resident = core.zswap.arena.region.resident_bytes
    if resident != core.zswap.resident_bytes:
        problems.append(
            f"the pool occupies {resident} bytes, accounted are {core.zswap.resident_bytes}"
        )
    return problems


def _check_table(core: Core, words: U64, tags: I64) -> list[str]:
    counts = np.bincount(tags, minlength=TAGS)
    problems = [
        f"{int(counts[tag])} slots are {tag.name}, counted are {core.slot_counts[tag]}"
        for tag in Tag
        if tag is not Tag.FREE and counts[tag] != core.slot_counts[tag]
    ]
    used = (words != 0).reshape(-1, CLUSTER_SLOTS).sum(axis=1)
    if (used != core.clusters.used_counts(core.clusters.open_clusters())).any():
        problems.append("clusters count other numbers of slots than the table has")
    spare = core.table.resident_bytes - core.clusters.in_use * CLUSTER_SLOTS * 8
    if spare and not (spare > 0 and core.table.untrimmed):
        problems.append(
            f"the table occupies {core.table.resident_bytes} bytes for "
            f"{core.clusters.in_use} clusters"
        )
    return problems


def _check_segments(core: Core, words: U64, tags: I64) -> list[str]:
    """Each ZSWAP word names a directory entry of its own slot; the sums per segment agree."""
    zswap = core.zswap
    places = places_of(words[tags == Tag.ZSWAP])
    shape = zswap.arena.segments
    entries = np.bincount(places.number, minlength=shape)
    lengths = np.bincount(places.number, places.length, minlength=shape)
    problems = []
    if (entries != zswap.live_entries).any() or (lengths != zswap.live_bytes).any():
        problems.append("segments count other live entries than the table names")
    found = 0
    for segment in zswap.all_segments().tolist():
        directory = zswap.directory(segment)
        alive, current = core.live_words(Tag.ZSWAP, segment, directory.numbers, directory.offsets)
        found += len(alive)
        if (lengths_of(current) != directory.lengths[alive]).any():
            problems.append(f"segment {segment}: lengths of words and directory differ")
    if found != len(places.number):
        problems.append(
            f"{len(places.number)} words name entries in the pool, directories have {found}"
        )
    if zswap.total_entries != len(places.number) or zswap.total_live_bytes != int(
        places.length.sum()
    ):
        problems.append("the pools' totals are not what the table names")
    of = zswap.pools_of(places.number)
    per_pool = np.bincount(of, minlength=len(zswap.pools))
    bytes_per_pool = np.bincount(of, places.length, minlength=len(zswap.pools))
    problems += [
        f"pool {pool.codec.spec} counts other live entries than the table names"
        for pool in zswap.pools
        if (pool.entries, pool.live_bytes) != (per_pool[pool.index], bytes_per_pool[pool.index])
    ]
    return problems


def _check_extents(core: Core, words: U64, tags: I64) -> list[str]:
    places = places_of(words[tags == Tag.PHYS])
    problems = []
    for device in core.devices:
        path = device.device.path
        base = device.number_of(0)
        numbers = places.number
        mine = (numbers >= base) & (numbers < base + len(device.live_entries))
        extents = numbers[mine] - base
        shape = len(device.live_entries)
        entries = np.bincount(extents, minlength=shape)
        lengths = np.bincount(extents, places.length[mine], minlength=shape)
        if (entries != device.live_entries).any() or (lengths != device.live_bytes).any():
            problems.append(f"{path}: extents count other live entries than the table names")
        overlap = _overlapping(places.pick(mine))
        if overlap:
            problems.append(f"{path}: {overlap} entries lie over each other")
        held = int(((device.live_entries > 0) | (device.pins > 0)).sum())
        if device.map.used != held + len(device.discards) + device.discarding:
            problems.append(f"{path}: extents in use are not those with live entries")
    return problems


def _check_ledger(core: Core) -> list[str]:
    """What other shards are told is what this one holds, and no more."""
    if core.ledger.alone:
        return []
    said = {
        "the pools": (core.ledger.own(Column.POOL), core.zswap.in_use_bytes),
        "spare memory": (core.ledger.own(Column.SPARE), core.zswap.arena.spare_bytes),
    }
    for group in core.groups:
        if group.columns is not None:
            pool, device = map(core.ledger.own, group.columns)
            said[f"group {group.name} in pools"] = pool, group.pool_bytes
            on_devices = group.device_bytes + group.device_pending
            said[f"group {group.name} on devices"] = device, on_devices
    return [
        f"the ledger has {entered} bytes for {what}, held are {held}"
        for what, (entered, held) in said.items()
        if entered != held
    ]


def _overlapping(places: Places) -> int:
    order = np.argsort(places.address)
    begin = places.address[order]
    end = begin + places.length[order] + CHECK_BYTES
    return int((begin[1:] < end[:-1]).sum())


def _check_groups(core: Core, words: U64, tags: I64) -> list[str]:
    """The charges of groups, and the counts of spaces, are what their words add up to."""
    spaces = sorted(core.spaces.values(), key=lambda space: space.id)
    ids = np.array([space.id for space in spaces], np.int64)
    owners = core.clusters.owners_of(core.clusters.open_clusters())
    if not np.isin(owners, ids).all():
        return ["some clusters belong to spaces that do not exist"]
    of_slot = np.repeat(np.searchsorted(ids, owners), CLUSTER_SLOTS)
    lengths = lengths_of(words)

    def per_space(which: npt.NDArray[np.bool_], weights: I64 | None = None) -> I64:
        chosen = None if weights is None else weights[which]
        return np.bincount(of_slot[which], chosen, len(spaces)).astype(np.int64)

    pool = per_space(tags == Tag.ZSWAP, lengths)
    device = per_space(tags == Tag.PHYS, lengths)
    zero = per_space(tags == Tag.ZERO)
    backed = per_space(tags >= BACKED)
    allocated = per_space(tags != Tag.FREE)
    problems = [
        f"space {space.id} counts other slots or pages than the table has for it"
        for i, space in enumerate(spaces)
        if (space.compressed_bytes, space.zero_pages, space.backed_pages, space.slots.slots)
        != (pool[i] + device[i], zero[i], backed[i], allocated[i])
    ]
    of_space = np.array([space.group.index for space in spaces], np.int64)
    problems += [
        f"group {group.name} is charged for other bytes than it holds"
        for group in core.groups
        if (group.pool_bytes, group.device_bytes)
        != (pool[of_space == group.index].sum(), device[of_space == group.index].sum())
    ]
    return problems
