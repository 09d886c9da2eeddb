"""The installed service under a real systemd: who may do what, and what the daemon itself may do.

Each test brings the service into the state it needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest

from support.container import Container, missing, raises_limits
from support.installed import (
    MEMBER,
    ROUND_TRIP,
    STRANGER,
    client,
    ctl,
    drop_in,
    main_pid,
    of_process,
    restarted,
    show,
    status,
)
from support.privileges import skip_unless_locking
from support.sources import REPOSITORY

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

# In CI a skip is a failure (see tests/conftest.py), so there it must run.
if reason := missing():
    pytest.skip(reason, allow_module_level=True)


def test_a_stranger_is_refused(machine: Container) -> None:
    """Who is neither root nor in the group vswap cannot even connect."""
    restarted(machine)
    result = client(machine, ROUND_TRIP, STRANGER)
    assert result.returncode != 0
    assert "/run/vswapd.sock" in result.stderr
    assert "ermission" in result.stderr
    assert ctl(machine, "status", user=STRANGER).returncode != 0


def test_the_socket_belongs_to_the_group(machine: Container) -> None:
    """systemd makes the socket: root's, of the group vswap, closed to everybody else."""
    restarted(machine)
    described = machine.run("stat", "--format=%U %G %a", "/run/vswapd.sock").stdout
    assert described == "root vswap 660\n"


def test_a_member_sees_the_status(machine: Container) -> None:
    """Status is for whoever may connect."""
    restarted(machine)
    document = ctl(machine, "status", "--json", user=MEMBER)
    assert json.loads(document.stdout)["state"] == "running", document.stderr
    screen = ctl(machine, user=MEMBER)
    assert "nothing stored" in screen.stdout, screen.stderr


@pytest.mark.parametrize(
    "words",
    [
        "set pool.tiers=zstd:3",
        "reload",
        "swapon /var/lib/vswapd/swap --size 64M",
        "swapoff /var/lib/vswapd/swap",
        "writeback 1M",
        "compact",
        "verify",
        "spaces --uid 0",
        "drop cache --uid 0",
    ],
)
def test_a_member_may_not_steer(machine: Container, words: str) -> None:
    """Steering is root's: a member is told so, in one line and with exit code 77."""
    machine.run("systemctl", "start", "vswapd.service")
    before = status(machine)["settings"]
    refused = ctl(machine, *words.split(), user=MEMBER)
    assert (refused.returncode, refused.stdout) == (77, ""), refused.stderr
    assert refused.stderr.count("\n") == 1
    after = status(machine)
    assert (after["settings"], after["devices"]) == (before, [])


def test_root_may_steer(machine: Container) -> None:
    """What root sets holds at once."""
    restarted(machine)
    done = ctl(machine, "set", "pool.tiers=zstd:3")
    assert done.returncode == 0, done.stderr
    assert status(machine)["pool"]["codec"] == "zstd:3"


def test_a_device_inside_the_sandbox(machine: Container) -> None:
    """A swap device in the state directory is created, written with O_DIRECT, and read back."""
    restarted(machine)
    result = ctl(machine, "swapon", "/var/lib/vswapd/swap", "--size", "64M")
    assert result.returncode == 0, result.stderr
    script = (
        "import os, subprocess, vswap\n"
        "pages = os.urandom(vswap.PAGE_BYTES * 1024)\n"
        "with vswap.connect() as space:\n"
        "    slots = space.store(pages)\n"
        "    subprocess.run(['vswapctl', 'writeback', '2M'], check=True, capture_output=True)\n"
        "    on_device = space.status()['slots']['phys']\n"
        "    assert bytes(space.load(slots)) == pages\n"
        "print('written' if on_device >= 500 else on_device)\n"
    )
    result = client(machine, script, "root")
    assert result.stdout == "written\n", result.stderr
    device = status(machine)["devices"][0]
    assert device["direct"]
    assert device["encrypted"]
    described = machine.run("stat", "--format=%U %a", "/var/lib/vswapd/swap").stdout
    assert described == "vswap 600\n"
    result = ctl(machine, "swapoff", "/var/lib/vswapd/swap")
    assert result.returncode == 0, result.stderr


def _held_maps(machine: Container) -> list[str]:
    """What /proc says of the shards' tables and pools, 16 MiB of incompressible pages in them."""
    script = (
        "import os, vswap\n"
        "with vswap.connect() as space:\n"
        "    slots = space.store(os.urandom(vswap.PAGE_BYTES * 4096))\n"
        f"    main = {main_pid(machine)}\n"
        "    shards = open(f'/proc/{main}/task/{main}/children').read().split()\n"
        "    for pid in [main, *shards]:\n"
        "        print(open(f'/proc/{pid}/smaps').read())\n"
    )
    result = client(machine, script, "root")
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", result.stdout, flags=re.MULTILINE)
    held = [
        text for text in maps if re.search("/memfd:vswapd-(table|pool)", text.partition("\n")[0])
    ]
    assert held, result.stderr
    return held


def _kilobytes(maps: list[str], name: str) -> int:
    return sum(int(n) for n in re.findall(rf"^{name}: +(\d+) kB$", "".join(maps), re.MULTILINE))


