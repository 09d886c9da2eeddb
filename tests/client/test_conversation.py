"""Requests and replies in step, byte by byte, without a socket."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vswap
from vswap.conversation import Conversation
from vswap.pages import Pages
from vswap.planner import Ask, Call, Load, Store
from vswap.protocol import (
    HEADER_BYTES,
    MAX_TEXT_BYTES,
    PAGE_BYTES,
    Op,
    Reason,
    Status,
    error_body,
    pack_header,
    parse_header,
)


def reply(
    op: int, request_id: int, body: bytes = b"", *, status: int = 0, count: int = 0, flags: int = 0
) -> bytes:
    header = pack_header(
        op, len(body), status=status, count=count, flags=flags, request_id=request_id
    )
    return header + body


def feed(conversation: Conversation, data: bytes, sizes: list[int] | None = None) -> list[Call]:
    """Hand over `data`, in pieces of the sizes given (the last again and again)."""
    answered = []
    steps = itertools.chain(sizes or [], itertools.repeat((sizes or [1 << 30])[-1]))
    while data:
        count = min(len(conversation.wanted), next(steps), len(data))
        conversation.wanted[:count] = data[:count]
        data = data[count:]
        call = conversation.arrived(count)
        if call is not None:
            answered.append(call)
    return answered


def load_call(count: int, frame_pages: int = 64) -> tuple[Load, bytearray]:
    target = bytearray(count * PAGE_BYTES)
    slots = np.arange(count, dtype=np.uint64)
    return Load(slots, Pages(memoryview(target)), frame_pages), target


def slots_bytes(*slots: int) -> bytes:
    return np.array(slots, np.uint64).tobytes()


@given(sizes=st.lists(st.integers(1, 6000), min_size=1, max_size=20))
def test_replies_may_come_in_pieces_of_any_size(sizes: list[int]) -> None:
    """Wherever the stream is cut, every page lands in its place."""
    conversation = Conversation(window=8)
    call, target = load_call(3, 2)
    assert conversation.request(call, 0)
    assert conversation.request(call, 0)
    content = [bytes([n]) * PAGE_BYTES for n in (1, 2, 3)]
    stream = reply(Op.LOAD, 1, content[0] + content[1], count=2)
    stream += reply(Op.LOAD, 2, content[2], count=1)
    assert feed(conversation, stream, sizes) == [call, call]
    assert call.over
    assert bytes(target) == b"".join(content)


def test_requests_carry_count_flags_and_a_new_id_each() -> None:
    """The header on the wire says what the frame holds."""
    conversation = Conversation(window=8)
    call = Store(Pages(memoryview(bytes(3 * PAGE_BYTES))), 2)
    headers = []
    for _ in range(2):
        buffers = conversation.request(call, 0)
        assert buffers
        headers.append(parse_header(bytes(buffers[0]), 0, 1 << 30))
        assert sum(map(len, buffers)) == headers[-1].length
    assert [(h.op, h.count, h.request_id, h.status) for h in headers] == [
        (Op.STORE, 2, 1, 0),
        (Op.STORE, 1, 2, 0),
    ]


def test_the_window_bounds_what_is_unanswered() -> None:
    """With two of two requests unanswered the next must wait for a reply."""
    conversation = Conversation(window=2)
    call, _ = load_call(3, 1)
    assert conversation.request(call, 0)
    assert not conversation.full
    assert conversation.request(call, 0)
    assert conversation.full
    assert conversation.request(call, 0) is None
    feed(conversation, reply(Op.LOAD, 1, bytes(PAGE_BYTES), count=1))
    assert conversation.request(call, 0)


def test_a_typed_error_leaves_the_conversation_in_step() -> None:
    """After an error reply the next reply is read as what it is."""
    conversation = Conversation(window=8)
    failing, _ = load_call(2)
    good, target = load_call(1)
    conversation.request(failing, 0)
    conversation.request(good, 0)
    lost = error_body("the device is broken", slots_bytes(1))
    feed(conversation, reply(Op.LOAD, 1, lost, status=Status.PAGE_LOST, count=1))
    feed(conversation, reply(Op.LOAD, 2, b"p" * PAGE_BYTES, count=1))
    with pytest.raises(vswap.PageLost, match="the device is broken") as caught:
        failing.result()
    assert caught.value.slots.tolist() == [1]
    good.result()
    assert bytes(target) == b"p" * PAGE_BYTES
    assert conversation.idle


def test_a_rejection_carries_its_reason() -> None:
    """The flags of a REJECTED reply become the reason's word."""
    conversation = Conversation()
    call = Store(Pages(memoryview(bytes(PAGE_BYTES))), 64)
    conversation.request(call, 0)
    text = error_body("no room in 4 MB")
    feed(
        conversation,
        reply(Op.STORE, 1, text, status=Status.REJECTED, flags=Reason.GROUP_LIMIT),
    )
    with pytest.raises(vswap.Rejected, match="no room in 4 MB") as caught:
        call.result()
    assert caught.value.reason == "group_limit"


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (reply(Op.LOAD, 2, bytes(PAGE_BYTES), count=1), "answered request 2"),
        (reply(Op.FREE, 1), "operation 5"),
        (reply(Op.LOAD, 1, bytes(8), count=1), "8 bytes of body"),
        (reply(Op.LOAD, 1, bytes(2 * PAGE_BYTES), count=2), "8192 bytes of body"),
        (reply(Op.LOAD, 1, b"no", status=Status.BAD_SLOT, count=9), "names 9 slots"),
        (
            reply(Op.LOAD, 1, bytes(MAX_TEXT_BYTES + 1), status=Status.BAD_LENGTH),
            "bytes of text",
        ),
        (b"\0" * HEADER_BYTES, "version 0"),
        (b"HTTP/1.1 400 Bad Request\r\n", "no vswapd"),
        (pack_header(Op.LOAD, -1, request_id=1), "below the header"),
        (pack_header(Op.LOAD, 1 << 30, request_id=1), "the most is"),
    ],
)
def test_nonsense_is_a_protocol_error(stream: bytes, says: str) -> None:
    """Whatever cannot be the next reply is refused at once, with what is wrong about it."""
    conversation = Conversation()
    call, _ = load_call(1)
    conversation.request(call, 0)
    with pytest.raises(vswap.ProtocolError, match=says):
        feed(conversation, stream)


