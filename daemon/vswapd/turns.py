"""Turns of long work in the event loop: one in each of the loop's rounds, whoever has some.

Short requests are served in the round in which they come. All long work together gets one turn
between two rounds: however many there are that ask for much at once, somebody who asks for little
waits for one turn at most.

This module must not know what the work is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Turns:
    """A line in which long work stands again after each of its turns."""

    def __init__(self) -> None:
        self._line: deque[Callable[[], None]] = deque()

    def ask(self, go: Callable[[], None]) -> None:
        """Have something called when it is its turn, in the event loop's thread."""
        self._line.append(go)
        if len(self._line) == 1:
            asyncio.get_running_loop().call_soon(self._hand_out)

    async def mine(self) -> None:
        """Wait for a turn: it lasts until the caller waits for anything.

        Raises:
            asyncio.CancelledError: cancelled; the turn passes.
        """
        turn = asyncio.get_running_loop().create_future()

        def go() -> None:
            if not turn.done():
                turn.set_result(None)

        self.ask(go)
        await turn

    def _hand_out(self) -> None:
        """Give the first in line its turn; once in each round while there are any."""
        go = self._line.popleft()
        if self._line:
            asyncio.get_running_loop().call_soon(self._hand_out)
        go()
