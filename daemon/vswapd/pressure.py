"""How much the pool may take when memory runs short: less than its limit, for as long as it lasts.

The limit that holds is what the pool takes now, and what else is free but for a reserve. So a pool
that has grown gives way to those that need the memory more, to the device if there is one, and
takes no new pages that it would have no memory for. When the memory is free again the limit is
`pool_max` as before.

Invariants:
- Memory is looked at now and then, never per page: the more there is left, the later the next look.
- Between two looks the limit stands: the pool by itself cannot grow into the reserve.
- A look that fails, or sees a part only, never raises the limit: what was free a while ago may have
  become pool since.

This module must not know where memory is measured, or how a pool gives way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

_SOONEST_S: Final = 0.25
_LATEST_S: Final = 10.0
_EATEN_PER_S: Final = 4 << 30
"""What all programs of a machine together may come to take within a second, generously: four cores
clear 1 GiB/s of fresh memory each."""
_CRITICAL_SHARE: Final = 4
"""When less than this part of the reserve is left, nothing that takes memory is begun any more."""


_UNSEEN: Final = "memory was short when it was last seen, and cannot be looked at"


class Free(NamedTuple):
    """What is left where the least is."""

    nbytes: int
    """What may still be taken before anything has to give way."""
    where: str
    """Whose memory that is: "the machine", "control group /x"."""
    complete: bool = True
    """Whether all could be looked at that there was before."""


Meter = Callable[[], Free]
"""Looks at memory; cheap enough for a few times per second."""


class Pressure:
    """The limit that holds for the pool, of all shards together."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.meter: Meter | None = None
        """None: memory is not looked at."""
        self.limit = 0
        """Bytes that all pools together may occupy as things stand; at most pool_max."""
        self.why = ""
        """Why that is less than pool_max; empty: it is not."""
        self.critical = False
        """Whether not even the reserve is left: no new slots, no new windows."""
        self.next_look = 0.0
        """The clock's time at which memory is to be looked at again."""
        self._looked = False
        """Whether `limit` comes from a look."""

    @property
    def watching(self) -> bool:
        """Whether memory is looked at."""
        return self.meter is not None

    def due(self) -> bool:
        """Whether it is time for a look."""
        return self.meter is not None and self._clock() >= self.next_look

    def look(self, pool_max: int, reserve: int, occupied: Callable[[], int]) -> None:
        """Set `limit` and the rest anew.

        Args:
            pool_max: bytes, the limit where there is no pressure.
            reserve: bytes to be left free; 0: memory is not looked at.
            occupied: says what the pools of all shards occupy, spare memory included.

        Raises:
            Exception: whatever the meter raises; the limit is what it was, or `pool_max`.
        """
        if self.meter is None or not reserve:
            self.limit, self.why, self.critical = pool_max, "", False
            self._looked = False
            self.next_look = self._clock() + _LATEST_S
            return
        before = min(self.limit, pool_max) if self._looked else pool_max
        # At once: whatever becomes of this look, the next one comes in time, and not at once.
        self.limit, self.next_look = before, self._clock() + _SOONEST_S
        # First: what others store meanwhile is counted too little then, not twice.
        taken = occupied()
        free = self.meter()
        margin = free.nbytes - reserve
        limit = max(0, min(pool_max, taken + margin))
        critical = free.nbytes < reserve // _CRITICAL_SHARE
        if free.complete:
            self.critical = critical
            self.why = f"memory is short on {free.where}" if limit < pool_max else ""
            self.next_look = self._clock() + min(_LATEST_S, max(_SOONEST_S, margin / _EATEN_PER_S))
        else:
            limit = min(limit, before)
            self.critical = self.critical or critical
            if limit < pool_max:
                self.why = f"memory is short on {free.where}" if limit < before else _UNSEEN
        self.limit, self._looked = limit, True
