"""What all shards together hold of what is limited: each writes its own sums, all read the others'.

One row per shard in shared memory, one column per thing that has a limit: bytes of pool, bytes that
were written back today, and for each group its bytes in pools and on devices. Limits hold in sum:
who wants to grow looks at the sum and enters the growth under the ledger's lock, before it grows
(see `admission`); what it then really took, and what it gave back, is entered without.

Where the sum is above what is wanted, each shard makes its share go (see `share`). So that those
that can do not wait for those that cannot, each also says what its shrinker can do.

With one shard there is nobody else: every sum is 0, and the lock is none.

Invariants:
- A shard's entries are never below what it holds, but for what it has just given back or is moving.
- A process that is killed holds the ledger no more; what it had entered stays.

This module must not know what the limits are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from enum import IntEnum
from hashlib import blake2b
from typing import Final, NamedTuple

import numpy as np

from vswapd_backends.base import I64
from vswapd_backends.label import LIFE_BYTES, Label, adopt_region, find_label, make_region
from vswapd_backends.shared import SharedRegion

LAYOUT_VERSION: Final = 1
MOST_GROUPS: Final = 4096
"""Groups whose sums are shared. Of any more each shard knows its own part only."""
_HEAD: Final = 2
"""Rows before those of the shards: the groups' names, and how many there are."""


class Column(IntEnum):
    """What is limited for all groups together."""

    POOL = 0
    """Bytes that pools occupy."""
    BUDGET_DAY = 1
    """The day that BUDGET is of."""
    BUDGET = 2
    """Bytes that were written back on that day, and that are being."""
    LEAVING = 16 * 1024 - 5
    """Bytes that its shrinker is writing back at the moment, and that are still held."""
    LEAVING_OF = 16 * 1024 - 4
    """The column of what these are of: a group's in pools, or POOL if they are of any."""
    SPARE = 16 * 1024 - 3
    """Bytes of pool memory that are not in use, and not given back to the system yet."""
    POOL_BASIS = 16 * 1024 - 2
    """Bytes of POOL while the shard makes its share of them go, those counted that have gone since
    it began; 0: it does not."""
    SHRINKING = 16 * 1024 - 1
    """What its shrinker does: IDLE, STUCK, or, if it has seen the high watermark of all pools
    passed, 1 and the bytes that it wants to be left. These five are the last columns of a row:
    no earlier daemon has used them, so that a ledger which one of them has left says IDLE."""


IDLE: Final = 0
STUCK: Final = -1
"""Nothing that the shard holds can go as things stand: others need not wait for it."""


_FIRST_GROUP: Final = 3
_COLUMNS: Final = 16 * 1024
"""Whole pages per row, so that a region's size tells how many rows there are."""
_FIRST_BASIS: Final = _FIRST_GROUP + 2 * MOST_GROUPS
"""A group's third column: as POOL_BASIS, of its bytes in pools."""
assert _FIRST_BASIS + MOST_GROUPS <= Column.LEAVING < Column.SHRINKING < _COLUMNS


class Elsewhere(NamedTuple):
    """What the other shards hold of something of which all hold too much."""

    held: int
    stuck: int
    """What of that is of shards that cannot make anything go."""
    basis: int
    """What those hold that can, and have given since they began to make their share go."""
    leaving: int
    """What of all that is being written back."""


