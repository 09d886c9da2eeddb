"""Where a daemon's socket may be, and how a failure to reach one is told.

Invariants:
- A path that was asked for is the only one that is tried.
- A socket in /tmp is only trusted in a directory that nobody else could have made.

This module must not know the wire.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vswap.errors import NoDaemon

if TYPE_CHECKING:
    from vswap.waiting import Wait

SYSTEM_SOCKET: Final = Path("/run/vswapd.sock")
SOCKET_NAME: Final = "vswapd.sock"
VARIABLE: Final = "VSWAP_SOCKET"
_TIMEVAL: Final = struct.Struct("@ll")
_PEER: Final = struct.Struct("@3i")
_JOURNAL: Final = "journalctl -u vswapd"
_USERS_JOURNAL: Final = "journalctl --user -u vswapd"


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
    """A walk through the candidates, which remembers why none was taken."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.places = candidates(path, os.environ, os.getuid())
        self.place = self.places[0].path
        """Which of them is being tried."""
        self.sock: socket.socket | None = None
        """What is connected to it by now, for whoever asks who is there; it is somebody else's."""
        self._tried: list[str] = []

    def begin(self, candidate: Candidate) -> None:
        """One is tried."""
        if candidate is self.places[0]:
            self._tried.clear()
        self.place, self.sock = candidate.path, None

    def note(self, candidate: Candidate, error: Exception) -> None:
        """One was not reached."""
        why = _explain(candidate.path, error)
        self._tried.append(f"  {candidate.path} ({candidate.origin}): {why}")

    def failure(self) -> NoDaemon:
        """None was."""
        return NoDaemon(
            "no vswapd answers:\n"
            + "\n".join(self._tried)
            + "\nStart one (systemctl start vswapd.socket, or vswapd serve), or name its socket"
            + f" with the path argument or ${VARIABLE}."
        )


def open_socket(search: Search, wait: Wait) -> tuple[socket.socket, Path]:
    """A connected, blocking socket to the first daemon that answers, and where that is.

    Args:
        search: The places to try.
        wait: How long each of them is waited for.

    Raises:
        NoDaemon: none does; the text says where it was looked for and what to do.
    """
    for candidate in search.places:
        search.begin(candidate)
        wait.sign()
        try:
            sock = unconnected_socket(candidate)
        except OSError as error:
            search.note(candidate, error)
            continue
        try:
            _connect(sock, candidate.path, wait)
        except (OSError, ValueError) as error:
            sock.close()
            search.note(candidate, error)
        except BaseException:
            sock.close()
            raise
        else:
            search.sock = sock
            return sock, candidate.path.absolute()
    raise search.failure()


def _connect(sock: socket.socket, path: Path, wait: Wait) -> None:
    """Connect a blocking socket.

    Raises:
        TimeoutError: the queue of those who wait to be accepted was full for too long.
        OSError, ValueError: it is not to be had.
    """
    while True:
        # Python's own timeout makes the socket non-blocking, and a full queue an error at once.
        limit_receive_or_send(sock, socket.SO_SNDTIMEO, wait.step_s())
        try:
            sock.connect(os.fspath(path))
        except BlockingIOError:
            if wait.over():
                raise TimeoutError from None
        else:
            limit_receive_or_send(sock, socket.SO_SNDTIMEO, None)
            return


def limit_receive_or_send(sock: socket.socket, option: int, seconds: float | None) -> None:
    """Have the kernel end a call that has waited for so long; None: for ever.

    It costs nothing per call, where Python's own timeout would poll before each.

    Args:
        sock: whose calls.
        option: SO_RCVTIMEO or SO_SNDTIMEO (which connect(2) goes by, too).
        seconds: more than 0.
    """
    whole = int(seconds or 0)
    value = (0, 0) if seconds is None else (whole, max(1, int((seconds - whole) * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*value))


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
    if "\0" in os.fspath(candidate.path):
        # At the beginning it would be another kind of name, and elsewhere the path's end.
        raise OSError("no path has a NUL in it")
    if candidate.private:
        _check_private(candidate.path.parent)
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)


def _check_private(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{directory} is not a directory of this user alone")


def _explain(path: Path, error: Exception) -> str:
    """Why a place has no daemon that can be connected to: what is there, as far as one may see."""
    match error:
        case FileNotFoundError():
            return _what_is_missing(path)
        case ConnectionRefusedError():
            return _who_refuses(path)
        case PermissionError() if error.errno is not None:
            return _who_may(path)
        case TimeoutError():
            return f"the daemon does not accept the connection: {where_to_look(path)}"
        case OSError() if error.errno == errno.EPROTOTYPE:
            return "it is a socket of another kind, not vswapd's"
        case OSError():
            return error.strerror or str(error)
        case _:
            return str(error)


def _what_is_missing(path: Path) -> str:
    try:
        if path.is_symlink():
            return f"it is a link to {path.readlink()}, which is not there"
        if not path.parent.exists():
            return f"there is no directory {path.parent}"
    except OSError:
        pass  # what is not to be seen is not told
    return "there is no such socket"


def _who_refuses(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "nobody listens"
    if stat.S_ISDIR(mode):
        return "it is a directory, not a socket"
    if stat.S_ISREG(mode):
        return "it is a file, not a socket"
    if not stat.S_ISSOCK(mode):
        return "it is not a socket"
    return "nobody listens (left by a daemon that died)"


def _who_may(path: Path) -> str:
    if path == SYSTEM_SOCKET:
        return "no permission (the system's daemon serves members of the group vswap)"
    try:
        found = path.stat()
    except OSError:
        return f"no permission to look into {path.parent}"
    return f"no permission (it is user {found.st_uid}'s, mode {stat.S_IMODE(found.st_mode):o})"


def where_to_look(path: Path, sock: socket.socket | None = None) -> str:
    """Where a daemon that does not answer says why, as far as one can know.

    Args:
        path: of its socket.
        sock: connected to it. The kernel says who listens: a service manager, or a daemon itself.
    """
    pid = 0
    if sock is not None:
        with contextlib.suppress(OSError):
            found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            pid, uid, _ = _PEER.unpack(found)
    if pid:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_bytes() == b"systemd\n":
                return _JOURNAL if pid == 1 or not uid else _USERS_JOURNAL
            return f"process {pid} listens there; its log says more"
    if path == SYSTEM_SOCKET:
        return _JOURNAL
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and path == Path(runtime) / SOCKET_NAME:
        return _USERS_JOURNAL
    return f"its log, or {_JOURNAL}, says more"


def client_name(name: str | None) -> str:
    """What the daemon shows for this client: `name` or the program's, and the process id."""
    program = name or Path(sys.argv[0] if sys.argv else "").name or "python"
    # Names of files may hold bytes that are no text, and only text can be said.
    return f"{program} {os.getpid()}".encode(errors="replace").decode()
