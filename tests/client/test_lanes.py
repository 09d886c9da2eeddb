"""One space over several shards: large calls are spread, and nobody sees it in the results."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vswap
import vswap.aio
from support.daemon import RunningDaemon, running_daemon
from support.fake_daemon import FakeDaemon
from vswap.aio_lane import AsyncLane
from vswap.pages import Pages, cut_row
from vswap.planner import Call, Free, Load, Overwrite, Store
from vswap.protocol import PAGE_BYTES, Header, Op, Status

SHARDS = 3
MANY = 1500
"""Pages of a call that is large: several frames for each shard."""


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(f"server.shards={SHARDS}", "pool.max=64M") as running:
        yield running


@pytest.fixture
def space(daemon: RunningDaemon) -> Iterator[vswap.Space]:
    with vswap.connect(daemon.socket_path, timeout=30) as space:
        yield space


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * PAGE_BYTES)


def rows(buffer: object) -> npt.NDArray[np.uint8]:
    return np.frombuffer(buffer, np.uint8).reshape(-1, PAGE_BYTES)  # type: ignore[call-overload, no-any-return]


def shards_of(slots: npt.NDArray[np.uint64]) -> list[int]:
    return sorted(set((slots >> np.uint64(56)).tolist()))


# Through a daemon


def test_a_large_store_uses_all_shards(space: vswap.Space) -> None:
    """The slots of one store are of all shards, in the order of the pages."""
    content = noise(MANY)
    slots = space.store(content)
    assert shards_of(slots) == list(range(SHARDS))
    assert space.load(slots) == content


def test_a_small_store_uses_one_shard(space: vswap.Space) -> None:
    """What one frame holds goes one way."""
    assert len(shards_of(np.concatenate([space.store(noise(100, i)) for i in range(5)]))) == 1


def test_a_store_of_a_few_frames_is_shared_out(space: vswap.Space) -> None:
    """Pages that would be two frames are three smaller ones: every shard gets some."""
    assert shards_of(space.store(noise(192))) == list(range(SHARDS))


def test_slots_may_be_mixed_in_any_way(space: vswap.Space) -> None:
    """Loads, overwrites and frees in any order of slots, also page by page; a slot twice."""
    content = rows(noise(MANY))
    slots = space.store(content)
    order = np.random.default_rng(1).permutation(MANY)
    assert (rows(space.load(slots[order])) == content[order]).all()
    twice = np.concatenate([order[:700], order[:700]])
    assert (rows(space.load(slots[twice])) == content[twice]).all()
    changed = rows(noise(MANY, 2))
    space.store(changed[order], slots=slots[order])
    assert (rows(space.load(slots)) == changed).all()
    space.free(slots[order[:1000]])
    left = np.sort(order[1000:])
    assert (rows(space.load(slots[left])) == changed[left]).all()
    with pytest.raises(vswap.BadSlot):
        space.load(slots[order[:1]])


def test_pieces_of_a_large_store_can_be_loaded(space: vswap.Space) -> None:
    """Any part of it, wherever it begins and ends."""
    content = rows(noise(MANY))
    slots = space.store(content)
    for start, stop in ((0, 1), (1, MANY), (127, 129), (100, 1400), (5, 700)):
        assert (rows(space.load(slots[start:stop])) == content[start:stop]).all()


def test_objects_of_any_length_come_back(space: vswap.Space) -> None:
    """The short last page is of whichever shard took it."""
    for length in (MANY * PAGE_BYTES + 1, 700 * PAGE_BYTES - 1):
        array = np.frombuffer(noise(MANY + 1)[:length], np.uint8)
        with space.put(array) as handle:
            assert (handle.get() == array).all()
            into = np.empty_like(array)
            assert (handle.get(into=into) == array).all()


def test_an_array_of_mixed_shards_with_a_short_tail_comes_back(space: vswap.Space) -> None:
    """Scattered pages and the tail of a put object: each lands where it belongs."""
    content = noise(400, 3)[: 399 * PAGE_BYTES + 77]
    with space.put(content) as handle:
        slots = handle.slots
        assert len(shards_of(slots)) == SHARDS
        mixed = np.random.default_rng(0).permutation(len(slots) - 1)
        assert (rows(space.load(slots[mixed])) == rows(content[: 399 * PAGE_BYTES])[mixed]).all()
        assert handle.get() == content


def test_one_bad_slot_does_not_hide_what_was_done(space: vswap.Space) -> None:
    """Frames of other shards take effect, and the error says which."""
    slots = space.store(noise(MANY))
    bad = slots[500]
    space.free(bad)
    with pytest.raises(vswap.BadSlot) as caught:
        space.free(slots)
    assert caught.value.slots.tolist() == [bad]
    assert bad not in caught.value.done
    left = slots[~np.isin(slots, caught.value.done)]
    left = left[left != bad]
    if len(left):
        space.free(left)
    assert space.status()["slots"]["allocated"] == 0


def test_a_slot_of_no_shard_is_a_bad_slot(space: vswap.Space) -> None:
    """Numbers that nobody gave out are answered, not sent to nobody."""
    slots = space.store(noise(MANY))
    for nonsense in (0, 255 << 56, (SHARDS - 1) << 56):
        mixed = slots.copy()
        mixed[7] = nonsense
        with pytest.raises(vswap.BadSlot) as caught:
            space.load(mixed)
        assert caught.value.slots.tolist() == [nonsense]
    assert space.load(slots) == noise(MANY)


def test_a_store_that_does_not_fit_leaves_nothing(daemon: RunningDaemon) -> None:
    """What some shards had taken before another refused is freed on all of them."""
    with (
        running_daemon(f"server.shards={SHARDS}", "pool.max=4M") as small,
        vswap.connect(small.socket_path) as space,
    ):
        kept = space.store(noise(300))
        with pytest.raises(vswap.Rejected, match="pool") as caught:
            space.store(noise(3000, 1))
        assert caught.value.reason == "pool_full"
        assert space.status()["slots"]["allocated"] == 300
        assert space.load(kept) == noise(300)


def test_all_lanes_are_one_space_to_operators(daemon: RunningDaemon, space: vswap.Space) -> None:
    """One client, one space, however many connections."""
    space.store(noise(MANY))
    document = space.status()
    assert (document["clients"], document["spaces"]) == (1, 1)
    assert document["slots"]["allocated"] == MANY
    space.close()
    with vswap.connect(daemon.socket_path) as other:
        assert other.status()["slots"]["allocated"] == 0


class CrowdedDaemon(FakeDaemon):
    """Two shards, of which the other one has no room."""

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        if header.op == Op.HELLO and b"token" in body:
            yield self.refusal(header, Status.TOO_MANY_CONNECTIONS, "crowded")
            return
        yield from super().answer(header, body)


def test_a_refused_lane_is_done_without(tmp_path: Path) -> None:
    """Where a shard takes no more connections, a large call goes the ways that there are."""
    content = noise(MANY)
    with CrowdedDaemon(tmp_path / "sock", shards=2, token="0" * 32) as daemon:
        with vswap.connect(daemon.path, timeout=30) as space:
            slots = space.store(content)
            assert space.load(slots) == content
            space.store(content, slots=slots)
            greetings = [each for each in daemon.requests if each.op == Op.HELLO]
            assert len(greetings) == 2  # the refused one is not tried with every call
            with pytest.raises(vswap.ConnectionRefused):
                space.load([1 << 56])
            assert space.load(slots) == content

        async def the_same() -> None:
            async with vswap.aio.connect(daemon.path, timeout=30) as other:
                mine = await other.store(content)
                assert await other.load(mine) == content
                with pytest.raises(vswap.ConnectionRefused):
                    await other.load([1 << 56])
                assert await other.load(mine) == content

        asyncio.run(the_same())


def test_many_tasks_share_the_lanes(daemon: RunningDaemon) -> None:
    """Large and small calls of many tasks at once, some cancelled, the first ones opening lanes."""

    async def one(space: vswap.aio.Space, seed: int) -> None:
        count = (1, 60, 300, 1000)[seed % 4]
        content = noise(count, seed)
        slots = await space.store(content)
        order = np.random.default_rng(seed).permutation(count)
        assert (rows(await space.load(slots[order])) == rows(content)[order]).all()
        await space.store(content[::-1], slots=slots)
        assert await space.load(slots) == content[::-1]
        await space.free(slots)

    async def main() -> None:
        async with vswap.aio.connect(daemon.socket_path, timeout=30) as space:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(space, seed)) for seed in range(12)]
                doomed = [group.create_task(space.store(noise(1000, 99))) for _ in range(3)]
                await tasks[0]
                for task in doomed:
                    task.cancel()
            # An answer on every lane: what the cancelled stores undo has been undone before it.
            everywhere = await space.store(noise(1000))
            await space.load(everywhere)
            left = (await space.status())["slots"]["allocated"]
            mine = sum(len(task.result()) for task in doomed if not task.cancelled())
            assert left == 1000 + mine

    asyncio.run(main())


def test_calls_keep_their_order_while_lanes_are_opened(
    daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small call behind a large one, made at once, does not overtake it on their common lane."""
    put: list[tuple[Call, int]] = []
    original = AsyncLane.put

    def recorded(lane: AsyncLane, call: Call) -> None:
        put.append((call, lane.shard))
        original(lane, call)

    monkeypatch.setattr(AsyncLane, "put", recorded)

    async def main() -> None:
        async with vswap.aio.connect(daemon.socket_path, timeout=30) as space:
            put.clear()
            await asyncio.gather(space.store(noise(MANY)), space.ping())

    asyncio.run(main())
    calls = [call for call, _ in put if isinstance(call, Store) or call.op is Op.PING]
    assert [call.op for call in calls] == [Op.STORE] * SHARDS + [Op.PING]


