"""Memory that client and daemon share: lent, used, given back, and done without."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vswap
import vswap.aio
from support.daemon import RunningDaemon, running_daemon
from support.fake_daemon import FakeDaemon
from vswap.pages import Pages, Place, View
from vswap.planner import Load, Overwrite, Store
from vswap.protocol import PAGE_BYTES, Flag, Op
from vswap.window import Window, window_of

SIZE = 64 * PAGE_BYTES


@pytest.fixture(scope="module", params=["1", "3"])
def daemon(request: pytest.FixtureRequest) -> Iterator[RunningDaemon]:
    with running_daemon(f"server.shards={request.param}", "pool.max=64M") as running:
        yield running


@pytest.fixture
def space(daemon: RunningDaemon) -> Iterator[vswap.Space]:
    with vswap.connect(daemon.socket_path, timeout=30) as space:
        yield space


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * PAGE_BYTES)


def window() -> Window:
    fd = os.memfd_create("window")
    os.ftruncate(fd, SIZE)
    return Window(fd, SIZE, 2)


def place(window: Window, view: View) -> Place | None:
    return window.locate(Pages(view)).place


# Through a daemon


def test_pages_of_the_window_come_back(space: vswap.Space) -> None:
    """Store, overwrite, load and put, with buffers of the window and others, in any mixture."""
    content = noise(100)
    out = space.buffer(100)
    assert space._window is not None
    assert place(space._window, out) is not None
    out[:] = content
    slots = space.store(out)
    out[:] = bytes(len(out))
    assert space.load(slots) == content
    back = space.buffer(100)
    assert space.load(slots, into=back) is back
    assert back == content
    out[:] = content[::-1]
    space.store(out, slots=slots)
    assert space.load(slots, into=bytearray(len(out))) == content[::-1]
    with space.put(out) as handle:
        into = space.buffer(100)
        assert handle.get(into=into) is into
        assert into == content[::-1]


def test_large_calls_use_window_and_socket_together(space: vswap.Space) -> None:
    """A buffer of all the window, over all shards, slots in any order."""
    count = 1024
    rows = np.frombuffer(noise(count), np.uint8).reshape(-1, PAGE_BYTES)
    out = space.buffer(count)
    assert space._window is not None
    assert place(space._window, out) is not None
    view = np.frombuffer(out, np.uint8).reshape(-1, PAGE_BYTES)
    view[:] = rows
    slots = space.store(out)
    order = np.random.default_rng(1).permutation(count)
    space.load(slots[order], into=out)
    assert (view == rows[order]).all()
    space.store(out, slots=slots)
    space.load(slots, into=out)
    assert (view == rows[order]).all()


def test_pieces_of_a_buffer_are_in_the_window_too(space: vswap.Space) -> None:
    """Whole pages of it go by the window; what begins between pages goes by the socket."""
    buffer = space.buffer(10)
    assert space._window is not None
    buffer[:] = content = noise(10)
    piece = buffer[3 * PAGE_BYTES : 7 * PAGE_BYTES]
    assert place(space._window, piece) is not None
    odd = buffer[5 : 5 + PAGE_BYTES]
    assert place(space._window, odd) is None
    assert space.load(space.store(piece)) == content[3 * PAGE_BYTES : 7 * PAGE_BYTES]
    assert space.load(space.store(odd)) == content[5 : 5 + PAGE_BYTES]
    slots = space.store(buffer)
    assert space.load(slots[:1], into=odd) is odd
    assert odd == content[:PAGE_BYTES]


def test_a_short_object_in_the_window_keeps_its_last_bytes(space: vswap.Space) -> None:
    """The last, short page is sent beside the whole ones, which are in the window."""
    buffer = space.buffer(4)
    buffer[:] = noise(4)
    piece = buffer[: 3 * PAGE_BYTES + 5]
    with space.put(piece) as handle:
        assert handle.get() == piece


def test_when_all_is_lent_out_memory_is_had_elsewhere(space: vswap.Space) -> None:
    """A buffer that does not fit is ordinary memory; given back, the window is there again."""
    assert space._window is not None
    first = space.buffer(1000)
    second = space.buffer(1000)
    assert place(space._window, first) is not None
    assert place(space._window, second) is None
    second[:] = noise(1000)
    assert space.load(space.store(second), into=first) == second
    del first
    gc.collect()
    third = space.buffer(1000)
    assert place(space._window, third) is not None
    assert space.buffer(0).nbytes == 0
    with pytest.raises(ValueError, match="0 pages or more"):
        space.buffer(-1)


def test_a_daemon_that_shares_no_memory_serves_as_well() -> None:
    """With server.window = 0, or from a daemon that knows no windows, buffers are ordinary."""
    with running_daemon("server.window=0") as daemon, vswap.connect(daemon.socket_path) as space:
        assert space._window is None
        buffer = space.buffer(5)
        buffer[:] = noise(5)
        assert space.load(space.store(buffer)) == buffer


def test_an_old_daemon_serves_as_well(fake: FakeDaemon) -> None:
    """A daemon that ignores the wish sends no descriptor."""
    with vswap.connect(fake.path, timeout=30) as space:
        buffer = space.buffer(5)
        buffer[:] = noise(5)
        assert space.load(space.store(buffer)) == buffer
    assert not any(each.flags & Flag.WINDOW for each in fake.requests)


def test_buffers_outlive_their_space(daemon: RunningDaemon) -> None:
    """Closing the space takes no memory away that somebody looks at."""
    with vswap.connect(daemon.socket_path) as space:
        buffer = space.buffer(3)
        buffer[:] = noise(3)
    assert buffer == noise(3)


def test_the_window_leaves_no_descriptor_and_no_mapping(daemon: RunningDaemon) -> None:
    """Spaces that come and go leave nothing in this process."""

    def mappings() -> int:
        with open("/proc/self/maps") as maps:
            return sum("vswapd-window" in line for line in maps)

    before = len(os.listdir("/proc/self/fd")), mappings()
    for _ in range(5):
        with vswap.connect(daemon.socket_path) as space:
            space.store(space.buffer(3))
        del space
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), mappings()) == before


def test_the_same_for_asyncio(daemon: RunningDaemon) -> None:
    """Tasks with buffers of their own; a cancelled load's buffer is not lent again too early."""

    async def one(space: vswap.aio.Space, seed: int) -> None:
        buffer = space.buffer(80)
        buffer[:] = content = noise(80, seed)
        slots = await space.store(buffer)
        into = space.buffer(80)
        await space.load(slots, into=into)
        assert into == content

    async def main() -> None:
        async with vswap.aio.connect(daemon.socket_path, timeout=30) as space:
            assert space._window is not None
            await asyncio.gather(*(one(space, seed) for seed in range(6)))
            slots = await space.store(noise(500))
            for _ in range(20):
                task = asyncio.create_task(space.load(slots, into=space.buffer(500)))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                del task
                other = space.buffer(500)
                other[:] = bytes(other.nbytes)
                await space.ping()
                assert not any(other)

    asyncio.run(main())


