"""Shards' processes, made of the supervisor's own by fork.

Invariants:
- Shards are forked before anything is started: they share what was loaded, and no thread, no lock.
- One that is forked again, while the supervisor is at work, has its memory, and none of its
  descriptors but those that a shard is to have.
- No child ever returns into the supervisor's code.

This module must not know what shards do, or when they are made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

from vswapd import held_signals, shard_process
from vswapd.channel import Channel
from vswapd.shard_process import Birth

_LOG: Final = logging.getLogger(__name__)


@dataclass(slots=True)
class Child:
    """One shard, seen from outside."""

    index: int
    pid: int
    sock: socket.socket
    channel: Channel = field(init=False)
    connections: int = 0
    places: Counter[int] = field(default_factory=Counter)
    """Of `connections` those that have taken places, by user."""
    deaths: list[float] = field(default_factory=list)
    """When its processes died, as far as it is not long ago."""
    turn: int = 0
    """When it was last given a connection: counted in connections of all."""
    beaten: bool = False
    ready: bool = False
    """Whether its process has started."""
    alive: bool = False
    """Whether there is a process that was not waited for yet."""
    there: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while there is a process that can be talked to, and at the very end."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)


def fork_shards(births: Sequence[Birth], unwanted: Collection[int]) -> list[Child]:
    """Make the shards' processes. Nothing may have been started in this one yet.

    Args:
        births: what each is made with.
        unwanted: descriptors that shards are not to have: the listening sockets.

    Raises:
        OSError: the system has no process or descriptor for one; none is left.
    """
    gc.collect()
    # No collection shall write to what is shared.
    gc.freeze()
    children: list[Child] = []
    with contextlib.ExitStack() as undo:
        undo.callback(end_children, children)
        for birth in births:
            here, there = socket.socketpair()
            with there, contextlib.ExitStack() as half:
                half.callback(here.close)
                pid = _fork()
                if pid == 0:
                    here.close()
                    for child in children:
                        child.sock.close()
                    for fd in unwanted:
                        os.close(fd)
                    _live(birth, there)
                half.pop_all()
            children.append(Child(birth.index, pid, here))
        undo.pop_all()
    return children


def end_children(children: Sequence[Child]) -> None:
    """End those that nobody has waited for: the daemon could not start, or go on."""
    for child in children:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(child.pid, os.WNOHANG) == (0, 0):
                _end(child.pid)
        child.sock.close()


def fork_again(birth: Birth) -> tuple[int, int, socket.socket]:
    """Make a shard's process while this one is at work; returns id, pidfd, the channel's socket.

    What this process has under way stays where it is in the child, and is never gone on with: the
    child lives on top of it. All it has of it is memory; the descriptors are closed.

    Raises:
        OSError: the system has no process, memory or descriptor for it; none is left.
    """
    here, there = socket.socketpair()
    gc.collect()
    with there, contextlib.ExitStack() as undo:
        undo.callback(here.close)
        pid = _fork()
        if pid == 0:
            # Nothing of the parent's may be finalized here: its descriptors' numbers are others by
            # now.
            gc.freeze()
            signal.set_wakeup_fd(-1)
            _close_all_but({there.fileno(), *_inherited(birth)})
            _live(birth, there)
        undo.callback(_end, pid)
        pidfd = os.pidfd_open(pid)
        undo.pop_all()
    return pid, pidfd, here


def _fork() -> int:
    with warnings.catch_warnings():
        # Threads that wait, for work or for this one, are left behind with nothing that they hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _live(birth: Birth, sock: socket.socket) -> NoReturn:
    """A shard's whole life, in a process that was just made."""
    code = 70  # EX_SOFTWARE: if what follows fails before it can say how
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # They are for the supervisor, also where the whole group gets them.
            signal.signal(number, signal.SIG_IGN)
        held_signals.release()
        code = shard_process.run(birth, sock)
    except BaseException:  # noqa: BLE001 - it must not return into the supervisor's code
        _LOG.exception("shard %d failed by a mistake of ours", birth.index)
    finally:
        logging.shutdown()
        os._exit(code)


def _inherited(birth: Birth) -> set[int]:
    """The descriptors that a shard's process is to have of its parent's."""
    devices = [fd for used in birth.devices for fd in (used.fd, used.owners_fd)]
    return {0, 1, 2, birth.ledger.fd, *birth.memory.fds.values(), *devices}


def _close_all_but(wanted: set[int]) -> None:
    first = 0
    for fd in [*sorted(wanted), os.sysconf("SC_OPEN_MAX")]:
        if first < fd:  # an empty range that begins at 0 would be all of them
            os.closerange(first, fd)
        first = fd + 1
