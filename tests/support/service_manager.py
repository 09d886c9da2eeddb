"""A stand-in for the service manager: starts a daemon, keeps its descriptors, starts it again.

As systemd does with a service of `FileDescriptorStoreMax=`: what comes with FDSTORE=1 is kept under
its FDNAME until FDSTOREREMOVE=1, across all ends of the daemon, and passed to the next process
behind the listening socket. What is too much is dropped without a word. The tests of the real one
are in tests/system.

Invariants:
- Readiness is the daemon's READY=1. What it sent before that has been taken by then.
- Leaving the block ends what was started, and closes what was kept.

This module must not know what the descriptors are.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from support.daemon import DEADLINE_S, SOURCE_ROOTS, daemon_environment
from support.process_groups import kill_group
from support.sources import REPOSITORY

_MOST_FDS = 16
_EXEC = """
import fcntl, os, sys
fds = [int(fd) for fd in sys.argv[1].split(",") if fd]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1000) for fd in fds]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
os.closerange(3 + len(fds), os.sysconf("SC_OPEN_MAX"))
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""

_SET_CLOCK = """
import time
by = {by}
now, now_ns, of = time.time, time.time_ns, time.clock_gettime
time.time = lambda: now() + by
time.time_ns = lambda: now_ns() + int(by * 1e9)
time.clock_gettime = lambda clock: of(clock) + by * (clock == time.CLOCK_REALTIME)
"""
"""The machine's clock is everybody's, so the process is told another time instead."""
_RUN = """
import runpy
runpy.run_module("vswapd", run_name="__main__", alter_sys=True)
"""


