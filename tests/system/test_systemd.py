"""The installed service under a real systemd: activation, access, reload, watchdog, stop, journal.

The tests share one container, and each brings the service into the state it needs. Nothing in the
container reaches a network: what is installed comes from wheels that this machine fetched.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.container import Container, booted_container, missing, raises_limits
from support.sources import REPOSITORY, copy_sources

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

# In CI a skip is a failure (see conftest.py), so there it must run.
if reason := missing():
    pytest.skip(reason, allow_module_level=True)

PYTHON = "/usr/local/lib/vswapd/bin/python"
MEMBER = "member"
STRANGER = "stranger"
DEADLINE_S = 60.0

ROUND_TRIP = """
import os, random, vswap
page = vswap.PAGE_BYTES
pages = b"".join(
    (bytes(page), os.urandom(page), random.randbytes(64) * (page // 64))[n % 3] for n in range(3000)
)
with vswap.connect() as space:
    slots = space.store(pages)
    assert bytes(space.load(slots)) == pages
    space.free(slots)
    print("loaded", len(slots))
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A booted machine on which vswapd is installed, with its socket unit enabled."""
    with booted_container() as container:
        copy_sources(container.root / "src")
        _fetch_wheels(container, tmp_path_factory.mktemp("wheels"))
        container.run(
            *("make", "-C", "/src", "install", "PYTHON=/usr/bin/python3"),
            environment={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"},
        )
        container.run("systemd-sysusers")
        container.run("systemd-tmpfiles", "--create", "vswapd.conf")
        container.run("useradd", "--groups=vswap", MEMBER)
        container.run("useradd", STRANGER)
        if not raises_limits():
            _allow_locking(container)
        container.run("systemctl", "daemon-reload")
        container.run("systemctl", "enable", "--now", "vswapd.socket")
        yield container


def _allow_locking(container: Container) -> None:
    """Let the service lock memory where nobody may raise a limit, so not even its systemd.

    There the unit's LimitMEMLOCK= has no effect, and only the capability helps.
    """
    drop_in = container.root / "etc/systemd/system/vswapd.service.d/locking.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(
        "[Service]\nAmbientCapabilities=CAP_IPC_LOCK\nCapabilityBoundingSet=CAP_IPC_LOCK\n"
    )


def _fetch_wheels(container: Container, directory: Path) -> None:
    """Everything `make install` needs, for the container's Python, which may not be this one."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    version = container.run(
        "python3", "-c", "import sys; print(*sys.version_info[:2], sep='.')"
    ).stdout.strip()
    _pip(
        *("download", f"--dest={directory}", "--only-binary=:all:", f"--python-version={version}"),
        *project["project"]["dependencies"],
    )
    # What builds is pure Python, and some of it comes as sources only.
    tools = [*project["build-system"]["requires"], *project["dependency-groups"]["man"]]
    _pip("wheel", f"--wheel-dir={directory}", "pip>=25.1", *tools)
    shutil.copytree(directory, container.root / "wheels")


def _pip(*arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _client(machine: Container, script: str, user: str) -> subprocess.CompletedProcess[str]:
    return machine.run(PYTHON, "-I", "-", user=user, check=False, script=script)


def _ctl(
    machine: Container, *arguments: str, user: str | None = None
) -> subprocess.CompletedProcess[str]:
    return machine.run("vswapctl", *arguments, user=user, check=False)


def _status(machine: Container) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(machine.run("vswapctl", "status", "--json").stdout)
    return document


def _show(machine: Container, name: str) -> str:
    return machine.run("systemctl", "show", "--value", f"-p{name}", "vswapd.service").stdout.strip()


def _main_pid(machine: Container) -> int:
    return int(_show(machine, "MainPID"))


def _of_process(machine: Container, file: str) -> str:
    return machine.run("cat", f"/proc/{_main_pid(machine)}/{file}").stdout


def _restarted(machine: Container) -> None:
    """The service has just been started, whatever was before."""
    machine.run("systemctl", "reset-failed", "vswapd.service", "vswapd.socket")
    machine.run("systemctl", "start", "vswapd.socket")
    machine.run("systemctl", "restart", "vswapd.service")


class Journal:
    """What the journal says of the service from the moment on in which this is made."""

    def __init__(self, machine: Container) -> None:
        self._machine = machine
        shown = machine.run("journalctl", "--lines=0", "--show-cursor").stdout
        self._cursor = shown.split("-- cursor: ")[1].strip()

    def await_line(self, pattern: str) -> str:
        """Wait for a message that matches, and return what matched."""
        follow = ["journalctl", "--follow", "--lines=all", "--output=cat", *self._selection()]
        text = b""
        with subprocess.Popen(
            self._machine.command(follow), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN)
            try:
                while (found := re.search(pattern.encode(), text)) is None:
                    assert poll.poll(DEADLINE_S * 1000), f"no {pattern!r} in:\n{text.decode()}"
                    text += os.read(process.stdout.fileno(), 65536)
            finally:
                process.terminate()
        return found[0].decode()

    def entries(self) -> list[dict[str, Any]]:
        """Everything that was said so far, with the journal's fields."""
        lines = self._machine.run("journalctl", "--output=json", *self._selection()).stdout
        return [json.loads(line) for line in lines.splitlines()]

    def _selection(self) -> list[str]:
        return [f"--after-cursor={self._cursor}", "--unit=vswapd.service"]


def test_socket_activation(machine: Container) -> None:
    """The first connection of a member starts the service, which serves it at once."""
    machine.run("systemctl", "stop", "vswapd.service")
    assert _show(machine, "ActiveState") == "inactive"
    result = _client(machine, ROUND_TRIP, MEMBER)
    assert result.stdout == "loaded 3000\n", result.stderr
    assert _show(machine, "ActiveState") == "active"
    assert machine.run("systemctl", "is-active", "vswapd.socket").stdout == "active\n"


def test_a_stranger_is_refused(machine: Container) -> None:
    """Who is neither root nor in the group vswap cannot even connect."""
    _restarted(machine)
    result = _client(machine, ROUND_TRIP, STRANGER)
    assert result.returncode != 0
    assert "/run/vswapd.sock" in result.stderr
    assert "ermission" in result.stderr
    assert _ctl(machine, "status", user=STRANGER).returncode != 0


def test_the_socket_belongs_to_the_group(machine: Container) -> None:
    """systemd makes the socket: root's, of the group vswap, closed to everybody else."""
    _restarted(machine)
    described = machine.run("stat", "--format=%U %G %a", "/run/vswapd.sock").stdout
    assert described == "root vswap 660\n"


def test_a_member_sees_the_status_and_may_not_steer(machine: Container) -> None:
    """Status is for whoever may connect; steering is root's."""
    _restarted(machine)
    shown = _ctl(machine, "status", "--json", user=MEMBER)
    assert json.loads(shown.stdout)["state"] == "running", shown.stderr
    refused = _ctl(machine, "set", "pool.codec=zstd:3", user=MEMBER)
    assert refused.returncode == 77, refused.stderr
    assert _status(machine)["pool"]["codec"] == "lz4"
    done = _ctl(machine, "set", "pool.codec=zstd:3")
    assert done.returncode == 0, done.stderr
    assert _status(machine)["pool"]["codec"] == "zstd:3"


def test_a_device_inside_the_sandbox(machine: Container) -> None:
    """A swap device in the state directory is created, written with O_DIRECT, and read back."""
    _restarted(machine)
    result = _ctl(machine, "swapon", "/var/lib/vswapd/swap", "--size", "64M")
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
    result = _client(machine, script, "root")
    assert result.stdout == "written\n", result.stderr
    device = _status(machine)["devices"][0]
    assert device["direct"]
    assert device["encrypted"]
    described = machine.run("stat", "--format=%U %a", "/var/lib/vswapd/swap").stdout
    assert described == "vswap 600\n"
    result = _ctl(machine, "swapoff", "/var/lib/vswapd/swap")
    assert result.returncode == 0, result.stderr


def test_reload(machine: Container) -> None:
    """A reload applies what can change at run time and names in the journal what cannot."""
    _restarted(machine)
    journal = Journal(machine)
    configuration = machine.root / "etc/vswapd/vswapd.toml"
    before = configuration.read_text()
    pid = _main_pid(machine)
    try:
        configuration.write_text('[pool]\ncodec = "zstd:1"\n[server]\nmax_connections = 7\n')
        machine.run("systemctl", "reload", "vswapd.service")
        journal.await_line(r"server\.max_connections")
        assert _status(machine)["pool"]["codec"] == "zstd:1"
        configuration.write_text('[pool]\ncodek = "zstd:1"\n')
        machine.run("systemctl", "reload", "vswapd.service")
        journal.await_line(r"pool\.codec")
        assert _status(machine)["pool"]["codec"] == "zstd:1"
    finally:
        configuration.write_text(before)
    assert _main_pid(machine) == pid
    assert _show(machine, "ActiveState") == "active"


def test_a_wrong_configuration_is_not_tried_again(machine: Container) -> None:
    """A misspelt key keeps the service from starting, once, and the journal says which it is."""
    _restarted(machine)
    journal = Journal(machine)
    configuration = machine.root / "etc/vswapd/vswapd.toml"
    before = configuration.read_text()
    try:
        configuration.write_text('[pool]\ncodek = "zstd:1"\n')
        assert machine.run("systemctl", "restart", "vswapd.service", check=False).returncode
        journal.await_line(r"pool\.codec")
        assert _show(machine, "ExecMainStatus") == "78"
        assert _show(machine, "ActiveState") == "failed"
        assert _show(machine, "NRestarts") == "0"
    finally:
        configuration.write_text(before)


def test_memory_is_locked_and_in_no_core_dump(machine: Container) -> None:
    """Table and pool are locked as they fill; no core dump, and others are killed first."""
    _restarted(machine)
    script = (
        "import os, sys, vswap\n"
        "with vswap.connect() as space:\n"
        "    slots = space.store(os.urandom(vswap.PAGE_BYTES * 4096))\n"
        f"    print(open('/proc/{_main_pid(machine)}/status').read())\n"
    )
    result = _client(machine, script, "root")
    locked = re.search(r"^VmLck:\s+(\d+) kB$", result.stdout, re.MULTILINE)
    assert locked is not None, result.stderr
    assert int(locked[1]) >= 16 * 1024
    limits = _of_process(machine, "limits")
    assert re.search(r"^Max core file size +0 +0 +bytes", limits, re.MULTILINE)
    assert _show(machine, "LimitMEMLOCK") == "infinity"
    assert _show(machine, "OOMScoreAdjust") == "-900"
    if raises_limits():
        assert re.search(r"^Max locked memory +unlimited +unlimited", limits, re.MULTILINE)
        assert _of_process(machine, "oom_score_adj") == "-900\n"


def test_it_runs_as_a_user_without_rights(machine: Container) -> None:
    """The daemon is the user vswap, has no capability it does not need, and can gain none."""
    _restarted(machine)
    status = _of_process(machine, "status")
    uid = machine.run("id", "-u", "vswap").stdout.strip()
    assert re.search(rf"^Uid:\t{uid}\t{uid}\t{uid}\t{uid}$", status, re.MULTILINE)
    capabilities = 0 if raises_limits() else 1 << 14  # CAP_IPC_LOCK, see _allow_locking
    assert re.search(rf"^CapBnd:\t{capabilities:016x}$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)


def test_exposure_of_the_running_unit(machine: Container) -> None:
    """`systemd-analyze security` gives the installed unit at most 1.5 of 10."""
    _restarted(machine)
    report = machine.run("systemd-analyze", "security", "--no-pager", "vswapd.service").stdout
    exposure = re.search(r"Overall exposure level for vswapd.service: ([0-9.]+)", report)
    assert exposure is not None, report
    assert float(exposure[1]) <= 1.5


def test_ready_is_reported_with_a_status(machine: Container) -> None:
    """The service tells systemd that it is ready, and in a line what it does."""
    _restarted(machine)
    assert _show(machine, "Type") == "notify"
    assert _show(machine, "StatusText")


def test_a_stuck_daemon_is_restarted_by_the_watchdog(machine: Container) -> None:
    """An event loop that makes no progress is killed by systemd, and the service comes back."""
    drop_in = machine.root / "etc/systemd/system/vswapd.service.d/watchdog.conf"
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    try:
        drop_in.write_text("[Service]\nWatchdogSec=3s\n")
        machine.run("systemctl", "daemon-reload")
        _restarted(machine)
        journal = Journal(machine)
        stuck = _main_pid(machine)
        machine.run("systemctl", "kill", "--signal=SIGSTOP", "vswapd.service")
        journal.await_line(r"Watchdog timeout")
        journal.await_line(r"Scheduled restart job")
        assert _client(machine, ROUND_TRIP, MEMBER).stdout == "loaded 3000\n"
        assert _main_pid(machine) != stuck
    finally:
        drop_in.unlink()
        machine.run("systemctl", "daemon-reload")
        _restarted(machine)


def test_an_idle_daemon_feeds_the_watchdog(machine: Container) -> None:
    """The watchdog is configured, and a daemon with nothing to do keeps feeding it."""
    _restarted(machine)
    assert _show(machine, "WatchdogUSec") == "30s"
    assert _show(machine, "WatchdogTimestampMonotonic") != "0"


def test_stop_is_clean(machine: Container) -> None:
    """Stopping exits with 0, leaves no process and no socket, and complains of nothing."""
    _restarted(machine)
    journal = Journal(machine)
    assert _client(machine, ROUND_TRIP, MEMBER).stdout == "loaded 3000\n"
    machine.run("systemctl", "stop", "vswapd.socket", "vswapd.service")
    assert _show(machine, "Result") == "success"
    assert _show(machine, "ExecMainStatus") == "0"
    assert not (machine.root / "run/vswapd.sock").exists()
    left = machine.run("find", "/proc", "-maxdepth", "1", "-user", "vswap").stdout
    assert left == ""
    alarming = [entry for entry in journal.entries() if int(entry["PRIORITY"]) <= 4]
    assert not alarming


def test_the_journal_has_levels_and_one_line_per_event(machine: Container) -> None:
    """What the daemon logs reaches the journal with its level, one entry per event."""
    journal = Journal(machine)
    _restarted(machine)
    machine.run("systemctl", "stop", "vswapd.service")
    own = [entry for entry in journal.entries() if entry.get("_COMM") != "systemd"]
    said = [entry for entry in own if entry.get("_SYSTEMD_UNIT") == "vswapd.service"]
    assert said
    assert {entry["PRIORITY"] for entry in said} <= {"5", "6"}
    assert not any("Traceback" in entry["MESSAGE"] for entry in said)


def test_a_crash_restarts_the_service(machine: Container) -> None:
    """A daemon that is killed is started again; its clients' pages are gone, and they are told."""
    _restarted(machine)
    journal = Journal(machine)
    machine.run("systemctl", "kill", "--signal=SIGKILL", "vswapd.service")
    journal.await_line(r"Scheduled restart job")
    assert _client(machine, ROUND_TRIP, MEMBER).stdout == "loaded 3000\n"
