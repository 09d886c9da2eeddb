"""Clients that are slow, or mean it: what they cost is bounded, and only they pay for it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.daemon import RunningDaemon, running_daemon
from support.wire import (
    BAD_ARGUMENT,
    BAD_LENGTH,
    CONTROL,
    FOR_CONTROL,
    HELLO,
    LOAD,
    PING,
    STATUS,
    STORE,
    TOO_MANY_CONNECTIONS,
    WITH_SLOTS,
    Wire,
    noise,
    pack,
)

BUFFERS: Final = 8 << 20
HOSTILE: Final = 12


@pytest.fixture
def daemon() -> Iterator[RunningDaemon]:
    settings = (f"server.buffer_memory={BUFFERS}", "server.max_batch=256", "pool.max=64M")
    with running_daemon(*settings, "server.request_timeout=60s") as running:
        yield running


def resident(daemon: RunningDaemon) -> int:
    """Memory of the daemon and its shards, the pool and the table aside."""
    pids = [daemon.pid]
    pids += map(int, Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split())
    anonymous = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                anonymous += int(line.split()[1]) * 1024
    return anonymous


def work(wire: Wire, rounds: int) -> None:
    """What a client does that behaves; returns when all of it was answered rightly."""
    for _ in range(rounds):
        pages = noise(16)
        slots = wire.store(pages).slots
        assert wire.load(slots).body == pages
        assert wire.free(slots).status == 0


def stuffed(wire: Wire, frame: bytes) -> int:
    """Send a frame again and again until the daemon takes no more; returns the bytes sent."""
    wire.socket.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += wire.socket.send(frame[sent % len(frame) :])
    return sent


def test_clients_that_do_not_read_cost_what_they_may(daemon: RunningDaemon) -> None:
    """Replies that nobody reads take no more memory than is set aside; others go on as before."""
    with contextlib.ExitStack() as opened:
        good = opened.enter_context(Wire(daemon.socket_path))
        good.hello()
        work(good, 5)
        before = resident(daemon)
        for _ in range(HOSTILE):
            wire = opened.enter_context(Wire(daemon.socket_path))
            wire.hello()
            slots = wire.store(noise(64)).slots * 4
            stuffed(wire, wire.frame(LOAD, pack(slots), count=len(slots)))
            work(good, 5)
        grown = resident(daemon) - before
        assert grown < 2 * BUFFERS + HOSTILE * (1 << 20), f"{grown} bytes more"
        work(good, 50)


def test_half_frames_cost_what_they_may(daemon: RunningDaemon) -> None:
    """Large requests that never come to their end take a bounded part of the memory set aside."""
    with contextlib.ExitStack() as opened:
        good = opened.enter_context(Wire(daemon.socket_path))
        good.hello()
        work(good, 5)
        before = resident(daemon)
        for _ in range(HOSTILE // 3):
            wire = opened.enter_context(Wire(daemon.socket_path))
            wire.hello()
            frame = wire.frame(STORE, bytes(256 * 4096), count=256)
            wire.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                wire.socket.sendall(frame[: len(frame) - 1])
            work(good, 5)
        grown = resident(daemon) - before
        assert grown < 2 * BUFFERS + HOSTILE * (1 << 20), f"{grown} bytes more"
        work(good, 50)


def test_floods_of_tiny_requests_are_served_in_turns(daemon: RunningDaemon) -> None:
    """A client that sends pings without end keeps nobody else from being served."""
    with contextlib.ExitStack() as opened:
        good = opened.enter_context(Wire(daemon.socket_path))
        good.hello()
        for _ in range(HOSTILE):
            wire = opened.enter_context(Wire(daemon.socket_path))
            wire.hello()
            stuffed(wire, struct.pack("<IBBHIIQ", 24, 1, 2, 0, 0, 0, 1))
        work(good, 50)
        assert good.ask(STATUS).json["clients"] == HOSTILE + 1


def test_who_waits_in_the_middle_of_a_request_is_cut_off() -> None:
    """Half a frame, or replies that nobody reads: after request_timeout the connection ends."""
    with (
        running_daemon("server.request_timeout=500ms", "pool.max=8M") as daemon,
        Wire(daemon.socket_path) as good,
    ):
        good.hello()
        with Wire(daemon.socket_path) as half, Wire(daemon.socket_path) as deaf:
            half.hello()
            half.socket.sendall(half.frame(STORE, bytes(4096), count=1)[:100])
            deaf.hello()
            slots = deaf.store(noise(64)).slots * 4
            stuffed(deaf, deaf.frame(LOAD, pack(slots), count=len(slots)))
            half.socket.settimeout(60)
            assert half.reply().status == 0x305
            half.assert_closed()
            while good.ask(STATUS).json["clients"] != 1:
                pass
        assert good.ask(STATUS).json["slots"]["allocated"] == 0


def test_a_connection_that_says_nothing_stays(daemon: RunningDaemon) -> None:
    """Between requests a client may be silent for as long as it likes: it costs nobody anything."""
    with Wire(daemon.socket_path) as quiet, Wire(daemon.socket_path) as good:
        quiet.hello()
        good.hello()
        work(good, 20)
        quiet.assert_in_step()


def test_descriptors_that_are_received_are_gone_at_once(daemon: RunningDaemon) -> None:
    """With every piece of what is sent, half a frame included: nobody holds them any more.

    A pipe has its end when nobody holds the end for writing.
    """
    with Wire(daemon.socket_path) as good, Wire(daemon.socket_path) as wire:
        good.hello()
        wire.hello()
        reader, writer = os.pipe()
        for frame in (*[wire.frame(PING)] * 5, wire.frame(STORE, noise(1), count=1)[:99]):
            socket.send_fds(wire.socket, [frame], [writer] * 100)
        os.close(writer)
        for _ in range(5):
            assert wire.reply().status == 0
        work(good, 5)
        with open(reader, "rb") as pipe:
            assert pipe.read() == b""


@pytest.mark.parametrize("itself", [False, True])
def test_descriptors_that_are_never_received_go_with_their_connection(*, itself: bool) -> None:
    """Also if one of them keeps the connection itself open: then until it is cut off."""
    settings = ("server.request_timeout=500ms", "server.max_batch=256", "pool.max=8M")
    with running_daemon(*settings) as daemon, Wire(daemon.socket_path) as good:
        good.hello()
        reader, writer = os.pipe()
        with Wire(daemon.socket_path) as wire:
            wire.hello()
            # Its replies are not read, so the daemon reads no more from it either.
            slots = wire.store(noise(64)).slots * 4
            frame = wire.frame(LOAD, pack(slots), count=len(slots))
            gifts = [writer, wire.socket.fileno()] if itself else [writer]
            wire.socket.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    socket.send_fds(wire.socket, [frame], gifts)
                    sent += 1
            assert sent > 10
            os.close(writer)
            work(good, 5)
        with open(reader, "rb") as pipe:
            assert pipe.read() == b""
        while good.ask(STATUS).json["clients"] != 1:
            pass
        work(good, 5)


@pytest.mark.parametrize("name", [{}, {"name": "kept"}])
def test_a_greeting_that_is_refused_opens_nothing(
    daemon: RunningDaemon, name: dict[str, str]
) -> None:
    """However often a client greets wrongly, it has one space, and none once it has gone."""
    with Wire(daemon.socket_path) as good:
        good.hello()
        before = good.ask(STATUS).json["spaces"]
        with Wire(daemon.socket_path) as wire:
            for _ in range(20):
                said = json.dumps({"window": -1, **name}).encode()
                assert wire.ask(HELLO, said).status == BAD_ARGUMENT
            assert good.ask(STATUS).json["spaces"] == before
            wire.hello()
            assert good.ask(STATUS).json["spaces"] == before + 1
        while good.ask(STATUS).json["clients"] != 1:
            pass
        assert good.ask(STATUS).json["spaces"] == before


def test_connections_that_come_and_go_leave_nothing(daemon: RunningDaemon) -> None:
    """Hundreds of connections, closed at once, leave neither descriptors nor memory behind."""
    with Wire(daemon.socket_path) as good:
        good.hello()
        descriptors = Path(f"/proc/{daemon.pid}/fd")
        for _ in range(100):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(daemon.socket_path))
        while good.ask(STATUS).json["clients"] != 1:
            pass
        few, memory = len(list(descriptors.iterdir())), resident(daemon)
        for _ in range(400):
            with Wire(daemon.socket_path) as wire:
                wire.hello()
        while good.ask(STATUS).json["clients"] != 1:
            pass
        assert len(list(descriptors.iterdir())) <= few
        assert resident(daemon) - memory < 4 << 20


def test_huge_texts_are_not_read(daemon: RunningDaemon) -> None:
    """A greeting, or a request to steer, of more than 64 KiB: refused by its header alone.

    Nobody is to wait until megabytes of JSON have been taken apart.
    """
    huge = b'{"verb": "compact", "client": "' + b"x" * (1 << 20) + b'"}'
    with Wire(daemon.socket_path) as wire:
        for op in (HELLO, CONTROL):
            reply = wire.ask(op, huge)
            assert reply.status == BAD_LENGTH
            assert "65536 at most" in reply.text
            if op == HELLO:
                wire.hello(FOR_CONTROL)
        assert wire.control("compact").status == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_the_journal_is_not_flooded(shards: int) -> None:
    """By clients that are refused while places become free, or that drop what they have made."""
    settings = (f"server.shards={shards}", "server.max_connections=2", "pool.max=8M")
    with running_daemon(*settings) as daemon, Wire(daemon.socket_path) as good:
        good.hello()
        for _ in range(20):
            with Wire(daemon.socket_path) as wire:
                wire.hello(name="again and again")
                with Wire(daemon.socket_path) as refused:
                    with contextlib.suppress(BrokenPipeError):  # one shard does not wait for it
                        refused.socket.sendall(refused.frame(HELLO))
                    assert refused.reply().status == TOO_MANY_CONNECTIONS
            while good.ask(STATUS).json["clients"] != 1:
                pass
            good.done("drop", name="again and again")
        lines = [line for line in daemon.log.splitlines() if "refused" in line or "drop" in line]
        assert len(lines) == 1, lines
        assert f" {os.getpid()} of user {os.getuid()} was refused" in lines[0]


def test_small_replies_that_are_not_read_hold_no_memory(daemon: RunningDaemon) -> None:
    """However much was sent for them: others are served, and the daemon goes on when it is cut off.

    One that waited for memory that it held itself, and was cut off, once held it for ever.
    """
    with Wire(daemon.socket_path) as good, Wire(daemon.socket_path) as deaf:
        good.hello()
        deaf.hello()
        slots = deaf.store(bytes(64 * 4096)).slots
        frame = deaf.frame(STORE, pack(slots) + bytes(64 * 4096), count=64, flags=WITH_SLOTS)
        deaf.socket.settimeout(2)
        with contextlib.suppress(TimeoutError):
            for _ in range(2 * BUFFERS // len(frame) * 40):
                deaf.socket.sendall(frame)
        good.socket.settimeout(5)
        work(good, 20)
        deaf.socket.close()
        work(good, 20)


def test_small_requests_never_wait_for_memory() -> None:
    """Also if all other connections have begun a request each, small or huge, and let it lie."""
    settings = (f"server.buffer_memory={2 * BUFFERS}", "server.max_batch=256", "pool.max=64M")
    with (
        running_daemon(*settings, f"server.max_connections={HOSTILE}") as daemon,
        contextlib.ExitStack() as opened,
    ):
        good = opened.enter_context(Wire(daemon.socket_path))
        good.hello()
        begun = []
        for number in range(HOSTILE - 1):
            wire = opened.enter_context(Wire(daemon.socket_path))
            wire.hello()
            count = (80, 256)[number % 4 == 0]
            frame = wire.frame(STORE, bytes(count * 4096), count=count)
            wire.socket.sendall(frame[:1000])
            begun.append((wire, frame))
            work(good, 5)
        work(good, 50)
        # Nobody was cut off for it.
        for wire, frame in begun:
            wire.socket.sendall(frame[1000:])
            assert wire.reply().status == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_there_are_descriptors_for_all_connections_and_their_windows(shards: int) -> None:
    """In every process, wherever they all are; the system's soft limit is raised for them."""
    settings = (f"server.shards={shards}", "server.max_connections=100", "pool.max=8M")
    soft = ["sh", "-c", 'ulimit -Sn 150; exec "$@"', "sh"]
    with running_daemon(*settings, under=soft) as daemon, contextlib.ExitStack() as opened:
        for _ in range(100):
            wire = opened.enter_context(Wire(daemon.socket_path))
            assert wire.hello(shard=shards - 1, window=4096)["window"] == 4096
        work(wire, 5)
        assert "descriptors" not in daemon.log
