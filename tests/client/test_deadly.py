"""A request that kills the daemon each time is given up; everybody else gets on.

The daemons here are real, and die of certain pages (`support.deadly`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vswap
import vswap.aio
from support.daemon import RunningDaemon, running_daemon
from support.deadly import KILLS_LOADS, KILLS_STORES, UNDER
from support.fake_daemon import FakeDaemon
from vswap.protocol import PAGE_BYTES, Header, Op, Status

MANY = 1000
"""Pages of a call that is several frames on each shard."""
DIED = "was killed by signal 9"


@pytest.fixture
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon("server.shards=2", "pool.max=64M", under=UNDER) as running:
        yield running


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * PAGE_BYTES)


def with_page(content: bytes, index: int, page: bytes) -> bytes:
    return content[: index * PAGE_BYTES] + page + content[(index + 1) * PAGE_BYTES :]


def blocking(daemon: Any, play: Callable[[Any], Any]) -> Any:
    """Play with a space, each call of which is awaited: here they are over when they return."""
    with vswap.connect(daemon.socket_path, timeout=60) as space:
        return asyncio.run(play(Awaited(space)))


def tasks(daemon: Any, play: Callable[[Any], Any]) -> Any:
    """The same with the client for asyncio."""

    async def main() -> Any:
        async with vswap.aio.connect(daemon.socket_path, timeout=60) as space:
            return await play(space)

    return asyncio.run(main())


class Awaited:
    """A blocking space whose calls are awaited."""

    def __init__(self, space: vswap.Space) -> None:
        self._space = space

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Any:
            return getattr(self._space, name)(*arguments)

        return call


both = pytest.mark.parametrize("run", [blocking, tasks])


@both
@pytest.mark.parametrize("pages", [1, 50, MANY])
def test_a_store_that_kills_is_given_up(
    daemon: RunningDaemon, run: Callable[..., Any], pages: int
) -> None:
    """After three deaths it is a typed error, nothing of it is stored, and the space is usable."""

    async def play(space: Any) -> None:
        kept = await space.store(noise(300))
        with pytest.raises(vswap.DeadlyRequest, match="died 3 times") as caught:
            await space.store(with_page(noise(pages, 1), pages // 2, KILLS_STORES))
        assert caught.value.exit_code == 70
        assert sorted(await space.slots()) == sorted(kept)
        assert await space.load(kept) == noise(300)
        await space.free(kept)

    run(daemon, play)
    assert 3 <= daemon.log.count(DIED) <= 4


@both
def test_an_overwriting_that_kills_names_the_slots_in_doubt(
    daemon: RunningDaemon, run: Callable[..., Any]
) -> None:
    """Those that are neither done nor named have their old pages, those in doubt the old or new."""
    old, new = noise(MANY, 1), with_page(noise(MANY, 2), MANY // 2, KILLS_STORES)

    async def play(space: Any) -> None:
        slots = await space.store(old)
        with pytest.raises(vswap.DeadlyRequest) as caught:
            await space.store(new, slots)
        assert slots[MANY // 2] in caught.value.slots
        done, doubtful = set(caught.value.done.tolist()), set(caught.value.slots.tolist())
        assert not done & doubtful
        found = bytes(await space.load(slots))
        for index, slot in enumerate(slots.tolist()):
            where = slice(index * PAGE_BYTES, (index + 1) * PAGE_BYTES)
            allowed = [new[where]] if slot in done else [old[where]]
            allowed += [new[where]] if slot in doubtful else []
            assert found[where] in allowed

    run(daemon, play)
    assert 3 <= daemon.log.count(DIED) <= 4


@both
def test_a_load_that_kills_is_given_up(daemon: RunningDaemon, run: Callable[..., Any]) -> None:
    """The page stays stored, and all others can be loaded, and it can be freed."""
    content = with_page(noise(200), 100, KILLS_LOADS)

    async def play(space: Any) -> None:
        slots = await space.store(content)
        with pytest.raises(vswap.DeadlyRequest) as caught:
            await space.load(slots)
        assert slots[100] in caught.value.slots
        assert await space.load(slots[:100]) == content[: 100 * PAGE_BYTES]
        assert await space.load(slots[101:]) == content[101 * PAGE_BYTES :]
        await space.free(slots)

    run(daemon, play)
    assert 3 <= daemon.log.count(DIED) <= 4


def test_what_was_sent_beside_it_gets_through(daemon: RunningDaemon) -> None:
    """Of many tasks with requests on the way only the one fails whose request kills."""

    async def play(space: Any) -> None:
        async def one(number: int) -> None:
            content = noise(30, number)
            slots = await space.store(content)
            assert await space.load(slots) == content
            await space.free(slots)

        async def deadly() -> None:
            with pytest.raises(vswap.DeadlyRequest):
                await space.store(with_page(noise(30), 7, KILLS_STORES))

        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(one(number))
                if number == 10:
                    group.create_task(deadly())

    tasks(daemon, play)
    assert 3 <= daemon.log.count(DIED) <= 4


class Restarting(FakeDaemon):
    """Is restarted whenever it is asked for a page: says so, and ends the connection."""

    def __init__(self, path: Path, restarts: int) -> None:
        super().__init__(path, token="7" * 32, resumable=True, kept=True, window=0)
        self.restarts = restarts

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        """See FakeDaemon."""
        if header.op == Op.LOAD and self.restarts:
            self.restarts -= 1
            yield self.refusal(header, Status.STOPPING, "the daemon is restarted")
        else:
            yield from super().answer(header, body)


@both
def test_restarts_are_no_deaths(tmp_path: Path, run: Callable[..., Any]) -> None:
    """A daemon that says that it stops has not died of what it was asked, however often it does."""
    with Restarting(tmp_path / "s", 5) as daemon:

        async def play(space: Any) -> None:
            slots = await space.store(noise(1))
            assert await space.load(slots) == noise(1)

        run(SimpleNamespace(socket_path=daemon.path), play)
        assert daemon.restarts == 0


def test_other_clients_get_through(daemon: RunningDaemon) -> None:
    """Those whose requests are under way on the shard that dies go on, and notice nothing."""
    enough = threading.Event()
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with vswap.connect(daemon.socket_path, timeout=60) as space:
                while not enough.is_set():
                    content = noise(400, seed)
                    slots = space.store(content)
                    assert space.load(slots) == content
                    space.free(slots)
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        with (
            vswap.connect(daemon.socket_path, timeout=60) as space,
            pytest.raises(vswap.DeadlyRequest),
        ):
            space.store(KILLS_STORES)
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert errors == []
