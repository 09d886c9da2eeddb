"""Greetings in an event loop: finding a daemon, saying HELLO, coming back to one that was away.

Theory: as for `vswap.greeting`, which has what both clients need.

Invariants:
- What a greeting has opened is closed again if it comes to nothing: sockets, descriptors.

This module must not know what the calls mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vswap.address import Search
from vswap.aio_connection import AsyncConnection
from vswap.aio_lane import AsyncLane, open_async, silence, told
from vswap.errors import Broken, ConnectionLost, NoDaemon, SpaceBusy, Stopping, VswapError
from vswap.greeting import (
    AWAY,
    COMING_BACK,
    DYING_S,
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    apart,
    away,
    check_same,
    forgo,
    not_answering,
    not_back,
    silent,
)
from vswap.peer import Peer, hello, parse_hello
from vswap.waiting import Wait, check_patience, check_timeout
from vswap.window import Window, window_of

if TYPE_CHECKING:
    from pathlib import Path

    from vswap.planner import Ask, Call


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
        BadArgument: some of this makes no sense.
        NoDaemon, ConnectionRefused, ConnectionLost, ProtocolError: there is no connection.
    """
    silence_s, patience_s = check_timeout(silence_s), check_patience(patience_s)

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
    connection.said = lambda: silent(found)
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
        search = Search(self.path)
        gone = self.patience_s > 0
        wait = away(search, self.patience_s) if gone else not_answering(search, self.silence_s)
        with told(wait):
            while True:
                call = hello(self.client, shard=shard, token=self.token, name=self.name)
                try:
                    lane, there, *_ = await _greet(search, self.silence_s, call, wait, away=gone)
                    break
                except SpaceBusy:
                    # The client before this one has gone, and this shard is about to see it.
                    if loop.time() > begin + DYING_S:
                        raise
                except AWAY as error:
                    stays_away = isinstance(error, Stopping) and not self.kept
                    if stays_away or not gone or wait.over():
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
        search = Search(self.path)
        wait = away(search, self.patience_s)
        pause = FIRST_PAUSE_S
        pause_first = apart(lane.conversation.interrupt())
        with told(wait):
            while True:
                try:
                    return await self._take_up(lane, search, wait, pause_first)
                except COMING_BACK as error:
                    if (wait.left_s or 0.0) < pause:
                        raise not_back(why, self.patience_s, error) from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _take_up(self, lane: AsyncLane, search: Search, wait: Wait, pause_s: float) -> Peer:
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
        sock, _ = await open_async(search, wait)
        lane.reopen(sock)
        try:
            there = await _say_hello(lane, call, None, wait, away=True)
            check_same(there, lane.shard)
            await _be_quiet(lane, pause_s)
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
    search = Search(path)
    wait = not_answering(search, silence_s)
    with told(wait):
        while True:
            try:
                return await _greet(search, silence_s, call(), wait)
            except Broken:
                if loop.time() > end:
                    raise
            await asyncio.sleep(FIRST_PAUSE_S)


async def _greet(
    search: Search, silence_s: float | None, call: Ask, wait: Wait, *, away: bool = False
) -> tuple[AsyncLane, Peer, Path, Window | None]:
    """A lane that HELLO has been said on, what was answered, where, and the window.

    Args: as for `greeting._lane`.
    """
    sock, found = await open_async(search, wait)
    wait.sign()
    lane = AsyncLane(sock, _Greeting())
    try:
        peer = await _say_hello(lane, call, silence_s, wait, away=away)
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
    lane: AsyncLane, call: Ask, silence_s: float | None, wait: Wait, *, away: bool
) -> Peer:
    """Say HELLO, and what was answered. `away`: as for `vswap.lane.Lane.greet`."""
    lane.owner = greeting = _Greeting()
    lane.greet(call)
    try:
        async with asyncio.timeout(wait.left_s):
            await greeting.over
    except TimeoutError:
        silent = NoDaemon("nobody answers there") if away else silence(wait.text, silence_s)
        raise silent from None
    wait.end()
    return parse_hello(call.result())


async def _be_quiet(lane: AsyncLane, seconds: float) -> None:
    """As Lane.be_quiet."""
    lane.owner = quiet = _Greeting()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await quiet.over


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
