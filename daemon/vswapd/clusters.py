"""Who owns which slots: clusters of 512, their generations, and the slot ids made of them.

    slot id (u64):  shard:8 | cluster generation:16 | slot number:40     (most significant first)

A cluster belongs to one space from its first slot to its last. When its last slot is freed its
generation is used up and its page of table goes back, so ids of the old generation are wrong for
ever; a cluster whose generations are all used up is retired instead of starting again.

What outlives the process is one word per cluster: its last generation, and its owner while it has
one. It is written before the first word of table that needs it, and without its owner after the
last one has become FREE. The rest is for speed, and is made again from that and the table.

    kept word (u64):  generation:16 (counted from 1; 0: never handed out) | 0:8 | owner:40

Invariants:
- key[c] is 0 exactly when no slot of c is allocated; used[c] counts the allocated ones.
- A number below `limit` has a cluster that was handed out at some time.

This module must not know what stands behind a slot: it asks the table only which words are FREE.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from vswapd.errors import BadSlotError, DuplicateSlotError, NoSlotsError
from vswapd.swap_table import CLUSTER_SHIFT, CLUSTER_SLOTS, SwapTable
from vswapd_backends.base import I64, U64

_NUMBER_BITS: Final = 40
_NUMBER_MASK: Final = (1 << _NUMBER_BITS) - 1
_PREFIX_MASK: Final = ~_NUMBER_MASK
_OWNER_MASK: Final = _NUMBER_MASK
"""As many bits as a key has for it. With 32 a flood of connections comes to the end in days."""
_GENERATIONS: Final = (1 << 16) - 1
"""How often a cluster is handed out: generations 1 to 65535."""
_KEPT_SHIFT: Final = 48
_HINT: Final = "only slots that this space was given, and has not freed, can be used"


@dataclass(slots=True)
class SlotSet:
    """The clusters of one space."""

    owner: int
    """The space's number; not 0."""
    partial: dict[int, None] = field(default_factory=dict)
    """Clusters with a FREE slot, in the order in which they became so (a dict: an ordered set)."""
    clusters: set[int] = field(default_factory=set)
    slots: int = 0
    fresh: int = -1
    """The cluster that was opened last, as long as none of its slots was freed: its FREE slots are
    the last ones, and need not be looked for."""


