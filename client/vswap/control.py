"""Steering a daemon: what vswapctl is made of. Opens no space and stores no pages.

This module must not know the verbs: they are the daemon's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

from vswap.greeting import greet
from vswap.peer import parse_document
from vswap.planner import Ask
from vswap.protocol import Op

if TYPE_CHECKING:
    import os


class Control:
    """A connection for steering and status; a context manager.

    Args:
        path: The daemon's socket; default as for `vswap.connect`.
        timeout: Seconds of silence after which the daemon is given up; None: wait for ever. Verbs
            that move much data (swapoff) are silent until they are done.
        name: How the daemon names this client. Default: the program's name.

    Raises:
        NoDaemon: none answers.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
        name: str | None = None,
    ) -> None:
        self._connection, self.peer, _ = greet(path, timeout, name, control=True)

    def status(self) -> dict[str, Any]:
        """The daemon's status document; anybody may ask for it."""
        call = Ask(Op.STATUS)
        self._connection.run(call)
        return parse_document(call.result(), "status")

    def call(self, verb: str, /, **arguments: Any) -> dict[str, Any]:
        """Carry out a verb and return what the daemon says of it.

        Raises:
            NotAllowed: this user is neither root nor the daemon's.
            BadArgument: unknown verb, or arguments that make no sense.
            OutOfService: the daemon could not do it.
        """
        text = json.dumps({"verb": verb, **arguments}).encode()
        call = Ask(Op.CONTROL, text)
        self._connection.run(call)
        return parse_document(call.result(), f"answer to {verb}")

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
