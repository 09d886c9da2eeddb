"""Turns of long work in the event loop: one in each of the loop's rounds, whoever has some.

Short requests are served in the round in which they come. All long work together gets one turn
between two rounds: however many there are that ask for much at once, somebody who asks for little
waits for one turn at most.

This module must not know what the work is.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """A queue at which long work stands in line again after each of its turns."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def mine(self) -> None:
        """Wait for a turn: it lasts until the caller waits for anything.

        Raises:
            asyncio.CancelledError: cancelled; the turn is the next one's.
        """
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_soon(self._hand_out, loop)
        await turn

    def _hand_out(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the first in line its turn; once in each round while there are any."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                break
        if self._waiting:
            loop.call_soon(self._hand_out, loop)
