"""Calls of the blocking client against a daemon of dicts: results, failures, what is left after."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import vswap
from support.fake_daemon import FakeDaemon
from vswap.peer import FRAME_PAGES
from vswap.protocol import PAGE_BYTES, Flag, Header, Op, Status

MANY = 5 * FRAME_PAGES + 3


def random_pages(count: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(count * PAGE_BYTES)


@pytest.mark.parametrize("count", [0, 1, FRAME_PAGES, FRAME_PAGES + 1, MANY])
def test_pages_come_back(space: vswap.Space, fake: FakeDaemon, count: int) -> None:
    """What is stored is loaded, in any order and number of frames, and freed."""
    pages = random_pages(count)
    slots = space.store(pages)
    assert slots.dtype == np.uint64
    assert slots.shape == (count,)
    assert space.load(slots) == pages
    backwards = space.load(slots[::-1]).tobytes()
    assert backwards == b"".join(
        pages[n * PAGE_BYTES : (n + 1) * PAGE_BYTES] for n in reversed(range(count))
    )
    space.free(slots)
    assert not fake.pages


def test_load_fills_the_given_buffer(space: vswap.Space) -> None:
    """load(into=) fills and returns the caller's buffer."""
    pages = random_pages(MANY)
    slots = space.store(pages)
    array = np.zeros((MANY, PAGE_BYTES), np.uint8)
    assert space.load(slots, into=array) is array
    assert array.tobytes() == pages


def test_one_slot_may_be_given_as_a_number(space: vswap.Space) -> None:
    """A single slot out of an array is good enough for every call."""
    slot = space.store(random_pages(1))[0]
    space.store(random_pages(1, seed=2), slots=slot)
    assert space.load(slot) == random_pages(1, seed=2)
    space.free(slot)


def test_overwriting_keeps_the_slots(space: vswap.Space) -> None:
    """After an overwrite the same slots have the new pages."""
    slots = space.store(random_pages(MANY))
    new = random_pages(MANY, seed=2)
    again = space.store(new, slots=slots)
    assert again.tolist() == slots.tolist()
    assert space.load(slots) == new


def test_stored_pages_may_be_changed_at_once(space: vswap.Space) -> None:
    """When store returns, the daemon has the pages; the buffer is the caller's again."""
    buffer = bytearray(random_pages(MANY))
    before = bytes(buffer)
    slots = space.store(buffer)
    buffer[:] = bytes(len(buffer))
    assert space.load(slots) == before


def test_large_calls_are_cut_into_frames(space: vswap.Space, fake: FakeDaemon) -> None:
    """A call of many pages is as many requests as it takes, each within the limit."""
    space.store(random_pages(MANY))
    counts = [header.count for header in fake.requests if header.op == Op.STORE]
    assert counts == [FRAME_PAGES] * 5 + [3]


@pytest.mark.parametrize(("limit", "value"), [("max_batch", 3), ("max_frame_bytes", 24 + 3 * 4104)])
def test_the_daemons_limits_are_kept(socket_path: Path, limit: str, value: int) -> None:
    """A daemon that takes only three pages at once gets no more."""
    with FakeDaemon(socket_path, **{limit: value}) as fake, vswap.connect(socket_path) as space:
        pages = random_pages(8)
        assert space.load(space.store(pages)) == pages
        assert max(header.count for header in fake.requests) == 3


class CountingDaemon(FakeDaemon):
    """Answers only once `max_pipeline` requests are there: shows that they are pipelined."""

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        reply = b"".join(super().answer(header, body))
        if header.op != Op.STORE:
            yield reply
            return
        self.held = [*getattr(self, "held", []), reply]
        if len(self.held) == 2:
            yield b"".join(self.held)
            self.held = []


def test_requests_are_pipelined_up_to_the_window(socket_path: Path) -> None:
    """With max_pipeline 2 the second request is sent before the first reply, and never a third."""
    with (
        CountingDaemon(socket_path, max_pipeline=2) as fake,
        vswap.connect(socket_path, timeout=30) as space,
    ):
        space.store(random_pages(4 * FRAME_PAGES))
        assert len(fake.pages) == 4 * FRAME_PAGES


def test_a_rejected_store_leaves_nothing_behind(socket_path: Path) -> None:
    """New pages that do not all fit are all given back, and the connection goes on."""
    with (
        FakeDaemon(socket_path, capacity=3 * FRAME_PAGES) as fake,
        vswap.connect(socket_path) as space,
    ):
        with pytest.raises(vswap.Rejected, match="pool is full") as caught:
            space.store(random_pages(MANY))
        assert caught.value.reason == "pool_full"
        assert not len(caught.value.slots)
        assert not len(caught.value.done)
        assert not fake.pages
        assert len(space.store(random_pages(3 * FRAME_PAGES))) == 3 * FRAME_PAGES


class RejectingDaemon(FakeDaemon):
    """Rejects the frames whose numbers are in `rejecting`, counted over STOREs with slots."""

    rejecting: tuple[int, ...] = ()
    seen = 0

    def execute(self, header: Header, body: bytes) -> tuple[int, bytes, int, int]:
        if header.op == Op.STORE and header.flags & Flag.SLOTS:
            self.seen += 1
            if self.seen - 1 in self.rejecting:
                self._capacity, kept = 0, self._capacity
                try:
                    return super().execute(header, body)
                finally:
                    self._capacity = kept
        return super().execute(header, body)


