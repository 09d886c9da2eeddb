"""A daemon in a thread that keeps pages in a dict: for replies that a real one would never send.

Subclass it and override `answer` to misbehave. It takes requests in order and answers in order.

Invariants:
- Leaving the block closes everything and joins every thread.

This module must not know the client or the real daemon; it speaks protocol.py.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from vswap import protocol
from vswap.protocol import HEADER_BYTES, PAGE_BYTES, Flag, Header, Op, Status

HELLO: dict[str, Any] = {
    "version": protocol.VERSION,
    "page_bytes": PAGE_BYTES,
    "max_batch": 4096,
    "max_frame_bytes": protocol.MAX_FRAME_BYTES,
    "max_pipeline": 16,
    "shards": 1,
    "shard": 0,
    "space": "1",
    "token": "00",
    "daemon": "fake 1",
}


def pack_slots(slots: list[int]) -> bytes:
    return struct.pack(f"<{len(slots)}Q", *slots)


class FakeDaemon:
    """Listens at `path` while its block runs.

    `hello` replaces keys of the HELLO answer. `capacity`: pages it holds before it rejects.
    `requests` are all headers it has read, in order.
    """

    def __init__(self, path: Path, *, capacity: int = 1 << 30, **hello: Any) -> None:
        self.path = path
        self.pages: dict[int, bytes | None] = {}
        self.requests: list[Header] = []
        self.hello = HELLO | hello
        self._capacity = capacity
        self._next_slot = 1
        self._listener = socket.socket(socket.AF_UNIX)
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.hang_up()
        for thread in self._threads:
            thread.join()
        for sock in [self._listener, *self._connections]:
            sock.close()

    def hang_up(self) -> None:
        """End all connections, as a daemon that dies does."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _start(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError), connection.makefile("rb") as stream:
            while len(raw := stream.read(HEADER_BYTES)) == HEADER_BYTES:
                header = protocol.parse_header(raw, 0, protocol.MAX_FRAME_BYTES)
                body = stream.read(header.body_bytes)
                self.requests.append(header)
                replies = self.answer(header, body)
                while True:
                    with self._lock:
                        reply = next(replies, None)
                    if reply is None:
                        break
                    connection.sendall(reply)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    # What may be overridden, from here on.

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        """The bytes to send for one request, in pieces."""
        yield self.reply(header, *self.execute(header, body))

    def reply(
        self, header: Header, status: int = 0, body: bytes = b"", count: int = 0, flags: int = 0
    ) -> bytes:
        return (
            protocol.pack_header(
                header.op,
                len(body),
                status=status,
                count=count,
                flags=flags,
                request_id=header.request_id,
            )
            + body
        )

    def refusal(
        self, header: Header, status: Status, text: str, slots: list[int] | None = None
    ) -> bytes:
        body = protocol.error_body(text, pack_slots(slots or []))
        return self.reply(header, status, body, len(slots or []))

    def execute(self, header: Header, body: bytes) -> tuple[int, bytes, int, int]:
        """Status, body, count and flags of a request's reply, as a right daemon gives them."""
        count = header.count
        match Op(header.op):
            case Op.HELLO:
                return 0, json.dumps(self.hello).encode(), 0, 0
            case Op.PING:
                return 0, b"", 0, 0
            case Op.STATUS:
                return 0, json.dumps({"state": "running"}).encode(), 0, 0
            case Op.CONTROL:
                return 0, json.dumps({"asked": json.loads(body)}).encode(), 0, 0
            case Op.LIST:
                after = int.from_bytes(body, "little")
                some = sorted(slot for slot in self.pages if slot > after)[:count]
                return 0, pack_slots(some), len(some), 0
            case Op.STORE:
                return self._store(header, body)
            case Op.LOAD | Op.FREE:
                slots = list(struct.unpack(f"<{count}Q", body))
                bad = [slot for slot in slots if slot not in self.pages]
                if bad:
                    return _listed(Status.BAD_SLOT, bad)
                if header.op == Op.FREE:
                    for slot in slots:
                        del self.pages[slot]
                    return 0, b"", 0, 0
                contents = [self.pages[slot] for slot in slots]
                empty = [slot for slot in slots if self.pages[slot] is None]
                if empty:
                    return _listed(Status.UNBACKED, empty)
                return 0, b"".join(page or b"" for page in contents), count, 0

    def _store(self, header: Header, body: bytes) -> tuple[int, bytes, int, int]:
        count = header.count
        if header.flags & Flag.SLOTS:
            slots = list(struct.unpack_from(f"<{count}Q", body))
            body = body[count * 8 :]
            bad = [slot for slot in slots if slot not in self.pages]
            if bad:
                return _listed(Status.BAD_SLOT, bad)
        else:
            slots = list(range(self._next_slot, self._next_slot + count))
        if self._held_besides(slots) + count > self._capacity:
            if header.flags & Flag.SLOTS:
                self.pages.update(dict.fromkeys(slots))
            emptied = slots if header.flags & Flag.SLOTS else []
            text = protocol.error_body("the pool is full", pack_slots(emptied))
            return Status.REJECTED, text, len(emptied), protocol.Reason.POOL_FULL
        self._next_slot += 0 if header.flags & Flag.SLOTS else count
        for index, slot in enumerate(slots):
            self.pages[slot] = body[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
        return 0, pack_slots(slots), count, 0

    def _held_besides(self, slots: list[int]) -> int:
        held = sum(page is not None for page in self.pages.values())
        return held - sum(self.pages.get(slot) is not None for slot in slots)


def _listed(status: Status, slots: list[int]) -> tuple[int, bytes, int, int]:
    return status, protocol.error_body("no", pack_slots(slots)), len(slots), 0
