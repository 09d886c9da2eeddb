"""CONTROL, verb by verb, on the wire of the real daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import RunningDaemon, running_daemon
from support.wire import (
    BAD_ARGUMENT,
    CONTROL,
    FOR_CONTROL,
    NOT_ALLOWED,
    OUT_OF_SERVICE,
    STATUS,
    Wire,
    noise,
    text_pages,
)


@pytest.fixture
def wire(daemon: RunningDaemon) -> Iterator[Wire]:
    with Wire(daemon.socket_path) as wire:
        wire.hello()
        yield wire


@pytest.fixture
def steering(daemon: RunningDaemon) -> Iterator[Wire]:
    with Wire(daemon.socket_path) as wire:
        wire.hello(FOR_CONTROL)
        yield wire


def test_settings_are_changed(steering: Wire) -> None:
    """set answers with the key and its values before and after."""
    answer = steering.done("set", key="pool.verify", value="always")
    assert answer == {"key": "pool.verify", "old": "never", "new": "always"}
    assert steering.done("set", key="pool.verify", value="never")["old"] == "always"


def test_devices_come_and_go(steering: Wire, wire: Wire, tmp_path: Path) -> None:
    """swapon, writeback, swapoff; pages keep their slots and bytes all along."""
    pages = text_pages(2000)
    slots = wire.store(pages).slots
    path = str(tmp_path / "swap")
    attached = steering.done("swapon", path=path, size=16 << 20, priority=3)
    assert (attached["path"], attached["priority"]) == (path, 3)
    assert 0 < attached["size_bytes"] <= 16 << 20
    written = steering.done("writeback", bytes=64 << 20)
    assert set(written) == {"bytes", "pages", "stopped"}
    assert written["pages"] > 0
    assert wire.load(slots).body == pages
    assert steering.done("swapoff", path=path)["moved_pages"] > 0
    assert wire.load(slots).body == pages


def test_the_other_verbs_answer(steering: Wire, wire: Wire) -> None:
    """compact, verify, spaces and reload have the keys of the page."""
    slots = wire.store(noise(5)).slots
    assert set(steering.done("compact")) == {"moved_bytes", "freed_bytes"}
    verified = steering.done("verify")
    assert set(verified) == {"ok", "problems", "slots", "entries", "checked_bytes"}
    assert (verified["ok"], verified["problems"]) == (True, [])
    spaces = steering.done("spaces")["spaces"]
    assert any(space["slots"] == 5 and space["pid"] == os.getpid() for space in spaces)
    assert isinstance(steering.done("reload"), dict)
    assert wire.free(slots).status == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"verb": 5}',
        b'{"verb": "fly"}',
        b'{"verb": "set"}',
        b'{"verb": "set", "key": "pool.maxx", "value": "1M"}',
        b'{"verb": "set", "key": "pool.max", "value": "1 parsec"}',
        b'{"verb": "writeback", "bytes": "many"}',
        b'{"verb": "writeback", "bytes": -1}',
        b'{"verb": "swapon"}',
        b'{"verb": "verify", "surprise": 1}',
        b'{"verb": "verify", "verb": "verify"}',
        b'{"verb": "swapon", "path": "/swap", "size": 1048576, "size": 2097152}',
    ],
)
def test_verbs_that_make_no_sense_are_bad_arguments(steering: Wire, body: bytes) -> None:
    """BAD_ARGUMENT with a text; the connection goes on."""
    reply = steering.ask(CONTROL, body)
    assert reply.status == BAD_ARGUMENT, reply
    assert reply.text
    steering.assert_in_step()


@pytest.mark.parametrize(
    ("verb", "path"), [("swapoff", "/nonexistent/swap"), ("swapon", "/nonexistent/swap")]
)
def test_what_cannot_be_done_is_out_of_service(steering: Wire, verb: str, path: str) -> None:
    """OUT_OF_SERVICE with a text that names what it is about."""
    reply = steering.control(verb, path=path, **({"size": 1 << 22} if verb == "swapon" else {}))
    assert reply.status == OUT_OF_SERVICE
    assert path in reply.text
    steering.assert_in_step()


def test_strangers_may_not_steer() -> None:
    """NOT_ALLOWED for CONTROL by another user; STATUS and pages are theirs."""
    if os.getuid():
        pytest.skip("hardware: only root can be somebody else")
    with running_daemon("server.socket_mode=0666") as daemon:
        daemon.directory.chmod(0o755)
        child = os.fork()
        if not child:
            code = 1
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                with Wire(daemon.socket_path) as wire:
                    wire.hello(FOR_CONTROL)
                    assert wire.control("compact").status == NOT_ALLOWED
                    assert wire.control("drop", name="x", uid=0).status == NOT_ALLOWED
                    assert wire.control("spaces", uid=0).status == NOT_ALLOWED
                    assert wire.control("spaces").status == 0
                    assert wire.ask(STATUS).status == 0
                with Wire(daemon.socket_path) as wire:
                    wire.hello()
                    assert wire.store(bytes(4096)).status == 0
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
