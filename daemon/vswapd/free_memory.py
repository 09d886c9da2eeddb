"""How much memory is left to this process: of the machine, and of every control group it is in.

Invariants:
- What the system can take back without harm (clean pages of files) counts as left, half of what
  was used lately excepted. The daemon's own pages are of no file, so they never do.
- Swap space is nothing: a store that is swapped itself is worth little.
- To look takes no descriptor: the files stay open. One that cannot be read any more is told of, and
  makes the look incomplete; one that could never be read is as if it were not there.

This module must not know what the memory is for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from vswapd.host import groups_named_in, limit_of
from vswapd.kept_file import KeptFile
from vswapd.pressure import Free

_MACHINE: Final = "the machine"
_NOTHING_KNOWN: Final = Free(sys.maxsize, _MACHINE)

Tell = Callable[[str, Exception], None]
"""Told of what could not be looked at, and why."""


class _Names(NamedTuple):
    """How one version of control groups calls what is looked at."""

    limits: tuple[str, ...]
    usage: str
    stat: str
    """What a sum over the group and those below begins with, in memory.stat."""


_V1: Final = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
_V2: Final = _Names(("memory.max", "memory.high"), "memory.current", "")


class _Group:
    """One control group, whose files need not be there."""

    def __init__(self, name: str, directory: Path, names: _Names) -> None:
        self.name: Final = f"control group {name or '/'}"
        self._limits: Final = [KeptFile(directory / limit) for limit in names.limits]
        self._usage: Final = KeptFile(directory / names.usage)
        self._stat: Final = KeptFile(directory / "memory.stat")
        self._inactive: Final = f"{names.stat}inactive_file"
        self._active: Final = f"{names.stat}active_file"

    def free(self) -> int | None:
        """Bytes that are left; None: it has no limit, or is not there.

        Raises:
            OSError, ValueError: it has, and cannot be looked at.
        """
        texts = [text for file in self._limits if (text := file.read()) is not None]
        limits = [limit_of(text.decode()) for text in texts]
        limit = min((found for found in limits if found is not None), default=None)
        if limit is None:
            return None
        usage = int(_there(self._usage))
        stat = _there(self._stat).decode()
        return limit - usage + _field(stat, self._inactive) + _field(stat, self._active) // 2


class FreeMemory:
    """A meter of what is left, for `pressure`. Groups and their limits may change."""

    def __init__(self, root: Path = Path("/"), tell: Tell = lambda _what, _error: None) -> None:
        """Of the machine whose /proc and /sys lie below `root`."""
        self._root: Final = root
        self._tell: Final = tell
        self._meminfo: Final = KeptFile(root / "proc/meminfo")
        self._membership: Final = KeptFile(root / "proc/self/cgroup")
        self._member: bytes | None = None
        """What it said when `_groups` were found."""
        self._groups: list[_Group] = []
        self._seen: Final[set[str]] = set()
        """Whose memory could be looked at before."""

    def __call__(self) -> Free:
        """What is left where the least is, of what can be looked at."""
        found: list[Free] = []
        complete = self._find_groups()
        looks = [(_MACHINE, self._available), *((group.name, group.free) for group in self._groups)]
        for name, look in looks:
            try:
                free = look()
            except (OSError, ValueError) as error:
                self._tell(f"the memory of {name} cannot be looked at", error)
                complete = complete and name not in self._seen
                continue
            if free is not None:
                found.append(Free(free, name))
                self._seen.add(name)
        return min(found, default=_NOTHING_KNOWN)._replace(complete=complete)

    def _available(self) -> int:
        for line in _there(self._meminfo).splitlines():
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * 1024
        raise ValueError(f"{self._meminfo.path} has no MemAvailable")

    def _find_groups(self) -> bool:
        """Find the groups that this process is in by now; False: that cannot be told any more."""
        try:
            member = self._membership.read() or b""  # a kernel without control groups has no limits
            if member != self._member:
                self._groups = list(self._groups_of(member))
                self._member = member
        except (OSError, ValueError) as error:
            self._tell("control groups cannot be looked for", error)
            return self._member is None
        return True

    def _groups_of(self, member: bytes) -> Iterator[_Group]:
        text = member.decode(errors="surrogateescape")
        for name, directory, unified in groups_named_in(text, self._root):
            yield _Group(name, directory, _V2 if unified else _V1)


def _there(file: KeptFile) -> bytes:
    """What stands in a file that should be there.

    Raises:
        OSError: it is not, or cannot be read.
    """
    text = file.read()
    if text is None:
        raise FileNotFoundError(f"{file.path} is not there")
    return text


def _field(stat: str, name: str) -> int:
    """A number of memory.stat; 0 if it is not there."""
    for line in stat.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
