"""The write budget: what devices may still be given today, whoever sets the clock.

Days are those of UTC, by the wall clock, and only rise. A new one begins when the clock names a
later day than any before, or when the last one has lasted for 24 hours, by a clock that nobody
sets; it is the day that the clock names then, or, if that is no later, the one after the last. So

- a clock that is set back gives no second budget for a day, and one that is set forwards and back
  again gives the later day's once, early;
- after a leap of years forwards that is corrected there is a budget every 24 hours.

Where several shards share the budget they share its day: each goes on to the latest that any has.

Invariants:
- The day, when it began, and what was written on it outlive the process. A kill in between two of
  their stores gives no day's budget twice.

This module must not know who writes, and what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vswapd.ledger import Column, Ledger
from vswapd.memory import Head
from vswapd_backends.base import I64

_DAY_S: Final = 86400.0


class WriteBudget:
    """See the module."""

    def __init__(
        self,
        head: I64,
        ledger: Ledger,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        """The budget as an earlier process has left it, or a new one.

        Args:
            head: the words in which it is kept; see `Head`.
            ledger: what it is shared through.
            clock: seconds, without leaps.
            wall: seconds since 1970, UTC, as the machine's clock has them now.
        """
        self._head = head
        self._ledger = ledger
        self._clock = clock
        self._wall = wall
        self._day = head.item(Head.BUDGET_DAY) - 1
        self._begun = min(clock(), head.item(Head.BUDGET_BEGUN) / 1000)
        self._used = head.item(Head.BUDGET_USED)
        self.pending = 0
        """Bytes of writes that are under way, and not spent yet."""

    def left(self, budget: int) -> int:
        """Bytes of today's budget of so many that may still be written."""
        self._look()
        others = self._ledger.budget_of_others(self._day)
        return max(0, budget - self._used - self.pending - others)

    def spend(self, written: int, *, bounded: bool) -> None:
        """Count bytes that were written to a device.

        Args:
            written: how many.
            bounded: whether there is a budget; without one nothing of it is kept.
        """
        if bounded:
            self._look()
        self._used += written
        if bounded:
            self._head[Head.BUDGET_USED] = self._used
        self.enter()

    def enter(self) -> None:
        """Tell the other shards what this one has written today, and is writing.

        They look before they begin to write: what several begin in the same moment may pass the
        budget by one operation each.
        """
        self._ledger.enter(Column.BUDGET_DAY, self._day)
        self._ledger.enter(Column.BUDGET, self._used + self.pending)

    def renews_at(self) -> float:
        """The clock's time at which the next day begins, if nobody sets the wall clock."""
        wall, after_a_day = self._wall(), self._begun + _DAY_S
        if wall // _DAY_S < self._day:
            return after_a_day
        return min(after_a_day, self._clock() + _DAY_S - wall % _DAY_S)

    def _look(self) -> None:
        """Begin a new day if it is time to."""
        now = self._clock()
        latest = max(int(self._wall() // _DAY_S), self._ledger.latest_budget_day())
        if latest > self._day:
            self._begin(latest, now)
        elif now - self._begun >= _DAY_S:
            self._begin(self._day + 1, now)

    def _begin(self, day: int, now: float) -> None:
        head = self._head
        # Whoever is killed before the day is named leaves one that is over: it is begun again.
        # Before its beginning is: the day after may begin early, and is not given again then.
        head[Head.BUDGET_USED] = 0
        head[Head.BUDGET_DAY] = day + 1
        head[Head.BUDGET_BEGUN] = int(now * 1000)
        self._day, self._begun, self._used = day, now, 0
