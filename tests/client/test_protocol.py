"""protocol.py by itself, and docs/protocol.md held against it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswap import protocol
from vswap.protocol import (
    HEADER_BYTES,
    LISTS_SLOTS,
    MAX_FRAME_BYTES,
    MAX_TEXT_BYTES,
    FrameError,
    Op,
    Reason,
    Status,
    error_body,
    pack_header,
    parse_header,
    request_body_bytes,
)

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


@given(
    op=st.integers(0, 255),
    body=st.integers(0, MAX_FRAME_BYTES - HEADER_BYTES),
    status=st.integers(0, 0xFFFF),
    count=st.integers(0, 2**32 - 1),
    flags=st.integers(0, 2**32 - 1),
    request_id=st.integers(0, 2**64 - 1),
)
def test_headers_come_back(
    op: int, body: int, status: int, count: int, flags: int, request_id: int
) -> None:
    """What is packed is parsed, anywhere in a buffer."""
    raw = pack_header(op, body, status=status, count=count, flags=flags, request_id=request_id)
    header = parse_header(b"xyz" + raw, 3, MAX_FRAME_BYTES)
    assert (header.op, header.status, header.count) == (op, status, count)
    assert (header.flags, header.request_id, header.body_bytes) == (flags, request_id, body)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (struct.pack("<IBBHIIQ", 24, 2, 3, 0, 0, 0, 9), Status.BAD_VERSION),
        (struct.pack("<IBBHIIQ", 23, 1, 3, 0, 0, 0, 9), Status.BAD_FRAME),
        (struct.pack("<IBBHIIQ", 0, 1, 3, 0, 0, 0, 9), Status.BAD_FRAME),
        (struct.pack("<IBBHIIQ", 1025, 1, 3, 0, 0, 0, 9), Status.FRAME_TOO_LARGE),
    ],
)
def test_bad_headers_carry_the_status_to_answer_with(raw: bytes, status: Status) -> None:
    """A header that no frame can be cut after is refused with its status and request id."""
    with pytest.raises(FrameError) as caught:
        parse_header(raw, 0, 1024)
    assert (caught.value.status, caught.value.request_id, caught.value.op) == (status, 9, 3)
    assert status.closes


def test_bodies_are_as_long_as_the_page_says() -> None:
    """The lengths of request bodies follow from operation, count and flags."""
    assert request_body_bytes(Op.STORE, 3, 0) == 3 * 4096
    assert request_body_bytes(Op.STORE, 3, 1) == 3 * (4096 + 8)
    assert request_body_bytes(Op.LOAD, 3, 0) == request_body_bytes(Op.FREE, 3, 0) == 24
    assert request_body_bytes(Op.PING, 0, 0) == request_body_bytes(Op.STATUS, 0, 0) == 0
    assert request_body_bytes(Op.HELLO, 0, 0) is request_body_bytes(Op.CONTROL, 0, 0) is None


def test_error_bodies_fit() -> None:
    """A long text is cut so that slots and text stay within the limit."""
    body = error_body("x" * (MAX_TEXT_BYTES + 5), b"12345678")
    assert len(body) == MAX_TEXT_BYTES
    assert body.startswith(b"12345678x")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading of the page."""
    behind = PAGE.split(heading, 1)[1]
    lines = behind[behind.index("|") :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_has_every_operation() -> None:
    """The table of operations is that of the code."""
    assert {row[1]: int(row[0]) for row in rows("## Operations")} == {
        op.name: op.value for op in Op
    }


def test_the_page_has_every_status() -> None:
    """The table of statuses is that of the code: numbers, which close, which list slots."""
    table = {row[1]: row for row in rows("## Errors")}
    assert {name: int(row[0], 16) for name, row in table.items()} == {
        status.name: status.value for status in Status
    }
    assert {name for name, row in table.items() if row[2] == "X"} == {
        status.name for status in Status if status.closes
    }
    assert {name for name, row in table.items() if row[2] == "*"} == {
        Status(status).name for status in LISTS_SLOTS
    }


def test_the_page_has_every_reason() -> None:
    """The table of reasons is that of the code."""
    assert {row[1]: int(row[0]) for row in rows("Reasons of REJECTED")} == {
        reason.word: reason.value for reason in Reason
    }


def test_the_page_has_the_headers_layout() -> None:
    """Offsets and widths of the header's fields add up to what is packed."""
    layout = [(int(row[0]), int(row[1])) for row in rows("## Frames")[:-1]]
    assert layout == [(0, 4), (4, 1), (5, 1), (6, 2), (8, 4), (12, 4), (16, 8)]
    assert sum(layout[-1]) == protocol.HEADER.size


def test_the_example_is_a_conversation() -> None:
    """The bytes of the example are frames, and each reply answers the request before it."""
    example = PAGE.split("## Example", 1)[1]
    frame = re.compile(r"^    ([<>]) ([0-9a-f ]{70,})\n((?:      [0-9a-f. ]+\n)*)", re.MULTILINE)
    frames = frame.findall(example)
    assert len(frames) == 10
    asked = None
    for index, (direction, header_text, body_text) in enumerate(frames):
        header = parse_header(bytes.fromhex(header_text), 0, MAX_FRAME_BYTES)
        assert direction == "><"[index % 2]
        body = bytes.fromhex(body_text.replace("..", ""))
        assert len(body) == header.body_bytes or (".." in body_text and header.body_bytes > 8)
        if direction == ">":
            asked = header
            expected = request_body_bytes(Op(header.op), header.count, header.flags)
            assert expected in {None, header.body_bytes}
        else:
            assert asked is not None
            assert (header.op, header.request_id) == (asked.op, asked.request_id)


@pytest.mark.parametrize(
    "path",
    [
        "support/wire.py",
        "client/test_protocol_independent.py",
        "client/test_protocol_rejections.py",
        "client/test_protocol_closing.py",
        "client/test_protocol_steering.py",
    ],
)
def test_the_independent_client_is_independent(path: str) -> None:
    """The client that shows the page to be complete imports nothing of ours."""
    source = (Path(__file__).parents[1] / path).read_text()
    assert not re.search(r"^\s*(import|from) vswap", source, re.MULTILINE)
