"""Bytes as a plot: what hostile clients do to a shard, played against the real one, and judged.

A fuzzer changes bytes and looks which code they reach; here they are read as what three clients
do: frames right and wrong, halves of them, descriptors, scribbles in the window, time that passes.
Real are the sockets, the event loop, connections, sessions, steering and engine; a swap device is
memory.

What is held, whatever the bytes say:
- Each frame has one reply, in order, well-formed, and never one of INTERNAL; nothing is logged as a
  mistake of ours, and nobody hangs.
- A client's pages are its own: another's never appear in its replies or in its window.
- A witness beside them has its pages at the end, and every sum agrees.
- When the clients have gone there are no slots, no spaces, no memory of theirs, and no task.

`play` is deterministic but for random tokens.

This module must not know the fuzzer.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import gc
import json
import logging
import mmap
import os
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from support.engine import UnkindDevice
from vswap.protocol import (
    HEADER,
    HEADER_BYTES,
    LISTS_SLOTS,
    PAGE_BYTES,
    VERSION,
    Flag,
    FrameError,
    Header,
    Op,
    Status,
    parse_header,
)
from vswapd import status
from vswapd.config import Config, load
from vswapd.config_schema import Device
from vswapd.host import Host
from vswapd.memory import Shape, ShardMemory
from vswapd.peer import Peer
from vswapd.session import Session
from vswapd.shard import Kept, Shard
from vswapd.steering import Opened

MAX_BATCH: Final = 8
WINDOW: Final = 12 * PAGE_BYTES
UIDS: Final = (1000, 1001, 0)
"""Of the clients: two strangers, and one who may steer."""
WITNESS_UID: Final = 2000
HANG_S: Final = 30.0
_MOST_STEPS: Final = 256
SETTINGS: Final = (
    "server.shards=1",
    "server.max_connections=6",
    f"server.max_batch={MAX_BATCH}",
    "server.buffer_memory=1M",
    f"server.window={WINDOW}",
    "server.max_named_spaces=2",
    "table.max_slots=65536",
    "pool.max=1M",
    "pool.reserve=0",
)
_HOST: Final = Host(ram_bytes=1 << 30, uid=0)
_EVERY: Final = 64
"""Plays between two counts of descriptors: a collection of garbage stands before each."""


class Finding(AssertionError):  # noqa: N818 - what a fuzzer is run for
    """Something that must not be, whatever clients do."""


def check(holds: object, what: str) -> None:
    """Raise a Finding unless it holds."""
    if not holds:
        raise Finding(what)


TALLY: Final[Counter[str]] = Counter()
"""Plays, frames, replies by status, and what else was done: since the process began."""


class Script:
    """Bytes, taken from the front; zeros when there are none left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that were not taken."""
        return max(0, len(self._data) - self._at)

    def byte(self, below: int = 256) -> int:
        """A number from 0 on."""
        value = self._data[self._at] if self._at < len(self._data) else 0
        self._at += 1
        return value % below

    def bytes(self, count: int) -> bytes:
        """So many, or what is left."""
        found = self._data[self._at : self._at + count]
        self._at += count
        return found

    def word(self) -> int:
        """Eight bytes."""
        return int.from_bytes(self.bytes(8), "little")


# A client

_HELLOS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"window": WINDOW},
    {"window": -1},
    {"window": 1 << 70},
    {"window": "all"},
    {"window": 1, "name": "a"},
    {"name": "a"},
    {"name": "b", "window": True},
    {"name": " "},
    {"name": "x" * 300},
    {"client": "c" * 1000},
    {"client": 5, "token": 5},
    {"token": "0" * 32},
    {"token": "0" * 32, "resume": True},
    {"token": "0" * 32, "name": "a"},
    {"name": "a", "resume": True},
    {"shard": 3},
)
_VERBS: Final[tuple[dict[str, Any], ...]] = (
    {"verb": "spaces"},
    {"verb": "verify"},
    {"verb": "compact"},
    {"verb": "writeback", "bytes": 1 << 20},
    {"verb": "swapon", "path": "/m", "size": 1 << 20},
    {"verb": "swapon", "path": "/n", "size": "1M", "encrypt": False, "priority": 3},
    {"verb": "swapoff", "path": "/m"},
    {"verb": "swapoff", "path": "/n"},
    {"verb": "reload"},
    {"verb": "drop", "name": "a"},
    {"verb": "drop", "name": "a", "user": 1000},
    {"verb": "set", "key": "pool.max", "value": "0"},
    {"verb": "set", "key": "pool.max", "value": "1M"},
    {"verb": "set", "key": "pool.tiers", "value": "zstd:1"},
    {"verb": "set", "key": "pool.enabled", "value": "false"},
    {"verb": "set", "key": "store.enabled", "value": "false"},
    {"verb": "set", "key": "store.enabled", "value": "true"},
    {"verb": "set", "key": "groups.1000.slots_max", "value": "3"},
    {"verb": "set", "key": "server.max_batch", "value": "1"},
    {"verb": "set", "key": 1, "value": None},
    {"verb": ["set"]},
    {"verb": "shred"},
    {},
)
_COUNTS: Final = (1, 2, 3, MAX_BATCH, 0, MAX_BATCH + 1, 4096, (1 << 32) - 1)
_OFFSETS: Final = (
    *(0,) * 6,  # mostly right: what is outside is not looked at
    *(PAGE_BYTES, WINDOW - PAGE_BYTES, WINDOW, 1, (1 << 64) - PAGE_BYTES),
)
_OPS: Final = (*Op, Op.STORE, Op.STORE, Op.LOAD, Op.LOAD, Op.FREE, 0, 200)


_UNSENT: Final = {errno.EAGAIN, errno.EPIPE, errno.ECONNRESET, errno.ETOOMANYREFS}
"""The last: as many descriptors are on their way as may be (RLIMIT_NOFILE, but for root)."""


def mark_of(uid: int) -> bytes:
    """What stands in every page of a user, and nowhere else."""
    return b"<this is %d's own page>" % uid


def page_of(uid: int, kind: int) -> bytes:
    """A page of a user: shrinks, or does not, or is zero (and has no mark)."""
    if kind % 4 == 3:
        return bytes(PAGE_BYTES)
    filler = bytes([kind]) * PAGE_BYTES if kind % 2 else _NOISE[kind * 16 :]
    return (mark_of(uid) + filler)[:PAGE_BYTES]


_NOISE: Final = b"".join(
    (n * 0x9E3779B97F4A7C15 % (1 << 64)).to_bytes(8, "little") for n in range(1024)
)
_MARKS: Final = tuple(mark_of(uid) for uid in (*UIDS, WITNESS_UID))


@dataclass
class Client:
    """One end of a connection, and what it may expect of the other."""

    uid: int
    sock: socket.socket
    last_id: int = 0
    slots: list[int] = field(default_factory=list)
    """What it was given, freed or not."""
    token: str = ""
    expected: deque[tuple[int, int]] = field(default_factory=deque)
    """Operation and id of each whole frame that was sent and not answered."""
    in_step: bool = True
    """Whether the daemon can tell where the next frame begins."""
    received: bytearray = field(default_factory=bytearray)
    window: mmap.mmap | None = None
    rights: list[int] = field(default_factory=list)
    """Descriptors to send with the next bytes."""
    closing: bool = False
    """Whether a reply has said that the connection ends."""
    sending: bool = True
    cut: int = 0
    """Bytes of the next frame to send; 0: all."""

    def send(self, data: bytes, *, whole: tuple[int, int] | None = None) -> None:
        """Send what fits; `whole` names the frame that it is."""
        if not self.sending or not data:
            return
        if self.cut:
            data, whole, self.cut = data[: self.cut], None, 0
        rights, self.rights = self.rights, []
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", rights).tobytes())]
        try:
            sent = self.sock.sendmsg([data], ancillary if rights else ())
        except OSError as error:
            check(error.errno in _UNSENT, f"nothing can be sent: {error}")
            sent = 0
        if sent < len(data) and not self._gone():
            self.in_step = self.in_step and sent == 0
        elif whole is None:
            self.in_step = False
        elif self.in_step:
            self.expected.append(whole)

    def _gone(self) -> bool:
        return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def read(self, most: int) -> bool:
        """Receive and judge; False at the end of the stream.

        Raises:
            BlockingIOError: there is nothing at the moment.
        """
        try:
            data, ancillary, _, _ = self.sock.recvmsg(most, socket.CMSG_SPACE(4 * 8))
        except ConnectionResetError:
            return False
        for _, _, rights in ancillary:
            fds = array.array("i", rights)
            check(len(fds) == 1 and self.window is None, f"{len(fds)} descriptors came")
            self.window = mmap.mmap(fds[0], os.fstat(fds[0]).st_size)
            _try_to_cut(fds[0])
            os.close(fds[0])
        self.received += data
        while len(self.received) >= HEADER_BYTES:
            (length,) = struct.unpack_from("<I", self.received)
            check(length >= HEADER_BYTES, f"a reply of {length} bytes")
            if len(self.received) < length:
                break
            frame = bytes(self.received[:length])
            del self.received[:length]
            self._judge(frame)
        return bool(data)

    def _judge(self, frame: bytes) -> None:
        _, version, op, code, count, _, request_id = HEADER.unpack_from(frame)
        body = frame[HEADER_BYTES:]
        check(version == VERSION, f"version {version} in a reply")
        check(code in Status._value2member_map_, f"status {code:#x}")
        said = Status(code)
        TALLY[f"status {said.name}"] += 1
        check(said is not Status.INTERNAL, f"INTERNAL for operation {op}: {body!r}")
        check(not self.closing, f"{said.name} after a reply that closes")
        self.closing = said.closes
        if self.in_step and said not in {Status.TIMED_OUT, Status.TOO_MANY_CONNECTIONS}:
            check(self.expected, f"a reply to nothing: {op} {said.name}")
            check(self.expected.popleft() == (op, request_id), f"a reply out of order: {op}")
        self._look_at(op, said, count, body)

    def _look_at(self, op: int, said: Status, count: int, body: bytes) -> None:
        foreign(self.uid, body, "a reply")
        if said is not Status.OK:
            listed = count * 8 if said in LISTS_SLOTS else 0
            check(listed or not count, f"count {count} with {said.name}")
            check(listed <= len(body), f"{said.name} lists {count} slots in {len(body)} bytes")
            if op != Op.STORE or said is not Status.REJECTED:
                check(body[listed:].decode(), "an error without a text")
        elif op == Op.HELLO:
            document = json.loads(body)
            self.token = document["token"] or ""
            check(not document["window"] or self.window is not None, "a window without its memory")
        elif op in {Op.STATUS, Op.CONTROL}:
            check(isinstance(json.loads(body), dict), "no JSON object")
        elif op in {Op.STORE, Op.LIST}:
            check(len(body) == 8 * count, f"{count} slots in {len(body)} bytes")
            self.slots = (self.slots + list(struct.unpack(f"<{count}Q", body)))[-64:]
        elif op == Op.LOAD:
            check(len(body) in {0, count * PAGE_BYTES}, f"{count} pages in {len(body)} bytes")

    def close(self) -> None:
        """Go, without a word."""
        self.sock.close()
        window, self.window = self.window, None
        if window is not None:
            with window:
                foreign(self.uid, window[:], "the window")


def foreign(uid: int, data: bytes, where: str) -> None:
    """Look for pages of others."""
    if len(data) >= PAGE_BYTES:
        for mark in _MARKS:
            check(mark == mark_of(uid) or mark not in data, f"{mark!r} in {where} of {uid}")


def _try_to_cut(fd: int) -> None:
    for size in (0, 1 << 40):
        try:
            os.ftruncate(fd, size)
        except PermissionError:
            continue
        raise Finding("the window can be cut, or made to grow")


# The daemon's side


class _Surroundings:
    """The rest of the service: there is none."""

    shard: Shard

    def facts(self, config: Config) -> status.Facts:
        return status.Facts(
            version="0",
            state="running",
            pid=os.getpid(),
            uptime_s=0.0,
            clients=self.shard.server.clients,
            shrinker_errors=0,
            locked=False,
            lock_trouble="",
            fits_bytes=0,
            lowered="",
            settings=config.flat(),
        )

    def was_read(self, read: Config | str) -> None:
        pass

    def configure(self, config: Config) -> None:
        """Neither metrics nor a journal."""


class _Mistakes(logging.Handler):
    """What the daemon logs as a mistake of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


