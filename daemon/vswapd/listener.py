"""The listening socket in the file system: made, guarded against a second daemon, and removed.

Invariants:
- A lock file beside the socket (`PATH.lock`) is held for the daemon's life: of two daemons that
  start at the same time one is refused, and a socket whose lock is free was left by a dead one.
- What is no socket is never removed, nor what this process has not made: socket and lock are told
  by their inodes, which stay theirs as long as descriptors of them are open, not by their names.
- Sockets are removed under the lock that stands at the path, in the folder in which they were made,
  wherever it is by then. So nobody who takes the lock first can lose a socket to us.
- In a folder that others can write to, no link of theirs is followed: the socket has its mode from
  the start, and its group is given to what was bound.

This module must not know what is served.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

_BACKLOG: Final = 128
_LONGEST_PATH: Final = 107
"""sun_path has 108 bytes, one of them the end."""
_FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_INODE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class ListenError(Exception):
    """The socket cannot be had; the text says what to do. EX_UNAVAILABLE of sysexits.h."""

    exit_code: ClassVar[int] = 69


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where to listen, and for whom; see Listener.open."""

    path: str
    mode: int
    group: str
    own_folder: bool

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def lock(self) -> str:
        return f"{self.name}.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What one socket in the file system consists of."""

    socket: socket.socket
    inode: int
    """A descriptor of the socket's file: while it is open no other file has its inode."""
    folder: int
    """A descriptor of the folder in which it was made."""
    lock: int


class Listener:
    """A socket that this process made and will remove."""

    def __init__(self, place: _Place, made: _Made) -> None:
        """For `open`."""
        self._place: Final = place
        self._made = made

    @classmethod
    def open(cls, path: str, *, mode: int, group: str = "", own_folder: bool = False) -> Listener:
        """Listen at `path`.

        Args:
            path: where.
            mode: of the socket: who can write to it can connect.
            group: of the socket; empty: the process's own.
            own_folder: whether its folder has to be this user's alone, and is made (0700) if it is
                missing; else it has to be there.

        Raises:
            ListenError: a daemon is listening there, something else stands there, there is no such
                folder, or it is not permitted; nothing was changed.
        """
        place = _Place(path=path, mode=mode, group=group, own_folder=own_folder)
        return cls(place, _make(place, None))

    @property
    def path(self) -> str:
        """Where it listens."""
        return self._place.path

    @property
    def socket(self) -> socket.socket:
        """The socket that listens."""
        return self._made.socket

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a process is to close that is forked, and does not listen."""
        return (self._made.socket.fileno(), self._made.inode, self._made.folder)

    def is_there(self) -> bool:
        """Whether who connects to the path comes to this socket."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._made.inode))
        except OSError:
            return False

    def make_again(self) -> None:
        """Listen with a new socket, as the path does not lead to this one any more.

        The old one stays open: it is to be closed by who accepts from it.

        Raises:
            ListenError: see `open`; all is as it was.
        """
        before = self._made
        kept = _leads_to(f"{self.path}.lock", before.lock)
        self._made = _make(self._place, before.lock if kept else None)
        # In a folder that was renamed it may still be there.
        _unlink(before.folder, self._place.name, before.inode)
        if not kept:
            _unlock(before.folder, self._place.lock, before.lock)
        _close(before)

    def close(self) -> None:
        """Remove socket and lock, where they are still what this process has made."""
        place, made = self._place, self._made
        try:
            lock, ours = _lock_again(place, made)
            if lock >= 0:
                _unlink(made.folder, place.name, made.inode)
            if ours:
                _unlock(made.folder, place.lock, lock)
            elif lock >= 0:
                os.close(lock)
        finally:
            made.socket.close()
            _close(made)


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


def _make(place: _Place, lock: int | None) -> _Made:
    """Everything, or nothing. `lock` is the path's lock, if it is held already."""
    if len(os.fsencode(place.path)) > _LONGEST_PATH:
        raise ListenError(f"{place.path}: a socket's path has at most {_LONGEST_PATH} bytes")
    gid = _gid(place.group) if place.group else -1
    with contextlib.ExitStack() as undo:
        folder = _folder(place)
        undo.callback(os.close, folder)
        if lock is None:
            lock = _lock(place, folder)
            undo.callback(_unlock, folder, place.lock, lock)
        sock, inode = _bind(place, folder, gid)
        undo.pop_all()
    return _Made(socket=sock, inode=inode, folder=folder, lock=lock)


def _close(made: _Made) -> None:
    os.close(made.inode)
    os.close(made.folder)


