"""The wire format: frames in, frames out, no I/O. Both ends use this module.

A frame is a fixed header of 24 bytes, then a body whose length follows from the operation and the
count. All numbers are little-endian. `docs/protocol.md` is the same in prose, and a test drives the
daemon from that page alone.

Invariants:
- `length` counts the whole frame, header included; a reader that trusts it can always find the next
  frame, so an unknown operation or a body of the wrong length costs one error reply, not the
  connection. A wrong version or a length out of bounds does cost it: nothing after it can be found.
- Requests carry status 0. A reply carries the operation and the request id of its request.
- Replies come in the order of their requests.

This module must not know sockets, event loops, the engine, or what else a slot id means.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

VERSION: Final = 1
PAGE_BYTES: Final = 4096
SLOT_BYTES: Final = 8
SHARD_SHIFT: Final = 56
"""A slot's most significant bits name the shard that gave it out."""
OFFSET_BYTES: Final = 8
"""Where in the window pages lie: bytes from its beginning, whole pages."""
HEADER: Final = struct.Struct("<IBBHIIQ")
HEADER_BYTES: Final = HEADER.size  # 24: a multiple of 8, so the slots that follow it are aligned
MAX_BATCH: Final = 4096
"""Most pages in one request: 16 MiB, the largest folio."""
MAX_TEXT_BYTES: Final = 1 << 20
"""Longest JSON body of a reply (HELLO, STATUS, CONTROL) and longest error text."""
MAX_ASKED_BYTES: Final = 64 * 1024
"""Longest JSON body of a request (HELLO, CONTROL): reading it takes 1 ms at most."""
MAX_FRAME_BYTES: Final = HEADER_BYTES + MAX_BATCH * (SLOT_BYTES + PAGE_BYTES)


class Op(IntEnum):
    """Operations. Bodies are written `request -> reply`."""

    HELLO = 1
    """JSON -> JSON. Must come first. Opens a space unless flagged CONTROL."""
    PING = 2
    """nothing -> nothing."""
    STORE = 3
    """[count slots, if flagged SLOTS] count pages -> count slots. All or nothing.
    Flagged WINDOW: an offset instead of the pages."""
    LOAD = 4
    """count slots -> count pages, in the order asked for. A slot may stand twice.
    Flagged WINDOW: an offset, count slots -> nothing, the pages are in the window."""
    FREE = 5
    """count slots -> nothing."""
    STATUS = 6
    """nothing -> JSON."""
    CONTROL = 7
    """JSON {"verb": ..., ...} -> JSON. For root and the daemon's own user."""
    LIST = 8
    """A slot -> slots: those of the space on this shard that come after it, ascending, at most
    `count`. Slot 0 comes before all."""


class Flag(IntFlag):
    """Meaning depends on the operation; unknown bits are an error."""

    NONE = 0
    SLOTS = 1
    """STORE: the body begins with the slots to overwrite."""
    WINDOW = 2
    """STORE, LOAD: the pages lie in the window, from the offset on that the body begins with."""
    CONTROL = 1
    """HELLO: this connection keeps no pages; no space is opened."""


SLOTS_BIT: Final = int(Flag.SLOTS)
WINDOW_BIT: Final = int(Flag.WINDOW)
"""As plain numbers: an `&` with a Flag takes 1.5 us, and each request has several."""


class Status(IntEnum):
    """A reply's outcome. The high byte is its class.

    0x00 a result; 0x01 the request was not understood; 0x02 the request was wrong (the caller's
    fault); 0x03 the daemon failed (ours). `closes` tells which of them end the connection.
    """

    OK = 0x000
    REJECTED = 0x001
    """STORE: not taken; `flags` holds the reason's code. Slots that were to be overwritten are
    UNBACKED now, and the reply lists them; none was newly allocated."""

    BAD_FRAME = 0x101
    """The length field is below the header's size. Closes."""
    BAD_VERSION = 0x102
    """Another protocol version. Closes."""
    UNKNOWN_OP = 0x103
    FRAME_TOO_LARGE = 0x104
    """Longer than `max_frame_bytes` of the HELLO reply. Closes."""

    BAD_LENGTH = 0x201
    """The body's length disagrees with the count."""
    BAD_SLOT = 0x202
    """Free, stale, or another space's; the reply lists them. Nothing was changed."""
    DUPLICATE_SLOT = 0x203
    """One slot twice in a STORE or FREE; the reply lists them. Nothing was changed."""
    UNBACKED = 0x204
    """LOAD of a slot whose last store was rejected; the reply lists them."""
    BATCH_TOO_LARGE = 0x205
    """More than `max_batch` pages, or none."""
    NOT_ALLOWED = 0x206
    """Steering by somebody who is neither root nor the daemon's user."""
    BAD_ARGUMENT = 0x207
    """CONTROL or HELLO: the text says what is wrong. Any request: flags, status or count."""
    HELLO_FIRST = 0x208
    """A connection's first request must be HELLO, and only that one. Closes."""
    NO_SPACE = 0x209
    """Page operations on a CONTROL connection."""
    SPACE_LOST = 0x20A
    """HELLO: the space that a token is said of is not there, or not for this client. Closes."""
    SPACE_BUSY = 0x20B
    """HELLO: the named space has a client already, or the part a connection. Closes."""

    PAGE_LOST = 0x301
    """LOAD: the device failed or a checksum did not match; the reply lists the slots. The other
    slots of the request can still be loaded."""
    INTERNAL = 0x302
    """A mistake in the daemon; the journal has it. Closes."""
    TOO_MANY_CONNECTIONS = 0x303
    """Closes."""
    STOPPING = 0x304
    """The daemon is shutting down. Closes."""
    TIMED_OUT = 0x305
    """Half a frame, and then nothing for `request_timeout`. Closes."""
    NO_SLOTS = 0x306
    """The swap table is full (`table.max_slots`)."""
    OUT_OF_SERVICE = 0x307
    """CONTROL: the daemon could not do it (no room for swapoff, no such device, I/O error).
    HELLO: there are as many spaces as there may be."""

    @property
    def closes(self) -> bool:
        """Whether the daemon closes the connection after a reply of this status."""
        return self in _CLOSING


