"""How much memory is left to this process: of the machine, and of every control group it is in.

Invariants:
- What the system can take back without harm (clean pages of files) counts as left, half of what
  was used lately excepted. The daemon's own pages are of no file, so they never do.
- Swap space is nothing: a store that is swapped itself is worth little.

This module must not know what the memory is for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from vswapd.host import groups_of_memory, limit_in
from vswapd.pressure import Free

_MACHINE: Final = "the machine"


class _Names(NamedTuple):
    """How one version of control groups calls what is looked at."""

    limits: tuple[str, ...]
    usage: str
    stat: str
    """What a sum over the group and those below begins with, in memory.stat."""


_V1: Final = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
_V2: Final = _Names(("memory.max", "memory.high"), "memory.current", "")


class FreeMemory:
    """A meter of what is left, for `pressure`. Its groups are found once; limits may change."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Of the machine whose /proc and /sys lie below `root`."""
        self._meminfo: Final = root / "proc/meminfo"
        self._groups: Final = [
            (f"control group {name or '/'}", directory, _V2 if unified else _V1)
            for name, directory, unified in groups_of_memory(root)
        ]

    def __call__(self) -> Free:
        """What is left where the least is.

        Raises:
            OSError: there is no /proc/meminfo.
        """
        return min([Free(self._available(), _MACHINE), *self._of_groups()])

    def _available(self) -> int:
        with self._meminfo.open("rb") as file:
            for line in file:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
        raise OSError(f"{self._meminfo} has no MemAvailable")

    def _of_groups(self) -> Iterator[Free]:
        for name, directory, names in self._groups:
            limits = [limit_in(directory / limit) for limit in names.limits]
            limit = min((found for found in limits if found is not None), default=None)
            if limit is None:
                continue
            try:
                usage = int((directory / names.usage).read_text())
                stat = (directory / "memory.stat").read_bytes()
            except (OSError, ValueError):
                continue  # the group has gone, or moved: there is nothing to be held to
            inactive = _field(stat, f"{names.stat}inactive_file")
            active = _field(stat, f"{names.stat}active_file")
            yield Free(limit - usage + inactive + active // 2, name)


def _field(stat: bytes, name: str) -> int:
    """A number of memory.stat; 0 if it is not there."""
    for line in stat.splitlines():
        key, _, value = line.partition(b" ")
        if key == os.fsencode(name):
            return int(value)
    return 0
