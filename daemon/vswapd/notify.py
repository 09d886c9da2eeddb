"""The service manager's side of a daemon: sockets handed over, and news told (sd_notify).

Invariants:
- Without a service manager every call does nothing.
- A message that cannot be delivered is dropped, as sd_notify(3) wants it: the daemon's work does
  not depend on who listens.

This module must not know what the daemon does.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Final

_FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""


class ServiceManager:
    """Whoever started the daemon, as far as its environment tells."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        self._address = given.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            # An abstract address: written with @, meant with a zero byte.
            self._address = "\0" + self._address[1:]
        self.watchdog_s = _watchdog(given)
        """Seconds after which the manager kills a daemon that it has not heard of; None: never."""
        self._sockets = _inherited(given)

    @property
    def present(self) -> bool:
        """Whether anybody listens to `tell`."""
        return bool(self._address)

    def tell(self, **news: str) -> None:
        """Send assignments such as READY="1", STATUS="..."."""
        if not self._address:
            return
        text = "\n".join(f"{name}={value}" for name, value in news.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            try:
                sender.sendto(text.encode(), self._address)
            except OSError:
                return

    def reloading(self) -> None:
        """Tell that a reload has begun; READY="1" ends it."""
        # The kernel's monotonic clock, so that the manager can tell it from an older reload.
        self.tell(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))

    def take_sockets(self) -> list[socket.socket]:
        """Listening sockets that were passed to this process; each is handed out once."""
        taken, self._sockets = self._sockets, []
        return [socket.socket(fileno=fd) for fd in taken]


def _watchdog(given: Mapping[str, str]) -> float | None:
    pid = given.get("WATCHDOG_PID")
    if pid is not None and pid != str(os.getpid()):
        return None
    try:
        return int(given["WATCHDOG_USEC"]) / 1e6
    except (KeyError, ValueError):
        return None


def _inherited(given: Mapping[str, str]) -> list[int]:
    if given.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(given.get("LISTEN_FDS", "0"))
    descriptors = list(range(_FIRST_FD, _FIRST_FD + count))
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return descriptors
