"""An upgrade that is cut off, or refused, or gone back on: what was there stays whole."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from support.service_manager import ServiceManager
from support.sources import REPOSITORY
from support.versions import Program, program, version_of
from vswapd.keeping import Keeping
from vswapd.upgrades import LIFE_VERSION
from vswapd_backends.shared import SYSTEM_PAGE

EACH = pytest.mark.parametrize("shards", [1, 2])

_MORTAL = """
import os, signal
from vswapd import notify
count = 0
def step():
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
def mortal(call):
    def before_and_after(*given, **named):
        step()
        found = call(*given, **named)
        step()
        return found
    return before_and_after
for whose, name in ((os, "memfd_create"), (os, "pwrite"), (notify.ServiceManager, "_send")):
    setattr(whose, name, mortal(getattr(whose, name)))
"""
"""Dies at one of the steps of which a conversion consists: what it makes, writes, hands over."""


@contextlib.contextmanager
def _left(shards: int, older: Path, path: Path) -> Iterator[tuple[ServiceManager, Program]]:
    """What a daemon of the previous version has left, with a device, and a client of it."""
    with ServiceManager(f"server.shards={shards}", "pool.max=16M") as manager:
        manager.sources = older
        manager.start()
        with program(manager.socket_path, older) as client:
            client.tell("open", who="it")
            client.tell("store", who="it", count=600)
            client.call("swapon", path=str(path), size=32 << 20)
            client.call("writeback", bytes=1 << 20)
            manager.kill()
            yield manager, client


def _versions(manager: ServiceManager) -> dict[str, int]:
    """The layout version of everything that is kept, by name."""
    return {name: version_of(fd) for name, fd in manager.kept.items()}


def _started(manager: ServiceManager, sources: Path) -> None:
    manager.first, manager.sources = "", sources
    manager.start()


@EACH
def test_a_daemon_may_be_killed_while_it_converts(shards: int, older: Path, tmp_path: Path) -> None:
    """Until it is final the previous version can go on; the new one can whenever it was killed."""
    with _left(shards, older, tmp_path / "swap") as (manager, client):
        for at in itertools.count(3, 17):
            manager.first, manager.sources = _MORTAL.format(at=at), REPOSITORY
            manager.launch()
            ready = manager.becomes_ready()
            manager.kill()
            if ready or _versions(manager)["kept-life"] == LIFE_VERSION:
                break
            _started(manager, older)
            assert client.tell("check", who="it") == 600
            manager.kill()
        _started(manager, REPOSITORY)
        assert client.tell("check", who="it") == 600
        assert client.call("verify")["ok"]
    assert at > 17


class _Store:
    """A service manager's store that a forked process writes to, until it is killed."""

    def __init__(self, kept: dict[str, int]) -> None:
        self.kept = {name.removeprefix("kept-"): os.dup(fd) for name, fd in kept.items()}
        self._here, self._there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def take_kept(self) -> dict[str, int]:
        return dict(self.kept)

    def keep(self, name: str, fd: int) -> None:
        socket.send_fds(self._there, [f"+{name}".encode()], [fd])

    def let_go(self, name: str) -> None:
        self._there.send(f"-{name}".encode())

    def take(self) -> None:
        """Carry out what was asked for meanwhile."""
        self._here.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                text, fds, _, _ = socket.recv_fds(self._here, 256, 1)
                name = text[1:].decode()
                if fds:
                    assert name not in self.kept
                    self.kept[name] = fds[0]
                elif name in self.kept:
                    os.close(self.kept.pop(name))

    def close(self) -> None:
        for fd in self.kept.values():
            os.close(fd)
        self._here.close()
        self._there.close()


def _convert(store: _Store, at: int) -> bool:
    """Have a process convert what is kept, and be killed at a step of it; whether it was."""
    with warnings.catch_warnings():
        # The service manager's thread is left behind, with nothing that the child needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            time.time = lambda: 1e9
            time.clock_gettime = lambda _: 1e5
            _die(at)
            life = Keeping(store).found()
            os._exit(0 if life is not None and life.revived else 1)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    store.take()
    assert code in {0, -signal.SIGKILL}
    return code != 0


def _die(at: int) -> None:
    """Be killed before or after one of the calls that a conversion consists of."""
    steps = itertools.count(1)

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def before_and_after(*given: Any, **named: Any) -> Any:
            if next(steps) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            found = call(*given, **named)
            if next(steps) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return before_and_after

    whose: list[tuple[Any, str]] = [
        *((os, name) for name in ("memfd_create", "ftruncate", "pwrite", "close")),
        *((_Store, name) for name in ("keep", "let_go")),
    ]
    for owner, name in whose:
        setattr(owner, name, mortal(getattr(owner, name)))


def _bytes_of(fd: int) -> bytes:
    """A digest of what a file holds, its label included."""
    found, at = blake2b(), 0
    with contextlib.suppress(OSError):  # behind the last byte
        while True:
            at = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, at, os.SEEK_HOLE)
            while at < end:
                part = os.pread(fd, min(1 << 20, end - at), at)
                found.update(at.to_bytes(8, "little") + part)
                at += len(part)
    return found.digest()


