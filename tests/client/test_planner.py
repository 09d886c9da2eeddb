"""How calls are cut into frames and put together, without any I/O."""

from __future__ import annotations

import numpy as np
import pytest

import vswap
from vswap.pages import Pages
from vswap.planner import Ask, Call, Frame, Free, Load, Overwrite, Store, frame_limit
from vswap.protocol import MAX_BATCH, MAX_FRAME_BYTES, PAGE_BYTES, SLOT_BYTES, Flag, Op


def pages(count: int) -> Pages:
    return Pages(memoryview(bytes(range(256)) * 16 * count))


def slots(*numbers: int) -> vswap.errors.U64:
    return np.array(numbers, np.uint64)


def send_all(call: Call) -> list[Frame]:
    frames = []
    while (frame := call.next_frame(0)) is not None:
        call.in_flight += 1
        frames.append(frame)
    return frames


def accept(call: Call, frame: Frame, *stored: int) -> None:
    if stored:
        assert frame.targets
        frame.targets[0][:] = slots(*stored).tobytes()
    call.in_flight -= 1
    call.accept(frame, b"")


def refuse(call: Call, frame: Frame, error: vswap.VswapError) -> None:
    call.in_flight -= 1
    call.refuse(frame, error)


def rejected(*numbers: int) -> vswap.Rejected:
    return vswap.Rejected("no room", "pool_full", slots(*numbers))


def test_a_call_is_cut_into_frames_of_the_given_size() -> None:
    """Ten pages in frames of four are three requests, the last with two pages."""
    call = Store(pages(10), 4)
    frames = send_all(call)
    assert [(frame.where, frame.count) for frame in frames] == [
        (slice(0, 4), 4),
        (slice(4, 8), 4),
        (slice(8, 10), 2),
    ]
    assert [sum(map(len, frame.body)) for frame in frames] == [4 * 4096, 4 * 4096, 2 * 4096]
    assert all(frame.op is Op.STORE and not frame.flags for frame in frames)


def test_the_cut_copies_no_pages() -> None:
    """A frame's body looks into the caller's buffer."""
    buffer = bytearray(3 * PAGE_BYTES)
    frame = Store(Pages(memoryview(buffer)), 2).next_frame(0)
    assert frame is not None
    buffer[0] = 77
    assert frame.body[0][0] == 77


def test_a_short_last_page_travels_beside_the_whole_ones() -> None:
    """The frame that holds the last page has the tail behind the rest; others do not."""
    call = Store(Pages(pages(2).whole, memoryview(b"t" * PAGE_BYTES)), 2)
    first, last = send_all(call)
    assert sum(map(len, first.body)) == 2 * PAGE_BYTES
    assert b"".join(last.body) == b"t" * PAGE_BYTES


def test_slots_come_back_in_the_order_of_the_pages() -> None:
    """Each frame's slots land at the place of its pages, whichever way they are answered."""
    call = Store(pages(3), 2)
    first, second = send_all(call)
    accept(call, first, 11, 12)
    assert not call.over
    accept(call, second, 13)
    assert call.over
    assert call.result().tolist() == [11, 12, 13]


def test_an_overwrite_sends_its_slots_before_the_pages() -> None:
    """With slots given the frame is flagged, and its body is slots, then pages."""
    call = Overwrite(slots(5, 6, 7), pages(3), 2)
    first, second = send_all(call)
    assert first.flags == Flag.SLOTS
    assert bytes(first.body[0]) == slots(5, 6).tobytes()
    assert bytes(second.body[0]) == slots(7).tobytes()
    assert len(second.body[1]) == PAGE_BYTES


def test_loads_land_where_they_belong() -> None:
    """Each LOAD frame's reply fills its own pages of the target."""
    target = bytearray(3 * PAGE_BYTES)
    call = Load(slots(5, 6, 7), Pages(memoryview(target)), 2)
    _, second = send_all(call)
    assert second.targets
    second.targets[0][:] = b"z" * PAGE_BYTES
    assert target[2 * PAGE_BYTES :] == b"z" * PAGE_BYTES
    assert target[: 2 * PAGE_BYTES] == bytes(2 * PAGE_BYTES)