def test_a_reply_to_nothing_is_a_protocol_error() -> None:
    """With no request unanswered a reply is nonsense."""
    with pytest.raises(vswap.ProtocolError, match="not asked"):
        feed(Conversation(), reply(Op.PING, 0))


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("status", [status for status in Status if status.closes])
def test_a_closing_error_ends_the_conversation(status: Status, asked: bool) -> None:  # noqa: FBT001
    """A closing status is raised at once, as answer to a request or to none."""
    conversation = Conversation()
    if asked:
        conversation.request(load_call(1)[0], 0)
    stream = reply(Op.LOAD if asked else 0, 1 if asked else 0, b"the end", status=status)
    with pytest.raises((vswap.ConnectionLost, vswap.ProtocolError), match="the end"):
        feed(conversation, stream)


def test_an_unknown_status_is_an_error_of_its_request_only() -> None:
    """A newer daemon's status does not end the connection."""
    conversation = Conversation()
    call = Ask(Op.STATUS)
    conversation.request(call, 0)
    feed(conversation, reply(Op.STATUS, 1, b"new", status=0x2FF))
    with pytest.raises(vswap.NotUnderstood, match="0x2ff: new"):
        call.result()
    assert conversation.idle


def test_an_unknown_reason_is_a_rejection_nevertheless() -> None:
    """A newer daemon's reason is still a page not taken."""
    conversation = Conversation()
    call = Store(Pages(memoryview(bytes(PAGE_BYTES))), 64)
    conversation.request(call, 0)
    feed(conversation, reply(Op.STORE, 1, b"moon", status=Status.REJECTED, flags=99))
    with pytest.raises(vswap.Rejected, match="moon") as caught:
        call.result()
    assert caught.value.reason == "reason_99"


@pytest.mark.parametrize("arrived", [0, 5, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 5000])
def test_an_abandoned_load_touches_its_target_no_more(arrived: int) -> None:
    """Wherever in the reply it is abandoned, the rest goes elsewhere and the next is in step."""
    conversation = Conversation(window=8)
    call, target = load_call(3, 2)
    after = Ask(Op.PING)
    for each in (call, call, after):
        conversation.request(each, 0)
    stream = reply(Op.LOAD, 1, b"x" * 2 * PAGE_BYTES, count=2)
    stream += reply(Op.LOAD, 2, b"y" * PAGE_BYTES, count=1) + reply(Op.PING, 3)
    feed(conversation, stream[:arrived])
    before = bytes(target)
    conversation.abandon(call)
    feed(conversation, stream[arrived:], [1000])
    assert bytes(target) == before
    assert after.over
    assert call.over


@pytest.mark.parametrize("arrived", [0, 5, HEADER_BYTES, HEADER_BYTES + 5, HEADER_BYTES + 8])
def test_a_store_that_is_abandoned_within_its_reply_frees_what_it_was_given(arrived: int) -> None:
    """The slots are heard to the end, or others than these would be freed."""
    conversation = Conversation()
    call = Store(Pages(memoryview(bytes(3 * PAGE_BYTES))), 64)
    call.slots[:] = 1, 2, 3  # what happens to be in its memory
    conversation.request(call, 0)
    stream = reply(Op.STORE, 1, slots_bytes(7, 8, 9), count=3)
    feed(conversation, stream[:arrived])
    conversation.abandon(call)
    feed(conversation, stream[arrived:])
    buffers = conversation.request(call, 0)
    assert buffers is not None
    assert b"".join(buffers[1:]) == slots_bytes(7, 8, 9)


def test_a_sent_frame_holds_no_pages() -> None:
    """Once its buffers are let go of, nothing keeps the caller's memory from being resized."""
    conversation = Conversation()
    buffer = bytearray(PAGE_BYTES)
    call = Store(Pages(memoryview(buffer)), 64)
    buffers = conversation.request(call, 0)
    call.release()
    del buffers
    buffer.extend(b"x")
