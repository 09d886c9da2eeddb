"""Nobody waits for a daemon without a word: what is logged, for how long, and what limits may be.

The daemons that answer are real; those that do not are sockets with nobody behind them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vswap
import vswap.aio
from support.daemon import RunningDaemon, daemon_environment, running_daemon
from support.service_manager import service
from vswap.control import Control
from vswap.protocol import PAGE_BYTES

LIMIT_S = 1.2
"""A limit on silence that is more than the second after which something is said."""


class Heard(logging.Handler):
    """What the library says, and events for whoever waits for it to be said."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[tuple[int, str]] = []
        self.warned = threading.Event()
        self.informed = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))
        (self.warned if record.levelno == logging.WARNING else self.informed).set()

    @property
    def warnings(self) -> list[str]:
        return [text for level, text in self.said if level == logging.WARNING]


@pytest.fixture
def heard() -> Iterator[Heard]:
    logger, handler = logging.getLogger("vswap"), Heard()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(before)
    logger.removeHandler(handler)


def blocking(path: Path, **more: Any) -> None:
    vswap.connect(path, **more).close()


def tasks(path: Path, **more: Any) -> None:
    async def main() -> None:
        async with vswap.aio.connect(path, **more):
            pass

    asyncio.run(main())


def steering(path: Path, **more: Any) -> None:
    Control(path, **more).close()


everybody = pytest.mark.parametrize("connect", [blocking, tasks, steering])


# Nobody behind the socket


@contextlib.contextmanager
def listening(path: Path, backlog: int = 8) -> Iterator[socket.socket]:
    """As a service manager listens for a daemon that does not come."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(backlog)
        yield listener


@everybody
def test_a_daemon_that_never_accepts_is_given_up(
    socket_path: Path, heard: Heard, connect: Callable[..., None]
) -> None:
    """The queue takes the connection, and nobody greets: that is said, then it is an error."""
    with (
        listening(socket_path),
        pytest.raises(vswap.TimedOut, match="is not answering at") as caught,
    ):
        connect(socket_path, timeout=LIMIT_S)
    assert caught.value.exit_code == 75
    said = f"vswapd is not answering at {socket_path}: process {os.getpid()} listens there"
    assert len(heard.warnings) == 1
    assert heard.warnings[0].startswith(said)


@everybody
def test_a_full_queue_is_told(
    socket_path: Path, heard: Heard, connect: Callable[..., None]
) -> None:
    """Nobody accepts, and no more can wait: the same."""
    with listening(socket_path, 0), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(socket_path))
        with pytest.raises(vswap.NoDaemon, match=r"not accept the connection: .*journalctl"):
            connect(socket_path, timeout=LIMIT_S)
    assert len(heard.warnings) == 1
    assert f"is not answering at {socket_path}: " in heard.warnings[0]


@everybody
@pytest.mark.parametrize(
    ("answer", "kind"),
    [(b"", vswap.TimedOut), (b"\x00" * 7, vswap.TimedOut), (b"HTTP/1.1 400 no\r\n" * 9, None)],
)
def test_what_is_no_daemon_is_given_up(
    socket_path: Path,
    heard: Heard,
    connect: Callable[..., None],
    answer: bytes,
    kind: type[vswap.VswapError] | None,
) -> None:
    """It accepts, and says nothing, or part of an answer, or something else."""

    def serve() -> None:
        connection, _ = listener.accept()
        connection.sendall(answer)
        connections.append(connection)

    connections: list[socket.socket] = []
    with listening(socket_path) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(kind or vswap.ProtocolError):
            connect(socket_path, timeout=LIMIT_S)
        thread.join()
        connections[0].close()
    if kind is not None:
        assert len(heard.warnings) == 1


@everybody
def test_an_answer_in_drops_is_no_answer(socket_path: Path, connect: Callable[..., None]) -> None:
    """Who says a byte now and then does not greet either."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            while not over.wait(0.02):
                connection.send(b"\x20")

    over = threading.Event()
    with listening(socket_path) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with pytest.raises((vswap.TimedOut, vswap.ProtocolError)):
                connect(socket_path, timeout=0.3)
        finally:
            over.set()
            thread.join()