def test_a_cancelled_overwrite_takes_no_pages_of_whoever_has_its_buffer_next(
    daemon: RunningDaemon,
) -> None:
    """The slots have their old pages or their new ones, also if the daemon comes to it later."""

    async def main() -> None:
        async with vswap.aio.connect(daemon.socket_path, timeout=30) as space:
            slots = await space.store(b"\1" * 100 * PAGE_BYTES)
            for _ in range(20):
                buffer = space.buffer(100)
                buffer[:] = b"\2" * buffer.nbytes
                task = asyncio.create_task(space.store(buffer, slots=slots))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                del task, buffer
                other = space.buffer(100)
                other[:] = b"\3" * other.nbytes
                await space.ping()
                assert 3 not in set(await space.load(slots))

    asyncio.run(main())


def test_a_forked_child_is_lent_nothing_of_it(daemon: RunningDaemon) -> None:
    """What it writes to its own buffer is not in its parent's, whoever held what at the fork."""
    with vswap.connect(daemon.socket_path, timeout=30) as space:
        assert space._window is not None
        view = space.buffer(1)
        view[:] = bytes(PAGE_BYTES)

        def fork() -> int:
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)  # it must not wait for who is not there
                with contextlib.suppress(BaseException):
                    space.buffer(1)[:] = b"\1" * PAGE_BYTES
                    os._exit(0)
                os._exit(1)
            return pid

        pid = space._window._lock.run(fork)
        assert os.waitpid(pid, 0)[1] == 0
        assert not any(space.buffer(1))
        assert not any(view)


# The window by itself


