"""One connection's conversation: requests in, replies out. No sockets, no event loop.

A request is judged by its header first (`admit`): what is wrong already is not received. Then it is
carried out (`execute`), as a task that whoever owns the connection gives to the driver.

Invariants:
- The first request that is carried out is HELLO, and only that one is.
- Each request gets exactly one reply; one that is refused has changed nothing.
- What is wrong with a request is a reply with one status; only our own mistakes are logged.

This module must not know transports, how replies are sent, or what the verbs of CONTROL do.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

import numpy as np

from vswap.protocol import (
    LISTS_SLOTS,
    OFFSET_BYTES,
    PAGE_BYTES,
    SLOT_BYTES,
    SLOTS_BIT,
    VERSION,
    WINDOW_BIT,
    Flag,
    Header,
    Op,
    Status,
    error_body,
    pack_header,
    request_body_bytes,
)
from vswapd.answers import Answer
from vswapd.compressor import Compressor
from vswapd.control import MOST_NAME
from vswapd.driver import Task
from vswapd.errors import ArgumentError, EngineError, NotAllowedError, OutOfServiceError
from vswapd.groups import Holder, Space
from vswapd.peer import Peer
from vswapd.trouble import Trouble
from vswapd.vswap import Engine
from vswapd.window import Window
from vswapd_backends.base import PAUSE, SHORT_PAGES, U64, Compute, turns_of

_LOG: Final = logging.getLogger(__name__)
_LONGEST_NAME: Final = 64
_MOST_TEXT: Final = 64 * 1024
"""Bytes of a greeting, or of a request to steer: reading them takes 1 ms at most."""
_TOKEN_DIGITS: Final = 32
_HEX: Final = frozenset("0123456789abcdef")
_SLOTS: Final = np.dtype("<u8")


@dataclass(slots=True)
class Reply:
    """One frame, in parts that are sent one after the other."""

    parts: list[bytes | memoryview]
    size: int
    """Bytes of all parts."""
    closes: bool = False
    descriptor: int | None = None
    """What goes with its first byte; it stays the session's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a connection may ask for, as HELLO tells it."""

    max_batch: int
    max_frame: int
    max_pipeline: int
    max_named_spaces: int = 64
    """Of one user."""
    max_window: int = 0
    """Bytes; 0: there are no windows."""


class Steering(Protocol):
    """What a session needs of the rest of the daemon."""

    @property
    def version(self) -> str:
        """The daemon's version."""

    def status(self) -> Task[dict[str, Any]]:
        """The status document."""

    def may_steer(self, uid: int) -> bool:
        """Whether a peer may change things."""

    def carry_out(self, request: dict[str, Any]) -> Task[dict[str, Any]]:
        """Do what a CONTROL request asks for; raises EngineError if that fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all sessions share."""

    engine: Engine
    compressor: Compressor
    steering: Steering
    limits: Limits
    resumable: bool = False
    """Whether spaces are there again after this process has died."""
    kept: bool = False
    """Whether they are also after the whole daemon has ended."""
    trouble: Trouble = field(default_factory=Trouble)


_CHANGES: Final = frozenset({int(Op.STORE), int(Op.FREE)})

