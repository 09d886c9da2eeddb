"""What is left of memory is the least of what the machine and all control groups have."""

from __future__ import annotations

from pathlib import Path

import pytest

from vswapd.free_memory import FreeMemory
from vswapd.pressure import Free

GIB = 1 << 30
MIB = 1 << 20


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """4 GiB left of 8, and these files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    lines = f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {4 << 20} kB\n"
    (root / "proc/meminfo").write_text(lines)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


def v2(where: str, limit: str, usage: int, *, high: str = "max") -> dict[str, str]:
    return {
        f"{where}memory.max": limit,
        f"{where}memory.high": high,
        f"{where}memory.current": str(usage),
        f"{where}memory.stat": f"anon 5\ninactive_file {MIB}\nactive_file {4 * MIB}",
    }


def v1(where: str, limit: int, usage: int) -> dict[str, str]:
    return {
        f"{where}memory.limit_in_bytes": str(limit),
        f"{where}memory.usage_in_bytes": str(usage),
        f"{where}memory.stat": f"inactive_file 7\ntotal_inactive_file {MIB}\ntotal_active_file 0",
    }


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, Free(4 * GIB, "the machine")),
        ("0::/a\n", v2("a/", "max", GIB), Free(4 * GIB, "the machine")),
        (
            "0::/a/b\n",
            v2("a/b/", str(2 * GIB), GIB),
            Free(GIB + 3 * MIB, "control group /a/b"),
        ),
        (
            "0::/a/b\n",
            v2("a/b/", str(2 * GIB), GIB) | v2("a/", str(3 * GIB), 3 * GIB),
            Free(3 * MIB, "control group /a"),
        ),
        (
            "0::/a\n",
            v2("a/", str(2 * GIB), GIB, high=str(GIB // 2)),
            Free(3 * MIB - GIB // 2, "control group /a"),
        ),
        ("0::/\n", v2("", str(GIB), GIB), Free(3 * MIB, "control group /")),
        ("0::/u\n", v2("unified/u/", str(GIB), GIB), Free(3 * MIB, "control group /u")),
        (
            "3:cpu:/x\n4:memory:/m/n\n0::/\n",
            v1("memory/m/", GIB, GIB // 2),
            Free(GIB // 2 + MIB, "control group /m"),
        ),
        ("4:memory:/m\n", v1("memory/m/", (1 << 63) - 4096, 5), Free(4 * GIB, "the machine")),
    ],
)
def test_the_least_is_what_is_left(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: Free
) -> None:
    """Of RAM and each group above this process; pages of files count as far as they can go."""
    assert FreeMemory(machine(tmp_path, cgroup, files))() == expected


def test_limits_may_change(tmp_path: Path) -> None:
    """A limit that is set, changed or lifted while the daemon runs holds from the next look on."""
    root = machine(tmp_path, "0::/a\n", v2("a/", "max", GIB))
    meter = FreeMemory(root)
    assert meter().where == "the machine"
    limit = root / "sys/fs/cgroup/a/memory.max"
    limit.write_text(f"{2 * GIB}\n")
    assert meter() == Free(GIB + 3 * MIB, "control group /a")
    limit.unlink()
    assert meter().where == "the machine"


def test_this_machine_can_be_read() -> None:
    """The real files give a plausible number."""
    free = FreeMemory()()
    assert 0 < free.nbytes < 1 << 50
