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
    def name(self) -> str:
        """Program and process id: what it is called that does not say it itself."""
        try:
            program = Path(f"/proc/{self.pid}/comm").read_text(errors="replace").strip()
        except OSError:
            return f"pid {self.pid}"  # hidden from us, or gone by now
        return f"{program} {self.pid}"
