"""A blocking connection: the lanes to the daemon's shards, and one call at a time over them.

Theory: the first lane is made with the connection, and is all that small calls use. A lane to
another shard is opened when a call first has something to send there. Calls that any shard can
serve (new slots) are offered to all lanes in turn, and whichever has room takes the next frame.

Invariants:
- One lock; a call has the connection to itself. Threads wait for each other. What a handler of a
  signal wants in the middle of a call of its own thread is refused.
- After a typed error all replies of the call have been read: every lane is in step.
- A lane that breaks because the daemon has died is taken up again, if what the daemon holds
  outlives it; the call goes on. So is one that no call has needed since, before the daemon ceases
  to wait for it, as long as there are calls.
- After anything else (silence, nonsense, an exception out of a signal handler, which may strike
  between the arrival of bytes and their being counted) the connection is closed, and later calls
  say why.
- A forked child does not share it: there it is closed, without harm to the parent's.

This module must not know what the calls mean.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from vswap.errors import Broken, ConnectionLost, OutOfService, Stopping
from vswap.locking import Lock

if TYPE_CHECKING:
    from vswap.lane import Lane
    from vswap.planner import Call

_ONE_CALL: Final = "a call on this connection"
_REFUSED_S: Final = 1.0
"""How long a shard that had no room for one more lane is left alone."""
_LOOK_S: Final = 1.0
"""How often the lanes that a call does not need are looked at: what a space has on a shard is freed
if its client does not come back in time. It costs a system call per lane."""


class Connection:
    """The lanes of one space, or the one lane of a connection for steering.

    Args:
        home: The first lane, on which HELLO was said.
        shards: How many the daemon has.
        open_lane: Makes a lane to another shard.
        resume: Takes a broken lane up again where it was; None: nobody keeps what the daemon held.
        forgo: Has freed what a shard that has died still keeps; None: that is not for this client
            to say, or nobody keeps it.
    """

    def __init__(
        self,
        home: Lane,
        shards: int,
        open_lane: Callable[[int], Lane],
        resume: Callable[[Lane, ConnectionLost], None] | None = None,
        forgo: Callable[[int], None] | None = None,
    ) -> None:
        self._home = home
        self._shards = shards
        self._open_lane = open_lane
        self._resume = resume
        self._forgo = forgo
        self._lanes: dict[int, Lane] = {home.shard: home}
        self._refused_at: dict[int, float] = {}
        self._looked_at = time.monotonic()
        self._lock = Lock(_ONE_CALL)
        self._why_closed: str | None = None
        _open_connections.add(self)

    @property
    def closed(self) -> bool:
        """Whether calls can only fail."""
        return self._why_closed is not None

    def close(self, why: str = "it was closed") -> None:
        """Close it; the daemon then frees the space. A call in another thread is waited for."""
        self._lock.run(self._shut, why)

    def run(self, call: Call) -> None:
        """Carry a call through. Its own errors are kept in it; ask it for its result.

        Raises:
            ConnectionLost: the connection is closed, or was.
            ConnectionRefused: a shard that the call needs takes no more connections; nothing was
                sent.
            ProtocolError: the daemon answered nonsense; the connection is closed now.
        """
        try:
            self._lock.run(self._run_alone, call)
        finally:
            call.release()

    def _run_alone(self, call: Call) -> None:
        self._check_open()
        lanes = self._lanes_for(call)
        try:
            self._carry_through(call, lanes)
        except BaseException as error:
            self._shut(str(error) or type(error).__name__)
            raise

    def _carry_through(self, call: Call, lanes: list[Lane]) -> None:
        if self._resume is not None and len(self._lanes) > len(lanes):
            self._look_at_others()
        while True:
            try:
                if len(lanes) == 1:
                    lanes[0].exchange(call)
                else:
                    self._exchange(call, lanes)
            except (Broken, Stopping) as error:
                if self._resume is None:
                    raise
                self._hear_others()
                for lane in self._lanes.values():
                    if lane.broken:
                        self._resume(lane, error)
            else:
                return

    def _hear_others(self) -> None:
        """Have all lanes answered before one is taken up again, for which the daemon is waited for.

        One that stops waits for us, too: until we have read what its other shards have to say.
        """
        for lane in self._lanes.values():
            if not lane.broken:
                with contextlib.suppress(Broken, Stopping):
                    lane.settle()

    def _look_at_others(self) -> None:
        """Take up lanes that have ended meanwhile; between calls nothing else can come on them."""
        now = time.monotonic()
        if now < self._looked_at + _LOOK_S:
            return
        self._looked_at = now
        assert self._resume is not None
        for lane in self._lanes.values():
            try:
                lane.pull()
            except (Broken, Stopping) as error:
                self._resume(lane, error)

    def _check_open(self) -> None:
        if self._why_closed is not None:
            raise ConnectionLost(f"the connection is closed: {self._why_closed}; connect() again")

    def _shut(self, why: str) -> None:
        if self._why_closed is None:
            self._why_closed = why
        # Also if it was closed before: a signal may have struck in the middle of that.
        # Those, too, that have died since the last call, or while it waited for another one.
        gone = [lane.shard for lane in self._lanes.values() if lane.gone]
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        if self._forgo is not None:
            for shard in gone:
                self._forgo(shard)

    # Lanes

    def _lanes_for(self, call: Call) -> list[Lane]:
        lanes = []
        for shard in call.routes(self._home.shard, self._shards):
            lane = self._lanes.get(shard) or self._open(shard, needed=call.needs_all)
            if lane is not None:
                lanes.append(lane)
        return lanes

    def _open(self, shard: int, *, needed: bool) -> Lane | None:
        """A new lane; None: none is to be had, and none is needed.

        Raises:
            ConnectionRefused, NoDaemon, ConnectionLost, OutOfService: as it may happen, and one is
                needed.
        """
        refused_at = self._refused_at.get(shard)
        if not needed and refused_at is not None and time.monotonic() < refused_at + _REFUSED_S:
            return None
        try:
            lane = self._open_lane(shard)
        except (ConnectionLost, OutOfService):
            self._refused_at[shard] = time.monotonic()
            if needed:
                raise
            return None
        self._lanes[shard] = lane
        return lane

    def _exchange(self, call: Call, lanes: list[Lane]) -> None:
        """Carry a call through over several lanes."""
        poll = select.poll()
        by_fd = {lane.sock.fileno(): lane for lane in lanes}
        # One for each before there are more for the first: its daemon may be quick to take them.
        for lane in lanes:
            lane.push(call, 1)
        while True:
            dropped = 0
            for fd, lane in by_fd.items():
                all_sent = lane.push(call)
                poll.register(fd, select.POLLIN if all_sent else select.POLLIN | select.POLLOUT)
                dropped += len(lane.conversation.dropped)
                lane.conversation.dropped.clear()
            if call.over:
                return
            if dropped:
                # Something is not awaited any more: lanes before this one may go on.
                continue
            for fd, events in self._home.wait_for(poll):
                if events & ~select.POLLOUT:
                    by_fd[fd].pull()


_open_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child: two processes in one conversation would garble it."""
    for connection in list(_open_connections):
        connection._lock = Lock(_ONE_CALL)  # noqa: SLF001 - another thread of the parent may hold it
        connection._forgo = None  # noqa: SLF001 - it is the parent's
        connection._shut("it belongs to the process that this one was forked from")  # noqa: SLF001


os.register_at_fork(after_in_child=_leave_to_the_parent)
