"""How a blocking connection comes about: a socket, HELLO, further lanes; and how it comes back.

Invariants:
- A lane that was taken up again is of the same space and the same shard, or SpaceLost is raised.

This module must not know what the connection is for.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from vswap.address import Search, client_name, open_socket, where_to_look
from vswap.connection import Connection
from vswap.conversation import Conversation
from vswap.errors import (
    Broken,
    ConnectionLost,
    ConnectionRefused,
    NoDaemon,
    SpaceBusy,
    SpaceLost,
    Stopping,
)
from vswap.lane import Lane
from vswap.peer import Peer, hello, parse_hello
from vswap.waiting import Wait, check_patience, check_timeout
from vswap.window import Window, window_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vswap.planner import Ask

PATIENCE_S: Final = 30.0
"""How long a daemon that has died is waited for: a service manager starts it again in one second,
and in some more if it has much to look through."""
COMING_BACK: Final = (Broken, NoDaemon, Stopping, ConnectionRefused)
"""What a daemon that is about to come back may say, or not say."""
AWAY: Final = (Broken, NoDaemon, Stopping)
"""The same without what one that is there may say, too."""
FIRST_PAUSE_S: Final = 0.01
LONGEST_PAUSE_S: Final = 0.25
APART_S: Final = (0.0, 0.1, 2.0)
"""By the deaths that they have met: within how many seconds requests are sent again. One is under
way for some milliseconds: so an innocent one meets another's second death one time in ten, and its
third one time in a hundred of these. Who kills a shard mostly does it once: few wait for long."""
_CHANCE: Final = random.SystemRandom()
"""Processes that were forked from one are not to choose the same."""
DYING_S: Final = 2.0
"""How long a new connection that breaks is made again: a shard of the daemon may just be dying."""


class Listener(Protocol):
    """Who knows better what the silence of a daemon means."""

    def silent(self, path: Path, sock: socket.socket) -> str:
        """What to say of it. See `silent`."""

    def waits_on(self) -> bool:
        """Whether to wait on although it was silent for `timeout`."""


def greet(
    path: str | os.PathLike[str] | None,
    timeout: float | None,
    label: str | None,
    *,
    control: bool = False,
    window: int = 0,
    patience: float = PATIENCE_S,
    name: str | None = None,
    shard: int | None = None,
    listener: Listener | None = None,
) -> tuple[Connection, Peer, Window | None]:
    """An open connection that HELLO has been said on, and its window.

    Most arguments are those of `vswap.connect`. With `control` it is for steering, and no space is
    opened; `shard` is to answer, if it matters; `listener` is asked when there is silence, from
    HELLO's answer on.

    Raises:
        BadArgument: `timeout`, `window` or `patience` make no sense.
        NoDaemon, ConnectionRefused, ConnectionLost, ProtocolError: there is none.
    """
    timeout, patience = check_timeout(timeout), check_patience(patience)
    client = client_name(label)

    def call() -> Ask:
        return hello(client, control=control, shard=shard, window_bytes=window, name=name)

    home, peer, found, shared = _first_lane(path, timeout, call, patience)
    if listener is not None:
        home.silent = lambda sock: listener.silent(found, sock)
        home.extend = listener.waits_on
    kept = peer.resumable and not control
    patience = patience if kept else 0.0
    door = _Door(found, timeout, client, peer.token, home.shard, shared, patience, peer.kept, name)
    resume = door.resume if patience else None
    # Also without patience: the daemon does not know that nobody will come back.
    forgo = door.forgo if kept and not name else None
    return Connection(home, peer.shards, door.open_lane, resume, forgo), peer, shared


@dataclass(frozen=True, slots=True)
class _Door:
    """Where a space's lanes come from."""

    path: Path
    timeout: float | None
    client: str
    token: str | None
    home: int
    """The shard whose window it is."""
    window: Window | None
    patience: float
    """0: nobody keeps what a daemon that has died held."""
    kept: bool
    """Whether a daemon that stops will know the space when it is back."""
    name: str | None
    """The space's, if it has one."""

    def open_lane(self, shard: int) -> Lane:
        """A lane to another shard; waits for a daemon that is away. Raises: as `greet`."""
        begin = time.monotonic()
        search = Search(self.path)
        wait = away(search, self.patience) if self.patience else not_answering(search, self.timeout)
        while True:
            call = hello(self.client, shard=shard, token=self.token, name=self.name)
            try:
                lane, there, *_ = _lane(search, self.timeout, call, wait, away=self.patience > 0)
                break
            except SpaceBusy:
                # The client before this one has gone, and this shard is about to see it.
                if time.monotonic() > begin + DYING_S:
                    raise
            except AWAY as error:
                stays_away = isinstance(error, Stopping) and not self.kept
                if stays_away or not self.patience or wait.over():
                    raise
            time.sleep(FIRST_PAUSE_S)
        if there.shard != shard:
            # The daemon is another one by now.
            lane.close()
            raise ConnectionLost(f"the daemon has no shard {shard} any more")
        return lane

    def resume(self, lane: Lane, why: ConnectionLost) -> None:
        """Take a lane up again that has broken; wait for the daemon to come back.

        Raises:
            SpaceLost: it is back, and the space is not.
            ConnectionLost: it did not come back.
        """
        if isinstance(why, Stopping) and not self.kept:
            raise why
        search = Search(self.path)
        wait = away(search, self.patience)
        pause = FIRST_PAUSE_S
        pause_first = apart(lane.interrupt())
        while True:
            try:
                self._take_up(lane, search, wait, pause_first)
            except COMING_BACK as error:
                if wait.over() or (wait.left_s or 0.0) < pause:
                    raise not_back(why, self.patience, error) from error
            else:
                return
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def forgo(self, shard: int) -> None:
        """See `forgo`."""
        forgo(self.path, self.client, shard, self.token)

    def _take_up(self, lane: Lane, search: Search, wait: Wait, pause: float) -> None:
        shared = self.window if lane.shard == self.home else None
        wish = 0 if shared is None else shared.wish
        call = hello(
            self.client,
            shard=lane.shard,
            token=self.token,
            window_bytes=wish,
            resume=True,
            name=self.name,
        )
        sock, _ = open_socket(search, wait)
        lane.reopen(sock)
        descriptor = lane.greet(call, wait, away=True)
        try:
            there = parse_hello(call.result())
            check_same(there, lane.shard)
            if shared is not None:
                shared.replace(descriptor, there.window_bytes)
                descriptor = None
        finally:
            if descriptor is not None:
                os.close(descriptor)
        lane.be_quiet(pause)
        lane.conversation.window = there.window
        lane.conversation.resume(there.last)


