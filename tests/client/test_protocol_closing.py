"""Requests, and events, that make the real daemon close a connection: what it says first."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from support.daemon import RunningDaemon, running_daemon
from support.wire import (
    BAD_ARGUMENT,
    BAD_FRAME,
    BAD_VERSION,
    CONTROL,
    FRAME_TOO_LARGE,
    HELLO,
    HELLO_FIRST,
    LOAD,
    PING,
    STATUS,
    STOPPING,
    STORE,
    TIMED_OUT,
    TOO_MANY_CONNECTIONS,
    Wire,
    pack,
    text_pages,
)


@pytest.fixture
def wire(daemon: RunningDaemon) -> Iterator[Wire]:
    with Wire(daemon.socket_path) as wire:
        wire.hello()
        yield wire


def test_another_request_before_hello_closes(daemon: RunningDaemon) -> None:
    """HELLO_FIRST, for any operation."""
    for op in (PING, STORE, STATUS, CONTROL):
        with Wire(daemon.socket_path) as wire:
            body = bytes(4096) if op == STORE else b"{}" if op == CONTROL else b""
            reply = wire.ask(op, body, count=int(op == STORE))
            assert reply.status == HELLO_FIRST
            wire.assert_closed()


def test_a_second_hello_closes(wire: Wire) -> None:
    """HELLO_FIRST: only the first request may be HELLO."""
    assert wire.ask(HELLO, b"{}").status == HELLO_FIRST
    wire.assert_closed()


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe", b"5"])
def test_a_hello_that_makes_no_sense_is_told(daemon: RunningDaemon, body: bytes) -> None:
    """BAD_ARGUMENT: HELLO's body is a JSON object; it can be said again."""
    with Wire(daemon.socket_path) as wire:
        reply = wire.ask(HELLO, body)
        assert reply.status == BAD_ARGUMENT
        assert reply.text
        assert wire.ask(HELLO, b"{}").status == 0


@pytest.mark.parametrize("greeted", [False, True])
def test_another_version_closes(daemon: RunningDaemon, greeted: bool) -> None:  # noqa: FBT001
    """BAD_VERSION, before and after HELLO."""
    with Wire(daemon.socket_path) as wire:
        if greeted:
            wire.hello()
        wire.socket.sendall(wire.frame(PING, version=2))
        assert wire.reply().status == BAD_VERSION
        wire.assert_closed()


@pytest.mark.parametrize("length", [0, 1, 23])
def test_a_length_below_the_header_closes(wire: Wire, length: int) -> None:
    """BAD_FRAME."""
    wire.socket.sendall(wire.frame(PING, length=length))
    assert wire.reply().status == BAD_FRAME
    wire.assert_closed()


def test_a_frame_that_is_too_long_closes_before_it_is_sent(daemon: RunningDaemon) -> None:
    """FRAME_TOO_LARGE is answered to the header alone."""
    with Wire(daemon.socket_path) as wire:
        longest = wire.hello()["max_frame_bytes"]
        wire.socket.sendall(wire.frame(STORE, length=longest + 1, count=1))
        assert wire.reply().status == FRAME_TOO_LARGE
        wire.assert_closed()


def test_half_a_frame_times_out() -> None:
    """TIMED_OUT: a frame that was begun and not finished closes; being idle does not."""
    with (
        running_daemon("server.request_timeout=200ms") as daemon,
        Wire(daemon.socket_path) as idle,
        Wire(daemon.socket_path) as wire,
    ):
        idle.hello()
        wire.hello()
        wire.socket.sendall(wire.frame(STORE, bytes(4096), count=1)[:1000])
        assert wire.reply().status == TIMED_OUT
        wire.assert_closed()
        idle.assert_in_step()


def test_too_many_connections_are_told() -> None:
    """TOO_MANY_CONNECTIONS, and there is room again when one has ended."""
    with (
        running_daemon("server.max_connections=2") as daemon,
        Wire(daemon.socket_path) as one,
        Wire(daemon.socket_path) as two,
    ):
        one.hello()
        two.hello()
        with Wire(daemon.socket_path) as three:
            assert three.reply().status == TOO_MANY_CONNECTIONS
            three.assert_closed()
        one.assert_in_step()


def test_a_daemon_that_stops_ends_the_connection() -> None:
    """SIGTERM: what was asked before is answered; then STOPPING, or the end."""
    with running_daemon() as daemon, Wire(daemon.socket_path) as wire:
        wire.hello()
        slots = wire.store(text_pages(1)).slots
        daemon.process.send_signal(signal.SIGTERM)
        statuses = set()
        try:
            while True:
                wire.socket.sendall(wire.frame(LOAD, pack(slots), count=1))
                reply = wire.reply()
                statuses.add(reply.status)
                if reply.status:
                    break
                assert reply.body == text_pages(1)
        except (AssertionError, ConnectionError):
            pass  # the end, without a word
        assert statuses <= {0, STOPPING}
        daemon.await_exit(expected=0)
