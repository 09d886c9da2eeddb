"""How a command begins and ends: whatever it cannot go on with is one line and an exit code.

Invariants:
- Descriptors 0, 1 and 2 are open before anything else is opened: else a socket could get the number
  that error messages go to.
- Every end that is no success is a code of sysexits.h and one line on standard error; a mistake of
  ours is one line, too, its traceback in it.
- Nobody waits for who does not read standard error.

This module must not know what commands do. What can fail is loaded when it can be told.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from vswapd import causes, journal

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

_EX_SOFTWARE: Final = 70
_EX_OSERR: Final = 71
_EX_IOERR: Final = 74
_INTERRUPTED: Final = 130


def run(command: str, module: str) -> NoReturn:
    """Run the function `main` of a module as a command, and end the process.

    Args:
        command: its name, for what it says on standard error.
        module: where `main` is, which returns an exit code, or exits.
    """
    _open_streams()
    _tell_output_apart()
    # numpy's library for what we never do makes threads, which a limit may forbid.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    code = _carried_out(command, module)
    sys.exit(code)


def _carried_out(command: str, module: str) -> int:
    try:
        try:
            code = importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
    except OutputError as error:
        # Else the interpreter would try once more at its end, and say so in its own way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:
            return 0  # who reads our output has seen enough (`vswapctl status | head`)
        journal.last_words(command, f"standard output: {causes.explained(error)}")
        return _EX_IOERR
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:  # noqa: BLE001 - a border: what it is, is told
        if causes.is_systems(error):
            journal.last_words(command, causes.explained(error))
            return _EX_OSERR
        journal.last_words(command, "a mistake of ours", error)
        return _EX_SOFTWARE
    return int(code or 0)


class OutputError(OSError):
    """Standard output does not take what was printed."""


class _Output(io.FileIO):
    """Standard output, whose errors are like no others."""

    def write(self, data: Buffer, /) -> int:
        """See io.RawIOBase."""
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


def _tell_output_apart() -> None:
    before = sys.stdout
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Output(1, "w", closefd=False)),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=before.isatty(),
    )


def _open_streams() -> None:
    """Whichever of 0, 1 and 2 is closed is opened: nobody reads it, or it takes nothing."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # What is printed to a closed output must fail, as it would have by itself.
            flags = os.O_RDONLY if name == "stdout" else os.O_RDWR
            try:
                os.open(os.devnull, flags)  # the lowest that is free
            except OSError:
                os.open("/", os.O_RDONLY)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(fd, mode, errors="backslashreplace", closefd=False))