def test_frames_in_the_window_carry_an_offset_and_no_pages() -> None:
    """To the window's shard; to any other the pages themselves."""
    shared = window()
    view = shared.buffer(8)
    assert view is not None
    located = place(shared, view)
    assert located is not None
    slots = (np.uint64(2) << np.uint64(56)) + np.arange(8, dtype=np.uint64)
    for call in (
        Store(shared.locate(Pages(view)), 4),
        Overwrite(slots, shared.locate(Pages(view)), 4),
        Load(slots, shared.locate(Pages(view)), 4),
    ):
        for at in (0, 4):
            frame = call.next_frame(2)
            assert frame is not None
            assert frame.flags & Flag.WINDOW
            body = b"".join(frame.body)
            assert int.from_bytes(body[:8], "little") == located.offset + at * PAGE_BYTES
            named = b"" if call.op is Op.STORE and not isinstance(call, Overwrite) else None
            assert body[8:] == (slots[at : at + 4].tobytes() if named is None else named)
    elsewhere = Store(shared.locate(Pages(view)), 4).next_frame(1)
    assert elsewhere is not None
    assert not elsewhere.flags
    assert sum(map(len, elsewhere.body)) == 4 * PAGE_BYTES


def test_other_memory_is_not_in_the_window() -> None:
    """Neither memory elsewhere, nor what reaches beyond its end."""
    shared = window()
    assert place(shared, memoryview(bytearray(SIZE))) is None
    assert place(shared, memoryview(b"")) is None
    with mmap.mmap(-1, SIZE) as other:
        view = memoryview(other)
        assert place(shared, view) is None
        view.release()


@given(st.lists(st.one_of(st.integers(1, 40), st.none()), max_size=40))
def test_a_part_is_lent_once(steps: list[int | None]) -> None:
    """Whatever is taken and given back in whatever order, no two borrowers share a page."""
    shared = window()
    held: list[tuple[View, int]] = []
    for number, step in enumerate(steps):
        if step is None:
            if held:
                returned, mark = held.pop(number % len(held))
                assert set(returned) == {mark}
                del returned
            continue
        lent = shared.buffer(step)
        free = 64 - sum(view.nbytes // PAGE_BYTES for view, _ in held)
        if lent is None:
            assert step > free or held
            continue
        assert place(shared, lent) is not None
        lent[:] = bytes([number % 256]) * lent.nbytes
        held.append((lent, number % 256))
        del lent
    assert all(set(view) == {mark} for view, mark in held)
    held.clear()
    assert shared.buffer(64) is not None


def test_a_part_comes_back_when_its_last_view_goes() -> None:
    """An array over a slice of a buffer keeps the whole buffer."""
    shared = window()
    view = shared.buffer(64)
    assert view is not None
    array = np.frombuffer(view[PAGE_BYTES : 2 * PAGE_BYTES], np.uint8)[5:]
    del view
    assert shared.buffer(1) is None
    del array
    assert shared.buffer(64) is not None


def test_a_replaced_window_is_used_no_more() -> None:
    """After the connection was taken up again, what was lent is ordinary memory."""
    shared = window()
    old = shared.buffer(8)
    assert old is not None
    old[:] = bytes([7]) * old.nbytes
    waiting = shared.locate(Pages(old))
    fd = os.memfd_create("window")
    os.ftruncate(fd, SIZE)
    shared.replace(fd, SIZE)
    assert place(shared, old) is None
    frame = Store(waiting, 8).next_frame(2)
    assert frame is not None
    assert not frame.flags
    new = shared.buffer(64)
    assert new is not None
    assert place(shared, new) is not None
    assert set(old) == {7}
    del old
    shared.replace(None, 0)
    assert shared.buffer(1) is None
    assert place(shared, new) is None


def test_threads_do_not_meet_a_window_that_is_half_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pages of the old memory are never taken for some of the new, whenever somebody looks."""
    shared = window()
    old = shared.buffer(8)
    assert old is not None
    close = os.close
    with ThreadPoolExecutor(1) as pool:
        found: list[Future[Place | None]] = []

        def close_and_look(fd: int) -> None:
            found.append(pool.submit(place, shared, old))
            wait(found, timeout=0.1)
            close(fd)

        monkeypatch.setattr(os, "close", close_and_look)
        fd = os.memfd_create("window")
        os.ftruncate(fd, SIZE)
        shared.replace(fd, SIZE)
        monkeypatch.undo()
        where = found[0].result()
    assert where is None or where.generation != shared.generation


def test_a_window_that_is_none_is_done_without() -> None:
    """No descriptor, a size that makes no sense, a file that cannot be mapped: no window."""
    assert window_of(None, SIZE, 0) is None
    for size in (0, 100):
        fd = os.memfd_create("odd")
        assert window_of(fd, size, 0) is None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    reader, writer = os.pipe()
    assert window_of(reader, SIZE, 0) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    os.close(writer)
