"""What is left of memory is the least of what the machine and all control groups have."""

from __future__ import annotations

import resource
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


def meter_of(root: Path) -> tuple[FreeMemory, list[str]]:
    """A meter, and what it has told."""
    told: list[str] = []
    return FreeMemory(root, lambda what, error: told.append(f"{what}: {error}")), told


@pytest.mark.parametrize("text", ["", "many\n", "7 8\n", "-\n"])
@pytest.mark.parametrize("name", ["memory.max", "memory.current"])
def test_numbers_that_are_none(tmp_path: Path, name: str, text: str) -> None:
    """A file of the group that makes no sense is told of, and the look is not complete."""
    root = machine(tmp_path, "0::/a\n", v2("a/", str(2 * GIB), GIB))
    meter, told = meter_of(root)
    assert meter() == Free(GIB + 3 * MIB, "control group /a")
    (root / "sys/fs/cgroup/a" / name).write_text(text)
    assert meter() == Free(4 * GIB, "the machine", complete=False)
    assert len(told) == 1
    assert "the memory of control group /a cannot be looked at" in told[0]
    (root / "sys/fs/cgroup/a" / name).write_text(f"{3 * GIB}\n")
    assert meter().complete


@pytest.mark.parametrize("name", ["memory.current", "memory.stat"])
def test_a_file_that_vanishes(tmp_path: Path, name: str) -> None:
    """A limit of which nobody knows how much is used is told of, and the look is not complete."""
    root = machine(tmp_path, "0::/a\n", v2("a/", str(2 * GIB), GIB))
    meter, told = meter_of(root)
    assert meter().complete
    (root / "sys/fs/cgroup/a" / name).unlink()
    assert meter() == Free(4 * GIB, "the machine", complete=False)
    assert name in told[0]


def test_a_machine_that_cannot_be_looked_at(tmp_path: Path) -> None:
    """Without /proc/meminfo the groups are still looked at, and the look is not complete."""
    root = machine(tmp_path, "0::/a\n", v2("a/", str(2 * GIB), GIB))
    meter, told = meter_of(root)
    assert meter().complete
    (root / "proc/meminfo").unlink()
    assert meter() == Free(GIB + 3 * MIB, "control group /a", complete=False)
    assert "the memory of the machine cannot be looked at" in told[0]
    (root / "proc/meminfo").write_text("MemTotal: 5 kB\n")
    assert not meter().complete
    assert "has no MemAvailable" in told[1]


def test_what_could_never_be_looked_at(tmp_path: Path) -> None:
    """Where a file was never readable, nothing is held to it: the look is as complete as any."""
    root = machine(tmp_path, "0::/a\n", v2("a/", str(2 * GIB), GIB))
    (root / "sys/fs/cgroup/a/memory.stat").unlink()
    meter, told = meter_of(root)
    assert meter() == Free(4 * GIB, "the machine")
    assert len(told) == 1


def test_a_process_that_is_moved(tmp_path: Path) -> None:
    """Whoever is put into another group is held to its limit from the next look on."""
    files = v2("a/", str(2 * GIB), GIB) | v2("b/", str(GIB), GIB // 2)
    root = machine(tmp_path, "0::/a\n", files)
    meter = FreeMemory(root)
    assert meter().where == "control group /a"
    (root / "proc/self/cgroup").write_text("0::/b\n")
    assert meter() == Free(GIB // 2 + 3 * MIB, "control group /b")


def test_looks_take_no_descriptor(tmp_path: Path) -> None:
    """Where nothing can be opened any more memory is looked at as before."""
    meter, told = meter_of(machine(tmp_path, "0::/a\n", v2("a/", str(2 * GIB), GIB)))
    before = meter()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        again = meter()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert again == before
    assert not told
