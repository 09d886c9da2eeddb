"""A real daemon in a process of its own, for tests: started, awaited, stopped, looked over.

Invariants:
- Readiness is an event: the daemon's `READY=1` on NOTIFY_SOCKET. Nothing sleeps, nothing polls.
- Leaving the block ends the daemon with SIGTERM and holds it to its word: exit code 0, no process
  of its group left, no socket left, nothing alarming in its log.
- Everything it writes is in the directory given; the host's configuration is not looked at.

This module must not know the wire: it drives the daemon by signals and reads its log.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.process_groups import kill_group

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = tuple(REPOSITORY / name for name in ("client", "daemon", "backends", "blockdev"))
DEADLINE_S = 30.0
"""A daemon that needs longer than this to start, answer or stop is a failed test."""

_ALARMING = ("Traceback (most recent call last)", "Exception ignored in", "was never awaited")


class DaemonFailedError(AssertionError):
    """The daemon did not do what the fixture waited for; the text ends with its log."""


@dataclass(slots=True, kw_only=True)
class RunningDaemon:
    """A started daemon. `socket_path` is short enough for sockaddr_un."""

    process: subprocess.Popen[bytes]
    socket_path: Path
    directory: Path
    log_path: Path
    notify: socket.socket
    notified: list[str] = field(default_factory=list)
    """Every `NAME=value` that has been read from NOTIFY_SOCKET, oldest first."""

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has written to standard output and standard error so far."""
        return self.log_path.read_text(errors="replace")

    def await_notification(self, line: str) -> None:
        """Wait until the daemon says `line` (such as `RELOADING=1`); what came before is kept.

        Raises:
            DaemonFailedError: it ended first, or said nothing for DEADLINE_S.
        """
        poll = select.poll()
        pidfd = os.pidfd_open(self.pid)
        try:
            poll.register(self.notify, select.POLLIN)
            poll.register(pidfd, select.POLLIN)
            while True:
                ready = {descriptor for descriptor, _ in poll.poll(DEADLINE_S * 1000)}
                if self.notify.fileno() in ready:
                    said = self.notify.recv(65536).decode().splitlines()
                    self.notified += said
                    if line in said:
                        return
                elif pidfd in ready:
                    raise self._failure(f"exited with {self.process.wait()} before {line}")
                else:
                    raise self._failure(f"did not say {line} within {DEADLINE_S:.0f} s")
        finally:
            os.close(pidfd)

    def reload(self) -> None:
        """SIGHUP, and wait until it is ready again."""
        self.process.send_signal(signal.SIGHUP)
        self.await_notification("READY=1")

    def terminate(self) -> None:
        """SIGTERM, and hold it to a clean end: exit 0, no leftovers. Once is enough."""
        if self.process.returncode is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        self.await_exit(expected=0)
        if _group_is_alive(self.pid):
            kill_group(self.pid)
            raise self._failure("left processes behind")
        if self.socket_path.exists():
            raise self._failure("left its socket behind")

    def await_exit(self, *, expected: int) -> None:
        """Wait for its end; a negative `expected` is the signal that ended it."""
        try:
            code = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise self._failure(f"did not end within {DEADLINE_S:.0f} s") from None
        if code != expected:
            raise self._failure(f"exited with {code}, not {expected}")

    def kill(self) -> None:
        """SIGKILL to it and everything it started; for tests of sudden death."""
        kill_group(self.pid)
        self.process.wait()

    def check_log(self) -> None:
        """Fail if the log holds a traceback or what Python says of things not closed."""
        for text in _ALARMING:
            if text in self.log:
                raise self._failure(f"has {text!r} in its log")

    def _failure(self, what: str) -> DaemonFailedError:
        return DaemonFailedError(f"the daemon {what}; its log:\n{self.log}")


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def daemon_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the sources first and nothing of the host's sessions."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"VSWAP_SOCKET", "XDG_RUNTIME_DIR", "NOTIFY_SOCKET", "WATCHDOG_USEC"}
        and not name.startswith("LISTEN_")
    }
    if os.geteuid() != 0:
        # Tests look at descriptors and memory of a daemon, which else only root may.
        environment["VSWAPD_DUMPABLE"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(map(str, SOURCE_ROOTS))
    return environment | dict(extra or {})


_EVERY_DAEMON: Final = tuple(os.environ.get("VSWAPD_TEST_SET", "").split())
"""Settings for every daemon of a run: `VSWAPD_TEST_SET="server.shards=4" make test`."""


@contextlib.contextmanager
def running_daemon(
    *settings: str,
    config: str = "",
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    clean_log: bool = True,
    under: Sequence[str] = (),
) -> Iterator[RunningDaemon]:
    """Run `python -m vswapd serve` until the block ends.

    Args:
        settings: `key=value` as for `--set`, e.g. `"pool.max=8M"`.
        config: The text of the TOML configuration it is started with.
        arguments: More arguments for `serve`.
        environment: Variables to add to its environment.
        clean_log: Whether tracebacks in the log fail the test (off for tests that provoke them).
        under: What to put before its command; has to become it (`exec`).

    Raises:
        DaemonFailedError: it did not start, or did not end as it should.
    """
    # Not pytest's tmp_path: the names of sockets in it can pass the 108 bytes of sockaddr_un.
    with tempfile.TemporaryDirectory(prefix="vswapd-test-") as name:
        directory = Path(name)
        socket_path = directory / "vswapd.sock"
        (directory / "vswapd.toml").write_text(config)
        notify_path = directory / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(notify_path))
            command = [*under, sys.executable, "-W", "error", "-m", "vswapd", "serve"]
            command += ["--config", str(directory / "vswapd.toml")]
            command += [f"--set=server.socket={socket_path}"]
            command += [f"--set={setting}" for setting in (*_EVERY_DAEMON, *settings)]
            variables = {"NOTIFY_SOCKET": str(notify_path), "XDG_RUNTIME_DIR": name}
            with (directory / "daemon.log").open("wb") as log:
                process = subprocess.Popen(
                    [*command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=directory,
                    env=daemon_environment(variables | dict(environment or {})),
                    start_new_session=True,
                )
            daemon = RunningDaemon(
                process=process,
                socket_path=socket_path,
                directory=directory,
                log_path=directory / "daemon.log",
                notify=notify,
            )
            try:
                daemon.await_notification("READY=1")
                yield daemon
                daemon.terminate()
                if clean_log:
                    daemon.check_log()
            finally:
                daemon.kill()