Handler = Callable[["Session", Header, memoryview], Task[Reply]]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operation is judged and carried out."""

    op: Op
    handler: Handler
    flags: int = 0
    """Those that may be set."""
    pages: bool = False
    """Needs a space, and a count of 1 to max_batch."""


class Session:
    """See the module. `close` must be driven to its end once nothing is under way."""

    __slots__ = ("_context", "_greeted", "joined", "peer", "space", "window")

    def __init__(self, context: Context, peer: Peer) -> None:
        self._context = context
        self._greeted = False
        self.peer = peer
        self.space: Space | None = None
        self.joined = False
        """Whether it serves a space that has its first connection on another shard."""
        self.window: Window | None = None

    # Requests

    def admit(self, header: Header) -> Reply | None:
        """What is wrong with a request as far as its header tells; None: receive its body."""
        rule = self.rules.get(header.op)
        if self._greeted == (header.op == Op.HELLO):
            text = "HELLO comes once" if self._greeted else "the first request must be HELLO"
            return failure(header, Status.HELLO_FIRST, text)
        if rule is None:
            return failure(header, Status.UNKNOWN_OP, f"there is no operation {header.op}")
        if header.status or header.flags & ~rule.flags:
            text = f"flags {header.flags:#x}, status {header.status:#x}: not known in a request"
            return failure(header, Status.BAD_ARGUMENT, text)
        if rule.pages:
            if self.space is None:
                text = "this connection was opened for control: it has no space"
                return failure(header, Status.NO_SPACE, text)
            if not 1 <= header.count <= self._context.limits.max_batch:
                text = f"{header.count} pages in one request: 1 to {self._context.limits.max_batch}"
                return failure(header, Status.BATCH_TOO_LARGE, text)
        expected = request_body_bytes(rule.op, header.count, header.flags)
        if expected is not None and expected != header.body_bytes:
            text = (
                f"a body of {header.body_bytes} bytes where count {header.count} means {expected}"
            )
            return failure(header, Status.BAD_LENGTH, text)
        if expected is None and header.body_bytes > _MOST_TEXT:
            text = f"a body of {header.body_bytes} bytes: {rule.op.name} takes {_MOST_TEXT} at most"
            return failure(header, Status.BAD_LENGTH, text)
        return None

    def waits(self, header: Header) -> bool:
        """Whether a request may only be begun when all earlier ones have their replies.

        Of those that change anything, at most one is to be in doubt if this process dies.
        """
        return self._context.resumable and header.op in _CHANGES

    def execute(self, header: Header, body: memoryview) -> Task[Reply]:
        """Carry out a request that was admitted; `body` must stay as it is until the end."""
        try:
            return (yield from self.rules[header.op].handler(self, header, body))
        except EngineError as error:
            if error.status is Status.PAGE_LOST:
                self._context.trouble.of_pages(self.peer.name, error)
            return failure(header, error.status, str(error), error.slots)
        except Exception:  # noqa: BLE001 - a border: one connection ends, and it is logged
            _LOG.exception("a request of %s failed by a mistake of ours", self.peer.name)
            text = "a mistake in the daemon: its journal has more"
            return failure(header, Status.INTERNAL, text)

    def close(self) -> Task[None]:
        """Free everything that the connection's space holds, unless it has a name."""
        self.window = None
        space, self.space = self.space, None
        if space is None:
            return
        if space.name and not space.closed:
            self._context.engine.detach(space)
        else:
            yield from self._context.engine.close_space(space)

    # Handlers, one per operation

    def _hello(self, header: Header, body: memoryview) -> Task[Reply]:
        said = _object(body)
        name = _name(said.get("client")) or self.peer.name
        limits, token = self._context.limits, None
        ledger = self._context.engine.core.ledger
        last: Answer | None = None
        if not header.flags & Flag.CONTROL:
            token = _token(said.get("token"))
            self.joined = token is not None
            resumes = token is not None and said.get("resume") is True
            token = token or secrets.token_hex(16)
            named = _space_name(said.get("name"))
            critical = self._context.engine.core.pressure.critical
            size = _window_bytes(said.get("window"), 0 if critical else limits.max_window)
            # Nothing is wrong from here on: who is refused may greet again, and has no space yet.
            # Another user's space is another one, whatever token or name they say.
            of = f"{self.peer.uid} {token}" if named is None else f"{self.peer.uid} is {named}"
            key = blake2b(of.encode(), digest_size=16).hexdigest()
            holder = self._holder(token)
            if resumes:
                self.space = self._context.engine.reopen_space(key, holder=holder)
                if self.space is None:
                    return failure(header, Status.SPACE_LOST, "the space is not here any more")
                # Whoever comes back says a token, also on what was the first connection.
                self.joined = self.space.joined
                last = self._context.engine.last_answer(self.space)
            else:
                self.space = self._open(name, key, named or "", holder)
                if self.space is None:
                    return failure(header, Status.SPACE_BUSY, f"{named} is in use")
            self.window = _window(size)
        self._greeted = True
        answer = {
            "version": VERSION,
            "page_bytes": PAGE_BYTES,
            "max_batch": limits.max_batch,
            "max_frame_bytes": limits.max_frame,
            "max_pipeline": limits.max_pipeline,
            "shards": ledger.shards,
            "shard": ledger.shard,
            "space": None if self.space is None else str(self.space.id),
            "token": token,
            "window": 0 if self.window is None else self.window.size,
            "daemon": f"vswapd {self._context.steering.version}",
            "resumable": self._context.resumable,
            "kept": self._context.kept,
            "last": None if last is None else _outcome(last),
        }
        reply = success(header, json.dumps(answer).encode())
        if self.window is not None:
            reply.descriptor = self.window.fd
        return reply
        yield

    def _holder(self, token: str) -> Holder:
        digest = blake2b(token.encode(), digest_size=8, person=b"vswap holder").digest()
        return Holder(self.peer.pid, self.peer.started, int.from_bytes(digest, "little"))

    def _open(self, client: str, key: str, name: str, holder: Holder) -> Space | None:
        """A space for this connection; None: the one of that name is another's at the moment.

        Raises:
            OutOfServiceError: there are too many.
        """
        engine = self._context.engine
        found = engine.find_space(uid=self.peer.uid, name=name) if name else None
        if found is not None:
            if found.attached:
                return None
            found.client = client
            # Who comes now has asked for nothing yet, and gives its requests the same numbers.
            engine.forget_answer(found)
            return engine.reopen_space(key, number=found.id, holder=holder)
        most = self._context.limits.max_named_spaces
        if name and engine.named_spaces(self.peer.uid) >= most:
            raise OutOfServiceError(
                f"there are {most} named spaces of this user: drop some (`vswapctl drop NAME`), "
                "or raise server.max_named_spaces"
            )
        return engine.open_space(
            uid=self.peer.uid,
            group=str(self.peer.uid),
            client=client,
            holder=holder,
            key=key,
            joined=self.joined,
            name=name,
        )

    def _list(self, header: Header, body: memoryview) -> Task[Reply]:
        assert self.space is not None
        after = int.from_bytes(body, "little")
        if header.count > SHORT_PAGES:
            yield PAUSE
        slots = self._context.engine.slots_after(self.space, after, header.count)
        return success(header, slots.tobytes(), count=len(slots))

    def _ping(self, header: Header, body: memoryview) -> Task[Reply]:  # noqa: ARG002 - a handler
        return success(header)
        yield

    def _store(self, header: Header, body: memoryview) -> Task[Reply]:
        assert self.space is not None
        slots: U64 | None = None
        pages: memoryview | None = body
        if header.flags & WINDOW_BIT:
            window, offset = self._window_and_offset(body)
            window.check(offset, header.count)
            pages = None
            body = body[OFFSET_BYTES:]
        if header.flags & SLOTS_BIT:
            end = header.count * SLOT_BYTES
            slots = np.frombuffer(body[:end], _SLOTS)
            if pages is not None:
                pages = body[end:]

        def read(turn: slice) -> memoryview:
            if pages is None:
                # A copy: the client may change the window while we look at it.
                at = offset + turn.start * PAGE_BYTES
                return memoryview(window.take(at, turn.stop - turn.start))
            return pages[turn.start * PAGE_BYTES : turn.stop * PAGE_BYTES]

        folio = yield from self._context.compressor.prepare(header.count, read)
        if self._context.resumable:
            folio.request = header.request_id
        stored = yield from self._context.engine.store(self.space, folio, slots)
        packed = stored.slots.tobytes()
        head = pack_header(
            Op.STORE,
            len(packed),
            status=Status.OK if stored.reason is None else Status.REJECTED,
            count=len(stored.slots),
            flags=0 if stored.reason is None else stored.reason,
            request_id=header.request_id,
        )
        return Reply([head + packed], len(head) + len(packed))

    def _load(self, header: Header, body: memoryview) -> Task[Reply]:
        assert self.space is not None
        window = None
        offset = 0
        if header.flags & WINDOW_BIT:
            window, offset = self._window_and_offset(body)
            window.check(offset, header.count)
            body = body[OFFSET_BYTES:]
        slots = np.frombuffer(body, _SLOTS)
        pages = yield from self._context.engine.load(self.space, slots)
        if window is not None:
            for turn in turns_of(len(pages)):
                if turn.start:
                    yield PAUSE
                window.put(offset + turn.start * PAGE_BYTES, pages[turn])
            return success(header, count=len(pages))
        size = len(pages) * PAGE_BYTES
        head = pack_header(Op.LOAD, size, count=len(pages), request_id=header.request_id)
        return Reply([head, *pages], len(head) + size)

    def _window_and_offset(self, body: memoryview) -> tuple[Window, int]:
        if self.window is None:
            raise ArgumentError("this connection has no window: ask for one in HELLO")
        return self.window, int.from_bytes(body[:OFFSET_BYTES], "little")

    def _free(self, header: Header, body: memoryview) -> Task[Reply]:
        assert self.space is not None
        request = header.request_id if self._context.resumable else None
        yield from self._context.engine.free(self.space, np.frombuffer(body, _SLOTS), request)
        return success(header, count=header.count)

    def _status(self, header: Header, body: memoryview) -> Task[Reply]:  # noqa: ARG002 - a handler
        yield PAUSE  # small to ask for, and long work: it has its turn with all other long work
        document = yield from self._context.steering.status()
        yield PAUSE
        return (yield from _answer(header, document))

    def _control(self, header: Header, body: memoryview) -> Task[Reply]:
        request = _object(body)
        if not self._context.steering.may_steer(self.peer.uid):
            request = self._about_own_spaces(request)
        yield PAUSE  # as in _status
        answer = yield from self._context.steering.carry_out(request)
        return (yield from _answer(header, answer))

    def _about_own_spaces(self, request: dict[str, Any]) -> dict[str, Any]:
        """What everybody may ask for.

        Raises:
            NotAllowedError: it is something else.
        """
        whose = request.get("uid")
        if request.get("verb") in ("spaces", "drop") and whose in (None, self.peer.uid):
            return {**request, "uid": self.peer.uid}
        raise NotAllowedError(
            "steering is for root and for the user that the daemon runs as; others may list and "
            "drop spaces of their own"
        )

    rules: ClassVar[Mapping[int, Rule]] = MappingProxyType(
        {
            int(rule.op): rule
            for rule in (
                Rule(Op.HELLO, _hello, flags=int(Flag.CONTROL)),
                Rule(Op.PING, _ping),
                Rule(Op.STORE, _store, flags=SLOTS_BIT | WINDOW_BIT, pages=True),
                Rule(Op.LOAD, _load, flags=WINDOW_BIT, pages=True),
                Rule(Op.FREE, _free, pages=True),
                Rule(Op.STATUS, _status),
                Rule(Op.CONTROL, _control),
                Rule(Op.LIST, _list, pages=True),
            )
        }
    )


