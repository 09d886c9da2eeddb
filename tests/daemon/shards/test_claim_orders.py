"""Claims in any order: greetings that overlap, clients that go, shards that die, late answers.

What is asked is answered as a shard would, at some later moment; in between anything else happens.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest

from vswapd.claims import Claim, Claims, Connected, Known, Question, Verdict, key_of
from vswapd.groups import Holder

SHARDS = 3
KEYS = ("a", "b")
TOKENS = (1, 2, 3)


@dataclass
class Greeting:
    """A connection, from its HELLO to its end."""

    claim: Claim
    judging: Generator[Question, bool, Verdict]
    life: int
    """How often its shard had died when it came."""
    question: Question | None = None
    granted: bool = False
    hung_up: bool = False


@dataclass
class World:
    """Shards and clients, and what must hold of them."""

    chooser: random.Random
    claims: Claims = field(default_factory=Claims)
    open: list[Greeting] = field(default_factory=list)
    lives: list[int] = field(default_factory=lambda: [0] * SHARDS)
    left: set[tuple[str, int]] = field(default_factory=set)
    """Parts that wait for their client: key and token."""
    last: int = 0
    verdicts: dict[Verdict, int] = field(default_factory=dict)

    def greet(self) -> None:
        self.last += 1
        token, joins = self.chooser.choice(TOKENS), self.chooser.random() < 0.6
        claim = Claim(
            key=self.chooser.choice(KEYS),
            number=self.last,
            holder=Holder(token=token if joins else 100 + self.last),
            shard=self.chooser.randrange(SHARDS),
            joins=joins,
            resumes=joins and self.chooser.random() < 0.3,
            named=True,
            known=joins and self.chooser.random() < 0.3,
        )
        greeting = Greeting(claim, self.claims.decide(claim), self.lives[claim.shard])
        self.open.append(greeting)
        self.advance(greeting)

    def advance(self, greeting: Greeting, *, answer: bool | None = None) -> None:
        claim = greeting.claim
        try:
            judging = greeting.judging
            greeting.question = next(judging) if answer is None else judging.send(answer)
        except StopIteration as end:
            greeting.question = None
            self.verdicts[end.value] = self.verdicts.get(end.value, 0) + 1
            if end.value is Verdict.GRANTED:
                greeting.granted = True
                self.left.discard((claim.key, claim.holder.token))
            else:
                self.open.remove(greeting)

    def answer(self) -> None:
        waiting = [each for each in self.open if each.question is not None]
        if not waiting:
            return
        greeting = self.chooser.choice(waiting)
        match greeting.question:
            case Known(key, token):
                self.advance(greeting, answer=(key, token) in self.left)
            case Connected(shard, key, number):
                there = [
                    each
                    for each in self.open
                    if (each.claim.shard, each.claim.key, each.claim.number) == (shard, key, number)
                    and each.granted
                ]
                for each in there:
                    if each.hung_up:
                        self.part(each)
                self.advance(greeting, answer=any(not each.hung_up for each in there))

    def part(self, greeting: Greeting) -> None:
        claim = greeting.claim
        self.claims.leave(claim.key, claim.shard, claim.number)
        self.open.remove(greeting)
        self.left.add((claim.key, claim.holder.token))

    def hang_up(self) -> None:
        if self.open:
            self.chooser.choice(self.open).hung_up = True

    def notice(self) -> None:
        gone = [each for each in self.open if each.hung_up and each.granted]
        if gone:
            self.part(self.chooser.choice(gone))

    def die(self) -> None:
        shard = self.chooser.randrange(SHARDS)
        self.lives[shard] += 1
        self.claims.clear(shard)
        for greeting in [each for each in self.open if each.claim.shard == shard]:
            # Whoever judges sees that the shard has died, and goes on with none of its claims.
            greeting.judging.close()
            self.open.remove(greeting)
            if greeting.granted:
                self.left.add((greeting.claim.key, greeting.claim.holder.token))

    def check(self) -> None:
        for key in KEYS:
            held = [each for each in self.open if each.granted and each.claim.key == key]
            assert len({each.claim.holder.token for each in held}) <= 1, "two clients"
            shards = [each.claim.shard for each in held]
            assert len(set(shards)) == len(shards), "two connections to a part"
            for each in held:
                assert self.claims.has(key, each.claim.holder.token)

    def end(self) -> None:
        """All go, and all questions are answered: then nothing is left, and the name is free."""
        for greeting in self.open:
            greeting.hung_up = True
        while self.open:
            self.answer()
            self.notice()
        for key in KEYS:
            assert self.claims.withhold(key) is None


@pytest.mark.parametrize("seed", range(40))
def test_no_order_gives_a_space_two_clients(seed: int) -> None:
    """Nor a part two connections, nor a name that nobody has to nobody."""
    chooser = random.Random(seed)
    world = World(chooser)
    actions = [world.greet] * 5 + [world.answer] * 5 + [world.hang_up] * 2 + [world.notice] * 2
    actions.append(world.die)
    for _ in range(800):
        chooser.choice(actions)()
        world.check()
    assert set(world.verdicts) == set(Verdict)
    world.end()


def test_a_space_that_is_withheld_is_granted_to_nobody() -> None:
    """Until it is given back; one that somebody has is not withheld, and it is told who."""
    claims, holder = Claims(), Holder(pid=7, token=1)
    key = key_of(0, "", "x")
    claim = Claim(
        key=key,
        number=1,
        holder=holder,
        shard=0,
        joins=False,
        resumes=False,
        named=True,
        known=False,
    )

    def verdict() -> Verdict:
        with pytest.raises(StopIteration) as ended:
            next(claims.decide(claim))
        found: Verdict = ended.value.value
        return found

    assert claims.withhold(key) is None
    assert verdict() is Verdict.BUSY
    claims.restore(key)
    assert verdict() is Verdict.GRANTED
    assert claims.withhold(key) == holder


def test_keys_are_of_one_user_and_one_kind() -> None:
    """A name that looks like another user's token, or the other way round, is another space."""
    keys = {
        key_of(uid, token, name)
        for uid in (0, 1)
        for token in ("0" * 32, "1" * 32)
        for name in (None, "x", "0" * 32, f"is {'0' * 32}")
    }
    assert len(keys) == 2 * (2 + 3)
