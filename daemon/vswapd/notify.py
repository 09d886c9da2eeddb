"""The service manager's side of a daemon: descriptors handed over, and news told (sd_notify).

Invariants:
- Without a service manager every call does nothing.
- What is to be kept is delivered, or there is an error. Other news that cannot be delivered are
  dropped, as sd_notify(3) wants it: the daemon's work does not depend on who listens.
- What concerns this process alone is taken out of the environment: children do not inherit it.

This module must not know what the daemon does.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import time
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Final

_FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""
_KEPT: Final = "kept-"
"""How the names of descriptors begin that an earlier process had kept, and no socket's."""
_MOST_DIGITS: Final = 18
"""Of a number in the environment."""
_KEEP_S: Final = 10.0
"""How long the manager may take to read what it is to keep."""


class ServiceManager:
    """Whoever started the daemon, as far as its environment tells."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Take what the environment says.

        Raises:
            ValueError: it says that descriptors were passed which were not.
        """
        address = environment.pop("NOTIFY_SOCKET", "")
        # An abstract address is written with @ and meant with a zero byte.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s: Final = _watchdog(environment)
        """Seconds after which the manager kills a daemon that it has not heard of; None: never."""
        inherited = _inherited(environment)
        self._kept = {n.removeprefix(_KEPT): fd for n, fd in inherited if n.startswith(_KEPT)}
        self._stored = set(self._kept)
        """Names of which the manager has something, as far as it was told."""
        self._sockets = [fd for name, fd in inherited if not name.startswith(_KEPT)]
        self._most = _number(environment.pop("FDSTORE", "")) or 0
        self.keeps: Final = bool(self._address) and self._most > 0
        """Whether it keeps descriptors; see FileDescriptorStoreMax= of systemd.service(5)."""

    def tell(self, **news: str) -> None:
        """Send assignments such as READY="1", STATUS="..."; no value may have a second line."""
        if self._address:
            # Never wait: the loop would stand still with a manager that does.
            with contextlib.suppress(OSError):
                self._send(news, patience_s=0.0)

    def _send(
        self, news: Mapping[str, str], *, patience_s: float, descriptors: Sequence[int] = ()
    ) -> None:
        text = "\n".join(f"{name}={value}" for name, value in news.items())
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(patience_s)
            sender.connect(self._address)
            sender.sendmsg([text.encode()], rights if descriptors else [])

    def reloading(self) -> None:
        """Tell that a reload has begun; READY="1" ends it."""
        # The kernel's monotonic clock, so that the manager can tell it from an older reload.
        self.tell(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))

    def take_sockets(self) -> list[socket.socket]:
        """Listening Unix sockets that were passed to this process; each is handed out once.

        Raises:
            ValueError: something else was passed.
        """
        descriptors, self._sockets = self._sockets, []
        for fd in descriptors:
            if not _listens(fd):
                for each in descriptors:
                    os.close(each)
                raise ValueError(f"descriptor {fd} is no listening Unix stream socket")
        return [socket.socket(fileno=fd) for fd in descriptors]

    def take_kept(self) -> dict[str, int]:
        """Descriptors by name, of an earlier process; each is handed out once."""
        kept, self._kept = self._kept, {}
        return kept

    def keep(self, name: str, fd: int) -> None:
        """Have a copy of a descriptor kept for the next process of this service.

        Raises:
            OSError: the manager does not take it.
        """
        if name not in self._stored and len(self._stored) >= self._most:
            # It would drop it, and not say so.
            raise OSError(
                errno.ENOSPC, f"it has room for {self._most} only: raise FileDescriptorStoreMax"
            )
        if name in self._stored:
            # It was not told that the one before is of no use. It would keep both.
            self._send(_removed(name), patience_s=_KEEP_S)
        self._send({"FDSTORE": "1", "FDNAME": _KEPT + name}, patience_s=_KEEP_S, descriptors=[fd])
        self._stored.add(name)

    def let_go(self, name: str) -> None:
        """What has this name is to be kept no more."""
        if self.keeps:
            with contextlib.suppress(OSError):  # then whoever keeps another of that name tells it
                self._send(_removed(name), patience_s=0.0)
                self._stored.discard(name)


def _removed(name: str) -> dict[str, str]:
    return {"FDSTOREREMOVE": "1", "FDNAME": _KEPT + name}


def _listens(fd: int) -> bool:
    """Whether a descriptor is a listening Unix stream socket. It stays open."""
    duplicate = os.dup(fd)
    try:
        copy = socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        return False  # no socket at all
    with copy:
        return bool(
            copy.family == socket.AF_UNIX
            and copy.type == socket.SOCK_STREAM
            and copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )


def _watchdog(environment: MutableMapping[str, str]) -> float | None:
    usec, pid = _number(environment.pop("WATCHDOG_USEC", "")), environment.pop("WATCHDOG_PID", "")
    if pid not in {"", str(os.getpid())} or not usec:
        return None
    return usec / 1e6


def _inherited(environment: MutableMapping[str, str]) -> list[tuple[str, int]]:
    """What was passed to this process, with the names that it has.

    Raises:
        ValueError: it was not passed.
    """
    pid, said = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not said:
        return []  # they are another's
    count = _number(said)
    if count is None:
        raise ValueError(f"{said} is no number of descriptors")
    descriptors = range(_FIRST_FD, _FIRST_FD + count)
    for fd in descriptors:
        try:
            os.set_inheritable(fd, False)
        except (OSError, OverflowError):
            raise ValueError(f"descriptor {fd} was not passed") from None
    names += [""] * (len(descriptors) - len(names))
    return list(zip(names[: len(descriptors)], descriptors, strict=True))


def _number(text: str) -> int | None:
    """A whole number of a variable; None: it is none, or none that anybody could mean."""
    return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None