def work_bytes(header: Header) -> int:
    """Memory that a request takes besides its body, as far as it is worth accounting."""
    pages = header.op == Op.LOAD or (header.op == Op.STORE and header.flags & WINDOW_BIT)
    return header.count * PAGE_BYTES if pages else 0


def success(header: Header, body: bytes = b"", *, count: int = 0) -> Reply:
    """A reply of status OK."""
    head = pack_header(header.op, len(body), count=count, request_id=header.request_id)
    return Reply([head + body], len(head) + len(body))


def failure(header: Header, status: Status, text: str, slots: U64 | None = None) -> Reply:
    """An error reply, with the slots that it is about where its status lists them."""
    listed = b"" if slots is None or status not in LISTS_SLOTS else slots.tobytes()
    body = error_body(text, listed)
    head = pack_header(
        header.op,
        len(body),
        status=status,
        count=len(listed) // SLOT_BYTES,
        request_id=header.request_id,
    )
    return Reply([head + body], len(head) + len(body), closes=status.closes)


def _answer(header: Header, document: dict[str, Any]) -> Task[Reply]:
    """A reply of JSON, made outside the lock."""
    work = Compute(lambda: success(header, json.dumps(document).encode()))
    yield work
    return work.result()


def _object(body: memoryview) -> dict[str, Any]:
    """A request's JSON object; an empty body is an empty one.

    Raises:
        ArgumentError: it is none.
    """
    if not body:
        return {}
    try:
        found = json.loads(bytes(body))
        # Half of a surrogate pair can be written in JSON, and nowhere else: no path, no reply.
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"the body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArgumentError("the body is no JSON object")
    return found


