"""The listening socket in the file system: made, guarded against a second daemon, and removed.

Invariants:
- A lock file beside the socket (`PATH.lock`) is held for the daemon's life: of two daemons that
  start at the same time one is refused, and a socket whose lock is free was left by a dead one.
- What is no socket is never removed.

This module must not know what is served.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import socket
import stat
from pathlib import Path
from typing import ClassVar, Final

_BACKLOG: Final = 128
_LONGEST_PATH: Final = 107
"""sun_path has 108 bytes, one of them the end."""


class ListenError(Exception):
    """The socket cannot be had; the text says what to do. EX_UNAVAILABLE of sysexits.h."""

    exit_code: ClassVar[int] = 69


class Listener:
    """A socket that this process made and will remove."""

    def __init__(self, path: str, sock: socket.socket, lock_fd: int) -> None:
        self.path: Final = path
        self.socket: Final = sock
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: str, *, mode: int, group: str = "") -> Listener:
        """Listen at `path`.

        Args:
            path: where; its directory is made (0700) if only that is missing.
            mode: of the socket: who can write to it can connect.
            group: of the socket; empty: the process's own.

        Raises:
            ListenError: a daemon is listening there, something else stands there, or it is not
                permitted; nothing was changed.
        """
        if len(os.fsencode(path)) > _LONGEST_PATH:
            raise ListenError(f"{path}: a socket's path has at most {_LONGEST_PATH} bytes")
        gid = _gid(group) if group else -1
        _make_directory(Path(path).parent)
        lock_fd = _lock(path)
        try:
            return cls(path, _bind(path, mode, gid), lock_fd)
        except BaseException:
            _unlock(path, lock_fd)
            raise

    def close(self) -> None:
        """Remove the socket and give up the lock."""
        self.socket.close()
        Path(self.path).unlink(missing_ok=True)
        _unlock(self.path, self._lock_fd)


def _gid(group: str) -> int:
    """The group's id, if the socket can be given to it."""
    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        raise ListenError(f"server.socket_group: there is no group {group!r}") from None
    if os.geteuid() != 0 and gid not in {os.getegid(), *os.getgroups()}:
        raise ListenError(
            f"server.socket_group: only root and members of {group!r} can give it a socket"
        )
    return gid


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(0o700, exist_ok=True)
        owner, above = directory.stat().st_uid, directory.parent.stat().st_mode
    except OSError as error:
        raise ListenError(f"{directory}: cannot be made: {error.strerror}") from None
    if above & stat.S_IWOTH and owner not in {0, os.geteuid()}:
        # Where everybody can make directories somebody else can have made this one.
        raise ListenError(f"{directory}: belongs to another user: use another place")


def _lock(path: str) -> int:
    """Hold the lock of a socket's path; returns its descriptor."""
    lock = f"{path}.lock"
    while True:
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ListenError(f"{lock}: cannot be made: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(lock)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise ListenError(f"{path}: another vswapd is serving it") from None
        except FileNotFoundError:
            pass
        # Its holder has removed it between our two calls: what we hold locks nobody out.
        os.close(fd)


def _unlock(path: str, fd: int) -> None:
    Path(f"{path}.lock").unlink(missing_ok=True)
    os.close(fd)


def _bind(path: str, mode: int, gid: int) -> socket.socket:
    _clear(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Nobody can connect between bind and chmod.
        before = os.umask(0o777)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
    except OSError as error:
        sock.close()
        raise ListenError(f"{path}: {error.strerror}") from None
    try:
        if gid >= 0:
            os.chown(path, -1, gid)
        Path(path).chmod(mode)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        Path(path).unlink(missing_ok=True)
        raise ListenError(f"{path}: {error.strerror}") from None
    return sock


def _clear(path: str) -> None:
    """Remove a socket that nobody listens on any more."""
    try:
        status = Path(path).lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise ListenError(f"{path}: is there already, and is no socket: remove it, or use another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno not in {errno.ECONNREFUSED, errno.ENOENT}:
                raise ListenError(f"{path}: {error.strerror}") from None
        else:
            raise ListenError(f"{path}: another daemon is listening there")
    Path(path).unlink()