class Clusters:
    """Hands out slots, takes them back, and tells ids from impostors. All in batches."""

    def __init__(
        self,
        table: SwapTable,
        shard: int = 0,
        kept: U64 | None = None,
        kept_limit: I64 | None = None,
    ) -> None:
        """For a table in which nothing is allocated, as far as is known (see `restore`).

        Args:
            table: the words.
            shard: what all ids begin with.
            kept: what outlives the process, a word per cluster; None: memory of its own.
            kept_limit: the same for `limit`, one word.
        """
        self._table = table
        total = table.max_slots >> CLUSTER_SHIFT
        self.total: Final = total
        self._kept: U64 = np.zeros(total, np.uint64) if kept is None else kept
        self._kept_limit = np.zeros(1, np.int64) if kept_limit is None else kept_limit
        self._used = np.zeros(total, np.uint16)
        # Per cluster: what its ids begin with (shard, and generation counted from 1), and below it
        # its owner; one comparison checks all three. 0, as of an untouched entry, fits nobody.
        self._key: I64 = np.zeros(total + 1, np.int64)
        self._shard = shard
        self._limit = self._kept_limit.item(0)
        self._free: list[int] = []
        self.retired = 0
        self.in_use = 0

    def ids_of(self, numbers: I64) -> U64:
        """The ids of slots as `allocate` returned them; shape (n,)."""
        cluster = numbers.item(0) >> CLUSTER_SHIFT
        ids: I64
        if cluster == numbers.item(-1) >> CLUSTER_SHIFT:
            ids = numbers | (self._key.item(cluster) & _PREFIX_MASK)
        else:
            ids = numbers | (self._key[numbers >> CLUSTER_SHIFT] & _PREFIX_MASK)
        return ids.view(np.uint64)

    def resolve(self, owner: int, ids: U64) -> I64:
        """Slot numbers for ids of one space; whether the slots are FREE is not looked at.

        Raises:
            BadSlotError: ids of another space, a freed cluster, or none at all.
        """
        if len(ids) == 1:
            return np.array([self.resolve_one(owner, ids)])
        signed = ids.view(np.int64)
        numbers = signed & _NUMBER_MASK
        # What lies beyond the table finds the last key, which fits nobody.
        keys = self._key.take(numbers >> CLUSTER_SHIFT, mode="clip")
        good = keys == ((signed & _PREFIX_MASK) | owner)
        if not good.all():
            raise bad_slots(ids[~good])
        return numbers

    def resolve_one(self, owner: int, ids: U64) -> int:
        """The same for one, in numbers of Python's."""
        signed = ids.view(np.int64).item()
        number: int = signed & _NUMBER_MASK
        cluster = min(number >> CLUSTER_SHIFT, self.total)
        if self._key.item(cluster) != ((signed & _PREFIX_MASK) | owner):
            raise bad_slots(ids)
        return number

    def allocate(self, slots: SlotSet, count: int) -> I64:
        """`count` FREE slots for a space, ascending where it can be; their words are still FREE.

        The caller writes a word that is not FREE for each before the next call.

        Raises:
            NoSlotsError: fewer than `count` are left; nothing is allocated.
        """
        self.ensure(slots, count)
        parts: list[I64] = []
        missing = count
        words = self._table.words
        while missing and slots.partial:
            # The one that became partial last: popping from the end of a dict is what is cheap.
            cluster = next(reversed(slots.partial))
            first = cluster << CLUSTER_SHIFT
            end = first + CLUSTER_SLOTS
            if cluster == slots.fresh:
                begin = first + self._used.item(cluster)
                free = np.arange(begin, min(begin + missing, end))
            else:
                free = (words[first:end] == 0).nonzero()[0][:missing]
                free += first
            missing -= self._claim(slots, cluster, free, parts)
        while missing:
            cluster = self._open(slots)
            first = cluster << CLUSTER_SHIFT
            missing -= self._claim(
                slots, cluster, np.arange(first, first + min(missing, CLUSTER_SLOTS)), parts
            )
            slots.fresh = cluster
        slots.slots += count
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.int64)])

    def ensure(self, slots: SlotSet, count: int) -> None:
        """Check that `count` slots could be allocated.

        Raises:
            NoSlotsError: they could not.
        """
        spare = (self.total - self._limit + len(self._free)) * CLUSTER_SLOTS
        if count <= spare:
            return
        partial = np.fromiter(slots.partial, np.int64, len(slots.partial))
        spare += int((CLUSTER_SLOTS - self._used[partial].astype(np.int64)).sum())
        if count > spare:
            raise NoSlotsError(
                f"the swap table has room for {spare} more slots here, {count} are wanted: "
                "free some, or raise table.max_slots"
            )

    def release(self, slots: SlotSet, numbers: I64) -> None:
        """Take back slots whose words have just been made FREE; distinct, shape (n,), n > 0."""
        of = numbers >> CLUSTER_SHIFT
        if len(of) == 1 or (of == of[0]).all():
            self._release_from(slots, of.item(0), len(of))
            return
        clusters, counts = np.unique(of, return_counts=True)
        if slots.fresh in clusters:
            slots.fresh = -1
        before = self._used[clusters]
        after = before - counts.astype(np.uint16)
        self._used[clusters] = after
        slots.slots -= len(numbers)
        empty = clusters[after == 0]
        for cluster in clusters[(before == CLUSTER_SLOTS) & (after > 0)].tolist():
            slots.partial[cluster] = None
        if len(empty):
            self._retire_or_reuse(slots, empty)

    def _release_from(self, slots: SlotSet, cluster: int, count: int) -> None:
        """The same for slots of one cluster, as mostly: a tenth of the time."""
        if slots.fresh == cluster:
            slots.fresh = -1
        before = self._used.item(cluster)
        self._used[cluster] = before - count
        slots.slots -= count
        if before == count:
            self._retire_or_reuse(slots, np.array([cluster]))
        elif before == CLUSTER_SLOTS:
            slots.partial[cluster] = None

    def _claim(self, slots: SlotSet, cluster: int, numbers: I64, parts: list[I64]) -> int:
        parts.append(numbers)
        used = self._used.item(cluster) + len(numbers)
        self._used[cluster] = used
        if used == CLUSTER_SLOTS:
            slots.partial.pop(cluster, None)
        return len(numbers)

    def _open(self, slots: SlotSet) -> int:
        if self._free:
            cluster = self._free.pop()
        else:
            cluster = self._limit
            self._limit += 1
            self._kept_limit[0] = self._limit
        generation = (self._kept.item(cluster) >> _KEPT_SHIFT) + 1
        self._kept[cluster] = generation << _KEPT_SHIFT | slots.owner
        self._key[cluster] = self._prefix(generation) | slots.owner
        slots.partial[cluster] = None
        slots.clusters.add(cluster)
        self.in_use += 1
        return cluster

    def _retire_or_reuse(self, slots: SlotSet, clusters: I64) -> None:
        self._key[clusters] = 0
        for cluster in clusters.tolist():
            slots.partial.pop(cluster, None)
            slots.clusters.discard(cluster)
            generation = self._kept.item(cluster) >> _KEPT_SHIFT
            self._kept[cluster] = generation << _KEPT_SHIFT
            if generation == _GENERATIONS:
                self.retired += 1
            else:
                self._free.append(cluster)
        self.in_use -= len(clusters)
        self._table.give_back(clusters)

    def _prefix(self, generation: int) -> int:
        """What ids of a generation begin with, as a signed number."""
        prefix = ((self._shard << 16) | generation) << _NUMBER_BITS
        return prefix - (1 << 64) if prefix >> 63 else prefix

    # What another process has left

    def kept_clusters(self) -> tuple[I64, I64]:
        """Clusters that have an owner, ascending, and their owners; shapes (k,)."""
        owners = (self._kept[: self._limit] & np.uint64(_OWNER_MASK)).view(np.int64)
        clusters = np.flatnonzero(owners)
        return clusters, owners[clusters]

    def kept_numbers(self, owner: int, ids: U64) -> I64:
        """Slot numbers for those ids whose clusters are the owner's in that generation.

        For ids that once were right, before `restore`.
        """
        signed = ids.view(np.int64)
        numbers = signed & _NUMBER_MASK
        generations = (signed >> _NUMBER_BITS) & _GENERATIONS
        kept = self._kept[numbers >> CLUSTER_SHIFT].view(np.int64)
        found: I64 = numbers[kept == (generations << _KEPT_SHIFT | owner)]
        return found

    def disown(self, clusters: I64) -> None:
        """Forget what stood in clusters, and whose they were. For `restore`, and before it."""
        # The words first: a cluster that nobody owns is handed out as it is.
        self._table.wipe(clusters)
        self._kept[clusters] &= ~np.uint64(_OWNER_MASK)

    def restore(self, sets: dict[int, SlotSet], clusters: I64, used: I64) -> None:
        """Take up what another process has left. Nothing is known yet.

        Args:
            sets: the spaces' empty sets, by their numbers.
            clusters: those of `kept_clusters` that are left, ascending; each one's owner is there.
            used: how many of the slots of each the table has allocated, at least one; shape (k,).
        """
        generations = (self._kept[: self._limit] >> np.uint64(_KEPT_SHIFT)).view(np.int64)
        owners = self._kept[clusters].view(np.int64) & _OWNER_MASK
        prefixes = (generations[clusters] | self._shard << 16) << _NUMBER_BITS
        self._key[clusters] = prefixes | owners
        self._used[clusters] = used
        self.in_use = len(clusters)
        closed = np.ones(self._limit, np.bool_)
        closed[clusters] = False
        self.retired = int((generations[closed] == _GENERATIONS).sum())
        # Popped from the end: the lowest first.
        self._free = np.flatnonzero(closed & (generations < _GENERATIONS))[::-1].tolist()
        order = np.argsort(owners, kind="stable")
        starts = np.flatnonzero(np.diff(owners[order], prepend=0))
        for mine in np.split(order, starts[1:]) if len(order) else []:
            slots = sets[int(owners[mine[0]])]
            slots.clusters = set(clusters[mine].tolist())
            slots.partial = dict.fromkeys(clusters[mine[used[mine] < CLUSTER_SLOTS]].tolist())
            slots.slots = int(used[mine].sum())

    def owners_of(self, clusters: I64) -> I64:
        """The numbers of the spaces that clusters belong to; 0 where nothing is allocated."""
        owners: I64 = self._key[clusters] & _OWNER_MASK
        return owners

    def in_open_clusters(self, numbers: I64) -> npt.NDArray[np.bool_]:
        """Which slot numbers lie in clusters with allocated slots; see `open_clusters`."""
        found: npt.NDArray[np.bool_] = self._key[numbers >> CLUSTER_SHIFT] != 0
        return found

    @property
    def limit(self) -> int:
        """No cluster at or above this number was ever handed out."""
        return self._limit

    def open_clusters(self) -> I64:
        """Clusters with allocated slots, ascending.

        Only their words may be looked at: reading a page of table that was given back brings it
        back.
        """
        return np.flatnonzero(self._key[: self._limit])

    def used_counts(self, clusters: I64) -> I64:
        """Allocated slots of each of these clusters."""
        return self._used[clusters].astype(np.int64)


def slots_of(clusters: I64) -> I64:
    """The slot numbers of clusters, in order; shape (k * 512,)."""
    return ((clusters << CLUSTER_SHIFT)[:, None] + np.arange(CLUSTER_SLOTS)).ravel()


def bad_slots(ids: U64) -> BadSlotError:
    """The error for ids that are not the caller's, naming the first of them."""
    return BadSlotError(f"{len(ids)} bad slot(s), first {int(ids[0]):#x}: {_HINT}", ids)


def refuse_duplicates(ids: U64) -> None:
    """Raise if a slot stands twice in one folio.

    Raises:
        DuplicateSlotError: with each slot that does.
    """
    if len(ids) < 2:  # noqa: PLR2004 - one slot has no double
        return
    ordered = np.sort(ids)
    same = ordered[1:] == ordered[:-1]
    if same.any():
        twice = np.unique(ordered[1:][same])
        raise DuplicateSlotError(
            f"slot {int(twice[0]):#x} stands twice in one request: each slot once", twice
        )