@EACH
def test_a_conversion_may_be_killed_anywhere(shards: int, older: Path, tmp_path: Path) -> None:
    """What it is made from is untouched until it is final, and what comes of it is the same."""
    with _left(shards, older, tmp_path / "swap") as (manager, client):
        begin = {name[5:]: _bytes_of(fd) for name, fd in manager.kept.items()}
        life = manager.kept["kept-life"]
        label_at = os.fstat(life).st_size - SYSTEM_PAGE
        label = os.pread(life, SYSTEM_PAGE, label_at)
        ends: set[tuple[tuple[str, bytes], ...]] = set()
        final = {True: 0, False: 0}
        for at in itertools.count(1):
            os.pwrite(life, label, label_at)
            store = _Store(manager.kept)
            killed = _convert(store, at)
            converted = os.pread(life, SYSTEM_PAGE, label_at) != label
            final[converted] += 1
            if not converted:
                there = {name: _bytes_of(fd) for name, fd in store.kept.items() if name in begin}
                assert there == begin
            assert not _convert(store, 0)
            ends.add(tuple(sorted((name, _bytes_of(fd)) for name, fd in store.kept.items())))
            if not killed:
                break
            store.close()
        assert len(ends) == 1
        assert min(final.values()) > 4 * shards
        for fd in manager.kept.values():
            os.close(fd)
        manager.kept = {f"kept-{name}": os.dup(fd) for name, fd in store.kept.items()}
        store.close()
        _started(manager, REPOSITORY)
        assert client.tell("check", who="it") == 600
        assert client.call("verify")["ok"]


@EACH
def test_going_back_is_refused_and_changes_nothing(
    shards: int, older: Path, tmp_path: Path
) -> None:
    """The previous version does not know what it was made into; the new one goes on with it."""
    with _left(shards, older, tmp_path / "swap") as (manager, client):
        _started(manager, REPOSITORY)
        client.tell("store", who="it", count=100)
        manager.kill()
        before = _versions(manager)
        manager.sources = older
        manager.launch()
        assert manager.await_exit() == 71
        assert f"of layout version {LIFE_VERSION}, and this vswapd knows" in manager.log
        assert _versions(manager) == before
        _started(manager, REPOSITORY)
        assert client.tell("check", who="it") == 700


@EACH
def test_what_cannot_be_converted_is_left_to_the_previous_version(
    shards: int, older: Path, tmp_path: Path
) -> None:
    """Without room for a copy in the service manager's store it says so, and nothing is lost."""
    with _left(shards, older, tmp_path / "swap") as (manager, client):
        before = _versions(manager)
        manager.most = len(before)
        manager.sources = REPOSITORY
        manager.launch()
        text = manager.await_refusal()
        assert "left alone, with all pages" in text
        assert "raise FileDescriptorStoreMax" in text
        assert manager.log.count(text.removeprefix("refused: ")) == 1
        assert _versions(manager) == before
        _started(manager, older)
        assert client.tell("check", who="it") == 600
        manager.kill()
        manager.most += shards
        _started(manager, REPOSITORY)
        assert client.tell("check", who="it") == 600


def _version_1(fd: int) -> None:
    """A label of a version that nobody has any more."""
    at = os.fstat(fd).st_size - SYSTEM_PAGE
    os.pwrite(fd, (1).to_bytes(4, "little"), at + 8)


def _senseless(fd: int) -> None:
    """More spaces and segments than there can be."""
    os.pwrite(fd, (1 << 40).to_bytes(8, "little") * 8, 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_version_1, r"this is memory of layout version 1, and this vswapd knows version \d+ only"),
        (_senseless, "what is kept does not fit together"),
    ],
)
def test_what_no_step_is_for_is_refused(
    change: Callable[[int], None], text: str, older: Path, tmp_path: Path
) -> None:
    """One line says what it is; it is left as it was, and whoever can read it goes on with it."""
    with _left(2, older, tmp_path / "swap") as (manager, client):
        state = manager.kept["kept-1-state"]
        size = os.fstat(state).st_size
        kept = os.pread(state, 64, 0), os.pread(state, SYSTEM_PAGE, size - SYSTEM_PAGE)
        change(state)
        before = {name: _bytes_of(fd) for name, fd in manager.kept.items()}
        manager.sources = REPOSITORY
        manager.launch()
        assert re.search(text, manager.await_refusal())
        assert "Traceback" not in manager.log
        assert {name: _bytes_of(fd) for name, fd in manager.kept.items()} == before
        os.pwrite(state, kept[0], 0)
        os.pwrite(state, kept[1], size - SYSTEM_PAGE)
        _started(manager, REPOSITORY)
        assert client.tell("check", who="it") == 600


def test_what_nobody_knows_keeps_nothing_from_being_converted(older: Path, tmp_path: Path) -> None:
    """Something of a third version that was given up before it served is dropped."""
    with _left(1, older, tmp_path / "swap") as (manager, client):
        for name in ("kept-frames", "kept-frames.7", "kept-0-state.9"):
            manager.kept[name] = os.memfd_create(name)
        _started(manager, REPOSITORY)
        assert client.tell("check", who="it") == 600
        assert {"kept-frames", "kept-frames.7", "kept-0-state.9"}.isdisjoint(manager.kept)
