"""One connection's conversation: requests in, replies out. No sockets.

Invariants:
- The first request is HELLO, and only that one is.
- Whatever a request holds, it gets exactly one reply, and a wrong one changes nothing.
- The pages of a request are looked at before `handle` returns: its buffer may be reused then.

This module must not know transports, how replies are sent, or what steering verbs do.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from vswap.protocol import (
    LISTS_SLOTS,
    PAGE_BYTES,
    SLOT_BYTES,
    VERSION,
    Flag,
    Header,
    Op,
    Status,
    error_body,
    pack_header,
    request_body_bytes,
)
from vswapd.driver import Driver, Pending
from vswapd.errors import ArgumentError, EngineError
from vswapd.groups import Space
from vswapd.vswap import Engine, Stored
from vswapd_backends.base import U64, Operation

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)
_KNOWN_FLAGS: Final = {Op.STORE: Flag.SLOTS, Op.HELLO: Flag.CONTROL}
_LONGEST_NAME: Final = 64


_OPS: Final = {int(op): op for op in Op}


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel says (SO_PEERCRED)."""

    uid: int
    pid: int
    name: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What a connection may ask for."""

    max_batch: int
    max_frame: int
    max_pipeline: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One frame, in parts that are sent one after the other."""

    parts: list[bytes | memoryview]
    closes: bool = False

    @property
    def size(self) -> int:
        """Bytes of the frame."""
        return sum(map(len, self.parts))


_Handler = Callable[[Header, memoryview], Reply | Awaitable[Reply]]