def _window_bytes(wish: object, most: int) -> int:
    """How large a window is that is as large as is wished for and may be; 0: none.

    Raises:
        ArgumentError: the wish makes no sense.
    """
    if wish is None:
        return 0
    if not isinstance(wish, int) or isinstance(wish, bool) or wish < 0:
        raise ArgumentError(f"window: {wish!r}: write bytes")
    return min(-(-wish // PAGE_BYTES) * PAGE_BYTES, most)


def _window(size: int) -> Window | None:
    """A window; None: none is wanted, or to be had."""
    if not size:
        return None
    try:
        return Window(size)
    except OSError as error:
        _LOG.warning("a client gets no window: %s", error.strerror)
        return None


def _outcome(last: Answer) -> dict[str, Any]:
    """A request that was carried out, as HELLO tells of it."""
    slots = [] if last.freed else last.slots.tolist()
    return {"request": last.request, "status": int(Status.OK), "flags": 0, "slots": slots}


def _token(said: object) -> str | None:
    """The space that a connection wants to join; None: one of its own.

    Raises:
        ArgumentError: it is no token.
    """
    if said is None:
        return None
    if not isinstance(said, str) or len(said) != _TOKEN_DIGITS or set(said) - _HEX:
        raise ArgumentError("token: write the 32 hexadecimal digits of the space's first HELLO")
    return said


def _space_name(said: object) -> str | None:
    """The name of the space that a connection wants; None: one without.

    Raises:
        ArgumentError: it is no name.
    """
    if said is None:
        return None
    if (
        not isinstance(said, str)
        or not said.isprintable()
        or said != said.strip()
        or not 1 <= len(said.encode()) <= MOST_NAME
    ):
        raise ArgumentError(
            f"name: 1 to {MOST_NAME} bytes that can be printed, without blanks at the ends"
        )
    return said


def _name(said: object) -> str:
    """What a client calls itself, on one line and not too long; "" if that is nothing."""
    if not isinstance(said, str):
        return ""
    return "".join(c if c.isprintable() else " " for c in said[:_LONGEST_NAME]).strip()
