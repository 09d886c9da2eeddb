"""A process and all that it has started, killed together.

Invariants:
- When `kill_group` returns, none of them runs any more. A process that was killed still has its
  memory to give back, which on a busy machine takes a moment; whoever looks for leftovers, or at
  what memory is left, would find it.

This module must not know what the processes are.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path


def kill_group(group: int) -> None:
    """SIGKILL to each process of a group, and wait for their ends. One that is gone is no error."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    # From here on none of them can start another one.
    for pid in _members(group):
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(pid)
            poll = select.poll()
            try:
                poll.register(ended, select.POLLIN)
                poll.poll()
            finally:
                os.close(ended)


def _members(group: int) -> Iterator[int]:
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name stands in parentheses and may hold anything; behind it: state, parent, group.
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                yield int(directory.name)