def _first_lane(
    path: str | os.PathLike[str] | None,
    timeout: float | None,
    call: Callable[[], Ask],
    patience: float,
) -> tuple[Lane, Peer, Path, Window | None]:
    """As `_lane`; a daemon whose shard dies with the connection is asked once more."""
    end = time.monotonic() + min(patience, DYING_S)
    search = Search(path)
    wait = not_answering(search, timeout)
    while True:
        try:
            return _lane(search, timeout, call(), wait)
        except Broken:
            if time.monotonic() > end:
                raise
        time.sleep(FIRST_PAUSE_S)


def _lane(
    search: Search, timeout: float | None, call: Ask, wait: Wait, *, away: bool = False
) -> tuple[Lane, Peer, Path, Window | None]:
    """A lane that HELLO has been said on, what was answered, where, and the window.

    Args:
        search: the places to try.
        timeout: for the calls over the lane.
        call: HELLO.
        wait: for the lane.
        away: as for `Lane.greet`.
    """
    sock, found = open_socket(search, wait)
    wait.sign()
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        lane = Lane(sock, timeout, lambda sock: silent(found, sock))
        descriptor = lane.greet(call, wait, away=away)
        if descriptor is not None:
            undo.callback(os.close, descriptor)
        peer = parse_hello(call.result())
        lane.shard = peer.shard
        lane.conversation.window = peer.window
        undo.pop_all()
    return lane, peer, found, window_of(descriptor, peer.window_bytes, peer.shard)


def forgo(path: Path, client: str, shard: int, token: str | None) -> None:
    """Have freed what a space has on a shard that has died: by coming back for it, and going again.

    Whoever listens for the daemon, a service manager for instance that is about to start it, has
    both found by it when it is back. Where nobody listens it is freed when this process ends.
    """
    frame = Conversation().request(hello(client, shard=shard, token=token, resume=True), shard)
    assert frame is not None
    with contextlib.suppress(NoDaemon, OSError):
        sock, _ = open_socket(Search(path), Wait(FIRST_PAUSE_S, str))
        with sock:
            sock.sendmsg(frame, (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def check_same(there: Peer, shard: int) -> None:
    """Refuse a daemon that has answered, and is not the one that the space was in.

    Raises:
        SpaceLost: it is not.
    """
    if there.shard != shard or not there.resumable:
        raise SpaceLost("another daemon answers now: connect again and store anew")


def silent(path: Path, sock: socket.socket | None = None) -> str:
    """What is said of a daemon that does not answer. `sock`: connected to it."""
    return f"vswapd is not answering at {path}: {where_to_look(path, sock)}"


def not_answering(search: Search, timeout: float | None) -> Wait:
    """A wait for a daemon that is expected to be there."""
    return Wait(timeout, lambda: silent(search.place, search.sock))


def away(search: Search, patience: float) -> Wait:
    """A wait for one that has been there, and may come back."""
    path = search.place
    return Wait(
        patience,
        lambda: f"vswapd has gone from {path}, and is waited for: {where_to_look(path)}",
        whole=True,
    )


def apart(deaths: int) -> float:
    """Seconds to let pass before what was under way on a lane is sent again: some, by chance.

    Several clients had requests under way on a shard that has died, and one may have died of: that
    is known when it meets the next deaths, too, and alone. So each of them comes back at another
    time. It is the daemon that is back at one time for all: they wait after HELLO.

    Args:
        deaths: how many the requests have met that were under way, at most.
    """
    return _CHANCE.uniform(0.0, APART_S[min(deaths, len(APART_S) - 1)])


def not_back(why: Exception, patience: float, last: Exception) -> ConnectionLost:
    """The error for a daemon that stayed away."""
    return ConnectionLost(f"{why}; it did not come back within {patience:g} s: {last}")
