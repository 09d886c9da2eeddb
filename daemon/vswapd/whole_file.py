"""A file that is replaced as a whole, in a folder that may be somebody else's.

Invariants:
- A reader sees the old file or the new one, never half of one.
- Nothing that stands in the folder is followed, opened or written to: what is written is new, and
  its name is not to be guessed. A link at the path is replaced, whatever it leads to; a folder, a
  device or a pipe at the path is left alone.
- A failure leaves the old file as it was, and nothing beside it.

This module must not know what is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import weakref
from pathlib import Path
from typing import Final

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class WholeFile:
    """A file in its place. Its inode stays its own until `close`, so it can be told from others."""

    def __init__(self, folder: int, name: str, fd: int) -> None:
        """For `write`."""
        self._folder = folder
        self._name = name
        self._fd = fd
        self._close = weakref.finalize(self, _close, fd, folder)

    @classmethod
    def write(cls, path: Path, content: bytes, *, mode: int) -> WholeFile:
        """Replace what stands at `path`.

        Args:
            path: where; its folder must exist.
            content: all of it.
            mode: its permissions, whatever the umask.

        Raises:
            OSError: it cannot be written; nothing was changed. `filename` is the path.
        """
        try:
            return cls._write(path, content, mode)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None

    @classmethod
    def _write(cls, path: Path, content: bytes, mode: int) -> WholeFile:
        with contextlib.ExitStack() as undo:
            folder = os.open(path.parent, _FOLDER)
            undo.callback(os.close, folder)
            _refuse_others(folder, path.name)
            # Who collects *.prom, or looks for pictures, must not find it before it is whole.
            unfinished = f".{path.name[:100]}.{secrets.token_hex(8)}.tmp"
            fd = os.open(unfinished, _NEW, 0o600, dir_fd=folder)
            undo.callback(os.close, fd)
            undo.callback(_remove, folder, unfinished, fd)
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fchmod(fd, mode)
            os.replace(unfinished, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            undo.pop_all()
        return cls(folder, path.name, fd)

    def remove(self) -> None:
        """Remove the file, unless another one stands in its place by now; and close."""
        _remove(self._folder, self._name, self._fd)
        self.close()

    def close(self) -> None:
        """Leave the file where it is."""
        self._close()


def _close(*descriptors: int) -> None:
    for fd in descriptors:
        os.close(fd)


def _refuse_others(folder: int, name: str) -> None:
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise OSError(errno.EINVAL, "is no regular file")


def _remove(folder: int, name: str, fd: int) -> None:
    """Remove a name if it still is the name of this file."""
    with contextlib.suppress(OSError):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if os.path.samestat(found, os.fstat(fd)):
            os.unlink(name, dir_fd=folder)