def _open_device(entry: Device) -> Opened:
    return Opened(UnkindDevice(4, entry.path), discards=False)


def make_shard(settings: Sequence[str] = SETTINGS, *, resumable: bool = False) -> Shard:
    """A shard without a process of its own; made, and to be closed, inside an event loop.

    Args:
        settings: as for `--set`.
        resumable: whether what it holds would outlive it.
    """
    surroundings = _Surroundings()
    kept = Kept(ShardMemory.create(_SHAPE)) if resumable else None
    shard = Shard(
        config=_CONFIG if settings is SETTINGS else load(None, settings),
        host=_HOST,
        source=None,
        overrides=tuple(settings),
        surroundings=surroundings,
        open_device=_open_device,
        kept=kept,
    )
    surroundings.shard = shard
    return shard


_CONFIG: Final = load(None, SETTINGS)
_SHAPE: Final = Shape.fitting(shard=0, max_slots=1 << 16, arena_bytes=16 << 20)


class Play:
    """One shard, its witness, and the clients that do what the script says."""

    def __init__(self, script: Script) -> None:
        self.script = script
        first = script.byte()
        self.shard = make_shard(resumable=bool(first & 1))
        self.server = self.shard.server
        self.clients: list[Client | None] = [None] * len(UIDS)
        self.at = 0
        self._uid = WITNESS_UID
        new_session = self.server._new_session

        def session(peer: Peer) -> Session:
            made = new_session(peer)
            made.peer = Peer(uid=self._uid, pid=peer.pid)
            return made

        self.server._new_session = session
        self.gifts = [os.memfd_create("gift"), os.open("/", os.O_RDONLY), *os.pipe()]

    async def run(self) -> None:
        """All of it."""
        witness = self.connect(WITNESS_UID)
        try:
            await self.ask(witness, Op.HELLO, b"{}")
            pages = [page_of(WITNESS_UID, kind) for kind in range(6)]
            for page in pages:
                await self.ask(witness, Op.STORE, page, 1)
            for _ in range(_MOST_STEPS):
                if not self.script.left:
                    break
                self.step()
                # What is sent before the daemon looks comes to it in one piece.
                then = self.script.byte(8)
                for _ in range(then % 4):
                    await asyncio.sleep(0)
                if then >= 4:
                    self.look()
            await self.end()
            body = b"".join(slot.to_bytes(8, "little") for slot in witness.slots)
            found = await self.ask(witness, Op.LOAD, body, len(pages))
            check(found == b"".join(pages), "the witness's pages are not what they were")
            await self.reckon(len(pages))
        finally:
            with contextlib.ExitStack() as leaving:  # whatever one of them finds at its end
                for client in (witness, *self.clients):
                    if client is not None:
                        leaving.callback(client.close)
                for fd in self.gifts:
                    leaving.callback(os.close, fd)

    def connect(self, uid: int) -> Client:
        """A new connection."""
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        ours.setblocking(False)
        self._uid = uid
        self.server.welcome(theirs)
        return Client(uid, ours)

    async def ask(self, client: Client, op: int, body: bytes = b"", count: int = 0) -> bytes:
        """A request that must succeed; returns the reply's body."""
        loop = asyncio.get_running_loop()
        client.last_id += 1
        frame = HEADER.pack(HEADER_BYTES + len(body), 1, op, 0, count, 0, client.last_id) + body
        async with asyncio.timeout(HANG_S):
            await loop.sock_sendall(client.sock, frame)
            head = await self.receive(client.sock, HEADER_BYTES)
            length, _, _, code, got, _, _ = HEADER.unpack(head)
            found = await self.receive(client.sock, length - HEADER_BYTES)
        check(code == 0, f"the witness is refused: {found!r}")
        if op == Op.STORE:
            client.slots += struct.unpack(f"<{got}Q", found)
        return found

    async def receive(self, sock: socket.socket, count: int) -> bytes:
        """Exactly so many bytes."""
        data = b""
        while len(data) < count:
            piece = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
            check(piece, "the witness was cut off")
            data += piece
        return data

    # What the script says

    def step(self) -> None:
        """One thing that one client does."""
        action = _ACTIONS[self.script.byte(len(_ACTIONS))]
        if action is Play.pick:
            action(self, self._someone())
            return
        client = self.clients[self.at]
        action(self, client if client is not None else self._someone())

    def _someone(self) -> Client:
        client = self.clients[self.at]
        if client is None:
            client = self.connect(UIDS[self.at])
            self.clients[self.at] = client
            if self.script.byte(8):  # most plays are to come further than to HELLO
                self.hello(client)
        return client

    def pick(self, client: Client) -> None:
        self.at = self.script.byte(len(UIDS))

    def frame(self, client: Client) -> None:
        """A request, right but for what is twisted."""
        script = self.script
        op = _OPS[script.byte(len(_OPS))]
        count = _COUNTS[script.byte(len(_COUNTS))] if op >= Op.STORE else 0
        flags = script.byte(4) if op in {Op.STORE, Op.LOAD, Op.HELLO} else 0
        if op == Op.LOAD:
            flags &= Flag.WINDOW
        twist = script.byte()
        body = self.body(client, op, min(count, 16), flags)
        if op in {Op.STATUS, Op.CONTROL}:
            count = 0
        version = code = 0
        length = HEADER_BYTES + len(body)
        # Mostly nothing: what is behind a wrong header is not looked at.
        match twist:
            case 250:
                body = body[:-1]
                length -= bool(length > HEADER_BYTES)
            case 251:
                body, length = body + b"\0", length + 1
            case 252:
                length = script.byte() << script.byte(24)
            case 253:
                version = script.byte()
            case 254:
                code = script.byte()
            case 255:
                flags = 1 << script.byte(32)
        client.last_id += 1
        data = HEADER.pack(length, version ^ 1, op, code, count, flags, client.last_id) + body
        TALLY["frames"] += 1
        client.send(data, whole=(op, client.last_id) if length == len(data) else None)

    def hello(self, client: Client) -> None:
        """A greeting that is right."""
        body = json.dumps(_HELLOS[self.script.byte(8) > 1]).encode()
        flags = self.script.byte() // 200
        client.last_id += 1
        data = HEADER.pack(HEADER_BYTES + len(body), 1, Op.HELLO, 0, 0, flags, client.last_id)
        TALLY["frames"] += 1
        client.send(data + body, whole=(Op.HELLO, client.last_id))

    def body(self, client: Client, op: int, count: int, flags: int) -> bytes:
        """What belongs behind a header."""
        match op:
            case Op.HELLO:
                return self.text(client, _HELLOS)
            case Op.CONTROL:
                return self.text(client, _VERBS)
            case Op.STORE:
                slots = self.slots(client, count) if flags & Flag.SLOTS else b""
                if flags & Flag.WINDOW:
                    return self.offset() + slots
                kind = self.script.byte()
                return slots + b"".join(page_of(client.uid, (kind + n) % 256) for n in range(count))
            case Op.LOAD:
                where = self.offset() if flags & Flag.WINDOW else b""
                return where + self.slots(client, count)
            case Op.FREE:
                return self.slots(client, count)
            case Op.LIST:
                return self.slots(client, 1)
            case _:
                return b""

    def text(self, client: Client, some: tuple[dict[str, Any], ...]) -> bytes:
        """JSON, or what claims to be."""
        which = self.script.byte(len(some) + 3)
        if which < len(some):
            return json.dumps(some[which]).encode()
        if which == len(some):
            token = next((c.token for c in self.clients if c is not None and c.token), "")
            return json.dumps({"token": token, "resume": bool(self.script.byte(2))}).encode()
        if which == len(some) + 1:
            key, value = self.script.bytes(8), self.script.bytes(16)
            said = dict(some[self.script.byte(len(some))])
            said[key.decode("latin-1").strip("\0") or "x"] = value.decode("latin-1")
            return json.dumps(said).encode()
        return self.script.bytes(self.script.byte())

    def slots(self, client: Client, count: int) -> bytes:
        """Slots: one's own, another's, or made up."""
        found = []
        first = self.script.byte()
        kind = first >> 5
        for number in range(count):
            own = client.slots
            if kind < 5 and own:
                found.append(own[(first + number) % len(own)])
            elif kind == 5:
                others = [s for c in self.clients if c is not None for s in c.slots]
                found.append(others[(first + number) % len(others)] if others else number)
            elif kind == 6:
                found.append(number << 56 | first << 40 | number)
            else:
                found.append(self.script.word())
        return struct.pack(f"<{len(found)}Q", *found)

    def offset(self) -> bytes:
        return _OFFSETS[self.script.byte(len(_OFFSETS))].to_bytes(8, "little")

    def raw(self, client: Client) -> None:
        """Bytes that are no frame, or happen to be one."""
        client.send(self.script.bytes(self.script.byte()))

    def cut(self, client: Client) -> None:
        """The next frame is sent in part."""
        client.cut = 1 + self.script.byte()

    def look(self) -> None:
        """Everybody reads what there is."""
        for client in self.clients:
            if client is not None:
                with contextlib.suppress(BlockingIOError):
                    while client.read(1 << 16):
                        pass

    def read(self, client: Client) -> None:
        """Some of the replies."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(1 + self.script.byte(4)):
                client.read(1 << (4 + self.script.byte(13)))

    def give(self, client: Client) -> None:
        """Descriptors of all kinds with the next bytes."""
        count = 1 + self.script.byte(253)  # SCM_MAX_FD
        client.rights = [(*self.gifts, client.sock.fileno())[n % 5] for n in range(count)]
        TALLY["descriptors sent"] += count

    def leave(self, client: Client) -> None:
        """Close, whatever is under way."""
        client.close()
        self.clients[self.at] = None

    def fall_silent(self, client: Client) -> None:
        """Send no more, and still read."""
        client.sending = False
        client.sock.shutdown(socket.SHUT_WR)

    def scribble(self, client: Client) -> None:
        """Change the window, whoever may be looking at it."""
        if client.window is not None:
            at = self.script.byte(max(1, len(client.window) // PAGE_BYTES)) * PAGE_BYTES
            client.window[at : at + PAGE_BYTES] = page_of(client.uid, self.script.byte())
            TALLY["scribbles"] += 1

    def unmap(self, client: Client) -> None:
        """Give the window up."""
        if client.window is not None:
            foreign(client.uid, client.window[:], "the window")
            client.window.close()
            client.window = mmap.mmap(-1, PAGE_BYTES)  # so that a second one would be noticed

    def pass_time(self, client: Client) -> None:
        """Everybody's patience is tried: whoever keeps others waiting is cut off."""
        now = self.server.loop.time()
        for leap in (0.0, 0.6, 3600.0)[: 1 + self.script.byte(3)]:
            for connection in list(self.server._connections):
                connection.check(now + leap)

    def shrink(self, client: Client) -> None:
        """What the shrinker's thread does now and then."""
        shrinker = self.shard.engine.shrinker
        if self.shard.driver.pending == 0 and (nbytes := shrinker.count()):
            self.shard.driver.run(shrinker.scan(nbytes))

    # The end

    async def end(self) -> None:
        """Nobody sends any more; everybody reads what is left, and goes."""
        for client in self.clients:
            if client is not None and client.sending:
                self.fall_silent(client)
        for index, client in enumerate(self.clients):
            if client is not None:
                await self.drain(client)
                client.close()
                self.clients[index] = None

    async def drain(self, client: Client) -> None:
        """Read to the end of the stream: every frame has been answered then."""
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(client.sock, readable.set)
        try:
            async with asyncio.timeout(HANG_S):
                while True:
                    try:
                        if not client.read(1 << 16):
                            break
                    except BlockingIOError:
                        readable.clear()
                        await readable.wait()
        except TimeoutError:
            raise Finding(f"the daemon owes {client.uid} {client.expected}, and hangs") from None
        finally:
            loop.remove_reader(client.sock)
        check(not client.received, f"half a reply: {bytes(client.received[:64])!r}")
        if client.in_step and not client.closing:
            check(not client.expected, f"no replies to {client.expected}")

    async def reckon(self, kept: int) -> None:
        """What is left is the witness's, and all sums agree."""
        engine, server = self.shard.engine, self.server
        async with asyncio.timeout(HANG_S):
            while server.clients != 1 or server._tasks or self.shard.driver.pending:  # noqa: ASYNC110 - turns
                await asyncio.sleep(0)
        check(server.buffers.used == 0, f"{server.buffers.used} bytes of buffers are out")
        check(not server.buffers.crowded, "somebody waits for memory who has gone")
        for space in engine.orphans():
            check(space.name, f"space {space.id} was left behind")
            await self.shard.drive(engine.close_space(space))
        snapshot = engine.snapshot()
        spaces = engine.core.spaces
        check(len(spaces) == 1, f"{len(spaces)} spaces, and one client")
        check(snapshot.slots.allocated == kept, f"{snapshot.slots.allocated} slots allocated")
        report = await self.shard.drive(engine.verify())
        check(report.ok, f"verify: {report.problems}")