class ServiceManager:
    """See the module. `settings` may be changed between two starts."""

    def __init__(self, *settings: str, keeps: bool = True) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="vswapd-test-")
        self.directory = Path(self._directory.name)
        self.socket_path = self.directory / "vswapd.sock"
        self.log_path = self.directory / "daemon.log"
        self.settings = list(settings)
        self.arguments: list[str] = []
        """More arguments for `serve`."""
        self.keeps = keeps
        self.clock_set_by = 0.0
        """Seconds by which the next daemon's wall clock differs from the machine's."""
        self.first = ""
        """What the next daemon's process does before anything else, in Python."""
        self.sources = REPOSITORY
        """Where the next daemon's sources are: those of another version, perhaps."""
        self.listens = True
        """Whether the daemon is given the socket; else it is to make its own."""
        self.most = 512
        """How many descriptors are kept."""
        self.kept: dict[str, int] = {}
        """Descriptors by name."""
        self.process: subprocess.Popen[bytes] | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket_path))
        self._listener.listen(64)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self.directory / "notify"))
        self._news = threading.Condition()
        self._ready = False
        """Whether the last process that was started has said that it is."""
        self._heard = True
        self.status = ""
        """What the last process has told of itself last."""
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._send(b"THE_END=1")
        self._thread.join()
        self._notify.close()
        self._listener.close()
        for fd in self.kept.values():
            os.close(fd)
        self._directory.cleanup()

    @property
    def log(self) -> str:
        """What all daemons have written so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The daemon's process."""
        assert self.process is not None
        return self.process.pid

    def give_up(self) -> None:
        """Keep nothing any more, as of a service that has failed."""
        for fd in self.kept.values():
            os.close(fd)
        self.kept.clear()

    def somebody_waits(self) -> bool:
        """Whether a client has connected that no daemon has taken yet."""
        return bool(select.select([self._listener], [], [], 0)[0])

    def await_status(self, text: str) -> None:
        """Wait until what it tells of what it does has this text in it."""
        with self._news:
            assert self._news.wait_for(lambda: text in self.status, DEADLINE_S), self.status

    # What a service manager does

    def start(self) -> None:
        """Start a daemon with what is kept, and wait until it is ready."""
        self.launch()
        assert self.becomes_ready(), f"it ended:\n{self.log}"

    def becomes_ready(self) -> bool:
        """Wait until the daemon is ready, or has ended; returns which."""
        assert self.process is not None
        with self._news:
            while not self._ready:
                if self.process.poll() is not None:
                    return False
                assert self._thread.is_alive(), "nobody listens to it any more"
                self._news.wait(0.1)
        return True

    def launch(self) -> None:
        """Start a daemon with what is kept; the last one's process has ended, or is about to."""
        if self.process is not None:
            self.process.wait(DEADLINE_S)
            self._hear_the_last()
        with self._news:
            self._ready, self.status = False, ""
            passed = {"vswapd.socket": self._listener.fileno()} if self.listens else {}
            passed |= self.kept
            names, fds = list(passed), list(passed.values())
        environment = {
            "NOTIFY_SOCKET": str(self.directory / "notify"),
            "XDG_RUNTIME_DIR": str(self.directory),
            "PYTHONPATH": os.pathsep.join(str(self.sources / root.name) for root in SOURCE_ROOTS),
            "LISTEN_FDS": str(len(fds)),
            "LISTEN_FDNAMES": ":".join(names),
        }
        if self.keeps:
            environment["FDSTORE"] = str(self.most)
        command = [sys.executable, "-c", _EXEC, ",".join(map(str, fds))]
        command += ["-W", "error"]
        first = self.first
        if self.clock_set_by:
            first += _SET_CLOCK.format(by=self.clock_set_by)
        command += ["-c", first + _RUN, "serve"] if first else ["-m", "vswapd", "serve"]
        command += [*self.arguments, *(f"--set={setting}" for setting in self.settings)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=daemon_environment(environment),
                pass_fds=fds,
                start_new_session=True,
            )

    def _hear_the_last(self) -> None:
        """Wait until all has been read that the process which has ended had told.

        So does systemd: it reads what a service has told before it looks for its end.
        """
        self._heard = False
        self._send(b"SAID=ALL")
        with self._news:
            while not self._heard and self._thread.is_alive():
                self._news.wait(0.1)

    def kill(self) -> None:
        """SIGKILL to the daemon and all that it started."""
        if self.process is not None:
            kill_group(self.process.pid)
            self.process.wait()
            self._hear_the_last()

    def restart(self) -> None:
        """SIGTERM, wait for its end, and start it again."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """SIGTERM, and hold it to a clean end."""
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(DEADLINE_S) == 0, self.log
        self._hear_the_last()

    def await_refusal(self) -> str:
        """Wait until the daemon says that it refuses what is kept, and end it; returns the text."""
        assert self.process is not None
        with self._news:
            while not self.status.startswith("refused: "):
                assert self.process.poll() is None, self.log
                self._news.wait(0.1)
        self.process.terminate()
        assert self.process.wait(DEADLINE_S) == 0, self.log
        return self.status

    def await_exit(self) -> int:
        """Wait for its own end; returns its code."""
        assert self.process is not None
        code = self.process.wait(DEADLINE_S)
        self._hear_the_last()
        return code

    # The notification socket

    def _send(self, news: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(news, str(self.directory / "notify"))

    @contextlib.contextmanager
    def not_listening(self) -> Iterator[None]:
        """Nothing is read meanwhile, and there is no room for anything to be read later."""
        with self._news, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(b"STATUS=the last", str(self.directory / "notify"))
            while select.select([self._notify], [], [], 0)[0]:
                os.sched_yield()  # it is read, and waits for us to be taken
            with contextlib.suppress(BlockingIOError):
                while True:
                    sender.sendto(b"STATUS=too much", str(self.directory / "notify"))
            yield

    def _listen(self) -> None:
        room = socket.CMSG_SPACE(_MOST_FDS * 4)
        while True:
            data, ancillary, _, _ = self._notify.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
            fds = array.array("i")
            for _, _, rights in ancillary:
                fds.frombytes(rights)
            news = dict(line.split("=", 1) for line in data.decode().splitlines())
            with self._news:
                if "THE_END" in news:
                    return
                self._take(news, list(fds))
                self._news.notify_all()

    def _take(self, news: dict[str, str], fds: list[int]) -> None:
        name = news.get("FDNAME", "")
        if "FDSTORE" in news and self.keeps and len(self.kept) < self.most:
            (fd,) = fds
            assert name not in self.kept, f"{name} was sent twice"
            self.kept[name] = fd
        else:
            for fd in fds:
                os.close(fd)
        if "FDSTOREREMOVE" in news and name in self.kept:
            os.close(self.kept.pop(name))
        self._ready |= news.get("READY") == "1"
        self.status = news.get("STATUS", self.status)
        self._heard |= news.get("SAID") == "ALL"


@contextlib.contextmanager
def service(*settings: str, keeps: bool = True) -> Iterator[ServiceManager]:
    """A service manager that has started its daemon."""
    with ServiceManager(*settings, keeps=keeps) as manager:
        manager.start()
        yield manager
