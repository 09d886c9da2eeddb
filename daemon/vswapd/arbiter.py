"""Claims of several shards, judged in one place: the supervisor's, who sees them all.

Invariants:
- Nothing is granted to a shard that has died meanwhile. What it had is struck out when it dies.
- One shard that does not answer delays nobody but those who have to be told what it has.

This module must not know sockets, or how a shard finds its answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final

from vswapd.claims import Claim, Claims, Connected, Known, Question, Verdict
from vswapd.errors import OutOfServiceError, SilentShardError
from vswapd.forking import Child
from vswapd.groups import Holder
from vswapd.messages import Inherit

_PATIENCE_S: Final = 5.0
"""How long a shard is waited for that has to say whether a client is still there: one that hangs
must not have whoever wants the space hang, too."""


class Arbiter:
    """See the module."""

    def __init__(
        self,
        children: Sequence[Child],
        ask: Callable[[Child, object], Awaitable[Any]],
        later: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """Nothing is granted yet.

        Args:
            children: the shards, by their numbers.
            ask: has one of them answer; raises OutOfServiceError where it has gone for good.
            later: has something done besides; given up when the daemon stops.
        """
        self._children: Final = children
        self._ask: Final = ask
        self._later: Final = later
        self._claims: Final = Claims()

    async def claim(self, child: Child, claim: Claim) -> Verdict:
        """Judge a shard's claim.

        Raises:
            OutOfServiceError: another shard that has to be asked has gone for good.
        """
        pid = child.pid
        judging = self._claims.decide(claim)
        answer = None
        while True:
            try:
                question = next(judging) if answer is None else judging.send(answer)
            except StopIteration as end:
                verdict: Verdict = end.value
                break
            answer = await self._answer(question)
            if child.pid != pid or not child.there.is_set():
                return Verdict.LOST  # nobody hears it
        if verdict is Verdict.GRANTED and claim.named and not claim.joins:
            for other in self._children:
                if other is not child:
                    self._later(self._bequeath(other, claim))
        return verdict

    def leave(self, child: Child, key: str, number: int) -> None:
        """A shard has let go of what was granted to it."""
        self._claims.leave(key, child.index, number)

    def withhold(self, key: str) -> Holder | None:
        """See Claims."""
        return self._claims.withhold(key)

    def restore(self, key: str) -> None:
        """See Claims."""
        self._claims.restore(key)

    def clear(self, child: Child) -> None:
        """A shard has died."""
        self._claims.clear(child.index)

    async def _answer(self, question: Question) -> bool:
        match question:
            case Connected(shard):
                try:
                    async with asyncio.timeout(_PATIENCE_S):
                        return bool(await self._ask(self._children[shard], question))
                except (TimeoutError, SilentShardError):
                    return True  # as far as anybody can tell
            case Known():
                return await self._any(question)

    async def _any(self, question: Known) -> bool:
        """Whether any shard says yes; who is slower than the first that does is not waited for."""
        asked = [asyncio.ensure_future(self._ask(each, question)) for each in self._children]
        failure: OutOfServiceError | None = None
        try:
            for answer in asyncio.as_completed(asked):
                try:
                    if await answer:
                        return True
                except OutOfServiceError as error:
                    failure = error
            if failure is not None:
                raise failure
            return False
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _bequeath(self, child: Child, claim: Claim) -> None:
        """A space has a new client: parts that wait on other shards are not the last one's now."""
        with contextlib.suppress(OutOfServiceError):
            await child.there.wait()
            if self._claims.has(claim.key, claim.holder.token):
                await self._ask(child, Inherit(claim.key, claim.holder))