class Ledger:
    """One shard's way to the sums."""

    def __init__(self, region: SharedRegion | None = None, shard: int = 0) -> None:
        """For one shard alone, or for one of those that share a region (see `shared_region`)."""
        self._region = region
        self._rows: I64 | None = None
        if region is not None:
            rows = region.size // (_COLUMNS * 8)
            words = region.words_array()[: rows * _COLUMNS]
            self._rows = words.view(np.int64).reshape(rows, _COLUMNS)
        self.shard: Final = shard
        self.shards: Final = 1 if self._rows is None else len(self._rows) - _HEAD
        # Single words, read and written by way of views of Python's: a few of them cost a third of
        # what numpy takes for a column, and all of this is done for every store.
        views = [] if self._rows is None else [memoryview(row) for row in self._rows[_HEAD:]]
        self._mine: Final = views[shard] if views else None
        self._others: Final = views[:shard] + views[shard + 1 :]

    @property
    def alone(self) -> bool:
        """Whether there are no other shards."""
        return self._rows is None

    def others(self, column: int) -> int:
        """What the other shards hold of it together."""
        held = 0
        for row in self._others:
            held += row[column]
        return held

    def own(self, column: int) -> int:
        """What this shard has entered; 0 if it is alone."""
        return 0 if self._mine is None else self._mine[column]

    def elsewhere(self, held: int, basis: int) -> Elsewhere:
        """What the others hold of it.

        Args:
            held: its column.
            basis: its column of what is held, and was given lately.
        """
        total = stuck = began = leaving = 0
        for row in self._others:
            mine = row[held]
            total += mine
            if row[Column.SHRINKING] == STUCK:
                stuck += mine
            else:
                began += row[basis] or mine
            if held in {Column.POOL, row[Column.LEAVING_OF]}:
                leaving += row[Column.LEAVING]
        return Elsewhere(total, stuck, began, leaving)

    def working(self, floor: int) -> bool:
        """Whether another shard has seen the high watermark passed, and is not done with it.

        Args:
            floor: bytes that this shard wants to be left. Who wants less to be left has been told
                of another limit: what it does is no reason to begin.
        """
        return any(row[Column.SHRINKING] > floor for row in self._others)

    def enter(self, column: int, value: int) -> None:
        """Say what this shard holds of it."""
        if self._mine is not None:
            self._mine[column] = value

    def budget_of_others(self, day: int) -> int:
        """What the other shards have written back on a day."""
        if self._rows is None:
            return 0
        days, used = self._rows[_HEAD:, Column.BUDGET_DAY], self._rows[_HEAD:, Column.BUDGET]
        same = days == day
        same[self.shard] = False
        return int(used[same].sum())

    def latest_budget_day(self) -> int:
        """The latest day on which another shard has written back; 0: there is none."""
        if self._rows is None:
            return 0
        days = self._rows[_HEAD:, Column.BUDGET_DAY].copy()
        days[self.shard] = 0
        return int(days.max())

    def columns_of(self, group: str) -> tuple[int, int] | None:
        """A group's columns: bytes in pools, bytes on devices. None: it is not shared."""
        if self._rows is None:
            return None
        key = int.from_bytes(blake2b(group.encode(), digest_size=8).digest(), "little", signed=True)
        with self.hold():
            names, count = self._rows[0], self._rows.item(1, 0)
            found = np.flatnonzero(names[:count] == key)
            if len(found):
                index = int(found[0])
            elif count < MOST_GROUPS:
                index = count
                names[index] = key
                self._rows[1, 0] = count + 1
            else:
                return None
        return _FIRST_GROUP + 2 * index, _FIRST_GROUP + 2 * index + 1

    @staticmethod
    def basis_of(columns: tuple[int, int]) -> int:
        """A group's column that is to its bytes in pools what POOL_BASIS is to POOL."""
        return _FIRST_BASIS + (columns[0] - _FIRST_GROUP) // 2

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Nobody else holds the ledger meanwhile. Short, and never while waiting for anything."""
        if self._region is None:
            yield
            return
        with self._region.hold():
            yield


def shared_region(shards: int) -> SharedRegion:
    """The memory of a ledger for so many shards, made before they are."""
    size = (_HEAD + shards) * _COLUMNS * 8
    life = os.urandom(LIFE_BYTES)
    return make_region(Label(kind="ledger", version=LAYOUT_VERSION, life=life, size=size))


def adopt_shared_region(fd: int) -> SharedRegion:
    """The memory of a ledger whose makers are no more; the descriptor is owned from now on.

    Raises:
        ForeignMemoryError: it is none, or of another layout version; it was left alone, and the
            descriptor is still the caller's.
    """
    return adopt_region(find_label("ledger", LAYOUT_VERSION, fd), fd)
