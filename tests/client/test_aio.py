"""The asyncio client: the same results and errors, many tasks at once, cancellation anywhere."""

from __future__ import annotations

import asyncio
import mmap
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vswap
import vswap.aio
from support.fake_daemon import FakeDaemon
from vswap.aio_connection import AsyncConnection
from vswap.aio_lane import AsyncLane
from vswap.pages import Pages
from vswap.peer import FRAME_PAGES
from vswap.planner import Call, Load, Store
from vswap.protocol import HEADER_BYTES, PAGE_BYTES, Header, Op, Status, pack_header

MANY = 5 * FRAME_PAGES + 3


def random_pages(count: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(count * PAGE_BYTES)


def run(path: Path, body: Callable[[vswap.aio.Space], Coroutine[Any, Any, None]]) -> None:
    """Run `body` with an open space, in a loop whose own errors fail the test."""
    problems: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, it: problems.append(it))
        async with asyncio.timeout(60), vswap.aio.connect(path) as space:
            await body(space)

    asyncio.run(main())
    assert not problems


def test_pages_come_back(fake: FakeDaemon) -> None:
    """Everything the blocking client does, awaited."""

    async def body(space: vswap.aio.Space) -> None:
        pages = random_pages(MANY)
        slots = await space.store(pages)
        assert await space.load(slots) == pages
        new = random_pages(MANY, seed=2)
        await space.store(new, slots=slots)
        target = bytearray(len(new))
        assert await space.load(slots, into=target) is target
        assert target == new
        await space.free(slots)
        assert not fake.pages
        await space.ping()
        assert await space.status() == {"state": "running"}
        assert (await space.store(b"")).shape == (0,)
        assert "fake 1" in repr(space)

    run(fake.path, body)


def test_objects_come_back(fake: FakeDaemon) -> None:
    """put, get, get(into=) and free of handles; the block frees."""

    async def body(space: vswap.aio.Space) -> None:
        array = np.asfortranarray(np.random.default_rng(1).random((333, 77)))
        async with await space.put(array) as handle:
            got = await handle.get()
            assert got.flags.f_contiguous
            assert np.array_equal(got, array)
            target = np.empty_like(array)
            assert await handle.get(into=target) is target
            assert np.array_equal(target, array)
            assert len(handle) == 333
        assert handle.freed
        assert not fake.pages
        with pytest.raises(vswap.HandleFreed):
            await handle.get()
        with pytest.raises(vswap.HandleFreed):
            await handle.free()

    run(fake.path, body)


def test_connect_can_be_awaited(fake: FakeDaemon) -> None:
    """`await connect()` gives a space that is itself a context manager."""

    async def main() -> None:
        async with await vswap.aio.connect(fake.path) as space:
            await space.ping()
        assert space.closed
        with pytest.raises(vswap.ConnectionLost, match="connect"):
            await space.ping()

    asyncio.run(main())


def test_many_tasks_share_a_space(fake: FakeDaemon) -> None:
    """Calls of many tasks at once are pipelined and each gets its own answer."""

    async def body(space: vswap.aio.Space) -> None:
        async def work(seed: int) -> None:
            pages = random_pages(1 + seed * 13 % 200, seed)
            slots = await space.store(pages)
            assert await space.load(slots) == pages
            await space.free(slots)

        async with asyncio.TaskGroup() as group:
            for seed in range(100):
                group.create_task(work(seed))
        assert not fake.pages

    run(fake.path, body)


class GatedDaemon(FakeDaemon):
    """Holds the replies to STORE back until there are `gate` of them."""

    gate = 2

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        reply = b"".join(super().answer(header, body))
        if header.op != Op.STORE:
            yield reply
            return
        self.held = [*getattr(self, "held", []), reply]
        if len(self.held) == self.gate:
            yield b"".join(self.held)
            self.held = []


def test_calls_of_several_tasks_are_on_the_way_together(socket_path: Path) -> None:
    """A second task's request does not wait for the first one's reply."""
    with GatedDaemon(socket_path):

        async def body(space: vswap.aio.Space) -> None:
            page = bytes(PAGE_BYTES)
            await asyncio.gather(space.store(page), space.store(page))

        run(socket_path, body)


def test_typed_errors_leave_the_others_alone(socket_path: Path) -> None:
    """One task's bad slot is its own; a store that does not fit leaves nothing behind."""
    with FakeDaemon(socket_path, capacity=2 * FRAME_PAGES) as fake:

        async def body(space: vswap.aio.Space) -> None:
            results = await asyncio.gather(
                space.load([999]),
                space.store(bytes(PAGE_BYTES)),
                space.store(random_pages(MANY)),
                return_exceptions=True,
            )
            assert isinstance(results[0], vswap.BadSlot)
            assert not isinstance(results[1], BaseException)
            assert isinstance(results[2], vswap.Rejected)
            assert len(fake.pages) == 1

        run(socket_path, body)


