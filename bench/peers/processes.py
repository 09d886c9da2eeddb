"""Servers as processes: started, waited for, weighed, ended.

Invariants:
- A server is ready when its socket takes a connection.
- `stop` leaves no process of the server's group.

This module must not know what is served.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.peers.contract import MissingError, PeerFailedError

_PATIENCE_S: Final = 30.0
_POLL_S: Final = 0.005
_PSS: Final = re.compile(r"^Pss: +(\d+) kB", re.MULTILINE)
_MAPPING: Final = re.compile(r"^(?=[0-9a-f]+-[0-9a-f]+ )", re.MULTILINE)
_STATE, _GROUP = 0, 2
_TIMES: Final = slice(11, 13)
"""Places in `_stat`: state, process group, time as user and in the system. See proc(5)."""
_ENDED: Final = frozenset("ZX")


class Server:
    """A process, with those that it starts, behind a Unix socket."""

    def __init__(self, command: Sequence[str], socket_path: Path) -> None:
        """Start it and wait until it listens.

        Raises:
            PeerFailedError: it ended, or did not listen in time; the text ends with its log.
        """
        self.socket_path: Final = socket_path
        self._log: Final = socket_path.with_suffix(".log")
        with self._log.open("wb") as log:
            self._process: Final = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=socket_path.parent,
                env=environment(),
                # Ctrl-C is for who measures: servers are stopped in their turn.
                start_new_session=True,
            )
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def _await_ready(self) -> None:
        give_up = time.monotonic() + _PATIENCE_S
        while self._process.poll() is None and time.monotonic() < give_up:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                open_socket(self.socket_path).close()
                return
            time.sleep(_POLL_S)
        log = self._log.read_text(errors="replace")
        raise PeerFailedError(f"{self._process.args!r} did not start:\n{log}")

    @property
    def pid(self) -> int:
        """The process that was started."""
        return self._process.pid

    def _family(self) -> list[Path]:
        """The directories in /proc of all processes of its group that are alive."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                stat = _stat(directory)
                if stat[_GROUP] == str(self._process.pid) and stat[_STATE] not in _ENDED:
                    found.append(directory)
        return found

    def resident_bytes(self, *, without: str | None = None) -> int:
        """Memory of all its processes; what several share is counted once.

        Args:
            without: what has this in its name is not counted: it is its clients'.
        """
        texts = [(directory / "smaps_rollup").read_text() for directory in self._family()]
        found = [_PSS.search(text) for text in texts]
        whole = sum(int(one[1]) << 10 for one in found if one is not None)
        return whole if without is None else whole - self._mapped_bytes(without)

    def _mapped_bytes(self, name: str) -> int:
        found = 0
        for directory in self._family():
            # A mapping's lines begin with one that ends with its name.
            for mapping in _MAPPING.split((directory / "smaps").read_text())[1:]:
                share = _PSS.search(mapping)
                if share is not None and name in mapping.partition("\n")[0]:
                    found += int(share[1]) << 10
        return found

    def cpu_s(self) -> float:
        """Processor time of all its processes, in steps of a tick (10 ms)."""
        stats = [_stat(directory) for directory in self._family()]
        ticks = sum(int(field) for stat in stats for field in stat[_TIMES])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it; what does not end when asked is killed."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # Those that it had started are nobody's children now: their end can only be looked for.
        give_up = time.monotonic() + _PATIENCE_S
        while self._family() and time.monotonic() < give_up:
            time.sleep(_POLL_S)


def _stat(directory: Path) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may hold anything."""
    return (directory / "stat").read_text().rpartition(")")[2].split()


def environment() -> dict[str, str]:
    """Ours, with nothing of a service manager's; Python finds there what we have found."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LISTEN_")
        and name not in {"NOTIFY_SOCKET", "WATCHDOG_USEC", "VSWAP_SOCKET"}
    }
    # Or nobody but root could see how much memory the daemon takes.
    ours["VSWAPD_DUMPABLE"] = "1"
    return ours | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def program(name: str, package: str) -> str:
    """The path of a program.

    Raises:
        MissingError: it is not installed.
    """
    path = shutil.which(name)
    if path is None:
        raise MissingError(f"there is no {name} here (Debian: apt-get install {package})")
    return path


def open_socket(path: Path | str) -> socket.socket:
    """A connected stream socket.

    Raises:
        OSError: nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock
