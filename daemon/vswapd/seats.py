"""Which connection has which space's part on this shard: at most one has each.

A seat is taken with a claim (see `claims`). It is judged here if this is the only shard, and else
where all shards are known.

Invariants:
- A seat that was taken is left once, with its connection, or at once if nothing came of it.
- A connection that has ended is never said to be there, whether its end was noticed or not.

This module must not know sockets, channels, or what a space holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from vswapd.claims import Claim, Claims, Connected, Verdict
from vswapd.driver import Elsewhere, Task


class Judge(Protocol):
    """Whoever knows all connections of all spaces."""

    def claim(self, claim: Claim) -> Task[Verdict]:
        """Judge a claim, and take note of it if it is granted.

        Raises:
            StoppingError: the daemon is ending.
        """

    def leave(self, claim: Claim) -> None:
        """What was granted to this shard is over."""


@dataclass(slots=True)
class _Seat:
    claim: Claim
    hung_up: Callable[[], bool]
    waiting: list[Callable[[], None]] = field(default_factory=list)
    """Whom to call when it is left."""


class Seats:
    """See the module."""

    def __init__(self, judge: Judge | None = None) -> None:
        """None are taken.

        Args:
            judge: of claims; None: there is no other shard.
        """
        self._judge: Final[Judge] = judge or _Alone(self)
        self._seats: Final[dict[int, _Seat]] = {}
        """By the number of the claim; also those that are not granted yet."""
        self._last = 0

    def number(self) -> int:
        """One for the next claim."""
        self._last += 1
        return self._last

    def take(self, claim: Claim, hung_up: Callable[[], bool]) -> Task[Verdict]:
        """Take the seat that a HELLO asks for, if it may be had.

        Args:
            claim: what for.
            hung_up: whether nobody is at the other end of the connection any more.

        Raises:
            StoppingError: the daemon is ending.
        """
        self._seats[claim.number] = _Seat(claim, hung_up)
        verdict = Verdict.LOST
        try:
            verdict = yield from self._judge.claim(claim)
        finally:
            if verdict is not Verdict.GRANTED:
                self._free(claim)
        return verdict

    def leave(self, claim: Claim) -> None:
        """Leave a seat that was taken."""
        self._judge.leave(claim)
        self._free(claim)

    def _free(self, claim: Claim) -> None:
        for told in self._seats.pop(claim.number).waiting:
            told()

    def connected(self, question: Connected) -> Task[bool]:
        """See Connected."""
        seat = self._seats.get(question.number)
        if seat is None or seat.claim.key != question.key:
            return False
        if seat.hung_up():
            yield Elsewhere(seat.waiting.append)
            return False
        return True


class _Alone:
    """The judge where there is one shard."""

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._claims = Claims()

    def claim(self, claim: Claim) -> Task[Verdict]:
        """See Judge."""
        judging = self._claims.decide(claim)
        answer = None
        while True:
            try:
                question = next(judging) if answer is None else judging.send(answer)
            except StopIteration as end:
                verdict: Verdict = end.value
                return verdict
            answer = False
            if isinstance(question, Connected):
                answer = yield from self._seats.connected(question)

    def leave(self, claim: Claim) -> None:
        """See Judge."""
        self._claims.leave(claim.key, claim.shard, claim.number)
