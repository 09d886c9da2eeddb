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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

import numpy as np

from vswap.protocol import (
    LISTS_SLOTS,
    MAX_ASKED_BYTES,
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
from vswapd.claims import Claim, Verdict, key_of
from vswapd.compressor import Compressor
from vswapd.driver import Task
from vswapd.errors import ArgumentError, EngineError, NotAllowedError, OutOfServiceError
from vswapd.groups import Holder, Space
from vswapd.hello import (
    Hello,
    destination,
    new_token,
    parse_hello,
    parse_object,
)
from vswapd.peer import Peer
from vswapd.seats import Seats
from vswapd.trouble import Trouble
from vswapd.vswap import Engine
from vswapd.window import Window, Windows
from vswapd_backends.base import PAUSE, SHORT_PAGES, U64, Compute, turns_of

_LOG: Final = logging.getLogger(__name__)
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
    seats: Seats = field(default_factory=Seats)
    trouble: Trouble = field(default_factory=Trouble)
    windows: Windows = field(default_factory=lambda: Windows(0))


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

    __slots__ = ("_claim", "_context", "_greeted", "hung_up", "joined", "peer", "space", "window")

    def __init__(self, context: Context, peer: Peer) -> None:
        self._context = context
        self._greeted = False
        self.peer = peer
        self.space: Space | None = None
        self.joined = False
        """Whether it serves a space that has its first connection on another shard."""
        self.window: Window | None = None
        self._claim: Claim | None = None
        """What was granted to it: the space's part here is its own."""
        self.hung_up: Callable[[], bool] = lambda: False
        """Whether its client has gone. Set by whoever owns the connection."""

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
        if header.count and not rule.pages:
            text = f"count {header.count}: {rule.op.name} takes none"
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
        if expected is None and header.body_bytes > MAX_ASKED_BYTES:
            most = f"{rule.op.name} takes {MAX_ASKED_BYTES} at most"
            text = f"a body of {header.body_bytes} bytes: {most}"
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
        if self.window is not None:
            self._context.windows.closed(self.window)
            self.window = None
        self._leave()
        space, self.space = self.space, None
        if space is None:
            return
        if space.name and not space.closed:
            self._context.engine.detach(space)
        else:
            yield from self._context.engine.close_space(space)

    # Handlers, one per operation

    def _hello(self, header: Header, body: memoryview) -> Task[Reply]:
        control = bool(header.flags & Flag.CONTROL)
        said = parse_hello(parse_object(body), control=control)
        limits = self._context.limits
        ledger = self._context.engine.core.ledger
        self._refuse_elsewhere(said)
        token: str | None = None
        last: Answer | None = None
        if not control:
            # Nothing is wrong from here on; what is wanted may be somebody else's.
            token = said.token or new_token(ledger.shard)
            refused, last = yield from self._find_space(said, token)
            if refused is not None:
                return failure(header, *refused)
            critical = self._context.engine.core.pressure.critical
            self.window = self._new_window(min(said.window, 0 if critical else limits.max_window))
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

    def _new_window(self, size: int) -> Window | None:
        """A window; None: none is wanted, or to be had."""
        try:
            return self._context.windows.open(size)
        except OSError as error:
            _LOG.warning("a client gets no window: %s", error.strerror)
            return None

    def _refuse_elsewhere(self, said: Hello) -> None:
        """Refuse what is not served here.

        Raises:
            ArgumentError: there is no such shard, or it is another one.
        """
        ledger = self._context.engine.core.ledger
        if said.shard is not None and said.shard >= ledger.shards and said.token is None:
            raise ArgumentError(f"shard: {said.shard}: there are {ledger.shards}, from 0 on")
        where = destination(said.shard, said.token, said.name, ledger.shards)
        if where not in {None, ledger.shard}:
            # It was not seen in time, or was not the first: whoever distributes connections has.
            raise ArgumentError(
                f"this connection has come to shard {ledger.shard}, and shard {where} is wanted: "
                "say so on a new one, in a HELLO that comes first, and at once"
            )

    def _find_space(
        self, said: Hello, token: str
    ) -> Task[tuple[tuple[Status, str] | None, Answer | None]]:
        """Open the space that a HELLO asks for, or take it up again.

        Returns:
            Why it cannot be had; or the last request that was carried out for who comes back.

        Raises:
            OutOfServiceError: there are too many.
            StoppingError: the daemon is ending.
        """
        engine, seats = self._context.engine, self._context.seats
        ledger = engine.core.ledger
        gone = Status.SPACE_LOST, "the space is not here any more"
        if said.shard is not None and said.shard >= ledger.shards:
            return gone, None  # it was on a shard that there is not now
        key = key_of(self.peer.uid, token, said.name)
        holder = self._holder(token)
        claim = Claim(
            key=key,
            number=seats.number(),
            holder=holder,
            shard=ledger.shard,
            joins=said.token is not None,
            resumes=said.resume,
            named=said.name is not None,
            known=said.token is not None and engine.is_known(key, holder.token),
        )
        verdict = yield from seats.take(claim, self.hung_up)
        if verdict is Verdict.LOST:
            return gone, None
        if verdict is Verdict.BUSY:
            what = "its part on this shard" if said.name is None else said.name
            return (Status.SPACE_BUSY, f"{what} is in use"), None
        self._claim = claim
        try:
            if said.resume:
                self.space = engine.reopen_space(key, holder=holder)
            else:
                self.space = self._open(said, key, holder)
        finally:
            if self.space is None:
                self._leave()
        if self.space is None:
            return gone, None
        # Whoever comes back says a token, also on what was the first connection.
        self.joined = self.space.joined if said.resume else said.token is not None
        return None, engine.last_answer(self.space) if said.resume else None

    def _leave(self) -> None:
        """Let go of what was claimed."""
        claim, self._claim = self._claim, None
        if claim is not None:
            self._context.seats.leave(claim)

    def _holder(self, token: str) -> Holder:
        digest = blake2b(token.encode(), digest_size=8, person=b"vswap holder").digest()
        return Holder(self.peer.pid, self.peer.started, int.from_bytes(digest, "little"))

    def _open(self, said: Hello, key: str, holder: Holder) -> Space:
        """The space's part on this shard, which has no client at the moment; a new one if need be.

        Raises:
            OutOfServiceError: there are too many.
        """
        engine, client = self._context.engine, said.client or self.peer.name
        if said.name is not None:
            found = engine.find_space(uid=self.peer.uid, name=said.name)
            number = None if found is None else found.id
            found = (
                None if found is None else engine.reopen_space(key, number=number, holder=holder)
            )
        else:
            # There is one if the client was not answered when it was opened.
            found = engine.reopen_space(key, holder=holder)
        if found is not None:
            found.client = client
            # Who comes now has asked for nothing yet, and gives its requests the same numbers.
            engine.forget_answer(found)
            return found
        most = self._context.limits.max_named_spaces
        if said.name is not None and engine.named_spaces(self.peer.uid) >= most:
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
            joined=said.token is not None,
            name=said.name or "",
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
        request = parse_object(body)
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


def _outcome(last: Answer) -> dict[str, Any]:
    """A request that was carried out, as HELLO tells of it."""
    # As text: beyond 2**53 most readers of JSON round a number.
    slots = [] if last.freed else list(map(str, last.slots.tolist()))
    return {"request": last.request, "status": int(Status.OK), "flags": 0, "slots": slots}
