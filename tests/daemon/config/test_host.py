"""What is read of the machine."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from vswapd.host import Host, uid_of_user

GIB = 1 << 30


def machine(root: Path, cgroup: str | None, limits: dict[str, str]) -> Path:
    """A tree with 8 GiB of RAM, this /proc/self/cgroup and these files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:  {8 << 20} kB\nMemFree: 1 kB\n")
    if cgroup is not None:
        (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in limits.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        (None, {}, 8 * GIB),
        ("0::/a/b\n", {}, 8 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": "max"}, 8 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": str(2 * GIB)}, 2 * GIB),
        ("0::/a/b\n", {"a/memory.max": str(GIB), "a/b/memory.max": str(2 * GIB)}, GIB),
        ("0::/a/b\n", {"a/b/memory.high": str(3 * GIB), "a/b/memory.max": "max"}, 3 * GIB),
        ("0::/a/b\n", {"memory.max": str(GIB)}, GIB),
        ("0::/../x\n", {"memory.max": str(GIB)}, GIB),
        ("0::/a\n", {"a/memory.max": str(64 * GIB)}, 8 * GIB),
        ("5:cpu:/c\n4:memory:/m/n\n", {"memory/m/memory.limit_in_bytes": str(GIB)}, GIB),
        ("4:memory:/m\n", {"memory/m/memory.limit_in_bytes": "9223372036854771712"}, 8 * GIB),
        ("4:cpu,memory:/m\n", {"memory/m/memory.limit_in_bytes": str(GIB)}, GIB),
        ("1:name=systemd:/x\n0::/u\n", {"unified/u/memory.max": str(GIB)}, GIB),
    ],
)
def test_ram_is_what_the_process_may_use(
    tmp_path: Path, cgroup: str | None, limits: dict[str, str], expected: float
) -> None:
    """Usable memory is RAM or the smallest limit of any control group above, version 1 or 2."""
    assert Host.here(machine(tmp_path, cgroup, limits)).ram_bytes == expected


def test_this_machine_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real /proc gives a plausible amount of memory and this process's uid."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    host = Host.here()
    assert (
        1 << 24
        < host.ram_bytes
        <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + (1 << 20)
    )
    assert host.uid == os.geteuid()
    assert host.runtime_dir == str(tmp_path)


def test_runtime_directory_that_is_not_there_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stale $XDG_RUNTIME_DIR does not become the socket's place."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert Host.here().runtime_dir is None


@pytest.mark.parametrize(
    ("uid", "runtime", "path"),
    [
        (0, "/run/user/0", "/run/vswapd.sock"),
        (1000, "/run/user/1000", "/run/user/1000/vswapd.sock"),
        (1000, None, "/tmp/vswapd-1000/vswapd.sock"),
    ],
)
def test_socket_has_a_place_by_default(uid: int, runtime: str | None, path: str) -> None:
    """Root's socket lies in /run, a user's in the runtime directory, else in a private one."""
    assert Host(ram_bytes=1, uid=uid, runtime_dir=runtime).socket_path == path


def test_users_are_looked_up() -> None:
    """A user's name becomes a uid, and an unknown one None."""
    me = pwd.getpwuid(os.getuid())
    assert uid_of_user(me.pw_name) == me.pw_uid
    assert uid_of_user("no such user") is None
