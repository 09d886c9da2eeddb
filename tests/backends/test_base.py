"""Places, requests, and driving one operation to its end on the spot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.engine import UnkindDevice
from vswapd_backends.base import (
    PAGE_BYTES,
    PAUSE,
    SEGMENT_BYTES,
    WAIT,
    IoBatch,
    IoKind,
    IoRequest,
    Operation,
    Places,
    StuckError,
    Submit,
    run,
)
from vswapd_blockdev.device import ReadError, WriteError

BLOCK = b"\x5a" * PAGE_BYTES


def _bytes_of(request: IoRequest) -> bytes:
    assert request.result is not None
    return bytes(request.result)


@settings(deadline=None)
@given(
    entries=st.lists(
        st.tuples(
            st.integers(0, (1 << 29) - 1), st.integers(0, SEGMENT_BYTES - 1), st.integers(1, 4096)
        )
    )
)
def test_an_address_is_number_and_offset(entries: list[tuple[int, int, int]]) -> None:
    """Number and offset come back out of an address, for every number that a word can carry."""
    numbers, offsets, lengths = np.array(entries, np.int64).reshape(-1, 3).T
    places = Places(numbers * SEGMENT_BYTES + offsets, lengths)
    assert places.number.tolist() == numbers.tolist()
    assert places.offset.tolist() == offsets.tolist()


def test_places_within_one_segment() -> None:
    """`within` gives entries of one segment their addresses, `pick` some of them."""
    offsets, lengths = np.array([64, 100, 4096]), np.array([10, 20, 30])
    places = Places.within(7, offsets, lengths)
    assert places.number.tolist() == [7, 7, 7]
    assert places.offset.tolist() == [64, 100, 4096]
    some = places.pick(np.array([True, False, True]))
    assert (some.offset.tolist(), some.length.tolist()) == ([64, 4096], [10, 30])
    assert places.pick(np.array([2, 0])).length.tolist() == [30, 10]


def test_requests_do_what_they_say() -> None:
    """Each kind reaches the device, with its extent, offset and length."""
    device = UnkindDevice(4)
    IoRequest(IoKind.WRITE, device, 2, PAGE_BYTES, PAGE_BYTES, BLOCK).perform()
    read = IoRequest(IoKind.READ, device, 2, PAGE_BYTES, PAGE_BYTES)
    read.perform()
    assert _bytes_of(read) == BLOCK
    assert read.error is None
    discard = IoRequest(IoKind.DISCARD, device, 2, 0, 2)
    discard.perform()
    read.perform()
    assert _bytes_of(read) != BLOCK
    assert (device.reads, device.writes, device.discards) == (2, 1, 1)


def test_device_errors_are_kept_in_their_request() -> None:
    """A failed request has its error, and the others of the batch are performed all the same."""
    device = UnkindDevice(4)
    device.fails = lambda kind, nth: nth == 1
    requests = [IoRequest(IoKind.WRITE, device, i, 0, PAGE_BYTES, BLOCK) for i in range(2)]
    requests += [IoRequest(IoKind.READ, device, i, 0, PAGE_BYTES) for i in range(2)]
    IoBatch(requests).perform()
    assert [type(request.error) for request in requests] == [
        WriteError,
        type(None),
        ReadError,
        type(None),
    ]
    assert requests[2].result is None
    assert _bytes_of(requests[3]) == BLOCK


def test_mistakes_of_ours_are_not_device_errors() -> None:
    """What the device's contract forbids is raised, not kept."""
    request = IoRequest(IoKind.READ, UnkindDevice(4), 9, 0, PAGE_BYTES)
    with pytest.raises(AssertionError):
        request.perform()
    assert request.error is None


def test_run_performs_what_an_operation_yields() -> None:
    """Requests are done when it is resumed, pauses cost nothing, and its result is returned."""
    device = UnkindDevice(4)
    seen: list[str] = []

    def operation() -> Operation[str]:
        yield PAUSE
        early = IoBatch([IoRequest(IoKind.WRITE, device, 0, 0, PAGE_BYTES, BLOCK)])
        yield Submit(early)
        late = IoBatch([IoRequest(IoKind.READ, device, 0, 0, PAGE_BYTES)])
        yield late
        assert _bytes_of(late.requests[0]) == BLOCK
        yield early
        seen.append(f"{device.writes} write")
        return "done"

    assert run(operation()) == "done"
    assert seen == ["1 write"]


def test_run_hands_on_what_an_operation_raises() -> None:
    """An operation's own error ends it, and comes out."""

    def operation() -> Operation[None]:
        yield PAUSE
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(operation())


def test_a_lone_operation_that_waits_is_stuck() -> None:
    """Waiting for others, where there are none, is told instead of hanging."""

    def operation() -> Operation[None]:
        yield WAIT

    with pytest.raises(StuckError):
        run(operation())