def test_a_free_that_is_cancelled_while_lanes_are_opened_is_carried_through(
    daemon: RunningDaemon,
) -> None:
    """It waits for calls before it to have their lanes, and nobody waits for it."""

    async def main() -> None:
        async with vswap.aio.connect(daemon.socket_path, timeout=30) as space:
            slots = await space.store(noise(100))
            large = asyncio.create_task(space.store(noise(MANY)))
            free = asyncio.create_task(space.free(slots))
            while space._connection._entering != 2:
                await turn()
            free.cancel()
            await asyncio.wait([free])
            assert free.cancelled()
            mine = await large
            await space.load(mine)  # behind all that waited before it
            assert (await space.status())["slots"]["allocated"] == MANY

    asyncio.run(main())


def test_a_forked_child_of_a_loop_keeps_no_space_alive(daemon: RunningDaemon) -> None:
    """Its parent's space is closed there, and freed when the parent closes it."""
    alive, enough = os.pipe()
    children: list[int] = []

    async def main() -> None:
        async with vswap.aio.connect(daemon.socket_path, timeout=30) as space:
            slots = await space.store(noise(MANY))
            children.append(os.fork())
            if not children[0]:
                os.close(enough)
                os.read(alive, 1)
                os._exit(not space.closed)
            assert await space.load(slots) == noise(MANY)
        async with asyncio.timeout(30), vswap.aio.connect(daemon.socket_path) as other:
            while (await other.status())["slots"]["allocated"]:
                await turn()

    try:
        asyncio.run(main())
    finally:
        os.close(enough)
        os.close(alive)
        assert [os.waitpid(child, 0)[1] for child in children] == [0]


