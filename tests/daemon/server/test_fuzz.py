"""Random and mutated bytes: one reply per frame or the end, nothing changed, nobody else hurt."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.daemon import RunningDaemon, running_daemon
from support.engine import make_engine
from support.wire import Wire, noise
from vswap.protocol import HEADER_BYTES, Flag, FrameError, Op, Status, pack_header, parse_header
from vswapd.compressor import Compressor
from vswapd.driver import Driver
from vswapd.peer import Peer
from vswapd.session import Context, Limits, Reply, Session

ROUNDS: Final = 150 * int(os.environ.get("VSWAPD_SOAK", "1"))
MAX_FRAME: Final = 24 + 64 * 4104


class _Nobody:
    """Operators who do nothing."""

    version = "0"

    def status(self):  # type: ignore[no-untyped-def]
        return {}
        yield

    def may_steer(self, uid: int) -> bool:
        return uid == 0

    def carry_out(self, request):  # type: ignore[no-untyped-def]
        return dict(request)
        yield


def session(uid: int = 0) -> tuple[Session, Driver]:
    engine = make_engine().engine
    context = Context(
        engine=engine,
        compressor=Compressor(engine),
        steering=_Nobody(),
        limits=Limits(max_batch=64, max_frame=MAX_FRAME, max_pipeline=4),
    )
    return Session(context, Peer(uid=uid, pid=0)), Driver()


def answer(session: Session, driver: Driver, frame: bytes) -> Reply | None:
    """What a connection does with the first frame of some bytes; None: they are no frame."""
    refused_with: Status | None = None
    try:
        header = parse_header(frame, 0, MAX_FRAME)
    except FrameError as error:
        refused_with = error.status
    if refused_with is not None:
        assert refused_with.closes
        return None
    if len(frame) < header.length:
        return None
    refused = session.admit(header)
    if refused is not None:
        return refused
    return driver.run(session.execute(header, memoryview(frame)[HEADER_BYTES : header.length]))


def status_of(reply: Reply) -> Status:
    frame = b"".join(bytes(part) for part in reply.parts)
    assert len(frame) == reply.size
    length, version, _, status, count, _, _ = struct.unpack_from("<IBBHIIQ", frame)
    assert (length, version) == (len(frame), 1)
    assert count * 8 <= max(length - 24, 0) or not status
    return Status(status)


OPS = st.sampled_from([*Op, 0, 9, 255])
NUMBERS = st.one_of(st.integers(0, 70), st.sampled_from([4096, 1 << 20, (1 << 32) - 1]))
BODIES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"{}", b"[]", b"null", b'{"client": 1}', b'{"verb": "set"}', b"\xff" * 8]),
    st.integers(0, 3).map(lambda n: bytes(4096 * n)),
)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(OPS, NUMBERS, NUMBERS, BODIES), max_size=8),
    st.sampled_from(["greeted", "not"]),
)
@example([(Op.STORE, 1, 0, bytes(4096)), (Op.LOAD, 1, 0, bytes(8))], "greeted")
def test_every_frame_gets_one_reply(
    frames: list[tuple[int, int, int, bytes]], greeted: str
) -> None:
    """Whatever a frame says, it is answered with a frame; a mistake of ours is none of them."""
    talk, driver = session()
    if greeted == "greeted":
        first = answer(talk, driver, pack_header(Op.HELLO, 0))
        assert first is not None
        assert status_of(first) is Status.OK
    for op, count, flags, body in frames:
        frame = pack_header(op, len(body), count=count, flags=flags, request_id=7) + body
        reply = answer(talk, driver, frame)
        assert reply is not None
        assert status_of(reply) is not Status.INTERNAL
        if reply.closes:
            break
    driver.run(talk.close())
    driver.close()


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused_or_answered(data: bytes) -> None:
    """No bytes whatever make a connection fail by a mistake of ours."""
    talk, driver = session()
    reply = answer(talk, driver, data.ljust(HEADER_BYTES, b"\0"))
    assert reply is None or status_of(reply) is not Status.INTERNAL
    driver.run(talk.close())
    driver.close()


def test_refused_requests_change_nothing() -> None:
    """After any number of requests that are wrong the engine is what it was before."""
    talk, driver = session()
    assert answer(talk, driver, pack_header(Op.HELLO, 0)) is not None
    engine = talk._context.engine
    before = engine.snapshot()
    chooser = random.Random(5)
    for _ in range(500):
        op = chooser.choice([Op.STORE, Op.LOAD, Op.FREE])
        count = chooser.choice([0, 1, 2, 65])
        body = bytes(chooser.choice([0, 8, 16, 4095, 4097, 4104]))
        flags = chooser.choice([0, int(Flag.SLOTS), 2, 0x80])
        reply = answer(talk, driver, pack_header(op, len(body), count=count, flags=flags) + body)
        assert reply is not None
        assert status_of(reply) is not Status.OK
    assert engine.snapshot() == before
    driver.close()


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon("pool.max=16M", "server.max_batch=64", "server.request_timeout=1s") as one:
        yield one


def _good(wire: Wire) -> list[bytes]:
    """Frames of a whole conversation that would be right."""
    hello = json.dumps({"client": "fuzz"}).encode()
    return [
        wire.frame(Op.HELLO, hello),
        wire.frame(Op.STORE, noise(3), count=3),
        wire.frame(Op.LOAD, bytes(16), count=2),
        wire.frame(Op.FREE, bytes(8), count=1),
        wire.frame(Op.STATUS),
        wire.frame(Op.CONTROL, b'{"verb": "spaces"}'),
        wire.frame(Op.PING),
    ]


def _mutated(chooser: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chooser.randrange(1, 6)):
        # Mostly in headers: what pages hold is nobody's business.
        at = min(
            chooser.choice([chooser.randrange(1 << 14), chooser.randrange(60)]), len(changed) - 1
        )
        match chooser.randrange(5):
            case 0:
                changed[at] ^= 1 << chooser.randrange(8)
            case 1:
                changed[at] = chooser.choice([0, 1, 0x7F, 0x80, 0xFF])
            case 2:
                del changed[at : at + chooser.randrange(1, 40)]
            case 3:
                changed[at:at] = chooser.randbytes(chooser.randrange(1, 40))
            case _:
                changed += chooser.randbytes(chooser.randrange(200))
        if len(changed) < 64:
            changed += bytes(64)
    return bytes(changed)


def _talk(path: Path, data: bytes) -> None:
    """Send bytes, say that nothing follows, and read until the daemon has closed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        # The daemon may close in the middle of it: what was wrong stood at the beginning.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1 << 20):
                pass


