"""Both clients against the real daemon: large calls, refusals, steering, its end."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vswap
import vswap.aio
from support.daemon import RunningDaemon, running_daemon
from vswap.control import Control
from vswap.peer import FRAME_PAGES
from vswap.protocol import PAGE_BYTES, SLOT_BYTES, Op, pack_header

MANY = 20 * FRAME_PAGES + 7


def mixed_pages(count: int, seed: int = 1) -> bytes:
    """A third zeros, a third that shrinks, a third that does not."""
    generator = np.random.default_rng(seed)
    pages = np.zeros((count, PAGE_BYTES), np.uint8)
    pages[1::3, ::16] = generator.integers(0, 256, pages[1::3, ::16].shape)
    pages[2::3] = generator.integers(0, 256, pages[2::3].shape)
    return pages.tobytes()


def test_large_calls_come_back(real_space: vswap.Space) -> None:
    """Many frames of every kind of page: stored, loaded in another order, overwritten, freed."""
    pages = mixed_pages(MANY)
    slots = real_space.store(pages)
    assert len(np.unique(slots)) == MANY
    order = np.random.default_rng(2).permutation(MANY)
    shuffled = np.frombuffer(real_space.load(slots[order]), np.uint8).reshape(MANY, -1)
    assert np.array_equal(shuffled, np.frombuffer(pages, np.uint8).reshape(MANY, -1)[order])
    new = mixed_pages(MANY, seed=3)
    assert np.array_equal(real_space.store(new, slots=slots), slots)
    target = bytearray(len(new))
    real_space.load(slots, into=target)
    assert target == new
    real_space.free(slots)
    with pytest.raises(vswap.BadSlot) as caught:
        real_space.load(slots[:3])
    assert caught.value.slots.tolist() == slots[:3].tolist()


def test_objects_come_back(real_space: vswap.Space) -> None:
    """Arrays and bytes of odd lengths survive the real daemon."""
    array = np.asfortranarray(np.random.default_rng(1).random((123, 457)))
    with real_space.put(array) as handle, real_space.put(b"x" * 4097) as text:
        assert np.array_equal(handle.get(), array)
        assert text.get() == b"x" * 4097


class Either(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("real", ctypes.c_double))


class Packed(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("flag", ctypes.c_char), ("words", ctypes.c_uint16 * 3), ("end", ctypes.c_char))


@pytest.mark.parametrize("kind", [Either, Packed])
def test_data_is_never_read_as_requests(daemon: RunningDaemon, kind: type[ctypes.Union]) -> None:
    """Items of several bytes whose format says one: a request among the data is data."""
    assert ctypes.sizeof(kind) == 8

    def data(victim: np.uint64) -> ctypes.Array[ctypes.Union]:
        # After as many bytes as there are items, and after the first frame's: FREE of the victim.
        request = pack_header(Op.FREE, SLOT_BYTES, count=1, flags=0, request_id=2)
        request += int(victim).to_bytes(SLOT_BYTES, "little")
        requests = (request * (PAGE_BYTES // len(request) + 1))[:PAGE_BYTES]
        items = (kind * (PAGE_BYTES // 8))()
        ctypes.memmove(items, bytes(512) + requests, PAGE_BYTES)
        return items

    precious = bytes(range(256)) * 16
    with vswap.connect(daemon.socket_path, timeout=30) as space:
        (victim,) = space.store(precious)
        source = data(victim)
        stored = space.store(source)
        over = space.store(source, slots=space.store(precious))
        assert space.load(stored) == space.load(over) == bytes(source)
        with space.put(source) as handle:
            assert handle.get() == bytes(source)
        target = (kind * len(source))()
        space.load(stored, into=target)
        assert bytes(target) == bytes(source)
        assert space.load([victim]) == precious

    async def also_with_asyncio() -> None:
        async with vswap.aio.connect(daemon.socket_path, timeout=30) as space:
            (victim,) = await space.store(precious)
            source = data(victim)
            stored = await space.store(source)
            over = await space.store(source, slots=await space.store(precious))
            assert await space.load(stored) == await space.load(over) == bytes(source)
            async with await space.put(source) as handle:
                assert await handle.get() == bytes(source)
            assert await space.load([victim]) == precious

    asyncio.run(also_with_asyncio())


def test_a_store_that_does_not_fit_leaves_nothing() -> None:
    """All or nothing over many frames: after the rejection no slot is held."""
    with running_daemon("pool.max=4M") as daemon, vswap.connect(daemon.socket_path) as space:
        noise = np.random.default_rng(1).bytes(4096 * PAGE_BYTES)
        with pytest.raises(vswap.Rejected, match=r"pool_full .*raise pool\.max") as caught:
            space.store(noise)
        assert caught.value.reason == "pool_full"
        assert space.status()["slots"]["allocated"] == 0
        with pytest.raises(vswap.Rejected):
            space.put(noise[:-1])
        assert space.status()["slots"]["allocated"] == 0
        slots = space.store(noise[: 16 * PAGE_BYTES])
        assert space.load(slots) == noise[: 16 * PAGE_BYTES]


def test_a_rejected_overwrite_says_what_each_slot_has() -> None:
    """What `done`, `slots` and neither say of each slot is what the daemon then answers."""
    with running_daemon("pool.max=4M") as daemon, vswap.connect(daemon.socket_path) as space:
        old = b"".join(b"%8d" % n * 512 for n in range(4096))
        new = np.random.default_rng(1).bytes(len(old))
        slots = space.store(old)
        with pytest.raises(vswap.Rejected) as caught:
            space.store(new, slots=slots)
        place = {int(slot): n for n, slot in enumerate(slots)}
        done, empty = caught.value.done, caught.value.slots
        assert len(empty)
        for slot in done:
            n = place[int(slot)] * PAGE_BYTES
            assert space.load(slot) == new[n : n + PAGE_BYTES]
        with pytest.raises(vswap.Unbacked) as unbacked:
            space.load(empty[:FRAME_PAGES])
        assert unbacked.value.slots.tolist() == empty[:FRAME_PAGES].tolist()
        others = np.setdiff1d(slots, np.concatenate([done, empty]))
        expected = b"".join(old[place[int(s)] * PAGE_BYTES :][:PAGE_BYTES] for s in others)
        assert space.load(others) == expected


def test_several_threads_and_spaces(daemon: RunningDaemon) -> None:
    """Clients at the same time, each with a space, do not see each other's pages."""
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with vswap.connect(daemon.socket_path, timeout=60) as space:
                for n in range(5):
                    pages = mixed_pages(300 + seed, seed=100 * seed + n)
                    slots = space.store(pages)
                    assert space.load(slots) == pages
                    space.free(slots)
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_asyncio_with_many_tasks(daemon: RunningDaemon) -> None:
    """Tasks of one loop share a space of the real daemon; cancelled ones leave nothing behind."""

    async def work(space: vswap.aio.Space, seed: int) -> None:
        pages = mixed_pages(1 + 37 * seed % 200, seed)
        slots = await space.store(pages)
        assert await space.load(slots) == pages
        await space.free(slots)

    async def main() -> None:
        async with vswap.aio.connect(daemon.socket_path, timeout=60, label="tasks") as space:
            async with asyncio.TaskGroup() as group:
                for seed in range(60):
                    group.create_task(work(space, seed))
            for steps in range(0, 40, 4):
                task = asyncio.create_task(space.store(mixed_pages(500)))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    await space.free(task.result())
            while held := await slots_of(daemon, "tasks"):
                assert held <= 10 * 500

    asyncio.run(main())


