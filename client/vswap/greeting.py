"""How a blocking connection comes about: a socket, HELLO, and lanes to further shards later.

This module must not know what the connection is for.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from vswap.address import client_name, open_socket
from vswap.connection import Connection
from vswap.errors import ConnectionLost
from vswap.lane import Lane
from vswap.peer import Peer, hello, parse_hello
from vswap.window import Window, window_of

if TYPE_CHECKING:
    from pathlib import Path

    from vswap.planner import Ask


def greet(
    path: str | os.PathLike[str] | None,
    timeout: float | None,
    name: str | None,
    *,
    control: bool = False,
    window: int = 0,
) -> tuple[Connection, Peer, Window | None]:
    """An open connection that HELLO has been said on, and its window.

    Raises:
        NoDaemon, ConnectionRefused, ConnectionLost, ProtocolError: there is none.
    """
    client = client_name(name)
    call = hello(client, control=control, window_bytes=window)
    home, peer, found, shared = _lane(path, timeout, call)

    def open_lane(shard: int) -> Lane:
        call = hello(client, shard=shard, token=peer.token)
        lane, there, *_ = _lane(found, timeout, call)
        if there.shard != shard:
            # The daemon is another one by now.
            lane.close()
            raise ConnectionLost(f"the daemon has no shard {shard} any more")
        return lane

    return Connection(home, peer.shards, timeout, open_lane), peer, shared


def _lane(
    path: str | os.PathLike[str] | None, timeout: float | None, call: Ask
) -> tuple[Lane, Peer, Path, Window | None]:
    """A lane that HELLO has been said on, what was answered, where, and the window."""
    sock, found = open_socket(path, timeout)
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        lane = Lane(sock, timeout)
        descriptor = lane.greet(call)
        if descriptor is not None:
            undo.callback(os.close, descriptor)
        peer = parse_hello(call.result())
        lane.shard = peer.shard
        lane.conversation.window = peer.window
        undo.pop_all()
    return lane, peer, found, window_of(descriptor, peer.window_bytes, peer.shard)
