"""A daemon that dies and comes back with what it held: calls go on as if nothing had happened.

The daemon here is a stand-in that keeps its pages in this process, dies at any point of a request,
and remembers the last change of each lane, as docs/protocol.md has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vswap
import vswap.aio
from support.fake_daemon import FakeDaemon
from vswap.protocol import HEADER, HEADER_BYTES, PAGE_BYTES, Header, Op, Status

SHARDS = 2
FRAMES = 300
"""Pages of a call that is several frames."""


class MortalDaemon(FakeDaemon):
    """Dies where `deaths` says, and is back at once.

    A death is (operation, "before" it is carried out | "after" that | "within" its reply): the next
    request of this operation meets it.
    """

    def __init__(self, path: Path, *, shards: int = 1, **more: Any) -> None:
        super().__init__(
            path, shards=shards, token="7" * 32, resumable=True, kept=True, window=0, **more
        )
        self.shards = shards
        self.deaths: list[tuple[Op, str]] = []
        self.died = 0
        self.dying = False
        self.spared = 0
        """Requests that no death meets."""
        self.mercy = 0
        """So many are spared after each death: what meets three is given up."""
        self.full = 0
        """Stores that are rejected."""
        self.life = 0
        self.forgets = False
        self.last: dict[int, dict[str, Any]] = {}
        """By shard: its lane's last change."""
        self.next_of = dict.fromkeys(range(shards), 1)
        self.resumed = 0
        self.executed: list[tuple[int, int]] = []
        """Shard and id of each request that was carried out and changed anything."""

    def _serve(self, connection: socket.socket) -> None:
        shard, life = 0, self.life
        with contextlib.suppress(ConnectionError), connection.makefile("rb") as stream:
            while len(raw := stream.read(HEADER_BYTES)) == HEADER_BYTES:
                header = Header(*_fields(raw))
                body = stream.read(header.body_bytes)
                if len(body) < header.body_bytes:
                    break
                self.before(header, shard)
                with self._lock:
                    if life != self.life:
                        break  # the dead carry nothing out
                    self.requests.append(header)
                    if header.op == Op.HELLO:
                        said = json.loads(body)
                        shard = said.get("shard", 0)
                        reply = self._greet(header, said, shard)
                    else:
                        reply = self._carry_out(header, body, shard)
                    if self.dying:
                        self.dying = False
                        with contextlib.suppress(OSError):
                            connection.send(reply, socket.MSG_DONTWAIT)
                        self.hang_up()
                        break
                connection.sendall(reply)
                self.after(header, shard)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def before(self, header: Header, shard: int) -> None:
        """A request has arrived at a shard, and will be carried out after this."""

    def after(self, header: Header, shard: int) -> None:
        """It has been answered."""

    def hang_up(self) -> None:
        self.life += 1
        super().hang_up()

    def _greet(self, header: Header, said: dict[str, Any], shard: int) -> bytes:
        last = None
        if said.get("resume"):
            self.resumed += 1
            assert said["token"] == "7" * 32
            if self.forgets:
                return self.refusal(header, Status.SPACE_LOST, "no such space")
            last = self.last.get(shard)
        answer = self.hello | {"shard": shard, "last": last}
        return self.reply(header, 0, json.dumps(answer).encode())

    def _carry_out(self, header: Header, body: bytes, shard: int) -> bytes:
        how = None
        if self.spared:
            self.spared -= 1
        elif self.deaths and self.deaths[0][0] == header.op:
            how = self.deaths.pop(0)[1]
            self.died += 1
            self.dying = True
            self.spared = self.mercy
        if how == "before":
            return b""
        self._next_slot = (shard << 56) + self.next_of[shard]
        room, self._capacity = self._capacity, 0 if self.full else self._capacity
        self.full = max(0, self.full - 1)
        status, reply_body, count, flags = self.execute(header, body)
        self._capacity = room
        self.next_of[shard] = self._next_slot & ((1 << 56) - 1)
        if header.op in {Op.STORE, Op.FREE}:
            self.executed.append((shard, header.request_id))
            listed = np.frombuffer(reply_body[: 8 * count], np.uint64).tolist()
            self.last[shard] = {
                "request": header.request_id,
                "status": int(status),
                "flags": int(flags),
                "slots": listed,
            }
        reply = self.reply(header, status, reply_body, count, flags)
        return {None: reply, "after": b"", "within": reply[: len(reply) // 2]}[how]


def _fields(raw: bytes) -> tuple[int, ...]:
    length, _, op, status, count, flags, request = HEADER.unpack(raw)
    return length, op, status, count, flags, request


@pytest.fixture(params=[1, SHARDS])
def mortal(socket_path: Path, request: pytest.FixtureRequest) -> Iterator[MortalDaemon]:
    with MortalDaemon(socket_path, shards=request.param) as daemon:
        yield daemon


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * PAGE_BYTES)


HOW = ["before", "after", "within"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("pages", [1, 100, FRAMES])
@pytest.mark.parametrize("op", [Op.STORE, Op.LOAD, Op.FREE])
def test_a_call_goes_on_over_a_death(mortal: MortalDaemon, op: Op, pages: int, how: str) -> None:
    """Whenever the daemon dies, each request takes effect once, and the caller notices nothing."""
    with vswap.connect(mortal.path, timeout=30) as space:
        if op is Op.STORE:
            mortal.deaths = [(op, how)]
        content = noise(pages)
        slots = space.store(content)
        assert len(mortal.pages) == pages
        mortal.deaths = [(Op.STORE, how)] if op is Op.STORE else []
        space.store(content[::-1], slots=slots)
        mortal.deaths = [(op, how)] if op is not Op.STORE else []
        assert space.load(slots) == content[::-1]
        space.free(slots)
        assert not mortal.pages
        assert mortal.died
        assert mortal.resumed
        assert len(set(mortal.executed)) == len(mortal.executed)


def test_a_death_between_two_calls_is_not_noticed(mortal: MortalDaemon) -> None:
    """The next call finds the connection broken, and takes it up again."""
    with vswap.connect(mortal.path, timeout=30) as space:
        slots = space.store(noise(FRAMES))
        for _ in range(3):
            mortal.hang_up()
            assert space.load(slots) == noise(FRAMES)
            mortal.hang_up()
            space.ping()
        assert space.status() == {"state": "running"}


@pytest.mark.parametrize("full", [1, 2])
@pytest.mark.parametrize("how", HOW)
def test_what_was_in_doubt_is_known_after_a_rejection(
    socket_path: Path, how: str, full: int
) -> None:
    """One frame is rejected, the next meets a death: what became of each slot is told."""
    with (
        MortalDaemon(socket_path) as mortal,
        vswap.connect(mortal.path, timeout=30) as space,
    ):
        slots = space.store(noise(256))
        mortal.spared, mortal.full = 1, full
        mortal.deaths = [(Op.STORE, how)]
        with pytest.raises(vswap.Rejected) as caught:
            space.store(noise(256, 1), slots=slots)
        done = set(caught.value.done.tolist())
        assert done | set(caught.value.slots.tolist()) == set(slots.tolist())
        for at, slot in enumerate(slots.tolist()):
            there = noise(256, 1)[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
            assert mortal.pages[slot] == (there if slot in done else None)


class HalfFullDaemon(MortalDaemon):
    """Its first shard takes one frame and rejects the next; then the second shard dies."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, shards=2)
        self.rejected = threading.Event()
        self.seen = 0

    def before(self, header: Header, shard: int) -> None:
        if header.op == Op.STORE and shard == 1:
            self.rejected.wait(30)

    def _carry_out(self, header: Header, body: bytes, shard: int) -> bytes:
        if header.op == Op.STORE and shard == 0:
            self.seen += 1
            self.full = int(self.seen == 2)
        reply = super()._carry_out(header, body, shard)
        if self.seen == 2:
            self.deaths = [(Op.STORE, "before")]
            self.seen += 1
        return reply

    def after(self, header: Header, shard: int) -> None:
        if self.seen > 2:
            self.rejected.set()


def test_a_rejected_store_is_undone_although_a_shard_dies(socket_path: Path) -> None:
    """What was stored is freed again when the frame that was in doubt is given up."""
    with (
        HalfFullDaemon(socket_path) as daemon,
        vswap.connect(socket_path, timeout=5) as space,
        pytest.raises(vswap.Rejected),
    ):
        space.store(noise(4 * 128))
    assert daemon.died
    assert not daemon.pages


def test_a_space_that_is_gone_is_told(mortal: MortalDaemon) -> None:
    """A daemon that comes back without the space ends it."""
    mortal.forgets = True
    with vswap.connect(mortal.path, timeout=30) as space:
        slots = space.store(noise(3))
        mortal.hang_up()
        with pytest.raises(vswap.SpaceLost, match="no such space"):
            space.load(slots)
        assert space.closed
        with pytest.raises(vswap.ConnectionLost, match="no such space"):
            space.load(slots)


def test_a_rejection_is_not_lost_with_the_daemon(socket_path: Path) -> None:
    """What the daemon decided before it died is what the caller is told."""
    with (
        MortalDaemon(socket_path, capacity=5) as mortal,
        vswap.connect(mortal.path, timeout=30) as space,
    ):
        slots = space.store(noise(3))
        mortal.deaths = [(Op.STORE, "after")]
        with pytest.raises(vswap.Rejected) as caught:
            space.store(noise(6))
        assert caught.value.reason == "pool_full"
        mortal.deaths = [(Op.FREE, "after")]
        with pytest.raises(vswap.BadSlot):
            space.free([*slots, 999])
        assert space.load(slots) == noise(3)


@pytest.mark.parametrize("how", HOW)
def test_undoing_a_store_goes_on_over_a_death(socket_path: Path, how: str) -> None:
    """A large store that is refused leaves nothing, though the daemon dies while it is undone."""
    with (
        MortalDaemon(socket_path, capacity=400) as mortal,
        vswap.connect(mortal.path, timeout=30) as space,
    ):
        mortal.deaths = [(Op.FREE, how)]
        with pytest.raises(vswap.Rejected):
            space.store(noise(600))
        assert mortal.died == 1
        assert not mortal.pages


def test_a_daemon_that_stays_away_is_given_up(mortal: MortalDaemon) -> None:
    """After `patience` the call fails with what happened."""
    with vswap.connect(mortal.path, timeout=30, patience=0.05) as space:
        slots = space.store(noise(1))
        mortal._listener.shutdown(socket.SHUT_RDWR)
        mortal.hang_up()
        with pytest.raises(vswap.ConnectionLost, match=r"did not come back within 0\.05 s"):
            space.load(slots)
        assert space.closed


def test_a_daemon_that_keeps_nothing_is_not_waited_for(fake: FakeDaemon) -> None:
    """Without `resumable` the end of a connection is the end of the space, at once."""
    with vswap.connect(fake.path, timeout=30) as space:
        fake.hang_up()
        with pytest.raises(vswap.ConnectionLost):
            space.ping()
    assert [each.op for each in fake.requests].count(Op.HELLO) == 1


def test_without_patience_nobody_is_waited_for(mortal: MortalDaemon) -> None:
    """patience=0 is how it was before daemons came back."""
    with vswap.connect(mortal.path, timeout=30, patience=0) as space:
        mortal.hang_up()
        with pytest.raises(vswap.ConnectionLost):
            space.ping()
    for patience in (-1, float("nan")):
        with pytest.raises(ValueError, match="patience"):
            vswap.connect(mortal.path, patience=patience)


def test_a_daemon_that_stops_is_waited_for(mortal: MortalDaemon) -> None:
    """STOPPING is what a restart begins with."""
    with vswap.connect(mortal.path, timeout=30) as space:
        slots = space.store(noise(2))
        header = Header(HEADER_BYTES, 0, 0, 0, 0, 0)
        stopping = mortal.refusal(header, Status.STOPPING, "restarting")
        for connection in mortal._connections:
            with contextlib.suppress(OSError):
                connection.send(stopping)
        mortal.hang_up()
        assert space.load(slots) == noise(2)


def test_another_daemon_is_no_continuation(mortal: MortalDaemon) -> None:
    """One that answers as another shard, or keeps nothing, has not got the space."""
    for change in ({"resumable": False}, {"last": {"request": "x"}}):
        with vswap.connect(mortal.path, timeout=30) as space:
            before = mortal.hello
            mortal.hello = before | change
            if "last" in change:
                mortal.last[0] = change["last"]  # type: ignore[assignment]
            mortal.hang_up()
            with pytest.raises((vswap.SpaceLost, vswap.ProtocolError)):
                space.ping()
            mortal.hello = before


# For asyncio


def test_tasks_go_on_over_deaths(mortal: MortalDaemon) -> None:
    """Many tasks, a daemon that dies again and again, some calls cancelled: nothing is lost."""
    chooser = random.Random(3)
    mortal.deaths = [
        (chooser.choice([Op.STORE, Op.LOAD, Op.FREE]), chooser.choice(HOW)) for _ in range(25)
    ]
    mortal.mercy = 10

    async def one(space: vswap.aio.Space, seed: int) -> None:
        for turn in range(4):
            count = (1, 30, 200)[(seed + turn) % 3]
            content = noise(count, 10 * seed + turn)
            slots = await space.store(content)
            assert await space.load(slots) == content
            await space.store(content[::-1], slots=slots)
            assert await space.load(slots) == content[::-1]
            await space.free(slots)

    async def main() -> None:
        async with vswap.aio.connect(mortal.path, timeout=30) as space:
            async with asyncio.TaskGroup() as group:
                for seed in range(5):
                    group.create_task(one(space, seed))
                doomed = []
                for _ in range(10):
                    doomed.append(group.create_task(space.store(noise(150))))
                    for _ in range(chooser.randrange(6)):
                        await asyncio.sleep(0)
                    doomed[-1].cancel()
            mortal.deaths.clear()
            for task in doomed:
                if not task.cancelled():
                    await space.free(task.result())
            async with asyncio.timeout(30):
                # What the cancelled stores undo is under way, perhaps on a lane coming back.
                while mortal.pages:
                    await space.free(await space.store(noise(FRAMES)))

    asyncio.run(main())
    assert mortal.died >= 5
    assert len(set(mortal.executed)) == len(mortal.executed)


async def turn() -> None:
    """One round of the loop."""
    await asyncio.sleep(0)


@pytest.mark.parametrize("what", ["store", "overwrite", "load", "free"])
def test_what_nobody_waits_for_any_more_ends_nothing(mortal: MortalDaemon, what: str) -> None:
    """Cancelled while the daemon is away, with several requests of it unanswered."""

    async def main() -> None:
        async with asyncio.timeout(30), vswap.aio.connect(mortal.path, timeout=30) as space:
            kept = await space.store(noise(1))
            slots = await space.store(noise(2 * FRAMES))
            calls: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
                "store": lambda: space.store(noise(2 * FRAMES)),
                "overwrite": lambda: space.store(noise(2 * FRAMES), slots=slots),
                "load": lambda: space.load(slots),
                "free": lambda: space.free(slots),
            }
            op = {"load": Op.LOAD, "free": Op.FREE}.get(what, Op.STORE)
            mortal.deaths = [(op, "before")]
            task = asyncio.create_task(calls[what]())
            while not space._connection._returning:
                await turn()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert await space.load(kept) == noise(1)
            while space._connection._routes:
                await space.ping()
            if what == "free":
                assert len(mortal.pages) == 1

    asyncio.run(main())


def test_a_load_that_is_cancelled_while_the_daemon_is_away_lets_go_of_its_buffer(
    mortal: MortalDaemon,
) -> None:
    """Nothing holds the caller's memory until the daemon is back."""

    async def main() -> None:
        async with asyncio.timeout(30), vswap.aio.connect(mortal.path, timeout=30) as space:
            slots = await space.store(noise(FRAMES))
            target = bytearray(FRAMES * PAGE_BYTES)
            mortal.deaths = [(Op.LOAD, "within")]
            task = asyncio.create_task(space.load(slots, into=target))
            while not space._connection._returning:
                await turn()
            task.cancel()
            await asyncio.wait([task])
            target.clear()
            assert await space.load(slots) == noise(FRAMES)

    asyncio.run(main())


def test_tasks_are_told_of_a_lost_space(mortal: MortalDaemon) -> None:
    """All that wait get SpaceLost or what follows from it."""
    mortal.forgets = True

    async def main() -> None:
        async with vswap.aio.connect(mortal.path, timeout=30) as space:
            await space.store(noise(1))
            mortal.deaths = [(Op.STORE, "before")]
            found = await asyncio.gather(
                *(space.store(noise(2)) for _ in range(3)), return_exceptions=True
            )
            assert all(isinstance(each, vswap.ConnectionLost) for each in found)
            assert any(isinstance(each, vswap.SpaceLost) for each in found)
            assert space.closed

    asyncio.run(main())


def test_closing_while_it_is_away_ends_the_waiting(mortal: MortalDaemon) -> None:
    """close() does not wait for a daemon to come back, and leaves no task."""

    async def main() -> None:
        space = await vswap.aio.connect(mortal.path, timeout=30)
        await space.store(noise(1))
        mortal._listener.shutdown(socket.SHUT_RDWR)
        mortal.hang_up()
        call = asyncio.create_task(space.store(noise(1)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert space._connection._returning
        await space.close()
        with pytest.raises(vswap.ConnectionLost, match="closed"):
            await call
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


class MuteDaemon(MortalDaemon):
    """Says nothing but HELLO once it has died and come back."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.over = threading.Event()
        self.away = 0.0
        """Seconds until it is back."""

    def before(self, header: Header, shard: int) -> None:
        if self.life and header.op == Op.HELLO:
            self.over.wait(self.away)
        if self.resumed and header.op != Op.HELLO:
            self.over.wait(30)

    def __exit__(self, *more: object) -> None:
        self.over.set()
        super().__exit__(*more)


def test_a_daemon_that_is_silent_after_it_came_back_is_given_up(socket_path: Path) -> None:
    """For tasks too, also if it was away for longer than it may be silent."""
    with MuteDaemon(socket_path) as daemon, vswap.connect(socket_path, timeout=0.2) as space:
        slots = space.store(noise(1))
        daemon.hang_up()
        with pytest.raises(vswap.TimedOut):
            space.load(slots)

    async def main(daemon: MuteDaemon) -> None:
        space = await vswap.aio.connect(socket_path, timeout=0.2)
        slots = await space.store(noise(1))
        daemon.away = 0.5
        daemon.hang_up()
        async with asyncio.timeout(30):
            with pytest.raises(vswap.TimedOut):
                await space.load(slots)

    socket_path.unlink()
    with MuteDaemon(socket_path) as daemon:
        asyncio.run(main(daemon))


class HalfMuteDaemon(MortalDaemon):
    """One of its shards answers no load until it is over."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, shards=2)
        self.over = threading.Event()

    def before(self, header: Header, shard: int) -> None:
        if shard == 1 and header.op == Op.LOAD:
            self.over.wait(30)

    def __exit__(self, *more: object) -> None:
        self.over.set()
        super().__exit__(*more)


def test_a_shard_that_is_silent_is_given_up_though_others_answer(socket_path: Path) -> None:
    """Other tasks' calls do not keep one waiting that a shard does not answer."""

    async def main() -> None:
        async with asyncio.timeout(30), vswap.aio.connect(socket_path, timeout=0.2) as space:
            slots = await space.store(noise(FRAMES))
            while not (slots >= 1 << 56).any():  # the first shard was quick enough to take all
                slots = await space.store(noise(FRAMES))
            load = asyncio.create_task(space.load(slots[slots >= 1 << 56]))
            while not space.closed:
                with contextlib.suppress(vswap.ConnectionLost):
                    await space.ping()
            with pytest.raises(vswap.TimedOut):
                await load

    with HalfMuteDaemon(socket_path):
        asyncio.run(main())


class ConfusedDaemon(MortalDaemon):
    """Says that what it did not carry out was answered with one slot, however many pages it had."""

    def before(self, header: Header, shard: int) -> None:
        if header.op == Op.STORE:
            self.last[shard] = {
                "request": header.request_id,
                "status": 0,
                "flags": 0,
                "slots": [1],
            }


def test_an_answer_that_does_not_fit_is_no_answer(socket_path: Path) -> None:
    """A store is told of it, by a thread or a task, and does not wait for ever."""
    with ConfusedDaemon(socket_path) as daemon:
        daemon.deaths = [(Op.STORE, "before"), (Op.STORE, "before")]
        with (
            vswap.connect(socket_path, timeout=30) as space,
            pytest.raises(vswap.ProtocolError, match="2 pages was answered with 1 slots"),
        ):
            space.store(noise(2))

        async def main() -> None:
            async with asyncio.timeout(30), vswap.aio.connect(socket_path) as space:
                with pytest.raises(vswap.ProtocolError, match="2 pages was answered with 1 slots"):
                    await space.store(noise(2))
                assert space.closed

        asyncio.run(main())