def test_memory_is_locked_as_it_fills(machine: Container) -> None:
    """What stands in table and pool is locked, and nothing is brought in only to be locked."""
    skip_unless_locking(1 << 20)
    restarted(machine)
    held = _held_maps(machine)
    locked = _kilobytes(held, "Locked")
    assert 16 * 1024 <= locked < 32 * 1024
    assert locked == _kilobytes(held, "Rss")
    assert _kilobytes(held, "Size") > 100 * locked
    assert show(machine, "LimitMEMLOCK") == "infinity"
    if raises_limits():
        limits = of_process(machine, "limits")
        assert re.search(r"^Max locked memory +unlimited +unlimited", limits, re.MULTILINE)


def test_pages_are_in_no_core_dump(machine: Container) -> None:
    """The daemon dumps no core, and table and pool would be left out of one."""
    restarted(machine)
    for text in _held_maps(machine):
        flags = re.search(r"^VmFlags: (.*)$", text, re.MULTILINE)
        assert flags is not None
        assert "dd" in flags[1].split()  # "do not include area into core dump", see proc(5)
    limits = of_process(machine, "limits")
    assert re.search(r"^Max core file size +0 +0 +bytes", limits, re.MULTILINE)


def test_others_are_killed_first(machine: Container) -> None:
    """When memory runs out, the kernel looks for somebody else."""
    restarted(machine)
    assert show(machine, "OOMScoreAdjust") == "-900"
    if raises_limits():
        assert of_process(machine, "oom_score_adj") == "-900\n"


def test_it_runs_as_a_user_without_rights(machine: Container) -> None:
    """The daemon is the user vswap, has no capability it does not need, and can gain none."""
    restarted(machine)
    shown = of_process(machine, "status")
    uid = machine.run("id", "-u", "vswap").stdout.strip()
    assert re.search(rf"^Uid:\t{uid}\t{uid}\t{uid}\t{uid}$", shown, re.MULTILINE)
    capabilities = 0 if raises_limits() else 1 << 14  # CAP_IPC_LOCK, see _allow_locking
    assert re.search(rf"^CapBnd:\t{capabilities:016x}$", shown, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\t1$", shown, re.MULTILINE)
    assert re.search(r"^Seccomp:\t2$", shown, re.MULTILINE)


def test_exposure_of_the_running_unit(machine: Container) -> None:
    """`systemd-analyze security` gives the installed unit at most 1.5 of 10."""
    restarted(machine)
    report = machine.run("systemd-analyze", "security", "--no-pager", "vswapd.service").stdout
    exposure = re.search(r"Overall exposure level for vswapd.service: ([0-9.]+)", report)
    assert exposure is not None, report
    assert float(exposure[1]) <= 1.5


@pytest.fixture
def override(machine: Container) -> Iterator[Callable[[str], None]]:
    """Puts a drop-in into force, by its heading in docs/installing.md; takes it back at the end."""
    path = drop_in(machine, "documented")
    text = (REPOSITORY / "docs/installing.md").read_text()

    def apply(heading: str) -> None:
        found = re.search(
            rf"^\*\*{heading}\.\*\*.*?^```ini\n(.*?)^```", text, re.DOTALL | re.MULTILINE
        )
        assert found is not None
        path.write_text(found[1])
        machine.run("systemctl", "daemon-reload")
        restarted(machine)

    yield apply
    path.unlink(missing_ok=True)
    machine.run("systemctl", "daemon-reload")
    # What was set, or swapped on, goes with the service.
    machine.run("systemctl", "stop", "vswapd.service")
    restarted(machine)


_FETCH = """
import urllib.request
with urllib.request.urlopen("http://127.0.0.1:9177/metrics", timeout=60) as answer:
    print(answer.read().decode())
"""


def test_metrics_need_the_override(machine: Container, override: Callable[[str], None]) -> None:
    """The sandbox has no network: the port cannot be had, until the documented override is made."""
    restarted(machine)
    refused = ctl(machine, "set", "metrics.listen=127.0.0.1:9177")
    assert refused.returncode == 2, refused.stdout
    assert "metrics.listen" in refused.stderr
    override("Metrics over HTTP")
    done = ctl(machine, "set", "metrics.listen=127.0.0.1:9177")
    assert done.returncode == 0, done.stderr
    page = client(machine, _FETCH, STRANGER)
    assert "\nvswap_clients " in page.stdout, page.stderr


def test_a_device_elsewhere_needs_the_override(
    machine: Container, override: Callable[[str], None]
) -> None:
    """The daemon writes to its own directory, and elsewhere with the documented override."""
    machine.run("install", "-d", "--owner=vswap", "/mnt/fast/vswapd")
    restarted(machine)
    swapon = ("swapon", "/mnt/fast/vswapd/swap", "--size", "2M")
    refused = ctl(machine, *swapon)
    assert refused.returncode == 1, refused.stdout
    assert "Read-only file system" in refused.stderr
    override("A swap device as a file elsewhere")
    done = ctl(machine, *swapon)
    assert done.returncode == 0, done.stderr


def test_memory_need_not_be_locked(machine: Container, override: Callable[[str], None]) -> None:
    """With the documented override nothing is locked."""
    override("Memory not locked")
    assert _kilobytes(_held_maps(machine), "Locked") == 0