@pytest.mark.parametrize("call", [Store(pages(0), 4), Free(slots(), 4)])
def test_no_pages_are_no_frames(call: Call) -> None:
    """A call of nothing is over before it begins."""
    assert call.next_frame(0) is None
    assert call.over


def test_after_a_failure_no_more_is_sent() -> None:
    """The first refusal ends the row of requests."""
    call = Free(slots(*range(8)), 2)
    first = call.next_frame(0)
    assert first is not None
    call.in_flight += 1
    refuse(call, first, vswap.BadSlot("no", slots(1)))
    assert call.next_frame(0) is None
    assert call.over


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_store_frees_what_it_had_stored(failing: int) -> None:
    """Whichever frame fails, the slots of all others are freed before the call is over."""
    call = Store(pages(3), 1)
    frames = send_all(call)
    for index, frame in enumerate(frames):
        if index == failing:
            refuse(call, frame, rejected())
        else:
            accept(call, frame, 10 + index)
    assert not call.over
    undoing = send_all(call)
    assert all(frame.op is Op.FREE for frame in undoing)
    freed = {int(n) for frame in undoing for n in np.frombuffer(frame.body[0], np.uint64)}
    assert freed == {10, 11, 12} - {10 + failing}
    for frame in undoing:
        accept(call, frame)
    assert call.over
    with pytest.raises(vswap.Rejected) as caught:
        call.result()
    assert not len(caught.value.done)


def test_undoing_waits_for_all_answers() -> None:
    """Nothing is freed while a STORE is unanswered: it might store more to free."""
    call = Store(pages(3), 1)
    frames = send_all(call)
    accept(call, frames[0], 10)
    refuse(call, frames[1], rejected())
    assert call.next_frame(0) is None
    assert not call.over
    accept(call, frames[2], 12)
    assert call.next_frame(0) is not None


def test_an_undoing_that_fails_is_told_in_the_error() -> None:
    """The first cause stays the error; that pages are left behind is a note in it."""
    call = Store(pages(2), 1)
    first, second = send_all(call)
    accept(call, first, 10)
    refuse(call, second, rejected())
    (undo,) = send_all(call)
    refuse(call, undo, vswap.BadSlot("gone"))
    assert call.over
    with pytest.raises(vswap.Rejected) as caught:
        call.result()
    assert "could not be freed" in caught.value.__notes__[0]


def test_an_abandoned_store_is_undone() -> None:
    """A call that nobody waits for sends no more and frees what it had stored."""
    call = Store(pages(3), 1)
    frame = call.next_frame(0)
    assert frame is not None
    call.in_flight += 1
    call.abandon()
    assert call.next_frame(0) is None
    accept(call, frame, 10)
    (undo,) = send_all(call)
    assert bytes(undo.body[0]) == slots(10).tobytes()
    accept(call, undo)
    assert call.over


def test_a_rejected_overwrite_tells_which_slots_are_empty_and_which_are_new() -> None:
    """`slots` are those of all rejected frames, `done` those of the accepted ones."""
    call = Overwrite(slots(1, 2, 3, 4, 5, 6), pages(6), 2)
    frames = send_all(call)
    accept(call, frames[0])
    refuse(call, frames[1], rejected(3, 4))
    refuse(call, frames[2], rejected(5, 6))
    with pytest.raises(vswap.Rejected) as caught:
        call.result()
    assert caught.value.slots.tolist() == [3, 4, 5, 6]
    assert caught.value.done.tolist() == [1, 2]
    assert caught.value.reason == "pool_full"


def test_rejections_with_different_reasons_name_all_slots_without_content() -> None:
    """Shards can have different reasons; no slot may pass for one that is as it was."""
    call = Overwrite(slots(1, 2, 3, 4, 5, 6), pages(6), 2)
    frames = send_all(call)
    refuse(call, frames[0], rejected(1, 2))
    refuse(call, frames[1], vswap.Rejected("no", "device_full", slots(3, 4)))
    accept(call, frames[2])
    with pytest.raises(vswap.Rejected) as caught:
        call.result()
    assert caught.value.slots.tolist() == [1, 2, 3, 4]
    assert caught.value.done.tolist() == [5, 6]
    assert caught.value.reason == "pool_full"
    assert caught.value.__notes__ == ["other pages of the call: no"]


