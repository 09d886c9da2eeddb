"""A memory control group for a daemon under test, version 1 or 2, with a limit that can change.

Invariants:
- Leaving the block removes the group: whoever was in it has to be gone by then.

This module must not know what runs in the group.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

_TOP: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One group. Sizes are in bytes."""

    directory: Path
    unified: bool

    @property
    def command(self) -> list[str]:
        """What to put before a command so that it runs in the group."""
        procs = self.directory / "cgroup.procs"
        return ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh"]

    def limit(self, nbytes: int) -> None:
        """Let the group have so much, and no swap space besides."""
        if self.unified:
            (self.directory / "memory.max").write_text(str(nbytes))
            with contextlib.suppress(OSError):  # a kernel without swap has no such file
                (self.directory / "memory.swap.max").write_text("0")
        else:
            (self.directory / "memory.swappiness").write_text("0")
            (self.directory / "memory.limit_in_bytes").write_text(str(nbytes))

    @property
    def usage(self) -> int:
        """What it takes."""
        name = "memory.current" if self.unified else "memory.usage_in_bytes"
        return int((self.directory / name).read_text())

    @property
    def kills(self) -> int:
        """Processes of it that were killed for want of memory."""
        name = "memory.events" if self.unified else "memory.oom_control"
        lines = (self.directory / name).read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@contextlib.contextmanager
def memory_group(nbytes: int) -> Iterator[MemoryGroup]:
    """A group that may have so many bytes; skips the test where none can be made."""
    if os.geteuid() != 0:
        pytest.skip("making a control group needs root")
    unified = not (_TOP / "memory").is_dir()
    top = _TOP if unified else _TOP / "memory"
    directory = top / f"vswapd-test-{os.getpid()}"
    try:
        if unified and "memory" not in (top / "cgroup.subtree_control").read_text().split():
            (top / "cgroup.subtree_control").write_text("+memory")
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"hardware: no memory control group can be made here: {error.strerror}")
    group = MemoryGroup(directory, unified)
    try:
        group.limit(nbytes)
        yield group
    finally:
        while (directory / "cgroup.procs").read_text():
            pass  # what was killed is about to be gone
        directory.rmdir()
