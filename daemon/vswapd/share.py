"""What one shard gives up where all of them together hold more than they are to.

Each gives the part of the excess that it holds of the sum. It notes that part once, as a weight:
how much of the floor is its own. If every shard instead took its part of what is left, each time
anew, those that are fast would go on and on while a slow one has not begun. So a shard that has
given its share leaves the rest to the others. If they do not get on with it for a while, it takes
its part of what is left. What is held by shards that say that nothing of theirs can go is not
waited for: the others give it, too.

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

PATIENCE_S: Final = 1.0
"""How long shards may take to give up something before the others take part of their share: many
times what a write of a few extents takes, even on a busy disk."""


class Share:
    """One shard's share of one thing that is limited in sum."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._weight: float | None = None
        """Which part of the floor is this shard's; None: the sum was not above it."""
        self._stuck = 0
        self._others = 0
        """The least that the others have held since."""
        self._since = 0.0
        """When that was seen first."""
        self._target = 0.0
        """What this shard may keep if it leaves the rest to the others."""
        self.next_look: float | None = None
        """The clock's time at which the others have had time enough; None: they are not waited
        for."""

    def due(self, own: int, others: int, stuck: int, floor: int) -> int:
        """Bytes to give up now; 0: none, or it is for the others to go on.

        Args:
            own: what this shard holds.
            others: what all others hold together.
            stuck: what of that cannot go, as those who hold it say.
            floor: what all together are to hold at most.
        """
        excess = own + others - floor
        if excess <= 0:
            self.forget()
            return 0
        now = self._clock()
        weight = self._weight
        if weight is not None and others < self._others:
            self._others, self._since = others, now
        late = now - self._since >= PATIENCE_S
        if weight is None or stuck != self._stuck or (late and own <= self._target):
            weight = self._weight = own / (own + others - stuck) if own else 0.0
            self._stuck, self._others, self._since = stuck, others, now
        self._target = weight * max(0, floor - stuck)
        mine = math.ceil(own - self._target)
        waits = mine <= 0 < own and others > stuck
        self.next_look = self._since + PATIENCE_S if waits else None
        return max(0, min(excess, mine))

    def forget(self) -> None:
        """Nothing is to be given up now; what comes next begins anew."""
        self._weight = self.next_look = None

    def given(self, own: int) -> bool:
        """Whether this shard, if it holds so much, waits for the others to give theirs."""
        return self.next_look is not None and own <= self._target