def test_two_kinds_of_failure_do_not_mix_their_slots() -> None:
    """The first failure is told; one of another kind adds nothing to its slots."""
    call = Free(slots(1, 2), 1)
    first, second = send_all(call)
    refuse(call, first, vswap.BadSlot("no", slots(1)))
    refuse(call, second, vswap.PageLost("no", slots(2)))
    with pytest.raises(vswap.BadSlot) as caught:
        call.result()
    assert caught.value.slots.tolist() == [1]


def test_slots_and_pages_must_be_of_one_number() -> None:
    """An overwrite of three pages with two slots is refused."""
    with pytest.raises(vswap.BadBuffer, match="2 slots do not fit 3 pages"):
        Overwrite(slots(1, 2), pages(3), 4)


def test_a_slot_twice_in_different_frames_is_found() -> None:
    """Doubles that no single frame shows are refused before anything is sent."""
    with pytest.raises(vswap.DuplicateSlot) as caught:
        Free(slots(1, 2, 3, 1, 2, 2), 2)
    assert caught.value.slots.tolist() == [1, 2]
    with pytest.raises(vswap.DuplicateSlot):
        Overwrite(slots(1, 2, 1), pages(3), 2)


def test_a_slot_twice_in_different_rows_of_its_shard_is_found() -> None:
    """Slots of two shards in long rows are several frames, however few they are."""
    here, there = np.arange(30, dtype=np.uint64), np.arange(30, dtype=np.uint64) + (1 << 56)
    mixed = np.concatenate([here, there, here])
    with pytest.raises(vswap.DuplicateSlot) as caught:
        Free(mixed, 128)
    assert caught.value.slots.tolist() == here.tolist()
    with pytest.raises(vswap.DuplicateSlot):
        Overwrite(mixed, pages(90), 128)
    Free(mixed[:60], 128)


def test_loading_a_slot_twice_is_fine() -> None:
    """A load may name a slot as often as it likes."""
    call = Load(slots(1, 1, 1), pages(3), 1)
    assert len(send_all(call)) == 3


def test_a_released_call_holds_no_buffer() -> None:
    """After release the caller can resize what he gave."""
    buffer = bytearray(2 * PAGE_BYTES)
    view = memoryview(buffer)
    call = Store(Pages(view), 1)
    call.release()
    view.release()
    buffer.extend(b"x")


def test_an_ask_is_one_frame_of_text_without_pages() -> None:
    """HELLO, STATUS and CONTROL have count 0, their text, and get text."""
    call = Ask(Op.HELLO, {}, Flag.CONTROL)
    (frame,) = send_all(call)
    assert (frame.count, frame.flags, bytes(frame.body[0])) == (0, 1, b"{}")
    call.in_flight -= 1
    call.accept(frame, b"yes")
    assert call.over
    assert call.result() == b"yes"


@pytest.mark.parametrize(
    ("wish", "max_batch", "max_frame_bytes", "limit"),
    [
        (64, MAX_BATCH, MAX_FRAME_BYTES, 64),
        (64, 10, MAX_FRAME_BYTES, 10),
        (64, MAX_BATCH, 24 + 7 * (PAGE_BYTES + SLOT_BYTES), 7),
        (64, MAX_BATCH, 24 + 7 * (PAGE_BYTES + SLOT_BYTES) - 1, 6),
        (1, 1, MAX_FRAME_BYTES, 1),
    ],
)
def test_frames_keep_within_the_daemons_limits(
    wish: int, max_batch: int, max_frame_bytes: int, limit: int
) -> None:
    """A frame has as many pages as wished, as long as pages, slots and header fit the limits."""
    assert frame_limit(wish, max_batch, max_frame_bytes) == limit


def test_a_daemon_that_takes_no_page_is_refused() -> None:
    """Limits that leave no room for one page are a protocol error."""
    with pytest.raises(vswap.ProtocolError, match="takes no pages"):
        frame_limit(64, 4096, 100)
