"""Who is at the other end of a Unix socket, as the kernel says.

This module must not know what a peer may do.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_UCRED: Final = struct.Struct("3i")
"""struct ucred of unix(7): pid, uid, gid."""
_ENDED: Final = "ZXx"
"""States of a process that is only waited for, if that."""
_SELF: Final = "/proc/self/stat"
_STARTED: Final = 19
"""Field 22 of /proc/PID/stat, counted from the state on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One process. What it says of itself stands nowhere in here."""

    uid: int
    pid: int
    """0 if it is in a process namespace that this one cannot see into."""

    @classmethod
    def of(cls, sock: socket.socket) -> Self:
        """The process that connected (SO_PEERCRED).

        Raises:
            OSError: not a Unix socket, or not a connected one.
        """
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(raw)
        return cls(uid=uid, pid=pid)

    @property
    def started(self) -> int:
        """When its process started; 0: that cannot be told."""
        try:
            return started(self.pid)
        except OSError:
            return 0

    @property
    def name(self) -> str:
        """Program and process id: what it is called that does not say it itself."""
        try:
            program = Path(f"/proc/{self.pid}/comm").read_text(errors="replace").strip()
        except OSError:
            return f"pid {self.pid}"  # hidden from us, or gone by now
        return f"{program} {self.pid}"


def started(pid: int) -> int:
    """When a process started, in clock ticks since the machine did; 0: it has ended, or is hidden.

    With it a process is told from another one that was given its number later. See proc(5).

    Raises:
        OSError: that cannot be told: there is no descriptor left to look with, or no /proc.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        if not Path(_SELF).exists():
            raise
        return 0
    # The name stands in parentheses and may hold anything; the state is the first field behind it.
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in _ENDED else int(fields[_STARTED])
