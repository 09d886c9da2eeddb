"""The ladder's first rung: does the pool take a folio, and if not, can room be made for it.

Making room means compaction first, where enough lies waste, and then writing back the *oldest*
segments (direct reclaim): new pages do not go to the device while old ones sit in RAM. A group over
its own limit pays with its own pages, never with another's.

Invariants:
- The pool never grows beyond the limit that holds (`pressure`) by what is admitted here.
- Once the pool has had to refuse, it refuses until it is at or below the accept threshold
  (hysteresis, as mm/zswap.c): a full pool does not swing between one page more and one page less.

This module must not know slots, words or devices.
"""

from __future__ import annotations

from enum import Enum

from vswap.protocol import Reason
from vswapd.compaction import Compaction
from vswapd.core import Core
from vswapd.groups import Group
from vswapd.ledger import Column
from vswapd.writeback import Cause, Stop, Writeback
from vswapd_backends.base import PAUSE, WAIT, Operation
from vswapd_backends.zswap import Compressed

_RECLAIM_AT_ONCE = 4
"""Extents that a store in need of room writes back at a time: written in parallel."""


class Refusal(Enum):
    """Why the pool does not take a folio as things stand."""

    OFF = "off"
    """Pool switched off, or its limit, or the group's, is 0."""
    FULL = "full"
    GROUP = "group"


class Room:
    """Admits folios to the pool."""

    def __init__(self, core: Core, writeback: Writeback, compaction: Compaction) -> None:
        self._core = core
        self._writeback = writeback
        self._compaction = compaction

    def refusal(self, group: Group, compressed: Compressed) -> Refusal | None:
        """What the pool says to a folio now; None: it takes it. Changes nothing but `full`."""
        settings = self._core.settings
        if not settings.pool_enabled or not settings.pool_max or group.limits.pool_max == 0:
            return Refusal.OFF
        ledger = self._core.ledger
        if ledger.alone:
            return self._judge(group, compressed)
        with ledger.hold():
            refusal = self._judge(group, compressed)
            if refusal is None:
                # Entered before it is appended: shards cannot pass the limit together.
                use = self._core.zswap.in_use_bytes + self._core.zswap.growth(compressed)
                ledger.enter(Column.POOL, use)
                group.enter(compressed.compressed_bytes)
            return refusal

    def _judge(self, group: Group, compressed: Compressed) -> Refusal | None:
        """Compare what a folio needs with what all limits leave."""
        core, settings, zswap = self._core, self._core.settings, self._core.zswap
        room = group.pool_room()
        if room is not None and compressed.compressed_bytes > room:
            return Refusal.GROUP
        if core.pool_was_full:
            if core.pool_use() > settings.accept_threshold * core.pressure.limit:
                return Refusal.FULL
            core.pool_was_full = False
        if zswap.growth(compressed) > core.pool_room():
            return Refusal.FULL
        return None if zswap.has_segments_for(compressed) else Refusal.FULL

    def make(self, group: Group, compressed: Compressed) -> Operation[Refusal | None]:
        """Make room for a folio; returns None when the pool takes it, else why it never will."""
        while True:
            refusal = self.refusal(group, compressed)
            if refusal is None or refusal is Refusal.OFF:
                return refusal
            if self._hopeless(group, compressed):
                return refusal
            only = group if refusal is Refusal.GROUP else None
            if not (yield from self._reclaim(only)):
                if refusal is Refusal.FULL:
                    self._core.pool_was_full = True
                return refusal

    def _hopeless(self, group: Group, compressed: Compressed) -> bool:
        """Whether the folio would not even fit into an empty pool: nobody need go for it."""
        limit = group.limits.pool_max
        return self._core.zswap.growth(compressed) > self._core.pressure.limit or (
            limit is not None and compressed.compressed_bytes > limit
        )

    def _reclaim(self, only: Group | None) -> Operation[bool]:
        """One step towards more room; False if there is none to make."""
        if only is None and self._compaction.step() is not None:
            # A pool that has to get below its threshold takes many: others have the lock between.
            yield PAUSE
            return True
        written = yield from self._writeback.write_some(Cause.RECLAIM, only, _RECLAIM_AT_ONCE)
        if written.stopped is None:
            return True
        if self._core.zswap.any_leaving(None if only is None else only.index):
            # Others are writing back what we might have: what they free may do.
            yield WAIT
            return True
        return False


def reason_for(refusal: Refusal, stop: Stop) -> Reason:
    """The one reason a folio is rejected for: what an operator would have to change.

    The pool's refusal comes first; the device's takes its place where it says more.
    """
    match stop:
        case Stop.NO_DEVICE:
            return {
                Refusal.OFF: Reason.NO_DEVICE,
                Refusal.FULL: Reason.POOL_FULL,
                Refusal.GROUP: Reason.GROUP_LIMIT,
            }[refusal]
        case Stop.WRITEBACK_DISABLED:
            return Reason.WRITEBACK_DISABLED
        case Stop.WRITE_BUDGET:
            return Reason.WRITE_BUDGET
        case Stop.GROUP_LIMIT:
            return Reason.GROUP_LIMIT
        case _:
            return Reason.DEVICE_FULL
