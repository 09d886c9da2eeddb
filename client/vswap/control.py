"""Steering a daemon: what vswapctl is made of. Opens no space and stores no pages.

This module must not know the verbs: they are the daemon's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from vswap.errors import VswapError
from vswap.greeting import greet, silent
from vswap.peer import parse_document
from vswap.planner import Ask
from vswap.protocol import Op

if TYPE_CHECKING:
    import os
    import socket
    from pathlib import Path


class Control:
    """A connection for steering and status; a context manager.

    Args:
        path: The daemon's socket; default as for `vswap.connect`.
        timeout: Seconds of silence after which the daemon is given up, as for `vswap.connect`;
            None: wait for ever. Verbs may be silent for long, until they are done (swapoff): then
            it is asked on another connection whether it is there, and waited for as long as it is.
        name: How the daemon names this client. Default: the program's name.

    Raises:
        BadArgument: `timeout` makes no sense.
        NoDaemon: none answers.
        TimedOut: one is there, and silent.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
        name: str | None = None,
    ) -> None:
        self._path = path
        self._timeout = timeout
        self._name = name
        self._verb: str | None = None
        """What is being carried out."""
        self._connection, self.peer, _ = greet(path, timeout, name, control=True, listener=self)

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
        call = Ask(Op.CONTROL, {"verb": verb, **arguments})
        self._verb = verb
        try:
            self._connection.run(call)
        finally:
            self._verb = None
        return parse_document(call.result(), f"answer to {verb}")

    def silent(self, path: Path, sock: socket.socket) -> str:
        """See greeting.Listener."""
        if self._verb is None:
            return silent(path, sock)
        return f"vswapd at {path} has not finished {self._verb} yet"

    def waits_on(self) -> bool:
        """See greeting.Listener. Asks the shard that owes the answer."""
        verb, self._verb = self._verb, None
        if verb is None:
            return False
        try:
            again, *_ = greet(
                self._path, self._timeout, self._name, control=True, shard=self.peer.shard
            )
        except VswapError:
            return False
        again.close()
        self._verb = verb
        return True

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
