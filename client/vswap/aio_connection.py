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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vswap.aio_lane import AsyncLane, open_async
from vswap.errors import (
    Broken,
    ConnectionLost,
    NoDaemon,
    OutOfService,
    SpaceBusy,
    Stopping,
    TimedOut,
    VswapError,
)
from vswap.greeting import (
    AWAY,
    COMING_BACK,
    DYING_S,
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    check_patience,
    check_same,
    forgo,
    not_back,
)
from vswap.peer import Peer, hello, parse_hello
from vswap.window import Window, window_of

if TYPE_CHECKING:
    from pathlib import Path

    from vswap.planner import Ask, Call

_REFUSED_S: Final = 1.0
"""How long a shard that had no room for one more lane is left alone."""


async def open_connection(
    path: str | os.PathLike[str] | None,
    silence_s: float | None,
    client: str,
    window_bytes: int,
    patience_s: float,
    name: str | None = None,
) -> tuple[AsyncConnection, Peer, Window | None]:
    """Connect to the first daemon that answers, and say HELLO. The window comes with it.

    Raises:
        ValueError: some of this makes no sense.
        NoDaemon, ConnectionRefused, ConnectionLost, ProtocolError: there is no connection.
    """
    check_patience(patience_s)

    def call() -> Ask:
        return hello(client, window_bytes=window_bytes, name=name)

    home, peer, found, window = await _greet_first(path, silence_s, call, patience_s)
    patience_s = patience_s if peer.resumable else 0.0
    door = _Door(
        found, silence_s, client, peer.token, home.shard, window, patience_s, peer.kept, name
    )
    resume = door.resume if patience_s else None
    # Also without patience: the daemon does not know that nobody will come back.
    last_word = door.forgo if peer.resumable and not name else None
    connection = AsyncConnection(home, peer.shards, silence_s, door.open_lane, resume, last_word)
    return connection, peer, window


@dataclass(frozen=True, slots=True)
class _Door:
    """Where a space's lanes come from."""

    path: Path
    silence_s: float | None
    client: str
    token: str | None
    home: int
    """The shard whose window it is."""
    window: Window | None
    patience_s: float
    """0: nobody keeps what a daemon that has died held."""
    kept: bool
    """Whether a daemon that stops will know the space when it is back."""
    name: str | None
    """The space's, if it has one."""

    def forgo(self, shard: int) -> None:
        """See `greeting.forgo`."""
        forgo(self.path, self.client, shard, self.token)

    async def open_lane(self, shard: int) -> AsyncLane:
        """A lane to another shard; a daemon that is away is waited for.

        Raises: as `open_connection`.
        """
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while True:
            call = hello(self.client, shard=shard, token=self.token, name=self.name)
            left = max(FIRST_PAUSE_S, begin + self.patience_s - loop.time())
            patience_s = left if self.patience_s else None
            try:
                lane, there, *_ = await _greet(self.path, self.silence_s, call, patience_s)
                break
            except SpaceBusy:
                # The client before this one has gone, and this shard is about to see it.
                if loop.time() > begin + DYING_S:
                    raise
            except AWAY as error:
                stays_away = isinstance(error, Stopping) and not self.kept
                if stays_away or loop.time() + FIRST_PAUSE_S > begin + self.patience_s:
                    raise
            await asyncio.sleep(FIRST_PAUSE_S)
        if there.shard != shard:
            # The daemon is another one by now.
            lane.close()
            raise ConnectionLost(f"the daemon has no shard {shard} any more")
        return lane

    async def resume(self, lane: AsyncLane, why: VswapError) -> Peer:
        """A socket for a lane that was interrupted, HELLO said; wait for the daemon to come back.

        Raises:
            SpaceLost: it is back, and the space is not.
            ConnectionLost: it did not come back.
        """
        if isinstance(why, Stopping) and not self.kept:
            raise why
        loop = asyncio.get_running_loop()
        end = loop.time() + self.patience_s
        pause = FIRST_PAUSE_S
        while True:
            try:
                return await self._take_up(lane, max(FIRST_PAUSE_S, end - loop.time()))
            except COMING_BACK as error:
                if loop.time() + pause > end:
                    raise not_back(why, self.patience_s, error) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _take_up(self, lane: AsyncLane, patience_s: float) -> Peer:
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
        sock, _ = await open_async(self.path, patience_s)
        lane.reopen(sock)
        try:
            there = await _say_hello(lane, call, None, patience_s)
            check_same(there, lane.shard)
        except BaseException:
            lane.interrupt()
            if lane.descriptor is not None:
                os.close(lane.descriptor)
                lane.descriptor = None
            raise
        descriptor, lane.descriptor = lane.descriptor, None
        if shared is not None:
            shared.replace(descriptor, there.window_bytes)
        elif descriptor is not None:
            os.close(descriptor)
        lane.conversation.window = there.window
        return there


