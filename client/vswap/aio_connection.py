"""A connection in an event loop: the lanes to the daemon's shards, and the calls of many tasks.

Theory: as for the blocking connection, with a queue of calls per lane. A call that goes over
several lanes stands in all of their queues, and each lane takes its frames when it has room.

Invariants:
- A call is in `_waiting` until whoever made it has heard that it is over, or has gone, or the
  connection is lost; it is in `_routes` until it is over, too. Lanes may say of one call several
  times that it is over: for each of its requests that are not sent again.
- A forked child has none of its sockets: there it is closed, without harm to the parent's.
- Calls come into the lanes' queues in the order in which they were made, also while a lane that
  the first of them needs is still being opened.

This module must not know what the calls mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from vswap.aio_lane import AsyncLane, silence
from vswap.errors import Broken, ConnectionLost, OutOfService, Stopping, VswapError
from vswap.waiting import LOG, NOTICE_S

if TYPE_CHECKING:
    from vswap.peer import Peer
    from vswap.planner import Call

_REFUSED_S: Final = 1.0
"""How long a shard that had no room for one more lane is left alone."""


class AsyncConnection:
    """The lanes of one space.

    Args:
        home: The first lane, on which HELLO was said.
        shards: How many the daemon has.
        timeout: Seconds of silence in the middle of a call after which the daemon is given up;
            None: wait for ever.
        open_lane: Makes a lane to another shard.
        resume: Finds an interrupted lane its daemon again; None: nobody keeps what that held.
        forgo: As for `vswap.connection.Connection`.
    """

    def __init__(
        self,
        home: AsyncLane,
        shards: int,
        timeout: float | None,
        open_lane: Callable[[int], Awaitable[AsyncLane]],
        resume: Callable[[AsyncLane, VswapError], Awaitable[Peer]] | None = None,
        forgo: Callable[[int], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._home = home
        self._shards = shards
        self._timeout = timeout
        self._open_lane = open_lane
        self._resume = resume
        self._forgo = forgo
        self._returning: dict[int, asyncio.Task[None]] = {}
        """By shard: who waits for it to come back."""
        self._why_closed: str | None = None
        self._waiting: dict[Call, asyncio.Future[None]] = {}
        self._routes: dict[Call, list[AsyncLane]] = {}
        """The lanes of every call that somebody waits for, or that is not over."""
        self._lanes: dict[int, AsyncLane] = {}
        self._refused_at: dict[int, float] = {}
        self._entering = 0
        """Calls that are not in the queues yet, since there is a lane to open."""
        self._door = asyncio.Lock()
        self._unattended: set[asyncio.Task[None]] = set()
        """Who sees calls in that nobody waits for."""
        self._watch: asyncio.TimerHandle | None = None
        self._told = False
        """Whether it was said that a shard is silent, and none has been heard since."""
        self.said: Callable[[], str] = lambda: "vswapd is not answering"
        """What is said of a daemon with a shard that is silent."""
        self._adopt(home)
        _connections.add(self)

    def _adopt(self, lane: AsyncLane) -> None:
        lane.owner = self
        self._lanes[lane.shard] = lane

    @property
    def closed(self) -> bool:
        """Whether calls can only fail."""
        return self._why_closed is not None

    def close(self) -> None:
        """Close it; calls that run fail with ConnectionLost."""
        if not self.closed:
            self._end(ConnectionLost("the connection was closed"))

    async def run(self, call: Call) -> None:
        """Carry a call through. Its own errors are kept in it; ask it for its result.

        Raises:
            ConnectionLost: the connection is closed, or was.
            ConnectionRefused: a shard that the call needs takes no more connections; nothing was
                sent.
            ProtocolError: the daemon answered nonsense; the connection is closed now.
        """
        self._check_open()
        if call.over:
            return
        shards = call.routes(self._home.shard, self._shards)
        if self._entering or not all(shard in self._lanes for shard in shards):
            try:
                future = await self._enter_late(call, shards)
            except asyncio.CancelledError:
                call.abandon()
                if not call.over and not self.closed:
                    self._carry_on(call, shards)
                raise
        else:
            future = self._enter(call, [self._lanes[shard] for shard in shards])
        try:
            await future
        except asyncio.CancelledError:
            self._abandon(call)
            raise
        self._waiting.pop(call, None)
        self._routes.pop(call, None)

    def _check_open(self) -> None:
        if self._why_closed is not None:
            raise ConnectionLost(f"the connection is closed: {self._why_closed}; connect() again")

    async def _enter_late(self, call: Call, shards: list[int]) -> asyncio.Future[None]:
        """After the calls before it, with lanes that may have to be opened."""
        self._entering += 1
        try:
            async with self._door:
                lanes = [await self._lane(shard, needed=call.needs_all) for shard in shards]
                self._check_open()
                return self._enter(call, [lane for lane in lanes if lane is not None])
        except BaseException:
            call.release()
            raise
        finally:
            self._entering -= 1

    def _carry_on(self, call: Call, shards: list[int]) -> None:
        """Have a call done that nobody waits for, and that is not in the queues yet."""

        async def enter() -> None:
            with contextlib.suppress(VswapError):
                await self._enter_late(call, shards)
                self._waiting.pop(call, None)

        task = self._loop.create_task(enter())
        self._unattended.add(task)
        task.add_done_callback(self._unattended.discard)

    async def _lane(self, shard: int, *, needed: bool) -> AsyncLane | None:
        """The lane to a shard; None: none is to be had, and none is needed.

        Raises:
            ConnectionRefused, NoDaemon, ConnectionLost, OutOfService: as it may happen, and one is
                needed.
        """
        lane = self._lanes.get(shard)
        if lane is not None:
            return lane
        refused_at = self._refused_at.get(shard)
        if not needed and refused_at is not None and self._loop.time() < refused_at + _REFUSED_S:
            return None
        try:
            lane = await self._open_lane(shard)
        except (ConnectionLost, OutOfService):
            self._refused_at[shard] = self._loop.time()
            if needed:
                raise
            return None
        if self.closed:
            lane.close()
        else:
            self._adopt(lane)
        return lane

    def _enter(self, call: Call, lanes: list[AsyncLane]) -> asyncio.Future[None]:
        future = self._loop.create_future()
        self._waiting[call] = future
        self._listen()
        self._routes[call] = lanes
        self._put(call, lanes)
        return future

    def _put(self, call: Call, lanes: list[AsyncLane]) -> None:
        for lane in lanes:
            if self.closed:
                return
            if lane.conversation.idle:
                lane.heard_at = self._loop.time()
            lane.put(call)

    def _abandon(self, call: Call) -> None:
        """The caller is gone; his buffers are his again."""
        self._waiting.pop(call, None)
        lanes = self._routes.get(call, [])
        for lane in lanes:
            lane.abandon(call)
        call.release()
        self._put(call, lanes)
        if call.over:
            self._routes.pop(call, None)

    # What lanes say

    def answered(self, call: Call) -> None:
        """A reply for the call has come, or there will be none."""
        lanes = self._routes.get(call)
        if lanes is None:
            return
        if call.over:
            call.release()
            future = self._waiting.get(call)
            if future is None:
                del self._routes[call]
            elif not future.done():
                future.set_result(None)
        elif call.error is not None or call.abandoned:
            self._put(call, lanes)

    def lose(self, lane: AsyncLane, error: VswapError) -> None:
        """A lane has ended: take it up again, or that is the end."""
        if self.closed:
            return
        if self._resume is None or not isinstance(error, Broken | Stopping):
            self._end(error)
            return
        lane.interrupt()
        self._returning[lane.shard] = self._loop.create_task(
            self._come_back(lane, error, self._resume)
        )

    async def _come_back(
        self,
        lane: AsyncLane,
        why: VswapError,
        resume: Callable[[AsyncLane, VswapError], Awaitable[Peer]],
    ) -> None:
        try:
            there = await resume(lane, why)
            lane.owner = self
            lane.heard_at = self._loop.time()
            self._listen()
            lane.resume(there.last)
            for call, lanes in list(self._routes.items()):
                # Some have got what they waited for with HELLO's answer, or wait for nothing now.
                if lane in lanes and not self.closed:
                    self.answered(call)
        except asyncio.CancelledError:
            raise
        except VswapError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001 - whoever waits for a call is told
            self._end(ConnectionLost(f"the connection could not be taken up again: {error!r}"))
        finally:
            del self._returning[lane.shard]

    def _end(self, error: VswapError) -> None:
        """The end: every call that waits fails."""
        if self.closed:
            return
        self._why_closed = str(error)
        if self._watch is not None:
            self._watch.cancel()
        for task in (*self._returning.values(), *self._unattended):
            if task is not asyncio.current_task(self._loop):
                task.cancel()
        gone = [shard for shard, lane in self._lanes.items() if lane.gone]
        for lane in self._lanes.values():
            lane.close()
        if self._forgo is not None:
            for shard in {*gone, *self._returning}:
                self._forgo(shard)
        self._routes.clear()
        waiting, self._waiting = self._waiting, {}
        first = True
        for call, future in waiting.items():
            call.release()
            if not future.done():
                # One exception object must not be raised in two tasks.
                future.set_exception(error if first else ConnectionLost(str(error)))
                first = False

    def _listen(self) -> None:
        """From now on no shard that is asked something is to be silent for long unnoticed."""
        if self._watch is None and not self.closed:
            self._watch = self._loop.call_later(self._next_look(0.0), self._look)

    def _next_look(self, silent_s: float) -> float:
        """Seconds until a shard that has been silent for so long may have been so for too long."""
        steps = [NOTICE_S if self._told else NOTICE_S - silent_s]
        if self._timeout is not None:
            steps.append(self._timeout - silent_s)
        return min(steps)

    def _look(self) -> None:
        """Whether a shard that is there, and has been asked something, was silent for too long."""
        self._watch = None
        asked = [
            lane.heard_at
            for shard, lane in self._lanes.items()
            if not lane.conversation.idle and shard not in self._returning
        ]
        silent_s = self._loop.time() - min(asked, default=self._loop.time())
        if self._told and silent_s < NOTICE_S:
            self._told = False
            LOG.info("vswapd answers again")
        if self.closed or not asked:
            return
        if self._timeout is not None and silent_s >= self._timeout:
            self._end(silence(self.said(), self._timeout))
            return
        if silent_s >= NOTICE_S and not self._told:
            self._told = True
            LOG.warning("%s", self.said())
        self._watch = self._loop.call_later(self._next_look(silent_s), self._look)


_connections: weakref.WeakSet[AsyncConnection] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child, which has none of the lanes."""
    for connection in list(_connections):
        connection._why_closed = "it belongs to the process that this one was forked from"  # noqa: SLF001


os.register_at_fork(after_in_child=_leave_to_the_parent)