class Steering(Protocol):
    """What a session needs of the rest of the service."""

    @property
    def version(self) -> str:
        """The daemon's version."""

    def status(self) -> dict[str, Any]:
        """The status document."""

    def may_steer(self, uid: int) -> bool:
        """Whether a peer may change things."""

    async def carry_out(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a CONTROL request asks for; raises EngineError if that fails."""


class Session:
    """See the module. `close` must be awaited once nothing is under way."""

    def __init__(
        self, engine: Engine, driver: Driver, steering: Steering, peer: Peer, limits: Limits
    ) -> None:
        self._engine = engine
        self._driver = driver
        self._steering = steering
        self._peer = peer
        self._limits = limits
        self._greeted = False
        self.space: Space | None = None
        self._handlers: Final[Mapping[Op, _Handler]] = {
            Op.STORE: self._store,
            Op.LOAD: self._load,
            Op.FREE: self._free,
            Op.PING: self._ping,
            Op.HELLO: self._hello,
            Op.STATUS: self._status,
            Op.CONTROL: self._control,
        }

    # Requests

    def handle(self, header: Header, body: memoryview) -> Reply | Awaitable[Reply]:
        """Answer one request; an awaitable if the answer needs a device, or time."""
        try:
            return self._handle(header, body)
        except EngineError as error:
            return failure(header, error.status, str(error), error.slots)
        except Exception:
            return self._mistake(header)

    def _mistake(self, header: Header) -> Reply:
        _LOG.exception("a request of %s failed by a mistake of ours", self._peer.name)
        return failure(header, Status.INTERNAL, "a mistake in the daemon; its journal has more")

    def _handle(self, header: Header, body: memoryview) -> Reply | Awaitable[Reply]:
        op = _OPS.get(header.op)
        if op is None:
            return failure(header, Status.UNKNOWN_OP, f"there is no operation {header.op}")
        wrong = self._check(op, header)
        if wrong is not None:
            return wrong
        return self._handlers[op](header, body)

    def _check(self, op: Op, header: Header) -> Reply | None:
        """What is wrong with a request before its body is looked at."""
        if self._greeted == (op is Op.HELLO):
            text = "HELLO comes first, and once" if self._greeted else "say HELLO first"
            return failure(header, Status.HELLO_FIRST, text)
        if header.status or header.flags & ~_KNOWN_FLAGS.get(op, Flag.NONE):
            return failure(header, Status.BAD_ARGUMENT, "status or flags that mean nothing here")
        if op in {Op.STORE, Op.LOAD, Op.FREE}:
            if self.space is None:
                return failure(header, Status.NO_SPACE, "this connection was opened for control")
            if not 1 <= header.count <= self._limits.max_batch:
                return failure(
                    header,
                    Status.BATCH_TOO_LARGE,
                    f"{header.count} pages in one request; 1 to {self._limits.max_batch} may be",
                )
        expected = request_body_bytes(op, header.count, header.flags)
        if expected is not None and expected != header.body_bytes:
            return failure(
                header,
                Status.BAD_LENGTH,
                f"a body of {header.body_bytes} bytes; count {header.count} means {expected}",
            )
        return None

    def _hello(self, header: Header, body: memoryview) -> Reply:
        asked = _object(body)
        name = str(asked.get("client", "") or self._peer.name)[:_LONGEST_NAME]
        token = None
        if not header.flags & Flag.CONTROL:
            token = secrets.token_hex(16)
            with self._driver.lock:
                self.space = self._engine.open_space(
                    uid=self._peer.uid,
                    group=str(self._peer.uid),
                    client=name,
                    pid=self._peer.pid,
                )
        self._greeted = True
        answer = {
            "version": VERSION,
            "page_bytes": PAGE_BYTES,
            "max_batch": self._limits.max_batch,
            "max_frame_bytes": self._limits.max_frame,
            "max_pipeline": self._limits.max_pipeline,
            "shards": 1,
            "shard": 0,
            "space": None if self.space is None else str(self.space.id),
            "token": token,
            "daemon": f"vswapd {self._steering.version}",
        }
        return success(header, json.dumps(answer).encode())

    def _ping(self, header: Header, body: memoryview) -> Reply:
        del body
        return success(header)

    def _status(self, header: Header, body: memoryview) -> Reply:
        del body
        return success(header, json.dumps(self._steering.status()).encode())

    def _store(self, header: Header, body: memoryview) -> Reply | Awaitable[Reply]:
        assert self.space is not None
        slots: U64 | None = None
        if header.flags & Flag.SLOTS:
            # A copy: the operation may outlive the buffer.
            slots = np.array(np.frombuffer(body[: header.count * SLOT_BYTES], np.uint64))
            body = body[header.count * SLOT_BYTES :]
        folio = self._engine.prepare(body)
        return self._drive(header, self._engine.store(self.space, folio, slots), _stored)

    def _load(self, header: Header, body: memoryview) -> Reply | Awaitable[Reply]:
        assert self.space is not None
        slots = np.array(np.frombuffer(body, np.uint64))
        return self._drive(header, self._engine.load(self.space, slots), _loaded)

    def _free(self, header: Header, body: memoryview) -> Reply | Awaitable[Reply]:
        assert self.space is not None
        slots = np.array(np.frombuffer(body, np.uint64))
        return self._drive(header, self._engine.free(self.space, slots), _freed)

    def _control(self, header: Header, body: memoryview) -> Reply | Awaitable[Reply]:
        if not self._steering.may_steer(self._peer.uid):
            return failure(
                header, Status.NOT_ALLOWED, "steering is for root and the daemon's own user"
            )
        return self._steer(header, _object(body))

    async def _steer(self, header: Header, request: dict[str, Any]) -> Reply:
        try:
            return success(header, json.dumps(await self._steering.carry_out(request)).encode())
        except EngineError as error:
            return failure(header, error.status, str(error))
        except Exception:
            return self._mistake(header)

    def _drive(
        self, header: Header, operation: Operation[T], answer: Callable[[Header, T], Reply]
    ) -> Reply | Awaitable[Reply]:
        """Run an operation; on the spot if it needs nothing, as most do."""
        result = self._driver.start(operation)
        if isinstance(result, Pending):
            return self._finish(header, result, answer)
        return answer(header, result)

    async def _finish(
        self, header: Header, pending: Pending[T], answer: Callable[[Header, T], Reply]
    ) -> Reply:
        try:
            return answer(header, await self._driver.finish(pending))
        except EngineError as error:
            return failure(header, error.status, str(error), error.slots)
        except Exception:
            return self._mistake(header)

    # The end

    async def close(self) -> None:
        """Free everything that the connection's space holds."""
        space, self.space = self.space, None
        if space is None:
            return
        result = self._driver.start(self._engine.close_space(space))
        if isinstance(result, Pending):
            await self._driver.finish(result)


def success(header: Header, body: bytes = b"", *, count: int = 0) -> Reply:
    """A reply of status OK."""
    head = pack_header(header.op, len(body), count=count, request_id=header.request_id)
    return Reply([head, body] if body else [head])


def failure(header: Header, status: Status, text: str, slots: U64 | None = None) -> Reply:
    """An error reply, with the slots that it is about where its status lists them."""
    listed = slots if slots is not None and status in LISTS_SLOTS else np.empty(0, np.uint64)
    body = error_body(text, listed.tobytes())
    head = pack_header(
        header.op, len(body), status=status, count=len(listed), request_id=header.request_id
    )
    return Reply([head, body], closes=status.closes)


def _stored(header: Header, stored: Stored) -> Reply:
    body = stored.slots.tobytes()
    head = pack_header(
        Op.STORE,
        len(body),
        status=Status.OK if stored.reason is None else Status.REJECTED,
        count=len(stored.slots),
        flags=0 if stored.reason is None else stored.reason,
        request_id=header.request_id,
    )
    return Reply([head, body])


def _loaded(header: Header, pages: list[bytes | memoryview]) -> Reply:
    head = pack_header(
        Op.LOAD, len(pages) * PAGE_BYTES, count=len(pages), request_id=header.request_id
    )
    return Reply([head, *pages])


def _freed(header: Header, _: None) -> Reply:
    return success(header, count=header.count)


def _object(body: memoryview) -> dict[str, Any]:
    """A request's JSON object; an empty body is an empty one.

    Raises:
        ArgumentError: it is none.
    """
    if not body:
        return {}
    try:
        found = json.loads(bytes(body))
    except ValueError as error:
        raise ArgumentError(f"the body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArgumentError("the body is no JSON object")
    return found
