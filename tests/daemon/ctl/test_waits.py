"""vswapctl and daemons that do not answer: how long it waits, what it says, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.daemon import running_daemon
from support.fake_daemon import FakeDaemon
from vswap.protocol import Header, Op
from vswapd.ctl import main
from vswapd.ctl.parser import TIMEOUT_S, build_parser

Run = Callable[..., tuple[int, str, list[str]]]
_EX_TEMPFAIL = 75


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vswap-test-") as directory:
        yield Path(directory) / "sock"


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str, socket_path: Path = path) -> tuple[int, str, list[str]]:
        try:
            code = main(["--socket", str(socket_path), *words])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


@pytest.mark.parametrize("words", [["status"], ["status", "--watch"], ["set", "a=1"], ["verify"]])
def test_a_daemon_that_never_comes_is_given_up(path: Path, run: Run, words: list[str]) -> None:
    """Somebody listens for one that restarts for ever: it is said, and then it ends with 75."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        code, out, err = run("--timeout", "1.2", *words)
    assert (code, out) == (_EX_TEMPFAIL, "")
    assert len(err) == 2
    said = f"vswapctl: vswapd is not answering at {path}: process {os.getpid()} listens there"
    assert all(line.startswith(said) for line in err)


def test_a_daemon_whose_supervisor_is_stopped_is_given_up(run: Run) -> None:
    """Its shards are there, and nobody finds them; it says which process is stopped."""
    with running_daemon("server.shards=2") as daemon:
        os.kill(daemon.pid, signal.SIGSTOP)
        code, out, err = run("--timeout", "0.3", "status", socket_path=daemon.socket_path)
        os.kill(daemon.pid, signal.SIGCONT)
        assert (code, out) == (_EX_TEMPFAIL, "")
        assert f"at {daemon.socket_path}: process {daemon.pid} listens there" in err[0]
        assert run("status", socket_path=daemon.socket_path)[0] == 0


class Slow(FakeDaemon):
    """Answers a verb when it has been greeted so often; after `deaf` greetings it is silent."""

    def __init__(self, path: Path, *, greetings: int, deaf: int = 1 << 30) -> None:
        super().__init__(path, space=None, token=None)
        self._greetings = greetings
        self._deaf = deaf
        self._greeted = threading.Semaphore(0)
        self.over = threading.Event()

    def __exit__(self, *_: object) -> None:
        """See FakeDaemon."""
        self.over.set()
        super().__exit__()

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        """See FakeDaemon."""
        if header.op == Op.HELLO:
            if self._deaf == 0:
                self.over.wait()
            self._deaf -= 1
            self._greeted.release()
        if header.op == Op.CONTROL:
            for _ in range(self._greetings):
                while not self._greeted.acquire(timeout=0.05) and not self.over.is_set():
                    pass
        return super().answer(header, body)

    def execute(self, header: Header, body: bytes) -> tuple[int, bytes, int, int]:
        """See FakeDaemon."""
        if header.op == Op.CONTROL:
            return 0, json.dumps({"path": "/x", "moved_pages": 1, "lost_pages": 0}).encode(), 0, 0
        return super().execute(header, body)


def test_a_verb_may_take_longer_than_the_limit(path: Path, run: Run) -> None:
    """The limit is one on silence: the daemon is asked elsewhere whether it is there."""
    with Slow(path, greetings=7):
        code, out, err = run("--timeout", "0.25", "swapoff", "/x")
    assert (code, out) == (0, "/x: out of use, 1 pages were moved\n")
    assert err == [f"vswapctl: vswapd at {path} has not finished swapoff yet"]


def test_a_daemon_that_hangs_in_a_verb_is_given_up(path: Path, run: Run) -> None:
    """It was there when it was asked last, and is not any more."""
    with Slow(path, greetings=99, deaf=3):
        code, out, err = run("--timeout", "0.2", "swapoff", "/x")
    assert (code, out) == (_EX_TEMPFAIL, "")
    assert f"vswapctl: vswapd is not answering at {path}: " in err[-1]


def test_there_is_a_limit_by_default() -> None:
    """Nobody has to ask for it; who wants to wait for ever says so."""
    parser = build_parser()
    assert parser.parse_args(["status"]).timeout == TIMEOUT_S
    for word in ("0", "none", "0.0"):
        assert parser.parse_args(["--timeout", word, "status"]).timeout is None
    assert parser.parse_args(["--timeout", "1000000", "status"]).timeout == 1e6


@pytest.mark.parametrize("word", ["-1", "1e12", "inf", "nan", "x", "", "0.01"])
def test_limits_that_cannot_be_are_refused(run: Run, word: str) -> None:
    """With what may be."""
    code, out, err = run(f"--timeout={word}", "status")
    assert (code, out) == (2, "")
    assert "write seconds, 0.1 to 1000000, or none" in err[-1]