_CLOSING: Final = frozenset(
    {
        Status.BAD_FRAME,
        Status.BAD_VERSION,
        Status.FRAME_TOO_LARGE,
        Status.HELLO_FIRST,
        Status.SPACE_LOST,
        Status.SPACE_BUSY,
        Status.INTERNAL,
        Status.TOO_MANY_CONNECTIONS,
        Status.STOPPING,
        Status.TIMED_OUT,
    }
)

LISTS_SLOTS: Final = frozenset(
    {
        Status.REJECTED,
        Status.BAD_SLOT,
        Status.DUPLICATE_SLOT,
        Status.UNBACKED,
        Status.PAGE_LOST,
    }
)
"""Error replies whose body is `count` slots and then the text; all others have only the text."""


class Reason(IntEnum):
    """Why a page was not taken. One word each, the same in counters, status, metrics, errors."""

    POOL_FULL = 1
    """The pool is at its limit, nothing can be made to go, and there is no device."""
    DEVICE_FULL = 2
    """Neither the pool nor any device has room."""
    NO_DEVICE = 3
    """The pool is switched off (or its limit, or the group's, is 0) and there is no device."""
    GROUP_LIMIT = 4
    """The group has reached its own limits."""
    WRITEBACK_DISABLED = 5
    """The pool has no room, and this group's pages may not go to the device."""
    WRITE_BUDGET = 6
    """The pool has no room, and today's write budget is spent."""
    DISABLED = 7
    """Storing is switched off (`store.enabled = false`)."""

    @property
    def word(self) -> str:
        """The reason as it is written everywhere: `pool_full`, `device_full`, ..."""
        return self.name.lower()


class FrameError(Exception):
    """A header that no frame can be cut after. Carries the status to answer with."""

    def __init__(self, status: Status, text: str, request_id: int = 0, op: int = 0) -> None:
        super().__init__(text)
        self.status = status
        self.request_id = request_id
        self.op = op


@dataclass(frozen=True, slots=True)
class Header:
    """One frame's header, as it stands on the wire."""

    length: int
    op: int
    status: int
    count: int
    flags: int
    request_id: int

    @property
    def body_bytes(self) -> int:
        """Bytes that follow the header."""
        return self.length - HEADER_BYTES


def parse_header(buffer: bytes | bytearray | memoryview, offset: int, max_frame: int) -> Header:
    """The header at `offset`; the caller has made sure that HEADER_BYTES are there.

    Raises:
        FrameError: wrong version, or a length below the header's or above `max_frame`.
    """
    length, version, op, status, count, flags, request_id = HEADER.unpack_from(buffer, offset)
    if version != VERSION:
        raise FrameError(
            Status.BAD_VERSION,
            f"protocol version {version} is not spoken here, this is version {VERSION}",
            request_id,
            op,
        )
    if length < HEADER_BYTES:
        raise FrameError(
            Status.BAD_FRAME,
            f"frame length {length} is below the header's {HEADER_BYTES} bytes",
            request_id,
            op,
        )
    if length > max_frame:
        raise FrameError(
            Status.FRAME_TOO_LARGE,
            f"frame of {length} bytes, the most is {max_frame}: send fewer pages at once",
            request_id,
            op,
        )
    return Header(length, op, status, count, flags, request_id)


def pack_header(
    op: int,
    body_bytes: int,
    *,
    status: int = 0,
    count: int = 0,
    flags: int = 0,
    request_id: int = 0,
) -> bytes:
    """The 24 bytes that stand before a body of `body_bytes`."""
    return HEADER.pack(HEADER_BYTES + body_bytes, VERSION, op, status, count, flags, request_id)


def request_body_bytes(op: Op, count: int, flags: int) -> int | None:
    """How long a request's body must be, or None where it is text of any length.

    Shapes: LOAD and FREE count*8; LIST 8; STORE count*4096, with SLOTS count*(8+4096); PING and
    STATUS 0. With WINDOW: 8 more, and no pages.
    """
    window = flags & WINDOW_BIT
    match op:
        case Op.STORE:
            slots = count * SLOT_BYTES if flags & SLOTS_BIT else 0
            return slots + (OFFSET_BYTES if window else count * PAGE_BYTES)
        case Op.LOAD:
            return count * SLOT_BYTES + (OFFSET_BYTES if window else 0)
        case Op.FREE:
            return count * SLOT_BYTES
        case Op.LIST:
            return SLOT_BYTES
        case Op.PING | Op.STATUS:
            return 0
        case Op.HELLO | Op.CONTROL:
            return None


def error_body(text: str, slots: bytes = b"") -> bytes:
    """The body of an error reply: the slots it is about (packed u64), then the text, cut to fit."""
    return slots + text.encode()[: MAX_TEXT_BYTES - len(slots)]
