"""A client written from docs/protocol.md alone drives the real daemon: operations, wrong requests.

The client is tests/support/wire.py, which knows struct and socket and nothing of vswap.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.daemon import RunningDaemon
from support.wire import (
    BAD_ARGUMENT,
    BAD_LENGTH,
    BAD_SLOT,
    BATCH_TOO_LARGE,
    DUPLICATE_SLOT,
    FOR_CONTROL,
    FREE,
    HELLO,
    LOAD,
    NO_SPACE,
    PING,
    STATUS,
    STORE,
    UNKNOWN_OP,
    WITH_SLOTS,
    Wire,
    noise,
    pack,
    text_pages,
)


@pytest.fixture
def wire(daemon: RunningDaemon) -> Iterator[Wire]:
    with Wire(daemon.socket_path) as wire:
        wire.hello()
        yield wire


def test_hello_says_the_limits(daemon: RunningDaemon) -> None:
    """The answer to HELLO has all the keys of the page."""
    with Wire(daemon.socket_path) as wire:
        answer = wire.hello()
        assert (answer["version"], answer["page_bytes"]) == (1, 4096)
        assert 0 <= answer["shard"] < answer["shards"]
        assert answer["max_batch"] >= 1
        assert answer["max_pipeline"] >= 1
        assert answer["max_frame_bytes"] >= 24 + 4104
        assert isinstance(answer["space"], str)
        assert answer["daemon"].startswith("vswapd ")
        assert answer["token"] is None or bytes.fromhex(answer["token"])


def test_hello_for_control_opens_no_space(daemon: RunningDaemon) -> None:
    """Flag CONTROL: no space, no token, and page operations are NO_SPACE."""
    with Wire(daemon.socket_path) as wire:
        answer = wire.hello(FOR_CONTROL)
        assert answer["space"] is None
        assert answer["token"] is None
        assert wire.store(bytes(4096)).status == NO_SPACE
        assert wire.load([1]).status == NO_SPACE
        assert wire.free([1]).status == NO_SPACE
        wire.assert_in_step()


def test_hello_may_be_empty(daemon: RunningDaemon) -> None:
    """The key `client`, or the whole body, may be missing."""
    for body in (b"{}", b""):
        with Wire(daemon.socket_path) as wire:
            assert wire.ask(HELLO, body).status == 0


@pytest.mark.parametrize("pages", [bytes(4096), text_pages(1), noise(1)])
def test_a_page_is_stored_loaded_and_freed(wire: Wire, pages: bytes) -> None:
    """Zero pages, pages that shrink, and pages that do not: the same bytes come back."""
    stored = wire.store(pages)
    assert (stored.status, stored.count, len(stored.body)) == (0, 1, 8)
    for _ in range(2):  # loading does not free
        loaded = wire.load(stored.slots)
        assert (loaded.status, loaded.count) == (0, 1)
        assert loaded.body == pages
    freed = wire.free(stored.slots)
    assert (freed.status, freed.count, freed.body) == (0, 1, b"")
    assert wire.load(stored.slots).status == BAD_SLOT


def test_a_batch_keeps_its_order(wire: Wire) -> None:
    """Slots come in the order of the pages, pages in the order of the slots, doubles included."""
    pages = text_pages(500) + bytes(4096 * 12) + noise(88)
    slots = wire.store(pages).slots
    assert len(set(slots)) == 600
    wanted = [*range(599, -1, -1), 5, 5]
    loaded = wire.load([slots[n] for n in wanted])
    assert loaded.body == b"".join(pages[n * 4096 : (n + 1) * 4096] for n in wanted)


def test_the_largest_batch_is_taken(daemon: RunningDaemon) -> None:
    """max_batch pages in one frame, with slots and without."""
    with Wire(daemon.socket_path) as wire:
        count = wire.hello()["max_batch"]
        pages = text_pages(count)
        slots = wire.store(pages).slots
        assert len(slots) == count
        assert wire.store(pages[::-1], slots).status == 0
        assert wire.load(slots).body == pages[::-1]
        assert wire.free(slots).status == 0


def test_an_overwrite_repeats_its_slots(wire: Wire) -> None:
    """STORE with slots replaces what they have."""
    slots = wire.store(text_pages(4)).slots
    again = wire.store(noise(2) + bytes(8192), slots[::-1])
    assert (again.status, again.slots) == (0, slots[::-1])
    assert wire.load(slots[:2]).body == bytes(8192)


def test_requests_can_be_pipelined(wire: Wire) -> None:
    """Many requests in one write are answered one by one, in order, errors among them."""
    slots = wire.store(text_pages(8)).slots
    first = wire.last_id + 1
    wanted = [*slots[:3], 2**64 - 1, *slots[3:]]
    frames = [wire.frame(LOAD, pack([slot]), count=1) for slot in wanted]
    frames += [wire.frame(99), wire.frame(PING)]
    wire.socket.sendall(b"".join(frames))
    replies = [wire.reply() for _ in frames]
    assert [reply.request_id for reply in replies] == list(range(first, first + 11))
    assert [reply.status for reply in replies] == [0, 0, 0, BAD_SLOT, *[0] * 5, UNKNOWN_OP, 0]
    pages = b"".join(reply.body for reply in replies if reply.op == LOAD and not reply.status)
    assert pages == text_pages(8)


def test_frames_may_come_byte_by_byte(wire: Wire) -> None:
    """How the stream is cut does not matter."""
    page = text_pages(1)
    frame = wire.frame(STORE, page, count=1)
    for offset in range(64):
        wire.socket.sendall(frame[offset : offset + 1])
    wire.socket.sendall(frame[64:4000])
    wire.socket.sendall(frame[4000:])
    assert wire.load(wire.reply().slots).body == page


def test_status_is_for_everybody(daemon: RunningDaemon) -> None:
    """STATUS answers with the document, on both kinds of connection."""
    for flags in (0, FOR_CONTROL):
        with Wire(daemon.socket_path) as wire:
            wire.hello(flags)
            assert wire.ask(STATUS).json["state"] == "running"


# Requests that are wrong, and leave the connection as it was.


def test_an_unknown_operation_costs_one_reply(wire: Wire) -> None:
    """UNKNOWN_OP: the frame is passed over, whatever its body."""
    for op in (0, 9, 99, 255):
        reply = wire.ask(op, b"whatever this is", count=3)
        assert (reply.status, reply.count) == (UNKNOWN_OP, 0)
        assert reply.text
    wire.assert_in_step()


@pytest.mark.parametrize(
    ("op", "body", "count", "flags"),
    [
        (STORE, b"x" * 4095, 1, 0),
        (STORE, b"x" * 4097, 1, 0),
        (STORE, b"x" * 4096, 2, 0),
        (STORE, b"x" * 4096, 1, WITH_SLOTS),
        (STORE, b"x" * 4104, 1, 0),
        (LOAD, b"x" * 8, 2, 0),
        (LOAD, b"x" * 7, 1, 0),
        (FREE, b"x" * 16, 1, 0),
        (PING, b"x", 0, 0),
        (STATUS, b"{}", 0, 0),
    ],
)
def test_a_body_of_the_wrong_length_costs_one_reply(
    wire: Wire, op: int, body: bytes, count: int, flags: int
) -> None:
    """BAD_LENGTH: body, count and flags must agree."""
    assert wire.ask(op, body, count=count, flags=flags).status == BAD_LENGTH
    wire.assert_in_step()


@pytest.mark.parametrize("op", [STORE, LOAD, FREE])
def test_a_batch_of_none_is_refused(wire: Wire, op: int) -> None:
    """BATCH_TOO_LARGE: count 0."""
    assert wire.ask(op, b"", count=0).status == BATCH_TOO_LARGE
    wire.assert_in_step()


@pytest.mark.parametrize("op", [LOAD, FREE])
def test_a_batch_of_too_many_is_refused(daemon: RunningDaemon, op: int) -> None:
    """BATCH_TOO_LARGE: more than max_batch."""
    with Wire(daemon.socket_path) as wire:
        count = wire.hello()["max_batch"] + 1
        assert wire.ask(op, bytes(8 * count), count=count).status == BATCH_TOO_LARGE
        wire.assert_in_step()


@pytest.mark.parametrize(
    ("op", "flags"), [(STORE, 4), (STORE, 1 << 31), (LOAD, 1), (FREE, 2), (PING, 1)]
)
def test_unknown_flags_are_refused(wire: Wire, op: int, flags: int) -> None:
    """BAD_ARGUMENT: a flag that the page does not have."""
    body = bytes(4096) if op == STORE else bytes(8) if op == LOAD else b""
    reply = wire.ask(op, body, count=int(op != PING), flags=flags)
    assert reply.status == BAD_ARGUMENT
    wire.assert_in_step()


def test_bad_slots_are_listed_and_nothing_is_changed(wire: Wire) -> None:
    """BAD_SLOT names slots at fault and no others, for every operation on slots."""
    pages = text_pages(4)
    slots = wire.store(pages).slots
    gone = wire.store(noise(1)).slots
    wire.free(gone)
    mixed = [*slots[:2], *gone, *slots[2:], 2**64 - 1]
    bad = [*gone, 2**64 - 1]
    for reply in (wire.load(mixed), wire.free(mixed), wire.store(noise(6), mixed)):
        assert reply.status == BAD_SLOT
        assert reply.slots
        assert set(reply.slots) <= set(bad)
        assert reply.text
    assert wire.load(slots).body == pages


def test_another_spaces_slots_are_bad_slots(wire: Wire, daemon: RunningDaemon) -> None:
    """A slot of another connection's space can be neither loaded, overwritten nor freed."""
    pages = text_pages(1)
    slots = wire.store(pages).slots
    with Wire(daemon.socket_path) as other:
        other.hello()
        for reply in (other.load(slots), other.free(slots), other.store(noise(1), slots)):
            assert (reply.status, reply.slots) == (BAD_SLOT, slots)
    assert wire.load(slots).body == pages


def test_a_space_ends_with_its_connection(daemon: RunningDaemon) -> None:
    """Another connection cannot name the slots of one that is gone."""
    with Wire(daemon.socket_path) as wire:
        wire.hello()
        slots = wire.store(noise(3)).slots
    with Wire(daemon.socket_path) as wire:
        wire.hello()
        assert wire.load(slots).status == BAD_SLOT


def test_a_slot_twice_is_refused(wire: Wire) -> None:
    """DUPLICATE_SLOT for STORE and FREE, with the slots; nothing is changed."""
    pages = text_pages(2)
    one, two = wire.store(pages).slots
    for reply in (wire.free([one, two, one]), wire.store(noise(3), [two, one, one])):
        assert (reply.status, reply.slots) == (DUPLICATE_SLOT, [one])
    assert wire.load([one, two]).body == pages
