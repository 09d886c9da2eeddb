"""What the configuration needs to know of the machine: memory, user, names of users and groups.

Invariants:
- `ram_bytes` is what this process may really use: the smallest of the machine's RAM and the limits
  of every control group above it, version 1 and 2.
- Everything is read once; a Host is plain data afterwards, but for the look-up of names.

This module must not know the configuration.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_V1_NO_LIMIT = 1 << 60
"""Version 1 writes "no limit" as the largest multiple of a page; anything near it is meant so."""


def uid_of_user(name: str) -> int | None:
    """The uid of a user's name, or None if there is no such user."""
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):  # no name has a zero byte
        return None


def gid_of_group(name: str) -> int | None:
    """The gid of a group's name, or None if there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine as the configuration sees it."""

    ram_bytes: int
    """Memory that this process may use."""
    uid: int
    """Effective uid of this process."""
    cpus: int = 1
    """Cores that this process may run on."""
    runtime_dir: str | None = None
    """$XDG_RUNTIME_DIR, if it is a directory."""
    uid_of: Callable[[str], int | None] = uid_of_user
    """The uid of a user's name, None if unknown."""
    gid_of: Callable[[str], int | None] = gid_of_group
    """The gid of a group's name, None if unknown."""

    @classmethod
    def here(cls, root: Path = Path("/")) -> Host:
        """This machine, its /proc and /sys taken from below `root`.

        Raises:
            OSError: there is no /proc/meminfo.
        """
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        return cls(
            ram_bytes=min([_ram(root), *_cgroup_limits(root)]),
            uid=os.geteuid(),
            cpus=len(os.sched_getaffinity(0)),
            runtime_dir=runtime if runtime and Path(runtime).is_dir() else None,
        )

    @property
    def makes_folder(self) -> bool:
        """Whether the folder of `socket_path` is made by the daemon, for this user alone."""
        return self.uid != 0 and self.runtime_dir is None

    @property
    def socket_path(self) -> str:
        """Where the daemon of this user listens unless told otherwise; clients look there."""
        if self.uid == 0:
            return "/run/vswapd.sock"
        if self.runtime_dir is not None:
            return f"{self.runtime_dir}/vswapd.sock"
        return f"/tmp/vswapd-{self.uid}/vswapd.sock"  # noqa: S108 - a directory of mode 0700


def _ram(root: Path) -> int:
    try:
        text = (root / "proc/meminfo").read_text()
    except FileNotFoundError as error:
        raise OSError(error.errno, "is not there: mount /proc", error.filename) from None
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name == "MemTotal":
            return int(rest.split()[0]) * 1024
    raise OSError("/proc/meminfo has no MemTotal")


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Memory limits of this process's control groups, in bytes, up to the root of each tree."""
    for _, directory, unified in groups_of_memory(root):
        names = ("memory.max", "memory.high") if unified else ("memory.limit_in_bytes",)
        for name in names:
            if limit := limit_in(directory / name):
                yield limit


def groups_of_memory(root: Path = Path("/")) -> Iterator[tuple[str, Path, bool]]:
    """The control groups that may limit this process's memory, up to the root of each tree.

    Yields:
        The group's name, its directory, which need not be there, and whether it is of version 2.
    """
    try:
        text = (root / "proc/self/cgroup").read_text()
    except OSError:
        return  # a kernel without control groups has no limits
    yield from groups_named_in(text, root)


def groups_named_in(text: str, root: Path = Path("/")) -> Iterator[tuple[str, Path, bool]]:
    """The same, of a process whose /proc/PID/cgroup is this text."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts, unified = ["unified", ""], True
        elif "memory" in controllers.split(","):
            mounts, unified = ["memory"], False
        else:
            continue
        for mount in mounts:
            top = root / "sys/fs/cgroup" / mount
            for directory in _upwards(top, path):
                yield f"/{directory.relative_to(top)}".removesuffix("/."), directory, unified


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The group's directory and those above it. In a container only some of them can be seen."""
    inside = PurePosixPath(path.lstrip("/"))
    if ".." in inside.parts:
        inside = PurePosixPath()  # the group is out of this container's sight
    yield mount / inside
    for parent in inside.parents:
        if parent != inside:
            yield mount / parent


def limit_in(file: Path) -> int | None:
    """The limit that a file of a control group holds, in bytes; None: it holds none."""
    try:
        return limit_of(file.read_text())
    except (OSError, ValueError):
        return None  # no such limit here: the root of a tree has none, or it is out of sight


def limit_of(text: str) -> int | None:
    """The limit that such a file's text says, in bytes; None: that there is none.

    Raises:
        ValueError: it says something else.
    """
    limit = _V1_NO_LIMIT if text.strip() == "max" else int(text)
    return limit if limit < _V1_NO_LIMIT else None
