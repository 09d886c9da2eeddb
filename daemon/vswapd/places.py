"""Places for connections: how many there are, and how many one user may have.

Invariants:
- Users have no more than `most` together, and none of them more than `per_user`.
- Operators, who steer the daemon, are not bounded as users are, and others are not in their way: up
  to `most` of their own, they always come in. So whatever clients do, an operator can look at it,
  and end it.
- Each place is given back once, for the user that took it.

This module must not know what connections are.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Final


class Places:
    """So many places, of which one user may have so many."""

    def __init__(
        self, most: int, per_user: int, operators: frozenset[int] = frozenset({0, os.geteuid()})
    ) -> None:
        """All of them free.

        Args:
            most: for all users together, and once more for operators.
            per_user: for each user that is no operator.
            operators: uids; by default root, and the user of this process.
        """
        self._most: Final = most
        self._per_user: Final = per_user
        self._operators: Final = operators
        self._taken: Final[Counter[int]] = Counter()
        """By uid, of those that have any."""

    @property
    def taken(self) -> int:
        """How many are, by all users together."""
        return self._taken.total()

    def refusal(self, uid: int) -> str:
        """Why a user cannot have one now, and what to do about it; empty: take it."""
        taken = self._taken
        if uid in self._operators:
            found = sum(taken[operator] for operator in self._operators)
        elif taken[uid] >= self._per_user:
            return (
                f"{taken[uid]} connections of this user are open: close one, or raise "
                "server.max_user_connections"
            )
        else:
            found = self.taken
        if found >= self._most:
            return f"{found} connections are open: close one, or raise server.max_connections"
        return ""

    def take(self, uid: int) -> None:
        """Take one, for which there was no refusal."""
        self._taken[uid] += 1

    def give(self, uid: int) -> None:
        """Give one back that this user has taken."""
        assert self._taken[uid] > 0
        self._taken[uid] -= 1
        if not self._taken[uid]:
            del self._taken[uid]