async def turn() -> None:
    """One round of the loop."""
    await asyncio.sleep(0)


def test_a_shards_death_ends_the_space(daemon: RunningDaemon) -> None:
    """When one lane is lost, the whole space is, with one error and no half results."""
    with running_daemon("server.shards=2", clean_log=False) as other:
        space = vswap.connect(other.socket_path, timeout=30)
        slots = space.store(noise(MANY))
        other.kill()
        with pytest.raises(vswap.ConnectionLost):
            space.load(slots)
        assert space.closed
        with pytest.raises(vswap.ConnectionLost, match="connect\\(\\) again"):
            space.load(slots)


# The cuts, without I/O


@given(
    count=st.integers(1, 60),
    frame_pages=st.integers(1, 9),
    shards=st.integers(1, 4),
    data=st.data(),
)
def test_every_page_goes_to_its_shard_once(
    count: int, frame_pages: int, shards: int, data: st.DataObject
) -> None:
    """Whatever the mixture, each slot is in one frame of its own shard, in rising order there."""
    shard_of = np.array(data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)))
    slots = np.arange(count, dtype=np.uint64) | (shard_of.astype(np.uint64) << np.uint64(56))
    home = data.draw(st.integers(0, shards - 1))
    content = np.random.default_rng(0).integers(0, 256, (count, PAGE_BYTES), np.uint8)
    target = bytearray(count * PAGE_BYTES)
    load = Load(slots, Pages(memoryview(target)), frame_pages)
    overwrite = Overwrite(slots, Pages(content.reshape(-1).data), frame_pages)
    free = Free(slots, frame_pages)
    for call in (load, overwrite, free):
        routes = call.routes(home, shards)
        assert len(set(routes)) == len(routes)
        seen: list[int] = []
        for shard in routes:
            while (frame := call.next_frame(shard)) is not None:
                assert frame.count <= frame_pages
                call.in_flight += 1
                body = b"".join(frame.body)
                sent = np.frombuffer(body[: frame.count * 8], np.uint64)
                places = np.arange(count)[frame.where]
                assert (slots[places] == sent).all()
                expected = shard_of[places]
                expected[expected >= shards] = home
                assert (expected == shard).all() or shards == 1
                if call is overwrite:
                    assert body[frame.count * 8 :] == content[places].tobytes()
                if call is load:
                    pages = content[places].tobytes()
                    for view in frame.targets or []:
                        view[:] = pages[: len(view)]
                        pages = pages[len(view) :]
                    assert not pages
                seen += places.tolist()
                call.in_flight -= 1
                call.accept(frame, b"")
            assert call.next_frame(shard) is None
        assert sorted(seen) == list(range(count))
        assert call.over
        call.result()
        assert call.done.tolist() == slots.tolist()
    assert target == content.tobytes()