_ACTIONS: Final[tuple[Callable[[Play, Client], None], ...]] = (
    *[Play.frame] * 14,
    *[Play.pick] * 3,
    *[Play.read] * 3,
    Play.hello,
    Play.raw,
    Play.cut,
    Play.give,
    Play.leave,
    Play.fall_silent,
    Play.scribble,
    Play.unmap,
    Play.pass_time,
    Play.shrink,
)


class Theatre:
    """Where plays are played: one event loop for all of them."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._mistakes = _Mistakes()
        self._loop.set_exception_handler(self._unhandled)
        self._plays = 0
        self._descriptors = 0

    def _unhandled(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._mistakes.said.append(f"{context['message']}: {context.get('exception')!r}")

    def play(self, data: bytes) -> None:
        """Do what the bytes say.

        Raises:
            Finding: something happened that must not.
        """
        TALLY["plays"] += 1
        self._plays += 1
        self._mistakes.said.clear()
        with _heard(self._mistakes):
            self._loop.run_until_complete(_whole(Script(data)))
        check(not self._mistakes.said, "\n".join(self._mistakes.said))
        if self._plays % _EVERY == 0:
            gc.collect()
            count = len(os.listdir("/proc/self/fd"))
            check(not self._descriptors or count <= self._descriptors, f"{count} descriptors")
            self._descriptors = self._descriptors or count

    def close(self) -> None:
        """No more plays."""
        self._loop.close()


async def _whole(script: Script) -> None:
    play = Play(script)
    try:
        await play.run()
    finally:
        await play.server.stop(HANG_S)
        play.shard.driver.close()


@contextlib.contextmanager
def _heard(handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger("vswapd")
    before = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.ERROR)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before[0]
        logger.setLevel(before[1])


# The frame parser by itself


def parse(data: bytes) -> None:
    """Any bytes are a header or one error; what a header says is what stands there.

    Raises:
        Finding: something else.
    """
    TALLY["headers"] += 1
    data = data.ljust(HEADER_BYTES, b"\0")
    try:
        header = parse_header(data, 0, 1 << 20)
    except FrameError as error:
        check(error.status.closes, f"{error.status} does not close")
        check(str(error), "no text")
        return
    check(HEADER_BYTES <= header.length <= 1 << 20, f"length {header.length}")
    again = HEADER.pack(header.length, VERSION, *_rest(header))
    check(again == data[:HEADER_BYTES], f"{data[:HEADER_BYTES]!r} was read as {header}")


def _rest(header: Header) -> tuple[int, int, int, int, int]:
    return header.op, header.status, header.count, header.flags, header.request_id