def test_a_rejected_overwrite_says_what_each_slot_has(socket_path: Path) -> None:
    """`slots` are without content, `done` have the new pages, the others still the old ones."""
    with RejectingDaemon(socket_path, max_pipeline=1) as fake, vswap.connect(socket_path) as space:
        old, new = random_pages(MANY), random_pages(MANY, seed=2)
        slots = space.store(old)
        fake.rejecting = (2,)
        with pytest.raises(vswap.Rejected) as caught:
            space.store(new, slots=slots)
        cut = 2 * FRAME_PAGES
        error = caught.value
        assert error.done.tolist() == slots[:cut].tolist()
        assert error.slots.tolist() == slots[cut : cut + FRAME_PAGES].tolist()
        assert space.load(error.done) == new[: cut * PAGE_BYTES]
        with pytest.raises(vswap.Unbacked) as unbacked:
            space.load(error.slots)
        assert unbacked.value.slots.tolist() == error.slots.tolist()
        rest = slots[cut + FRAME_PAGES :]
        assert space.load(rest) == old[(cut + FRAME_PAGES) * PAGE_BYTES :]


def test_a_bad_slot_names_itself(space: vswap.Space) -> None:
    """Loads, frees and overwrites of a slot that is not there name it and change nothing."""
    slots = space.store(random_pages(3))
    mixed = [*slots.tolist(), 999]
    for call in (
        lambda: space.load(mixed),
        lambda: space.free(mixed),
        lambda: space.store(random_pages(4), slots=mixed),
    ):
        with pytest.raises(vswap.BadSlot) as caught:
            call()
        assert caught.value.slots.tolist() == [999]
    assert space.load(slots) == random_pages(3)


def test_a_free_that_fails_says_what_was_freed(socket_path: Path) -> None:
    """Frames before the failing one are freed, and the error lists their slots."""
    with FakeDaemon(socket_path, max_pipeline=1) as fake, vswap.connect(socket_path) as space:
        slots = space.store(random_pages(MANY))
        bad = slots.copy()
        bad[FRAME_PAGES] = 10**6
        with pytest.raises(vswap.BadSlot) as caught:
            space.free(bad)
        assert caught.value.slots.tolist() == [10**6]
        assert caught.value.done.tolist() == slots[:FRAME_PAGES].tolist()
        assert set(fake.pages) == set(slots[FRAME_PAGES:].tolist())


@pytest.mark.parametrize("bad", [b"x" * 4095, "text", np.zeros(8192, np.uint8)[::2]])
def test_bad_buffers_are_refused_before_anything_is_sent(
    space: vswap.Space,
    fake: FakeDaemon,
    bad: bytes,
) -> None:
    """What is not whole pages never reaches the daemon."""
    sent = len(fake.requests)
    with pytest.raises(vswap.BadBuffer):
        space.store(bad)
    with pytest.raises(vswap.BadBuffer):
        space.load([1], into=bytes(4096))
    with pytest.raises(vswap.DuplicateSlot):
        space.free([1] * (FRAME_PAGES + 1))
    assert len(fake.requests) == sent


def test_calls_of_nothing_send_nothing(space: vswap.Space, fake: FakeDaemon) -> None:
    """Zero pages are stored, loaded and freed without a word to the daemon."""
    sent = len(fake.requests)
    slots = space.store(b"")
    assert slots.shape == (0,)
    assert len(space.load(slots)) == 0
    space.free(slots)
    assert len(fake.requests) == sent


class LosingDaemon(FakeDaemon):
    """Has lost the page of slot 2."""

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        if header.op == Op.LOAD and (2).to_bytes(8, "little") in body:
            yield self.refusal(header, Status.PAGE_LOST, "checksum", [2])
        else:
            yield from super().answer(header, body)


def test_a_lost_page_is_named_and_the_others_load(socket_path: Path) -> None:
    """PageLost names its slot; what a caller can still have he gets without it."""
    with LosingDaemon(socket_path), vswap.connect(socket_path) as space:
        slots = space.store(random_pages(4))
        with pytest.raises(vswap.PageLost, match="checksum") as caught:
            space.load(slots)
        lost = caught.value.slots
        assert lost.tolist() == [2]
        space.load(np.setdiff1d(slots, lost))


def test_threads_take_turns(space: vswap.Space) -> None:
    """Calls of several threads on one space do not mix."""
    problems: list[str] = []

    def work(seed: int) -> None:
        for n in range(10):
            pages = random_pages(FRAME_PAGES + seed, seed=seed * 100 + n)
            slots = space.store(pages)
            if space.load(slots) != pages:
                problems.append(f"thread {seed} got other bytes")
            space.free(slots)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_status_and_ping_answer(space: vswap.Space) -> None:
    """status() is the daemon's document; ping() returns when it answered."""
    assert space.status() == {"state": "running"}
    space.ping()


def test_a_closed_space_says_so(space: vswap.Space) -> None:
    """After close every call is ConnectionLost; closing twice is fine."""
    assert not space.closed
    space.close()
    space.close()
    assert space.closed
    for call in (lambda: space.store(b""), lambda: space.store(bytes(4096)), space.ping):
        with pytest.raises(vswap.ConnectionLost, match="it was closed; connect"):
            call()
    assert "closed" in repr(space)


def test_the_space_knows_its_daemon(space: vswap.Space) -> None:
    """What HELLO answered is at hand."""
    assert (space.peer.daemon, space.peer.space) == ("fake 1", "1")
    assert "fake 1" in repr(space)