# One that is there, and stops


@pytest.fixture
def stoppable() -> Iterator[RunningDaemon]:
    with running_daemon("server.shards=1") as daemon:
        yield daemon


def go_on_when_told(daemon: RunningDaemon, heard: Heard) -> threading.Thread:
    """Stop a daemon until somebody has said that it does not answer."""

    def go_on() -> None:
        heard.warned.wait(60)
        os.kill(daemon.pid, signal.SIGCONT)

    os.kill(daemon.pid, signal.SIGSTOP)
    thread = threading.Thread(target=go_on)
    thread.start()
    return thread


def test_a_call_that_waits_says_so(stoppable: RunningDaemon, heard: Heard) -> None:
    """A daemon that is stopped in the middle: one warning, and a word when it goes on."""
    content = np.random.default_rng(1).bytes(2000 * PAGE_BYTES)
    with vswap.connect(stoppable.socket_path) as space:
        for _ in range(2):
            heard.warned.clear()
            thread = go_on_when_told(stoppable, heard)
            slots = space.store(content)
            thread.join()
            assert bytes(space.load(slots)) == content
    assert [level for level, _ in heard.said] == [logging.WARNING, logging.INFO] * 2
    hint = f"vswapd is not answering at {stoppable.socket_path}: process {stoppable.pid} listens"
    assert all(text.startswith(hint) for text in heard.warnings)
    assert "vswapd answers again" in heard.said[1][1]


def test_a_task_that_waits_says_so(stoppable: RunningDaemon, heard: Heard) -> None:
    """The same in an event loop, which is not held up."""
    content = np.random.default_rng(1).bytes(2000 * PAGE_BYTES)

    async def main() -> None:
        async with vswap.aio.connect(stoppable.socket_path) as space:
            thread = go_on_when_told(stoppable, heard)
            slots = await space.store(content)
            thread.join()
            assert bytes(await space.load(slots)) == content
            while not heard.informed.is_set():
                await space.ping()

    asyncio.run(main())
    assert [level for level, _ in heard.said] == [logging.WARNING, logging.INFO]
    assert f"is not answering at {stoppable.socket_path}" in heard.warnings[0]


@pytest.mark.parametrize("connect", [blocking, tasks])
def test_a_stopped_daemon_is_waited_for_by_who_connects(
    stoppable: RunningDaemon, heard: Heard, connect: Callable[..., None]
) -> None:
    """Without a limit for ever, and not in silence."""
    thread = go_on_when_told(stoppable, heard)
    connect(stoppable.socket_path)
    thread.join()
    assert [level for level, _ in heard.said] == [logging.WARNING, logging.INFO]


@pytest.mark.parametrize("timeout", [0.3, LIMIT_S])
def test_a_stopped_daemon_is_given_up_in_the_middle(
    stoppable: RunningDaemon, heard: Heard, timeout: float
) -> None:
    """With a limit, of whatever length, its silence ends the call."""
    with vswap.connect(stoppable.socket_path, timeout=timeout) as space:
        os.kill(stoppable.pid, signal.SIGSTOP)
        try:
            with pytest.raises(vswap.TimedOut, match=rf"silent for {timeout} s"):
                space.ping()
        finally:
            os.kill(stoppable.pid, signal.SIGCONT)
    assert len(heard.warnings) == (timeout > 1)


# One that is away


def test_who_waits_for_a_daemon_to_come_back_says_so(heard: Heard) -> None:
    """A service that is killed, and is not started again for a while."""
    with service("server.shards=1") as manager, vswap.connect(manager.socket_path) as space:
        slots = space.store(bytes(range(256)) * 16)

        def start() -> None:
            heard.warned.wait(60)
            manager.start()

        manager.kill()
        thread = threading.Thread(target=start)
        thread.start()
        assert bytes(space.load(slots)) == bytes(range(256)) * 16
        thread.join()
    assert [level for level, _ in heard.said] == [logging.WARNING, logging.INFO]
    assert f"vswapd has gone from {manager.socket_path}, and is waited for" in heard.warnings[0]


