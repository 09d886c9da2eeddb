"""No core dump, and no debugger but root's: what a process of the daemon holds is other programs'.

A process that is not dumpable (prctl(2), PR_SET_DUMPABLE) leaves no core file, and other processes
of its user can neither trace it nor read its memory: its files in /proc belong to root. Processes
that it forks are the same.

This module must not know what there is to hide.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

DEBUGGING: Final = "VSWAPD_DUMPABLE"
"""A variable that leaves it as it is, for who wants to look into a daemon (gdb, py-spy, perf)."""
_PR_SET_DUMPABLE: Final = 4


def be_undumpable() -> None:
    """Make this process undumpable, unless whoever started it wants to look into it."""
    if not os.environ.get(DEBUGGING):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
