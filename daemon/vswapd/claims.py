"""Who has which space: one client at a time, and one connection to each of its parts.

Theory: a space is one, however many shards have a part of it; so who may have it is judged where
all its connections are known, and not by a shard. A shard claims the part that a HELLO asks for,
opens it if the claim is granted, and lets go of it with the connection. What is entered here lives
as long as the connections: whoever keeps it strikes out what a process had that has died.

A connection may have ended without its shard having noticed, and after a death there are parts that
wait for their client and have no connection. So before a claim is refused the shards are asked.
`decide` says what is to be asked, and whoever runs it knows how.

Invariants:
- All connections of one space are of one client, and no two of them on one shard.
- Between a look at what is entered and an entry nobody is asked anything.

This module must not know connections, channels, or what a part holds.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Final

from vswapd.groups import Holder


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A shard's, for a connection that has just said HELLO there."""

    key: str
    """The space's."""
    number: int
    """What tells it from the shard's other claims."""
    holder: Holder
    """The client, who is known by the token that it said, or is given now."""
    shard: int
    joins: bool
    """Whether it said a token: then it is to be that of a space that there is."""
    resumes: bool
    named: bool
    known: bool
    """Whether the shard that asks has a part of the space that this client has left."""


def key_of(uid: int, token: str, name: str | None) -> str:
    """What tells the parts of a space to be one, wherever they are, and no other user's."""
    # Whatever token or name another user says, it is another space.
    of = f"{uid} {token}" if name is None else f"{uid} is {name}"
    return blake2b(of.encode(), digest_size=16).hexdigest()


class Verdict(Enum):
    """What becomes of a claim."""

    GRANTED = "granted"
    BUSY = "busy"
    """The space has another client, or the part another connection."""
    LOST = "lost"
    """There is no such space, or not for this client."""


@dataclass(frozen=True, slots=True)
class Connected:
    """Whether what was granted to a shard still has a connection; one that has ended is waited for.

    The shard may not have heard yet that it was granted.
    """

    shard: int
    key: str
    number: int


@dataclass(frozen=True, slots=True)
class Known:
    """Whether any shard has a part of a space that a client has left."""

    key: str
    token: int
    """The client's, as in its Holder."""


Question = Connected | Known


@dataclass(slots=True)
class _Tenancy:
    holder: Holder
    parts: dict[int, int] = field(default_factory=dict)
    """By shard, the number of its claim."""


class Claims:
    """What is granted at the moment."""

    def __init__(self) -> None:
        self._by_key: Final[dict[str, _Tenancy]] = {}
        self._withheld: Final[set[str]] = set()

    def has(self, key: str, token: int) -> bool:
        """Whether a space is that client's at the moment."""
        found = self._by_key.get(key)
        return found is not None and found.holder.token == token

    def withhold(self, key: str) -> Holder | None:
        """Grant nobody a space until `restore`; who has it already, and nothing is withheld."""
        found = self._by_key.get(key)
        if found is not None:
            return found.holder
        self._withheld.add(key)
        return None

    def restore(self, key: str) -> None:
        """Grant it again."""
        self._withheld.discard(key)

    def decide(self, claim: Claim) -> Generator[Question, bool, Verdict]:
        """Judge a claim, and enter it if it is granted; yields what has to be found out first."""
        token = claim.holder.token
        refused = Verdict.LOST if claim.resumes else Verdict.BUSY
        asked: dict[int, int] = {}
        known = claim.known or not claim.joins
        while True:
            if claim.key in self._withheld:
                return refused
            found = self._by_key.get(claim.key)
            same = found is not None and found.holder.token == token
            if found is None and not known:
                if not (yield Known(claim.key, token)):
                    return Verdict.LOST
                known = True
            elif found is None or (same and claim.shard not in found.parts):
                held = self._by_key.setdefault(claim.key, _Tenancy(claim.holder))
                held.parts[claim.shard] = claim.number
                return Verdict.GRANTED
            else:
                if asked == (asked := dict(found.parts)):
                    return refused
                for shard, number in asked.items():
                    in_the_way = not same or shard == claim.shard
                    if in_the_way and (yield Connected(shard, claim.key, number)):
                        return refused

    def leave(self, key: str, shard: int, number: int) -> None:
        """What was granted to a shard is over."""
        found = self._by_key.get(key)
        if found is not None and found.parts.get(shard) == number:
            del found.parts[shard]
            if not found.parts:
                del self._by_key[key]

    def clear(self, shard: int) -> None:
        """A shard has died, and all its connections with it."""
        for key, found in list(self._by_key.items()):
            if shard in found.parts:
                self.leave(key, shard, found.parts[shard])
