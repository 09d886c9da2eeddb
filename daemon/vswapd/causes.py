"""An error of the system as one line: what could not be had, why, and what to raise.

Invariants:
- Where a limit of this process is the likely cause, the line names it, and what it is.

This module must not know what the process was about to do.
"""

from __future__ import annotations

import errno
import os
import resource
from typing import Final

_Limit = tuple[str, int, str]
_OF_MEMORY: Final[tuple[_Limit, ...]] = (
    ("RLIMIT_AS", resource.RLIMIT_AS, "LimitAS="),
    ("RLIMIT_DATA", resource.RLIMIT_DATA, "LimitDATA="),
)
_LIMITS: Final[dict[int, tuple[_Limit, ...]]] = {
    errno.EMFILE: (("RLIMIT_NOFILE", resource.RLIMIT_NOFILE, "LimitNOFILE="),),
    errno.EFBIG: (("RLIMIT_FSIZE", resource.RLIMIT_FSIZE, "LimitFSIZE="),),
    errno.ENOMEM: _OF_MEMORY,
    # A thread needs a stack, and is refused in the same way where there is no memory for it. Few
    # processes have a limit of memory, but all have one of processes.
    errno.EAGAIN: (*_OF_MEMORY, ("RLIMIT_NPROC", resource.RLIMIT_NPROC, "LimitNPROC=")),
}
"""What may stand behind an error of the system, the likelier first: getrlimit(2), and the unit's
word for it."""
_NO_THREAD: Final = "can't start new thread"


def is_systems(error: BaseException) -> bool:
    """Whether the system had refused something, and no mistake of ours is to be looked for."""
    thread = isinstance(error, RuntimeError) and str(error).startswith(_NO_THREAD)
    return thread or isinstance(error, (OSError, MemoryError, ImportError))


def explained(error: BaseException) -> str:
    """One line for an error of the system (see `is_systems`), or for any other."""
    match error:
        case OSError(errno=int(number)):
            why = error.strerror or os.strerror(number)
            name = error.filename
            where = os.fsdecode(name) if isinstance(name, (str, bytes)) else ""
        case MemoryError():
            number, why, where = errno.ENOMEM, os.strerror(errno.ENOMEM), ""
        case RuntimeError() if is_systems(error):
            number, why, where = errno.EAGAIN, "no thread can be started", ""
        case _:
            why, where = _innermost(error), ""
            # What ld.so says where there is no address space for a library.
            number = errno.ENOMEM if "failed to map segment" in why else 0
    return ": ".join(part for part in (where, why, _hint(number)) if part)


def _hint(number: int) -> str:
    """The limit that an error may come from, if this process has one."""
    for name, limit, directive in _LIMITS.get(number, ()):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            return f"{name} is {soft}: raise it ({directive} in a unit)"
    return ""


def _innermost(error: BaseException) -> str:
    """What an error began with, in one line: what wraps it may be pages of advice."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(str(error).split()) or type(error).__name__
