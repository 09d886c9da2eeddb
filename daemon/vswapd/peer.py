"""Who is at the other end of a Unix socket, as the kernel knows it.

This module must not know what a peer may do.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Final

from vswapd.session import Peer

_UCRED: Final = struct.Struct("3i")


def peer_of(transport: asyncio.BaseTransport) -> Peer:
    """Uid and pid of a transport's peer (SO_PEERCRED, unix(7)), and the name of its program."""
    sock = transport.get_extra_info("socket")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return Peer(uid=uid, pid=pid, name=_program(pid))


def _program(pid: int) -> str:
    """The name of a process, or its number where /proc does not tell."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().strip()
    except OSError:
        return f"pid {pid}"
