"""The engine's state, and the one way in which a word changes.

Everything that moves pages (stores, writeback, compaction, swapoff) goes through `publish` or
`flip`, so the accounts of pools, devices, groups and spaces can only change together with the
words that they are sums of.

Publish order: payload, directory, word, counters. Nothing can fail after the word.

This module must not know policy: which pages move, and when.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import numpy.ma  # np.unique would import it at its first call: 17 ms under the lock

from vswapd.budget import WriteBudget
from vswapd.clusters import Clusters
from vswapd.control import Control
from vswapd.groups import Group, Groups, Space
from vswapd.housekeeping import Housekeeping
from vswapd.ledger import IDLE, Column, Ledger
from vswapd.memory import Head, ShardMemory
from vswapd.pressure import Pressure
from vswapd.settings import Settings
from vswapd.stats import Stats
from vswapd.swap_table import (
    CLUSTER_SHIFT,
    LOST_WORD,
    TAGS,
    SwapTable,
    Tag,
    address_of,
    addresses_of,
    all_tagged,
    by_tag,
    length_of,
    make_words,
    places_of,
    reference_bits,
    tag_of,
    tags_of,
    total_length,
    without_reference,
)
from vswapd_backends.base import I64, PAGE_BYTES, U64, Places
from vswapd_backends.swapdev import SwapDevices
from vswapd_backends.zpool import ZPool
from vswapd_backends.zswap import Zswap

_WITH_ENTRIES: Final = frozenset({int(Tag.ZSWAP), int(Tag.PHYS)})


class Core:
    """Table, clusters, pools, devices, groups, counters, and the clocks."""

    def __init__(
        self,
        settings: Settings,
        memory: ShardMemory,
        clock: Callable[[], float],
        wall: Callable[[], float],
        ledger: Ledger,
    ) -> None:
        self.settings = settings
        self.ledger: Final = ledger
        self.clock: Final = clock
        self.memory: Final = memory
        self.control: Final = Control(memory)
        head = self.control.head
        self.table: Final = SwapTable(memory.shape.max_slots, memory.table)
        self.clusters: Final = Clusters(
            self.table,
            memory.shape.shard,
            memory.clusters,
            head[Head.CLUSTERS : Head.CLUSTERS + 1],
        )
        arena = ZPool(memory.pool.size, memory.pool, memory.segments)
        self.zswap: Final = Zswap(arena, settings.codec, memory.specs)
        if settings.dense:
            self.zswap.dense = self.zswap.pool_of(settings.dense)
        self.devices: Final = SwapDevices(memory.extents)
        self.groups: Final = Groups(settings, ledger, memory.groups)
        self.spaces: Final[dict[int, Space]] = {}
        self.stats: Final = Stats()
        self.housekeeping: Final = Housekeeping(self.stats)
        for region in (memory.table, memory.pool, memory.state):
            region.on_refusal = partial(self.housekeeping.failed, "memory cannot be given back")
        self.slot_counts: I64 = np.zeros(TAGS, np.int64)
        """Allocated slots by tag; [FREE] is meaningless."""
        self.pool_was_full = False
        """The pool refused, and has not been at or below the accept threshold since."""
        self.pressure: Final = Pressure(clock)
        self.look()
        self.budget: Final = WriteBudget(head, ledger, clock, wall)

    # Words

    def publish(self, space: Space, numbers: I64, words: U64) -> None:
        """Write the words of a space's distinct slots, and give up what they named before."""
        table = self.table.words
        if len(numbers) == 1:
            self._publish_one(space, numbers.item(), words.item())
            self.enter(space.group)
            return
        # What takes memory, first: it may not be there.
        old = table[numbers]
        gains = [(tag, len(some), _entry_bytes(tag, some)) for tag, some in by_tag(words)]
        losses = [
            (tag, len(some), _entry_bytes(tag, some), _places(tag, some))
            for tag, some in by_tag(old)
        ]
        table[numbers] = words
        for tag, count, length in gains:
            self._account(space, tag, count, length)
        for tag, count, length, places in losses:
            self._account(space, tag, -count, -length)
            if places is None:
                continue
            if tag == Tag.ZSWAP:
                self.zswap.give_up(places)
            else:
                self.devices.give_up(places)
        self.enter(space.group)

    def _publish_one(self, space: Space, number: int, word: int) -> None:
        """The same for one, in numbers of Python's: a third of the time."""
        table = self.table.words
        old = table.item(number)
        table[number] = word
        self._account(space, tag_of(word), 1, length_of(word))
        tag, length = tag_of(old), length_of(old)
        self._account(space, tag, -1, -length)
        if tag == Tag.ZSWAP:
            self.zswap.give_up_one(address_of(old), length)
        elif tag == Tag.PHYS:
            self.devices.give_up(places_of(np.array([old], np.uint64)))

    def _account(self, space: Space, tag: int, count: int, length: int) -> None:
        """Count words of one tag that have come, or gone, and charge for their entries."""
        self.slot_counts[tag] += count
        if tag == Tag.ZERO:
            space.zero_pages += count
            space.backed_pages += count
        elif tag in _WITH_ENTRIES:
            space.backed_pages += count
            self._charge(space, space.group, tag, length)

    def publish_new(self, space: Space, numbers: I64, words: U64, zeros: int, length: int) -> None:
        """The same for slots that are FREE, and words that are ZERO or ZSWAP: nothing is given up.

        Args:
            space: the slots' space.
            numbers: slot numbers, shape (n,).
            words: their words, shape (n,).
            zeros: how many of them are ZERO.
            length: compressed bytes of the others.
        """
        self.table.words[numbers] = words
        others = len(numbers) - zeros
        self.slot_counts[Tag.ZERO] += zeros
        self.slot_counts[Tag.ZSWAP] += others
        space.zero_pages += zeros
        space.backed_pages += zeros + others
        self._charge(space, space.group, Tag.ZSWAP, length)
        self.enter(space.group)

    @staticmethod
    def _charge(space: Space, group: Group, tag: int, length: int) -> None:
        space.compressed_bytes += length
        if tag == Tag.ZSWAP:
            group.pool_bytes += length
        else:
            group.device_bytes += length

    def words_now(self, numbers: I64) -> U64:
        """The words of slots that may have been freed since their numbers were noted; shape (n,).

        A number in a directory, or in the hands of an operation that has waited, may be of a
        cluster that was given back: reading its page of table would bring the page back.
        """
        still = self.clusters.in_open_clusters(numbers)
        if still.all():
            return self.table.words[numbers]
        words = np.zeros(len(numbers), np.uint64)
        words[still] = self.table.words[numbers[still]]
        return words

    def flip(self, numbers: I64, expected: U64, tag: Tag, places: Places, group: Group) -> I64:
        """Name new places where the words still are the expected ones, whole; returns which.

        A slot that was loaded, overwritten or freed since `expected` was read has another word, and
        is left alone. The reference bit of those that flip is kept.

        Entries at the new places must be counted as live by the caller for those that flipped;
        the old places are given up here. Only inside the pool may their lengths be others.
        Slots may belong to several spaces of one group.

        Returns:
            Indices into the batch of the slots that flipped; shape (k,).
        """
        table = self.table.words
        same = np.flatnonzero(self.words_now(numbers) == expected)
        if not len(same):
            return same
        old = expected[same]
        moved = places.pick(same)
        table[numbers[same]] = make_words(tag, moved) | reference_bits(old)
        old_tag = Tag(int(tags_of(old[:1])[0]))
        length = int(moved.length.sum())
        self.slot_counts[old_tag] -= len(same)
        self.slot_counts[tag] += len(same)
        if old_tag is not tag:
            delta = length if tag is Tag.ZSWAP else -length
            group.pool_bytes += delta
            group.device_bytes -= delta
            if tag is Tag.PHYS:
                group.written_back += length
        old_places = places_of(old)
        self._resized(numbers[same], moved.length - old_places.length, group)
        if old_tag is Tag.ZSWAP:
            self.zswap.give_up(old_places)
        else:
            self.devices.give_up(old_places)
        self.enter(group)
        return same

    def lose(self, numbers: I64, expected: U64, group: Group) -> int:
        """Make slots LOST whose words still are the expected ones, of entries on devices.

        Slots may belong to several spaces of one group.

        Returns:
            How many those were.
        """
        same = self.words_now(numbers) == expected
        numbers, old = numbers[same], expected[same]
        if not len(numbers):
            return 0
        assert all_tagged(old, Tag.PHYS)
        self.table.words[numbers] = LOST_WORD
        self.slot_counts[Tag.PHYS] -= len(numbers)
        self.slot_counts[Tag.LOST] += len(numbers)
        places = places_of(old)
        group.device_bytes -= int(places.length.sum())
        owners = self.clusters.owners_of(numbers >> CLUSTER_SHIFT)
        for owner in np.unique(owners).tolist():
            space = self.spaces[owner]
            space.backed_pages -= int((owners == owner).sum())
            space.compressed_bytes -= int(places.length[owners == owner].sum())
        self.devices.give_up(places)
        self.enter(group)
        return len(numbers)

    def _resized(self, numbers: I64, gains: I64, group: Group) -> None:
        """Charge what entries of the pool have grown by: those that were compressed again."""
        if not gains.any():
            return
        group.pool_bytes += int(gains.sum())
        owners = self.clusters.owners_of(numbers >> CLUSTER_SHIFT)
        first = owners.item(0)
        if (owners == first).all():
            self.spaces[first].compressed_bytes += int(gains.sum())
            return
        for owner in np.unique(owners).tolist():
            self.spaces[owner].compressed_bytes += int(gains[owners == owner].sum())

    def live_words(self, tag: Tag, number: int, numbers: I64, offsets: I64) -> tuple[I64, U64]:
        """Which entries of a segment or extent the table names, and by which words.

        Returns:
            Indices into the directory, shape (k,), and the words of those slots, shape (k,).
        """
        words = self.words_now(numbers)
        alive = np.flatnonzero(
            (tags_of(words) == int(tag))
            & (addresses_of(words) == Places.within(number, offsets, offsets).address)
        )
        return alive, words[alive]

    def clear_reference(self, numbers: I64) -> None:
        """Forget that slots were loaded."""
        self.table.words[numbers] = without_reference(self.table.words[numbers])

    # Room and budget

    def pool_use(self) -> int:
        """Bytes that the pools of all shards occupy."""
        return self.zswap.in_use_bytes + self.ledger.others(Column.POOL)

    def crowded(self) -> bool:
        """Whether spare memory, this shard's and that of others, is more than there is room for."""
        spare = self.zswap.arena.spare_bytes + self.ledger.others(Column.SPARE)
        return spare > self.pool_room()

    def pool_room(self) -> int:
        """Bytes that the pool may still grow by; negative when over its limit."""
        return self.pressure.limit - self.pool_use()

    def look_when_due(self) -> None:
        """Look if it is time to. Cheap: called after every request."""
        if self.pressure.due():
            self.look()

    def look(self) -> None:
        """Look at the memory that is left: the limit of the pool follows it."""
        self.housekeeping.do("memory cannot be looked at", self._look)

    def _look(self) -> None:
        arena = self.zswap.arena
        try:
            self.pressure.look(
                self.settings.pool_max,
                self.settings.pool_reserve,
                lambda: self.pool_use() + arena.spare_bytes,
            )
        finally:
            arena.most_bytes = self.pressure.limit
        if self.pressure.why:
            arena.trim()
            self.enter()

    def enter(self, group: Group | None = None) -> None:
        """Tell the other shards what the pools of this one occupy, and what it holds for a group.

        Done wherever a word has changed and wherever a segment may have gone, so that what was
        entered before it was there (see `admission`) is replaced in the same step.
        """
        if self.ledger.alone:
            return
        arena = self.zswap.arena
        self.ledger.enter(Column.POOL, arena.in_use_bytes)
        self.ledger.enter(Column.SPARE, arena.spare_bytes)
        if group is not None:
            group.enter()

    def enter_all(self) -> None:
        """Tell the other shards all that this one holds: those before it may have said more."""
        self.enter()
        self.ledger.enter(Column.SHRINKING, IDLE)
        self.ledger.enter(Column.POOL_BASIS, 0)
        self.ledger.enter(Column.LEAVING, 0)
        for group in self.groups:
            group.enter()
            if group.columns is not None:
                self.ledger.enter(self.ledger.basis_of(group.columns), 0)

    def leaving(self, nbytes: int, of: Group | None) -> None:
        """Tell the other shards what the shrinker is writing back, of one group or of any."""
        columns = None if of is None else of.columns
        self.ledger.enter(Column.LEAVING_OF, Column.POOL if columns is None else columns[0])
        self.ledger.enter(Column.LEAVING, nbytes)

    def unpin(self, segment: int, *, leaving: bool = True) -> None:
        """Undo a pin of a segment (see `Zswap.pin`); if it goes with that, others may know."""
        self.zswap.unpin(segment, leaving=leaving)
        self.enter()

    def budget_left(self) -> int | None:
        """Bytes that may still be written back today; None: any number."""
        most = self.settings.write_budget
        return self.budget.left(most) if most else None

    def spend(self, written: int) -> None:
        """Count bytes that were written to a device against today's budget."""
        self.budget.spend(written, bounded=self.settings.write_budget > 0)

    @property
    def saved_bytes(self) -> int:
        """What the backed pages would take, less what the daemon takes for them."""
        backed = int(
            self.slot_counts[Tag.ZERO] + self.slot_counts[Tag.ZSWAP] + self.slot_counts[Tag.PHYS]
        )
        return backed * PAGE_BYTES - self.zswap.resident_bytes - self.table.resident_bytes


def _entry_bytes(tag: int, words: U64) -> int:
    """Compressed bytes of words of one tag."""
    return total_length(words) if tag in _WITH_ENTRIES else 0


def _places(tag: int, words: U64) -> Places | None:
    """Where the entries of words of one tag lie; None: they have none."""
    return places_of(words) if tag in _WITH_ENTRIES else None
