"""Floods beside a client that behaves, counted in one event loop: who has how many turns.

The server is the real one; clients and server share a thread, so that counts do not depend on which
process the machine lets run.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from support.fuzzing import make_shard
from support.wire import FREE, LOAD, PING, STORE, WITH_SLOTS, noise
from vswap.protocol import HEADER, HEADER_BYTES, Op, pack_header
from vswapd.shard import Shard
from vswapd_backends.base import PAGE_BYTES, SHORT_PAGES, TURN_PAGES

FLOODS: Final = 4
ROUNDS: Final = 60
HUGE: Final = 512
"""Pages of their requests."""
TURNS: Final = 5
"""Of the loop, that a request with its reply takes a client here, from sending it to going on: one
to be received, one for the reply, and one each until its task is awake; with one to spare."""
_SETTINGS: Final = (
    "server.shards=1",
    "server.max_connections=32",
    "server.max_batch=512",
    "server.buffer_memory=32M",
    "table.max_slots=65536",
    "pool.max=64M",
    "pool.reserve=0",
)


class Line:
    """One client, in the server's own event loop."""

    def __init__(self, shard: Shard) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX)
        self.sock.setblocking(False)
        shard.server.welcome(theirs)
        self.answered = 0

    async def send(self, op: int, body: bytes = b"", count: int = 0, flags: int = 0) -> None:
        data = pack_header(op, len(body), count=count, flags=flags) + body
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def reply(self) -> bytes:
        length, _, _, status, *_ = HEADER.unpack(await self._read(HEADER_BYTES))
        body = await self._read(length - HEADER_BYTES)
        assert status == 0, body
        self.answered += 1
        return body

    async def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = await asyncio.get_running_loop().sock_recv(self.sock, count - len(data))
            assert piece
            data += piece
        return data

    async def ask(self, op: int, body: bytes = b"", count: int = 0, flags: int = 0) -> bytes:
        await self.send(op, body, count, flags)
        return await self.reply()

    async def work(self, rounds: int) -> None:
        """What a client does that behaves."""
        pages = noise(4)
        for _ in range(rounds):
            slots = await self.ask(STORE, pages, 4)
            assert await self.ask(LOAD, slots, 4) == pages
            await self.ask(FREE, slots, 4)


async def _for_ever(line: Line, op: int, body: bytes, count: int, flags: int) -> None:
    """Send requests without end, and read the replies as they come."""

    async def send() -> None:
        while True:
            await line.send(op, body, count, flags)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        while True:
            await line.reply()


@contextlib.asynccontextmanager
async def shard() -> AsyncIterator[Shard]:
    made = make_shard(_SETTINGS)
    try:
        yield made
    finally:
        await made.server.stop(30)
        made.driver.close()


async def _count(kind: str) -> tuple[int, list[int]]:
    """How many requests a client had answered, and each of the floods beside it."""
    async with shard() as made:
        good = Line(made)
        await good.ask(Op.HELLO)
        lines = [Line(made) for _ in range(FLOODS)]
        floods = []
        for line in lines:
            await line.ask(Op.HELLO)
            pages = noise(HUGE)
            match kind:
                case "pings":
                    what = (PING, b"", 0, 0)
                case "huge stores":
                    slots = await line.ask(STORE, pages, HUGE)
                    what = (STORE, slots + pages, HUGE, WITH_SLOTS)
                case _:
                    slots = await line.ask(STORE, pages, HUGE)
                    what = (LOAD, slots, HUGE, 0)
            floods.append(asyncio.create_task(_for_ever(line, *what)))
        before = [line.answered for line in lines]
        first = good.answered
        async with asyncio.timeout(100):
            await good.work(ROUNDS)
        after = [line.answered for line in lines]
        for flood in floods:
            flood.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        for line in (good, *lines):
            line.sock.close()
        found = [b - a for a, b in zip(before, after, strict=True)]
        return good.answered - first, found


def test_many_small_requests_have_no_more_turns_than_others() -> None:
    """While a client is served once, each flood has been served as often as the loop has turned."""
    served, floods = asyncio.run(_count("pings"))
    assert served == 3 * ROUNDS
    assert all(count <= TURNS * served for count in floods), floods
    assert sum(floods) > 0


@pytest.mark.parametrize("kind", ["huge stores", "huge loads"])
def test_all_large_requests_together_have_one_turn_in_each_round(kind: str) -> None:
    """However many flood: while a client is served once, so many pages of theirs are at most."""
    served, floods = asyncio.run(_count(kind))
    assert served == 3 * ROUNDS
    # What was almost done at the beginning is not to be counted.
    pages = (sum(floods) - FLOODS) * HUGE
    assert pages <= TURNS * served * TURN_PAGES, floods
    assert sum(floods) > 0


class Eager(socket.socket):
    """The daemon's end of a connection, whose other end takes at once whatever is sent."""

    def __init__(self, fd: int, other: socket.socket) -> None:
        super().__init__(fileno=fd)
        self.other = other
        self.taken = bytearray()
        self.turns: Counter[int] = Counter()
        """Bytes sent, by round of the loop."""
        self.news = asyncio.Event()
        self.round = 0
        self._count_rounds()

    def _count_rounds(self) -> None:
        self.round += 1
        if self.fileno() >= 0:
            asyncio.get_running_loop().call_soon(self._count_rounds)

    def sendmsg(self, *args: Any) -> int:
        """Send, and be read from, before anybody else has a turn."""
        count = super().sendmsg(*args)
        self.turns[self.round] += count
        end = len(self.taken) + count
        while len(self.taken) < end:
            self.taken += self.other.recv(end - len(self.taken))
        self.news.set()
        return count

    async def reply(self) -> bytes:
        """The body of the one reply that there will be."""
        while len(self.taken) < HEADER_BYTES or len(self.taken) < HEADER.unpack_from(self.taken)[0]:
            self.news.clear()
            await self.news.wait()
        body = bytes(self.taken[HEADER_BYTES:])
        self.taken.clear()
        return body


async def _send_to_an_eager_client() -> tuple[bool, list[int]]:
    """Whether a huge load is answered rightly, and the bytes sent in the loop's rounds."""
    async with shard() as made:
        line = Line(made)  # for `send` alone
        line.sock.close()
        line.sock, theirs = socket.socketpair(socket.AF_UNIX)
        line.sock.setblocking(False)
        eager = Eager(theirs.detach(), line.sock)
        made.server.welcome(eager)
        pages = noise(HUGE)
        async with asyncio.timeout(100):
            await line.send(Op.HELLO)
            await eager.reply()
            await line.send(STORE, pages, HUGE)
            slots = await eager.reply()
            eager.turns.clear()
            await line.send(LOAD, slots, HUGE)
            right = await eager.reply() == pages
        line.sock.close()
        return right, list(eager.turns.values())


def test_a_client_that_reads_at_once_is_not_sent_all_at_once() -> None:
    """However fast a huge reply is taken, others have their turns between its parts."""
    right, turns = asyncio.run(_send_to_an_eager_client())
    assert right
    assert sum(turns) == HEADER_BYTES + HUGE * PAGE_BYTES
    assert max(turns) <= SHORT_PAGES * PAGE_BYTES