def test_mutated_conversations_hurt_nobody(daemon: RunningDaemon) -> None:
    """A real daemon survives them all; a client beside them never notices, and nothing is left."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    chooser = random.Random(seed)
    with Wire(daemon.socket_path) as well_behaved:
        well_behaved.hello()
        pages = noise(64)
        slots = well_behaved.store(pages).slots
        for number in range(ROUNDS):
            frames = _good(well_behaved)
            data = b"".join(frames[: chooser.randrange(1, len(frames) + 1)])
            _talk(daemon.socket_path, _mutated(chooser, data))
            if number % 10 == 0:
                assert well_behaved.load(slots).body == pages
        assert well_behaved.load(slots).body == pages
        well_behaved.free(slots)
        assert well_behaved.done("verify")["ok"]
    with Wire(daemon.socket_path) as wire:
        wire.hello()
        document = wire.ask(Op.STATUS).json
        assert document["slots"]["allocated"] == 0


def test_a_client_may_go_at_any_byte(daemon: RunningDaemon) -> None:
    """A connection that ends in the middle of anything leaves no slot and no space behind."""
    with Wire(daemon.socket_path) as wire:
        wire.hello()
        data = b"".join(_good(wire)[:3])
        first = len(_good(wire)[0])
        cuts = [*range(first + 30), *range(first + 30, len(data), 997), len(data)]
        for cut in cuts:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(daemon.socket_path))
                sock.sendall(data[:cut])
        wire.assert_in_step()
        while (document := wire.ask(Op.STATUS).json)["spaces"] != 1:
            pass
        assert document["slots"]["allocated"] == 0
        assert wire.done("verify")["ok"]