def test_bad_buffers_are_refused_before_anything_is_sent(fake: FakeDaemon) -> None:
    """The same checks as in the blocking client."""

    async def body(space: vswap.aio.Space) -> None:
        sent = len(fake.requests)
        with pytest.raises(vswap.BadBuffer):
            await space.store(b"x")
        with pytest.raises(vswap.BadBuffer):
            await space.load([1], into=bytearray(5))
        assert len(fake.requests) == sent

    run(fake.path, body)


async def cancel(task: asyncio.Task[Any]) -> bool:
    """Cancel; whether it was cancelled before it was done."""
    task.cancel()
    await asyncio.wait([task])
    return task.cancelled()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13, 21])
def test_a_cancelled_store_is_undone(fake: FakeDaemon, steps: int) -> None:
    """Wherever it is cancelled, its pages are freed again and the connection stays in step."""

    async def body(space: vswap.aio.Space) -> None:
        kept = random_pages(MANY)
        slots = await space.store(kept)
        task = asyncio.create_task(space.store(random_pages(MANY, seed=2)))
        for _ in range(steps):
            await asyncio.sleep(0)
        if not await cancel(task):
            await space.free(task.result())
        for _ in range(3):
            await space.ping()  # behind all that the cancelled call still sends
        assert await space.load(slots) == kept
        while len(fake.pages) > MANY:
            await space.ping()

    run(fake.path, body)


def test_a_store_that_was_over_when_cancelled_is_undone(
    fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled between its last answer and its waking up, its slots are freed: nobody has them."""

    async def body(space: vswap.aio.Space) -> None:
        connection = space._connection
        answered = connection.answered

        def answered_and_cancelled(call: Call) -> None:
            answered(call)
            task.cancel()

        monkeypatch.setattr(connection, "answered", answered_and_cancelled)
        task = asyncio.create_task(space.store(bytes(PAGE_BYTES)))
        await asyncio.wait([task])
        assert task.cancelled()
        await space.ping()
        await space.ping()
        assert not fake.pages

    run(fake.path, body)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13, 21])
def test_a_cancelled_load_touches_its_buffer_no_more(fake: FakeDaemon, steps: int) -> None:
    """From the cancellation on the buffer is the caller's, and the connection stays in step."""

    async def body(space: vswap.aio.Space) -> None:
        pages = random_pages(MANY)
        slots = await space.store(pages)
        target = bytearray(len(pages))
        task = asyncio.create_task(space.load(slots, into=target))
        for _ in range(steps):
            await asyncio.sleep(0)
        await cancel(task)
        target[:] = b"\7" * len(target)
        assert await space.load(slots) == pages
        assert target == b"\7" * len(target)
        target.clear()  # nothing holds its memory either

    run(fake.path, body)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 21])
def test_a_cancelled_free_is_carried_through(socket_path: Path, steps: int) -> None:
    """Wherever it is cancelled, nothing is left of what was to be freed; so for a handle."""

    with FakeDaemon(socket_path, max_pipeline=1) as fake:

        async def body(space: vswap.aio.Space) -> None:
            slots = await space.store(random_pages(MANY))
            handle = await space.put(random_pages(MANY))
            for free in (space.free(slots), handle.free()):
                task = asyncio.create_task(free)
                for _ in range(steps):
                    await asyncio.sleep(0)
                await cancel(task)
            while space._connection._routes:
                await space.ping()
            assert not fake.pages

        run(socket_path, body)


