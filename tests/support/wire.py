"""The wire of vswapd as docs/protocol.md has it, spoken with struct and socket alone.

Numbers and names in here are copied from that page by hand.

This module must not import vswap: that it can do without is what it shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

HELLO, PING, STORE, LOAD, FREE, STATUS, CONTROL, LIST = range(1, 9)
WITH_SLOTS = 1  # flag of STORE
FOR_CONTROL = 1  # flag of HELLO

REJECTED = 0x001
BAD_FRAME, BAD_VERSION, UNKNOWN_OP, FRAME_TOO_LARGE = 0x101, 0x102, 0x103, 0x104
BAD_LENGTH, BAD_SLOT, DUPLICATE_SLOT, UNBACKED, BATCH_TOO_LARGE = range(0x201, 0x206)
NOT_ALLOWED, BAD_ARGUMENT, HELLO_FIRST, NO_SPACE, SPACE_LOST, SPACE_BUSY = range(0x206, 0x20C)
PAGE_LOST, INTERNAL, TOO_MANY_CONNECTIONS, STOPPING, TIMED_OUT, NO_SLOTS, OUT_OF_SERVICE = range(
    0x301, 0x308
)
REASONS = {
    "pool_full": 1,
    "device_full": 2,
    "no_device": 3,
    "group_limit": 4,
    "writeback_disabled": 5,
    "write_budget": 6,
    "disabled": 7,
}
WORDS = {code: word for word, code in REASONS.items()}


@dataclass
class Reply:
    op: int
    status: int
    count: int
    flags: int
    request_id: int
    body: bytes

    @property
    def slots(self) -> list[int]:
        return list(struct.unpack_from(f"<{self.count}Q", self.body))

    @property
    def json(self) -> dict[str, Any]:
        document = json.loads(self.body)
        assert isinstance(document, dict)
        return document

    @property
    def text(self) -> str:
        """Of an error: what stands behind the slots."""
        return self.body[self.count * 8 :].decode()


class Wire:
    """One connection, spoken by hand."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.last_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def frame(
        self,
        op: int,
        body: bytes = b"",
        *,
        count: int = 0,
        flags: int = 0,
        version: int = 1,
        length: int | None = None,
    ) -> bytes:
        self.last_id += 1
        length = 24 + len(body) if length is None else length
        return struct.pack("<IBBHIIQ", length, version, op, 0, count, flags, self.last_id) + body

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            assert piece, f"the daemon closed after {data!r}"
            data += piece
        return data

    def reply(self) -> Reply:
        length, version, op, status, count, flags, request_id = struct.unpack(
            "<IBBHIIQ", self.read(24)
        )
        assert version == 1
        assert length >= 24
        return Reply(op, status, count, flags, request_id, self.read(length - 24))

    def ask(self, op: int, body: bytes = b"", **fields: int) -> Reply:
        self.socket.sendall(self.frame(op, body, **fields))
        reply = self.reply()
        assert (reply.op, reply.request_id) == (op, self.last_id)
        if reply.status == 0:
            assert reply.flags == 0
        return reply

    def hello(self, flags: int = 0, **said: object) -> dict[str, Any]:
        body = json.dumps({"client": f"test {os.getpid()}", **said}).encode()
        reply = self.ask(HELLO, body, flags=flags)
        assert (reply.status, reply.count) == (0, 0), reply.text
        return reply.json

    def store(self, pages: bytes, slots: list[int] | None = None) -> Reply:
        count = len(pages) // 4096
        if slots is None:
            return self.ask(STORE, pages, count=count)
        return self.ask(STORE, pack(slots) + pages, count=count, flags=WITH_SLOTS)

    def load(self, slots: list[int]) -> Reply:
        return self.ask(LOAD, pack(slots), count=len(slots))

    def free(self, slots: list[int]) -> Reply:
        return self.ask(FREE, pack(slots), count=len(slots))

    def control(self, verb: str, **arguments: object) -> Reply:
        return self.ask(CONTROL, json.dumps({"verb": verb, **arguments}).encode())

    def done(self, verb: str, **arguments: object) -> dict[str, Any]:
        reply = self.control(verb, **arguments)
        assert reply.status == 0, reply.text
        return reply.json

    def assert_closed(self) -> None:
        """The daemon has closed; what it said before has been read."""
        with contextlib.suppress(ConnectionResetError):  # it need not read what was sent behind
            assert self.socket.recv(1) == b""

    def assert_in_step(self) -> None:
        assert self.ask(PING).status == 0


def pack(slots: list[int]) -> bytes:
    return struct.pack(f"<{len(slots)}Q", *slots)


def noise(count: int) -> bytes:
    """Pages that do not shrink."""
    return os.urandom(count * 4096)


def text_pages(count: int) -> bytes:
    """Pages that shrink, all different."""
    return b"".join(b"page %6d " % n * 256 for n in range(count)).ljust(count * 4096, b".")[
        : count * 4096
    ]
