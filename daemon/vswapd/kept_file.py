"""A small file of the system's that is looked at again and again: opened once, read from its start.

A process that has no descriptor left can still look at it, and so can one whose /proc has gone.

Invariants:
- A file that was removed, and a control group's whose group has gone, is opened by its name anew.

This module must not know what stands in it.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Final

_AT_ONCE: Final = 64 * 1024
"""Most bytes of any such file: one read gives all of it, of one moment."""


class KeptFile:
    """See the module. The descriptor is closed with the object."""

    def __init__(self, path: Path) -> None:
        """Of a file that need not be there."""
        self.path: Final = path
        self._fd: int | None = None
        self._close: weakref.finalize[[int], KeptFile] | None = None

    def read(self) -> bytes | None:
        """What stands in it now; None: there is no such file.

        Raises:
            OSError: it is there, and cannot be opened or read.
        """
        found = None if self._fd is None else self._read_again(self._fd)
        if found is not None:
            return found
        try:
            # Looked for first: where no descriptor is left, to open it would not tell.
            os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            self._keep(None)
            return None
        self._keep(fd := os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        return os.pread(fd, _AT_ONCE, 0)

    @staticmethod
    def _read_again(fd: int) -> bytes | None:
        """What stands in the file that is open; None: it has gone."""
        try:
            return os.pread(fd, _AT_ONCE, 0) if os.fstat(fd).st_nlink else None
        except OSError:  # of a control group: ENODEV, of a process: ESRCH
            return None

    def _keep(self, fd: int | None) -> None:
        if self._close is not None:
            self._close()
        self._fd = fd
        self._close = None if fd is None else weakref.finalize(self, os.close, fd)