class HoldingDaemon(FakeDaemon):
    """Answers nothing but HELLO until it is asked to go on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go = threading.Event()

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        if header.op != Op.HELLO:
            self.go.wait()
        yield from super().answer(header, body)


def test_a_cancelled_store_lets_go_of_its_pages_in_the_middle_of_a_frame(
    socket_path: Path,
) -> None:
    """Cancelled while a frame is half sent, the rest goes on from a copy; the buffer is free."""
    with HoldingDaemon(socket_path) as daemon:

        async def body(space: vswap.aio.Space) -> None:
            mapping = mmap.mmap(-1, MANY * PAGE_BYTES)
            mapping[:] = random_pages(MANY)
            task = asyncio.create_task(space.store(mapping))
            other = asyncio.create_task(space.store(bytes(PAGE_BYTES)))
            await asyncio.sleep(0)
            assert space._connection._home._buffers  # a frame is half sent
            assert await cancel(task)
            mapping.close()
            daemon.go.set()
            await other
            await space.ping()
            await space.ping()
            assert len(daemon.pages) == 1

        try:
            run(socket_path, body)
        finally:
            daemon.go.set()


class Owner:
    """Nobody, until the connection is it."""

    def answered(self, call: Call) -> None:
        raise AssertionError(call)

    def lose(self, lane: AsyncLane, error: vswap.VswapError) -> None:
        raise AssertionError(lane) from error


async def no_lane(shard: int) -> AsyncLane:
    """A daemon of one shard is asked for no other."""
    raise AssertionError(shard)


def test_full_buffers_on_both_sides_do_not_block(socket_path: Path) -> None:
    """Through the smallest socket buffers, with a wide window, everything gets through."""
    with FakeDaemon(socket_path):

        async def main() -> None:
            sock = socket.socket(socket.AF_UNIX)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            sock.connect(str(socket_path))
            sock.setblocking(False)
            lane = AsyncLane(sock, Owner())
            lane.conversation.window = 1000
            connection = AsyncConnection(lane, 1, 30, no_lane)
            content = random_pages(2000)
            store = Store(Pages(memoryview(content)), 1)
            await connection.run(store)
            target = bytearray(len(content))
            load = Load(store.result(), Pages(memoryview(target)), 1)
            await connection.run(load)
            load.result()
            assert target == content
            connection.close()

        asyncio.run(main())


class EndingDaemon(FakeDaemon):
    """Meets a STORE with `end`."""

    end: Callable[[Header], bytes] = staticmethod(lambda _: b"")

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        if header.op != Op.STORE:
            yield from super().answer(header, body)
            return
        yield self.end(header)
        self.hang_up()


ENDS: dict[str, tuple[Callable[[Header], bytes], type[Exception]]] = {
    "without a word": (lambda _: b"", vswap.Broken),
    "in a header": (lambda _: b"\x20\0\0\0\1", vswap.Broken),
    "in a body": (
        lambda header: pack_header(Op.STORE, 8 * header.count, request_id=header.request_id) + b"1",
        vswap.Broken,
    ),
    "with last words": (
        lambda _: pack_header(0, 3, status=Status.STOPPING) + b"bye",
        vswap.Stopping,
    ),
    "with nonsense": (lambda _: b"x" * HEADER_BYTES, vswap.ProtocolError),
    "with another id": (
        lambda header: pack_header(Op.STORE, 0, request_id=header.request_id + 1),
        vswap.ProtocolError,
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_call_that_waits_is_told_of_the_end(socket_path: Path, name: str) -> None:
    """When the connection ends, one call has the cause and all others are ConnectionLost."""
    with EndingDaemon(socket_path) as daemon:
        daemon.end, kind = ENDS[name]

        async def body(space: vswap.aio.Space) -> None:
            calls: list[Awaitable[object]] = [space.store(random_pages(MANY)) for _ in range(3)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert type(results[0]) is kind
            assert all(isinstance(result, vswap.ConnectionLost) for result in results[1:])
            assert len({id(result) for result in results}) == 3
            assert space.closed
            with pytest.raises(vswap.ConnectionLost):
                await space.ping()

        run(socket_path, body)


def test_closing_ends_calls_that_run(socket_path: Path) -> None:
    """close() in one task is ConnectionLost in the others."""
    with HoldingDaemon(socket_path) as daemon:

        async def body(space: vswap.aio.Space) -> None:
            task = asyncio.create_task(space.store(random_pages(MANY)))
            await asyncio.sleep(0)
            await space.close()
            with pytest.raises(vswap.ConnectionLost, match="was closed"):
                await task
            daemon.go.set()

        run(socket_path, body)


def test_silence_is_timed_out(socket_path: Path) -> None:
    """With a timeout, calls that are not answered end in TimedOut."""
    with HoldingDaemon(socket_path) as daemon:

        async def main() -> None:
            async with vswap.aio.connect(socket_path, timeout=0.05) as space:
                with pytest.raises(TimeoutError, match=r"silent for 0\.05 s"):
                    await space.ping()
                assert space.closed
                daemon.go.set()

        asyncio.run(main())


def test_idleness_is_no_silence(socket_path: Path) -> None:
    """Silence counts from the first question on: being idle before it is not the daemon's fault."""
    with HoldingDaemon(socket_path) as daemon:

        async def main() -> None:
            async with vswap.aio.connect(socket_path, timeout=1000) as space:
                connection, home = space._connection, space._connection._home
                home.heard_at -= 5000  # the last answer was long ago
                task = asyncio.create_task(space.ping())
                await asyncio.sleep(0)
                connection._look()
                assert not space.closed
                home.heard_at -= 5000
                connection._look()
                with pytest.raises(vswap.TimedOut):
                    await task
            daemon.go.set()

        asyncio.run(main())


def test_no_daemon_is_told_as_in_the_blocking_client(tmp_path: Path) -> None:
    """The same error with the same places."""

    async def main() -> None:
        with pytest.raises(vswap.NoDaemon, match="no such socket"):
            await vswap.aio.connect(tmp_path / "none")

    asyncio.run(main())


def test_a_full_queue_of_connections_is_waited_for(socket_path: Path) -> None:
    """A daemon that does not accept is tried again until the timeout, without blocking the loop."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(socket_path))
        listener.listen(0)
        first.connect(str(socket_path))

        async def main() -> None:
            with pytest.raises(vswap.NoDaemon, match="does not accept"):
                await vswap.aio.connect(socket_path, timeout=0.05)

        asyncio.run(main())


def test_a_refused_hello_leaves_no_socket(socket_path: Path) -> None:
    """A daemon that this client cannot work with is refused, and nothing stays open."""
    with FakeDaemon(socket_path, version=9):

        async def main() -> None:
            with pytest.raises(vswap.ProtocolError, match="version 9"):
                await vswap.aio.connect(socket_path)

        asyncio.run(main())
