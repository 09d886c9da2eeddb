"""Whether the pool takes entries, asked by all that makes it grow: one answer, the same for all.

Stores, pages that come back from devices and pages that are compressed again are all held against
the same limits, of all shards together. What is admitted is entered into the ledger before the
ledger is let go of, as if all of it were there already; the word that is published, or flipped,
then enters what it really takes (`Core.enter`). So whoever is admitted appends in the same step,
and enters what there is where nothing comes of it.

Invariants:
- Of all shards together no pool grows beyond the limit that holds (`pressure`), and no group beyond
  its own, by what is admitted here.
- Once the pool has had to refuse a store, it refuses stores until it is at or below the accept
  threshold (hysteresis, as mm/zswap.c): a full pool does not swing between one page more and one
  page less.

Compaction, and the second chance of pages that were loaded, need no admission: in one step they put
entries elsewhere and give up the place where these have been.

This module must not know who asks, or how room could be made.
"""

from __future__ import annotations

from enum import Enum

from vswapd.core import Core
from vswapd.groups import Group
from vswapd.ledger import Column
from vswapd_backends.zswap import Compressed


class Refusal(Enum):
    """Why the pool does not take entries as things stand."""

    OFF = "off"
    """Pool switched off, or its limit, or the group's, is 0."""
    FULL = "full"
    GROUP = "group"


class Growth(Enum):
    """Why the pool is to grow: it says which limits hold."""

    STORE = "store"
    """New pages: all limits, and the accept threshold."""
    RETURN = "return"
    """Pages that come back from a device: all limits."""
    REWRITE = "rewrite"
    """Entries of pages that the pool has, to be there twice for a while: what the pools occupy.
    Their group is charged for them already, and whether new pages are taken is not the question."""


class Admission:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def admit(
        self, group: Group, need: Compressed, growth: Growth = Growth.STORE
    ) -> Refusal | None:
        """Have the pool take entries, to be appended in this very step; None: it does.

        A refusal changes nothing but that it is noted.
        """
        ledger = self._core.ledger
        if ledger.alone:
            return self.judge(group, need, growth)
        with ledger.hold():
            refusal = self.judge(group, need, growth)
            if refusal is None:
                zswap = self._core.zswap
                ledger.enter(Column.POOL, zswap.in_use_bytes + zswap.growth(need))
                if growth is not Growth.REWRITE:
                    group.enter(need.compressed_bytes)
            return refusal

    def judge(self, group: Group, need: Compressed, growth: Growth) -> Refusal | None:
        """The same as things stand, without entering anything: others may be faster."""
        core, zswap = self._core, self._core.zswap
        if growth is not Growth.REWRITE:
            settings = core.settings
            if not settings.pool_enabled or not settings.pool_max or group.limits.pool_max == 0:
                return Refusal.OFF
            room = group.pool_room()
            if room is not None and need.compressed_bytes > room:
                return Refusal.GROUP
            if growth is Growth.STORE and core.pool_was_full:
                if core.pool_use() > settings.accept_threshold * core.pressure.limit:
                    return Refusal.FULL
                core.pool_was_full = False
        room = core.pool_room()
        left = room - zswap.growth(need)
        if left < 0 or not zswap.has_segments_for(need):
            return Refusal.FULL
        # Spare memory is not in use; with it, too, this shard stays within what others leave. And
        # a segment that was spare comes into use with all its memory, however little is needed.
        zswap.arena.most_bytes = room + zswap.in_use_bytes - core.ledger.others(Column.SPARE)
        zswap.arena.warm_bytes = left
        return None
