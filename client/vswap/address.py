"""Where a daemon's socket may be, and how a failure to reach one is told.

Invariants:
- A path that was asked for is the only one that is tried.
- A socket in /tmp is only trusted in a directory that nobody else could have made.

This module must not know the wire.
"""

from __future__ import annotations

import math
import os
import select
import socket
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vswap.errors import NoDaemon

SYSTEM_SOCKET: Final = Path("/run/vswapd.sock")
SOCKET_NAME: Final = "vswapd.sock"
VARIABLE: Final = "VSWAP_SOCKET"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One place where a daemon may listen."""

    path: Path
    origin: str
    """Why it is tried, for the error message."""
    private: bool = False
    """Whether its directory must be this user's own, since anybody could have made it."""


def candidates(
    path: str | os.PathLike[str] | None, environment: Mapping[str, str], uid: int
) -> list[Candidate]:
    """The places to try, best first."""
    if path is not None:
        return [Candidate(path=Path(path), origin="as given")]
    if named := environment.get(VARIABLE):
        return [Candidate(path=Path(named), origin=f"${VARIABLE}")]
    places = []
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        place = Path(runtime) / SOCKET_NAME
        places.append(Candidate(path=place, origin="the user's daemon, $XDG_RUNTIME_DIR"))
    if uid:
        place = Path(f"/tmp/vswapd-{uid}") / SOCKET_NAME  # noqa: S108 - checked: `private`
        places.append(Candidate(path=place, origin="the user's daemon", private=True))
    places.append(Candidate(path=SYSTEM_SOCKET, origin="the system's daemon"))
    return places


class Search:
    """A walk through the candidates, which remembers why none was taken.

    Raises:
        ValueError: `timeout` is no positive number of seconds.
    """

    def __init__(self, path: str | os.PathLike[str] | None, timeout: float | None) -> None:
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"a timeout is a positive number of seconds, not {timeout!r}")
        self.places = candidates(path, os.environ, os.getuid())
        self._tried: list[str] = []

    def note(self, candidate: Candidate, error: OSError) -> None:
        """One was not reached."""
        self._tried.append(f"  {candidate.path} ({candidate.origin}): {_explain(error)}")

    def failure(self) -> NoDaemon:
        """None was."""
        return NoDaemon(
            "no vswapd answers:\n"
            + "\n".join(self._tried)
            + "\nStart one (systemctl start vswapd.socket, or vswapd serve), or name its socket"
            + f" with the path argument or ${VARIABLE}."
        )


def open_socket(
    path: str | os.PathLike[str] | None, timeout: float | None
) -> tuple[socket.socket, Path]:
    """A connected, blocking socket to the first daemon that answers, and where that is.

    Raises:
        NoDaemon: none does; the text says where it was looked for and what to do.
    """
    search = Search(path, timeout)
    for candidate in search.places:
        try:
            sock = unconnected_socket(candidate)
        except OSError as error:
            search.note(candidate, error)
            continue
        try:
            sock.settimeout(timeout)
            sock.connect(os.fspath(candidate.path))
            sock.settimeout(None)
        except OSError as error:
            sock.close()
            search.note(candidate, error)
        except BaseException:
            sock.close()
            raise
        else:
            return sock, candidate.path.absolute()
    raise search.failure()


def hung_up(sock: socket.socket) -> bool:
    """Whether nobody is at the other end of a connection any more; nothing is read for that."""
    if sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock, 0)  # POLLHUP is told in any case
    return bool(poll.poll(0))


def unconnected_socket(candidate: Candidate) -> socket.socket:
    """A socket for this candidate.

    Raises:
        OSError: the place is not to be trusted, or is not there.
    """
    if candidate.private:
        _check_private(candidate.path.parent)
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)


def _check_private(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{directory} is not a directory of this user alone")


def _explain(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "there is no such socket"
        case ConnectionRefusedError():
            return "nobody listens (left by a daemon that died)"
        case PermissionError() if error.errno is not None:
            return "no permission (the system's daemon serves members of the group vswap)"
        case TimeoutError():
            return "the daemon does not accept the connection"
        case _:
            return error.strerror or str(error)


def client_name(name: str | None) -> str:
    """What the daemon shows for this client: `name` or the program's, and the process id."""
    program = name or Path(sys.argv[0] if sys.argv else "").name or "python"
    # Names of files may hold bytes that are no text, and only text can be said.
    return f"{program} {os.getpid()}".encode(errors="replace").decode()