async def slots_of(daemon: RunningDaemon, client: str) -> int:
    def ask() -> int:
        with Control(daemon.socket_path) as control:
            spaces = control.call("spaces")["spaces"]
        return sum(each["slots"] for each in spaces if (each["client"] or "").startswith(client))

    return await asyncio.to_thread(ask)


def test_steering(daemon: RunningDaemon, real_space: vswap.Space, tmp_path: Path) -> None:
    """Control attaches a device, writes pages back to it and detaches it; they can be loaded."""
    pages = mixed_pages(1000)
    slots = real_space.store(pages)
    path = str(tmp_path / "swap")
    with Control(daemon.socket_path) as control:
        control.call("swapon", path=path, size=16 << 20)
        assert control.call("writeback", bytes=1 << 30)["pages"] > 0
        assert real_space.load(slots) == pages
        assert [device["path"] for device in control.status()["devices"]] == [path]
        control.call("swapoff", path=path)
        assert real_space.load(slots) == pages
        with pytest.raises(vswap.BadArgument):
            control.call("set", key="pool.maxx", value="1")
        with pytest.raises(vswap.OutOfService):
            control.call("swapoff", path=path)


def test_a_killed_daemon_is_connection_lost() -> None:
    """SIGKILL in the middle of calls ends them with ConnectionLost, in both clients."""
    with running_daemon() as daemon, vswap.connect(daemon.socket_path) as space:
        slots = space.store(mixed_pages(MANY))
        first_load = threading.Event()

        def kill() -> None:
            first_load.wait()
            daemon.kill()

        killer = threading.Thread(target=kill)
        killer.start()

        def load_for_ever() -> None:
            while True:
                space.load(slots)
                first_load.set()

        with pytest.raises(vswap.ConnectionLost):
            load_for_ever()
        killer.join()
        assert space.closed
        with pytest.raises(vswap.NoDaemon, match="nobody listens"):
            vswap.connect(daemon.socket_path)


def test_a_daemon_that_stops_lets_go() -> None:
    """After SIGTERM calls end with ConnectionLost (or its kind Stopping), and the daemon with 0."""
    with running_daemon() as daemon, vswap.connect(daemon.socket_path, timeout=60) as space:
        slots = space.store(mixed_pages(10))
        daemon.process.send_signal(signal.SIGTERM)

        def load_for_ever() -> None:
            while True:
                space.load(slots)

        with pytest.raises(vswap.ConnectionLost):
            load_for_ever()
        daemon.await_exit(expected=0)


@pytest.mark.parametrize("value", ["x" * 70_000, "x" * (2 << 20), b"bytes", object()])
def test_what_cannot_be_asked_for_is_told_before_it_is_sent(
    daemon: RunningDaemon, value: Any
) -> None:
    """Text that is too long, and what is none: BadArgument, and the connection goes on."""
    with pytest.raises(vswap.BadArgument, match=r"text"):
        vswap.connect(daemon.socket_path, name=value)
    with Control(daemon.socket_path) as control:
        with pytest.raises(vswap.BadArgument, match=r"text"):
            control.call("set", key="log.level", value=value)
        assert control.status()["slots"]["allocated"] == 0