async def _greet_first(
    path: str | os.PathLike[str] | None,
    silence_s: float | None,
    call: Callable[[], Ask],
    patience_s: float,
) -> tuple[AsyncLane, Peer, Path, Window | None]:
    """As `_greet`; a daemon whose shard dies with the connection is asked once more."""
    loop = asyncio.get_running_loop()
    end = loop.time() + min(patience_s, DYING_S)
    while True:
        try:
            return await _greet(path, silence_s, call())
        except Broken:
            if loop.time() > end:
                raise
        await asyncio.sleep(FIRST_PAUSE_S)


async def _greet(
    path: str | os.PathLike[str] | None,
    silence_s: float | None,
    call: Ask,
    patience_s: float | None = None,
) -> tuple[AsyncLane, Peer, Path, Window | None]:
    """A lane that HELLO has been said on, what was answered, where, and the window."""
    sock, found = await open_async(path, silence_s if patience_s is None else patience_s)
    lane = AsyncLane(sock, _Greeting())
    try:
        peer = await _say_hello(lane, call, silence_s, patience_s)
    except BaseException:
        lane.close()
        if lane.descriptor is not None:
            os.close(lane.descriptor)
        raise
    lane.shard = peer.shard
    lane.conversation.window = peer.window
    descriptor, lane.descriptor = lane.descriptor, None
    return lane, peer, found, window_of(descriptor, peer.window_bytes, peer.shard)


async def _say_hello(
    lane: AsyncLane, call: Ask, silence_s: float | None, patience_s: float | None
) -> Peer:
    """Say HELLO, and what was answered. `patience_s`: as for `vswap.lane.Lane.greet`."""
    lane.owner = greeting = _Greeting()
    lane.greet(call)
    try:
        async with asyncio.timeout(silence_s if patience_s is None else patience_s):
            await greeting.over
    except TimeoutError:
        silent = _silence(silence_s) if patience_s is None else NoDaemon("nobody answers there")
        raise silent from None
    return parse_hello(call.result())


def _silence(silence_s: float | None) -> TimedOut:
    return TimedOut(f"the daemon was silent for {silence_s} s")


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
        """From now on no shard that is asked something is to be silent for too long."""
        if self._timeout is not None and self._watch is None and not self.closed:
            self._watch = self._loop.call_later(self._timeout, self._look)

    def _look(self) -> None:
        """Whether a shard that is there, and has been asked something, was silent for too long."""
        self._watch = None
        asked = [
            lane.heard_at
            for shard, lane in self._lanes.items()
            if not lane.conversation.idle and shard not in self._returning
        ]
        if self._timeout is None or self.closed or not asked:
            return
        silence = self._loop.time() - min(asked)
        if silence >= self._timeout:
            self._end(_silence(self._timeout))
        else:
            self._watch = self._loop.call_later(self._timeout - silence, self._look)


_connections: weakref.WeakSet[AsyncConnection] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child, which has none of the lanes."""
    for connection in list(_connections):
        connection._why_closed = "it belongs to the process that this one was forked from"  # noqa: SLF001


os.register_at_fork(after_in_child=_leave_to_the_parent)


class _Greeting:
    """Who waits for HELLO's answer on a lane that belongs to no connection yet."""

    def __init__(self) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, call: Call) -> None:
        """HELLO was answered."""
        del call
        if not self.over.done():
            self.over.set_result(None)

    def lose(self, lane: AsyncLane, error: VswapError) -> None:
        """There will be no answer."""
        del lane
        if not self.over.done():
            self.over.set_exception(error)
