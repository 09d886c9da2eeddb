"""What one shard gives up where all of them together hold more than they are to.

Each keeps its part of the floor, and gives the rest: as much of the floor is its own as it holds of
the sum, what has been given already counted as if it were there (its *basis*). That stands in the
ledger as long as the shard is at it, so that one which begins late finds the same parts. If every
shard took its part of what is left instead, each time anew, those that are fast would go on and on
while a slow one has not begun. And what comes in meanwhile is everybody's to make room for: whoever
stores gets a larger part, so its new pages do not go while old ones of others stay.

So a shard that has given its share leaves the rest to the others. If they do not get on with it for
a while, it begins anew with what is left. What is held by shards that say that nothing of theirs
can go is not waited for: the others give it, too.

Invariants:
- All give up the excess, and each about a segment more at most: nobody goes on below the floor of
  the sum, and nobody below its own part of it while the others give theirs.
- Where others cannot give theirs, or do not, what is there to give goes all the same, in the end.
- While there is nothing to do the next look is still to come: `next_look`.

This module must not know what it is that is held, or how it is given up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from vswapd.ledger import Elsewhere, Ledger

PATIENCE_S: Final = 1.0
"""How long shards may take to give up something before the others take part of their share: many
times what a write of a few extents takes, even on a busy disk."""
_NOBODY: Final = Elsewhere(0, 0, 0, 0)


class Share:
    """One shard's share of one thing that is limited in sum."""

    def __init__(
        self, clock: Callable[[], float], ledger: Ledger, columns: tuple[int, int] | None
    ) -> None:
        """Nothing is to be given up yet.

        Args:
            clock: seconds.
            ledger: where the others say what they hold.
            columns: of what is held, and of the basis; None: it is not shared.
        """
        self._clock = clock
        self._ledger = ledger
        self._columns = columns
        self._mark: int | None = None
        """What this shard had given before it began; None: the sum was not above the floor."""
        self._others = 0
        """The least that the others have held since."""
        self._since = 0.0
        """When that was seen first."""
        self._target = 0.0
        """What this shard may keep if it leaves the rest to the others."""
        self.next_look: float | None = None
        """The clock's time at which the others have had time enough; None: they are not waited
        for."""

    def due(self, own: int, given: int, floor: int) -> int:
        """Bytes to give up now; 0: none, or it is for the others to go on.

        Args:
            own: what this shard holds.
            given: what it has given in all its life.
            floor: what all together are to hold at most.
        """
        others = self._elsewhere()
        excess = own + others.held - floor
        if excess <= 0:
            self.forget()
            return 0
        now = self._clock()
        mark = self._mark
        if mark is not None and others.held < self._others:
            self._others, self._since = others.held, now
        late = mark is not None and now - self._since >= PATIENCE_S
        if mark is None or (late and own <= self._target):
            mark = self._mark = given
            self._others, self._since = others.held, now
        basis = own + given - mark
        self._enter(basis)
        part = basis / (basis + others.basis) if basis else 0.0
        self._target = part * max(0, floor - others.stuck)
        # What is on its way out need not go twice; but a disk that hangs is not waited for.
        left = excess if late else excess - others.leaving
        due = max(0, min(left, math.ceil(own - self._target)))
        waits = not due and own and others.held > others.stuck
        if waits and late:
            # It has just found that it may keep more (the floor was raised): they have time anew.
            self._since = now
        self.next_look = self._since + PATIENCE_S if waits else None
        return due

    def forget(self) -> None:
        """Nothing is to be given up now; what comes next begins anew."""
        if self._mark is not None:
            self._enter(0)
        self._mark = self.next_look = None

    def has_given(self, own: int) -> bool:
        """Whether this shard, if it holds so much, waits for the others to give theirs."""
        return self.next_look is not None and own <= self._target

    def _elsewhere(self) -> Elsewhere:
        return _NOBODY if self._columns is None else self._ledger.elsewhere(*self._columns)

    def _enter(self, basis: int) -> None:
        if self._columns is not None:
            self._ledger.enter(self._columns[1], basis)