def test_a_task_whose_daemon_is_away_says_so(heard: Heard) -> None:
    """The same in an event loop."""
    with service("server.shards=1") as manager:

        async def main() -> None:
            async with vswap.aio.connect(manager.socket_path) as space:
                slots = await space.store(bytes(range(256)) * 16)
                manager.kill()
                load = asyncio.create_task(space.load(slots))
                await asyncio.to_thread(heard.warned.wait, 60)
                manager.start()
                assert bytes(await load) == bytes(range(256)) * 16

        asyncio.run(main())
    assert [level for level, _ in heard.said] == [logging.WARNING, logging.INFO]
    assert f"vswapd has gone from {manager.socket_path}" in heard.warnings[0]


def test_who_has_not_configured_logging_sees_it(socket_path: Path) -> None:
    """Python writes warnings to standard error: the library brings no handler that keeps it."""
    program = (
        "import sys, vswap\n"
        "try: vswap.connect(sys.argv[1], timeout=1.2)\n"
        "except vswap.TimedOut: sys.exit(75)\n"
    )
    with listening(socket_path):
        result = subprocess.run(
            [sys.executable, "-c", program, str(socket_path)],
            env=daemon_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert result.returncode == 75
    assert result.stdout == ""
    assert result.stderr.startswith(f"vswapd is not answering at {socket_path}: ")
    assert result.stderr.count("\n") == 1


# What limits may be


WRONG = [0, -1, 1e12, float("inf"), float("nan"), True, "5", b"5", [5], 10**400, 1j]
"""No limit on silence."""


@everybody
@pytest.mark.parametrize("timeout", WRONG)
def test_a_limit_that_cannot_be_is_one_typed_error(
    stoppable_once: RunningDaemon, connect: Callable[..., None], timeout: object
) -> None:
    """On every way in; it says what is allowed."""
    with pytest.raises(vswap.BadArgument, match=r"more than 0 and at most 1,000,000, or None"):
        connect(stoppable_once.socket_path, timeout=timeout)


@pytest.mark.parametrize("connect", [blocking, tasks])
@pytest.mark.parametrize("patience", [wrong for wrong in WRONG if wrong != 0] + [None])
def test_a_patience_that_cannot_be_is_one_typed_error(
    stoppable_once: RunningDaemon, connect: Callable[..., None], patience: object
) -> None:
    """On every way in; it says what is allowed."""
    with pytest.raises(vswap.BadArgument, match=r"patience is .*, 0 to 1,000,000, not "):
        connect(stoppable_once.socket_path, patience=patience)


@everybody
@pytest.mark.parametrize(
    "limit", [1_000_000, 1e6, Fraction(1, 3) + 20, np.float32(30), np.int64(9)]
)
def test_the_longest_limit_works(
    stoppable_once: RunningDaemon, connect: Callable[..., None], limit: Any
) -> None:
    """What is let through is what every system call takes, of any type of number."""
    connect(stoppable_once.socket_path, timeout=limit)
    if connect is not steering:
        connect(stoppable_once.socket_path, patience=limit, timeout=None)


def test_the_longest_limit_holds_in_calls(stoppable_once: RunningDaemon) -> None:
    """Also where a call waits for room to send in."""
    with vswap.connect(stoppable_once.socket_path, timeout=1e6, patience=1e6) as space:
        content = bytes(range(256)) * 16 * 1500
        assert bytes(space.load(space.store(content))) == content


@pytest.mark.parametrize("connect", [blocking, tasks])
@pytest.mark.parametrize("window", [-1, True, 1.5, "1", None])
def test_a_window_that_cannot_be_is_one_typed_error(
    stoppable_once: RunningDaemon, connect: Callable[..., None], window: object
) -> None:
    """It is a number of bytes."""
    with pytest.raises(vswap.BadArgument, match="window"):
        connect(stoppable_once.socket_path, window=window)


@pytest.fixture(scope="module")
def stoppable_once() -> Iterator[RunningDaemon]:
    with running_daemon("server.shards=1") as daemon:
        yield daemon