@given(pages=st.sets(st.integers(0, 300), min_size=1), frame_pages=st.integers(1, 64))
def test_rows_are_cut_without_a_gap(pages: set[int], frame_pages: int) -> None:
    """Frames cover the pages in order; those in rows are slices."""
    wanted = np.array(sorted(pages))
    found: list[int] = []
    for where, count in cut_row(wanted, frame_pages):
        piece = np.arange(301)[where]
        assert len(piece) == count <= frame_pages
        found += piece.tolist()
    assert found == wanted.tolist()


def test_long_rows_are_not_copied() -> None:
    """Two rows of 100 pages are four slices, though page numbers jump between them."""
    wanted = np.concatenate([np.arange(100), np.arange(500, 600)])
    pieces = [where for where, _ in cut_row(wanted, 64)]
    assert pieces == [slice(0, 64), slice(64, 100), slice(500, 564), slice(564, 600)]


def test_an_undone_store_frees_each_slot_where_it_was_given_out() -> None:
    """After a refusal on one shard, each shard is asked to free its own, and only those."""
    call = Store(Pages(memoryview(bytes(600 * PAGE_BYTES))), 100)
    assert call.routes(1, 3) == [1, 0, 2]
    frames = [call.next_frame(shard) for shard in (1, 0, 2, 1)]
    call.in_flight = 4
    for number, frame in enumerate(frames):
        assert frame is not None
        call.in_flight -= 1
        if number == 2:
            call.refuse(frame, vswap.Rejected("no room", "pool_full"))
            continue
        shard = (1, 0, 2, 1)[number]
        assert frame.targets is not None
        given = (np.uint64(shard) << np.uint64(56)) + np.arange(frame.count, dtype=np.uint64)
        frame.targets[0][:] = given.tobytes()
        call.accept(frame, b"")
    assert not call.over
    for shard, count in ((0, 1), (1, 2), (2, 0)):
        for _ in range(count):
            frame = call.next_frame(shard)
            assert frame is not None
            slots = np.frombuffer(b"".join(frame.body), np.uint64)
            assert set((slots >> np.uint64(56)).tolist()) == {shard}
        assert call.next_frame(shard) is None
    assert call.over