def _folder(place: _Place) -> int:
    """A descriptor of the folder in which the socket is to be."""
    folder = Path(place.path).parent
    try:
        if place.own_folder:
            folder.mkdir(0o700, exist_ok=True)
        fd = os.open(folder, _FOLDER | (os.O_NOFOLLOW if place.own_folder else 0))
    except FileNotFoundError:
        raise ListenError(f"{folder}: there is no such folder: make it, or use another") from None
    except OSError as error:
        raise ListenError(f"{folder}: cannot be used: {error.strerror}") from None
    status = os.fstat(fd)
    # Where everybody can make folders somebody else can have made this one.
    shared = place.own_folder or folder.parent.stat().st_mode & stat.S_IWOTH
    trusted = {os.geteuid()} if place.own_folder else {0, os.geteuid()}
    if shared and status.st_uid not in trusted:
        os.close(fd)
        raise ListenError(f"{folder}: belongs to another user: use another place")
    if place.own_folder and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(fd)
        raise ListenError(f"{folder}: others can write to it: take that from them (chmod 700)")
    return fd


def _lock(place: _Place, folder: int) -> int:
    """Hold the lock of a socket's path; returns its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    while True:
        try:
            fd = os.open(place.lock, flags, 0o600, dir_fd=folder)
        except OSError as error:
            raise ListenError(f"{place.path}.lock: cannot be made: {error.strerror}") from None
        try:
            _refuse_foreign(fd, stat.S_IFREG, f"{place.path}.lock: is no lock of this user's")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _names(folder, place.lock, fd):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise ListenError(f"{place.path}: another vswapd is serving it") from None
        except BaseException:
            os.close(fd)
            raise
        # Its holder has removed it between our two calls: what we hold locks nobody out.
        os.close(fd)


def _refuse_foreign(fd: int, kind: int, what: str) -> None:
    """What is not of this kind, or somebody else's, is not ours to use."""
    status = os.fstat(fd)
    if stat.S_IFMT(status.st_mode) != kind or status.st_uid != os.geteuid():
        raise ListenError(f"{what}: remove it, or use another place")


def _lock_again(place: _Place, made: _Made) -> tuple[int, bool]:
    """The lock that now stands at the path, held, and whether it was made by us; else -1."""
    if _names(made.folder, place.lock, made.lock):
        return made.lock, True
    # It was swept away, and locks nobody out. Who has locked another one since has looked for a
    # socket there, and made its own.
    os.close(made.lock)
    found = _exists(made.folder, place.lock)
    try:
        return _lock(place, made.folder), not found
    except ListenError:
        return -1, False


def _unlock(folder: int, lock: str, fd: int) -> None:
    # Were it swept away and made by another daemon in this very moment, that one's would be
    # removed. It would lose nothing: who locks a third one finds its socket answering.
    _unlink(folder, lock, fd)
    os.close(fd)


def _bind(place: _Place, folder: int, gid: int) -> tuple[socket.socket, int]:
    """A socket that listens, and a descriptor of its file. The lock is held."""
    _clear(place, folder)
    inode = -1
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        before = os.umask(0o777)
        try:
            sock.bind(place.path)
        finally:
            os.umask(before)
        inode = os.open(place.name, _INODE, dir_fd=folder)
        _refuse_foreign(inode, stat.S_IFSOCK, f"{place.path}: was replaced while it was made")
        # By its descriptor: whoever can rename it could have made the path a link.
        itself = f"/proc/self/fd/{inode}"
        if gid >= 0:
            os.chown(itself, -1, gid)
        os.chmod(itself, place.mode)
        # Nobody can connect before this.
        sock.listen(_BACKLOG)
    except BaseException as error:
        sock.close()
        if inode >= 0:
            _unlink(folder, place.name, inode)
            os.close(inode)
        if isinstance(error, OSError):
            raise ListenError(f"{place.path}: {error.strerror}") from None
        raise
    return sock, inode


def _clear(place: _Place, folder: int) -> None:
    """Remove a socket that nobody listens on any more. The lock is held."""
    try:
        inode = os.open(place.name, _INODE, dir_fd=folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ListenError(f"{place.path}: {error.strerror}") from None
    try:
        if not stat.S_ISSOCK(os.fstat(inode).st_mode):
            raise ListenError(
                f"{place.path}: is there already, and is no socket: remove it, or use another"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # who listens need not accept
            try:
                probe.connect(place.path)
            except ConnectionRefusedError:
                _unlink(folder, place.name, inode)
            except FileNotFoundError:
                pass
            except BlockingIOError:
                raise ListenError(f"{place.path}: another daemon is listening there") from None
            except OSError as error:
                raise ListenError(f"{place.path}: {error.strerror}") from None
            else:
                raise ListenError(f"{place.path}: another daemon is listening there")
    finally:
        os.close(inode)


def _unlink(folder: int, name: str, fd: int) -> None:
    """Remove a name if it still is the name of this file, which is open.

    Between the two calls it may be given to another one, by hand. No daemon of ours does that
    without the lock.
    """
    if _names(folder, name, fd):
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)


def _names(folder: int, name: str, fd: int) -> bool:
    """Whether a name in a folder is that of this file, which is open."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(fd))


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return True


def _leads_to(path: str, fd: int) -> bool:
    """Whether a path leads to this file, which is open, and to no link."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except OSError:
        return False
