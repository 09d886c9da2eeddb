"""The ladder's first rung: room in a pool that does not take a folio as things stand.

Making room means compaction first, where enough lies waste, and then writing back the *oldest*
segments (direct reclaim): new pages do not go to the device while old ones sit in RAM. A group over
its own limit pays with its own pages, never with another's.

Invariants:
- Nobody need go for a folio that would not fit into an empty pool.

This module must not know slots, words or devices, or what makes the pool refuse.
"""

from __future__ import annotations

from vswap.protocol import Reason
from vswapd.admission import Admission, Refusal
from vswapd.compaction import Compaction
from vswapd.core import Core
from vswapd.groups import Group
from vswapd.writeback import Cause, Stop, Writeback
from vswapd_backends.base import PAUSE, WAIT, Operation
from vswapd_backends.zswap import Compressed

_RECLAIM_AT_ONCE = 4
"""Extents that a store in need of room writes back at a time: written in parallel."""


class Room:
    """Makes room in the pool for folios."""

    def __init__(
        self, core: Core, admission: Admission, writeback: Writeback, compaction: Compaction
    ) -> None:
        self._core = core
        self._admission = admission
        self._writeback = writeback
        self._compaction = compaction

    def make(self, group: Group, compressed: Compressed) -> Operation[Refusal | None]:
        """Make room for a folio; returns None when it is admitted, else why it never will be."""
        while True:
            refusal = self._admission.admit(group, compressed)
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
