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
from support.wire import FREE, LOAD, PING, STATUS, STORE, WITH_SLOTS, noise
from vswap.protocol import HEADER, HEADER_BYTES, Op, Status, pack_header
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
                case "statuses":
                    what = (STATUS, b"", 0, 0)
                case "lists":
                    await line.ask(STORE, pages, HUGE)
                    what = (Op.LIST, bytes(8), HUGE, 0)
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


@pytest.mark.parametrize("kind", ["statuses", "lists"])
def test_small_requests_that_are_long_work_stand_in_line(kind: str) -> None:
    """They are short to ask for: all that flood with them together have one in each round."""
    served, floods = asyncio.run(_count(kind))
    assert served == 3 * ROUNDS
    assert 0 < sum(floods) <= TURNS * served, floods


@pytest.mark.parametrize("kind", ["huge stores", "huge loads"])
def test_all_large_requests_together_have_one_turn_in_each_round(kind: str) -> None:
    """However many flood: while a client is served once, so many pages of theirs are at most."""
    served, floods = asyncio.run(_count(kind))
    assert served == 3 * ROUNDS
    # What was almost done at the beginning is not to be counted.
    pages = (sum(floods) - FLOODS) * HUGE
    assert pages <= TURNS * served * TURN_PAGES, floods
    assert sum(floods) > 0


class Rounds:
    """Counts the rounds of the loop, and what is moved in each."""

    def __init__(self) -> None:
        self.now = 0
        self.moved: Counter[int] = Counter()
        """Bytes, received or sent, by round."""
        self._handle = asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self.now += 1
        self._handle = asyncio.get_running_loop().call_soon(self._next)

    def stop(self) -> None:
        self._handle.cancel()

    @property
    def most(self) -> int:
        """Bytes in the round with most of them."""
        return max(self.moved.values())


class Eager(socket.socket):
    """The daemon's end of a connection whose client is as fast as can be.

    What the daemon sends is taken at once, and whatever room it makes is filled at once.
    """

    def __init__(self, fd: int, other: socket.socket, rounds: Rounds) -> None:
        super().__init__(fileno=fd)
        self.other = other
        self.rounds = rounds
        self.to_send = memoryview(b"")
        self.taken = bytearray()
        self.news = asyncio.Event()

    def sendmsg(self, *args: Any) -> int:
        """Send, and be read from, before anybody else has a turn."""
        count = super().sendmsg(*args)
        self.rounds.moved[self.rounds.now] += count
        end = len(self.taken) + count
        while len(self.taken) < end:
            self.taken += self.other.recv(end - len(self.taken))
        self.news.set()
        return count

    def recv_into(self, *args: Any) -> int:
        """Receive, and find as much again."""
        count = super().recv_into(*args)
        self.rounds.moved[self.rounds.now] += count
        self.news.set()
        self.fill()
        return count

    def fill(self) -> None:
        """Send what there is room for."""
        with contextlib.suppress(BlockingIOError):
            while self.to_send:
                self.to_send = self.to_send[self.other.send(self.to_send) :]

    async def until(self, moved: int) -> None:
        """Wait until so many bytes have been moved, by all."""
        while self.rounds.moved.total() < moved:
            self.news.clear()
            await self.news.wait()

    async def ask(self, op: int, body: bytes = b"", count: int = 0) -> tuple[int, bytes]:
        """One request; the reply's status and body."""
        self.taken.clear()
        self.to_send = memoryview(pack_header(op, len(body), count=count) + body)
        self.fill()
        while len(self.taken) < HEADER_BYTES or len(self.taken) < HEADER.unpack_from(self.taken)[0]:
            self.news.clear()
            await self.news.wait()
        return HEADER.unpack_from(self.taken)[3], bytes(self.taken[HEADER_BYTES:])


MOST: Final = (SHORT_PAGES + 2) * PAGE_BYTES
"""Bytes that a client's connection moves in one turn, headers and all."""


@contextlib.asynccontextmanager
async def _eager_clients(count: int = 1) -> AsyncIterator[tuple[Shard, list[Eager]]]:
    """Clients that have been greeted; all count into the same rounds."""
    async with shard() as made:
        rounds = Rounds()
        with contextlib.ExitStack() as stack:
            stack.callback(rounds.stop)
            clients = []
            for _ in range(count):
                ours, theirs = socket.socketpair(socket.AF_UNIX)
                stack.enter_context(ours)
                ours.setblocking(False)
                eager = Eager(theirs.detach(), ours, rounds)
                made.server.welcome(eager)
                clients.append(eager)
            async with asyncio.timeout(100):
                for eager in clients:
                    await eager.ask(Op.HELLO)
                rounds.moved.clear()
                yield made, clients


def test_a_client_that_is_fast_is_not_served_all_at_once() -> None:
    """However fast it sends and reads, others have their turns between the parts of it."""

    async def main() -> None:
        async with _eager_clients() as (_, [eager]):
            pages = noise(HUGE)
            status, slots = await eager.ask(STORE, pages, HUGE)
            assert status == 0
            assert await eager.ask(LOAD, slots, HUGE) == (0, pages)
            assert eager.rounds.moved.total() > 2 * len(pages)
            assert eager.rounds.most <= MOST

    asyncio.run(main())


def test_many_that_are_fast_stand_in_one_line() -> None:
    """All that receives or sends much together moves one part in a round, and the end of one."""

    async def main() -> None:
        async with _eager_clients(6) as (_, clients):
            pages = noise(HUGE)
            stored = await asyncio.gather(*(one.ask(STORE, pages, HUGE) for one in clients))
            assert {status for status, _ in stored} == {0}
            assert clients[0].rounds.most <= 2 * MOST
            clients[0].rounds.moved.clear()
            pairs = zip(clients, stored, strict=True)
            loads = (one.ask(LOAD, slots, HUGE) for one, (_, slots) in pairs)
            assert await asyncio.gather(*loads) == [(0, pages)] * len(clients)
            assert clients[0].rounds.most <= 2 * MOST

    asyncio.run(main())


def test_what_nobody_wants_is_not_skipped_all_at_once() -> None:
    """A large body whose header is refused: others have their turns between the parts of it."""

    async def main() -> None:
        async with _eager_clients() as (_, [eager]):
            status, _ = await eager.ask(200, noise(HUGE))
            assert status == Status.UNKNOWN_OP
            assert eager.rounds.moved.total() > HUGE * PAGE_BYTES
            assert eager.rounds.most <= MOST

    asyncio.run(main())


@pytest.mark.parametrize("later", [0, 1])
def test_who_is_cut_off_while_standing_in_line_leaves_it(
    caplog: pytest.LogCaptureFixture, later: int
) -> None:
    """In the middle of a large body, or of a large reply: nothing is received or sent any more."""

    async def main(op: int) -> None:
        async with _eager_clients() as (made, [eager]):
            pages = noise(HUGE)
            _, slots = await eager.ask(STORE, pages, HUGE)
            eager.rounds.moved.clear()
            asked = asyncio.create_task(eager.ask(op, slots if op == LOAD else pages, HUGE))
            await eager.until(PAGE_BYTES * HUGE // 4)
            for _ in range(later):  # in one of two rounds it stands in line, in the other not
                await asyncio.sleep(0)
            assert not asked.done()
            await made.server.stop(0)
            asked.cancel()
            before = eager.rounds.moved.total()
            for _ in range(20):
                await asyncio.sleep(0)
            assert eager.rounds.moved.total() == before

    with caplog.at_level("WARNING"):
        for op in (STORE, LOAD):
            asyncio.run(main(op))
    assert not [one for one in caplog.records if "cut off" not in one.message], caplog.text
