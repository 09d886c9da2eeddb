"""The installed service under a real systemd: activation, reload, restart, watchdog, stop, journal.

Each test brings the service into the state it needs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest

from support.container import Container, missing
from support.installed import (
    MEMBER,
    ROUND_TRIP,
    Journal,
    client,
    drop_in,
    main_pid,
    restarted,
    show,
    status,
)

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

# In CI a skip is a failure (see tests/conftest.py), so there it must run.
if reason := missing():
    pytest.skip(reason, allow_module_level=True)


@contextlib.contextmanager
def shards_of_service(machine: Container, shards: int) -> Iterator[None]:
    """The service started anew, with nothing kept, with so many shards."""
    configuration = machine.root / "etc/vswapd/vswapd.toml"
    before = configuration.read_text()
    try:
        configuration.write_text(f"[server]\nshards = {shards}\n")
        machine.run("systemctl", "stop", "vswapd.service")
        restarted(machine)
        assert status(machine)["shards"] == shards
        yield
    finally:
        configuration.write_text(before)
        machine.run("systemctl", "stop", "vswapd.service")
        restarted(machine)


def test_socket_activation(machine: Container) -> None:
    """The first connection of a member starts the service, which serves it at once."""
    machine.run("systemctl", "stop", "vswapd.service")
    assert show(machine, "ActiveState") == "inactive"
    result = client(machine, ROUND_TRIP, MEMBER)
    assert result.stdout == "loaded 3000\n", result.stderr
    assert show(machine, "ActiveState") == "active"
    assert machine.run("systemctl", "is-active", "vswapd.socket").stdout == "active\n"


def test_reload(machine: Container) -> None:
    """A reload applies what can change at run time and names in the journal what cannot."""
    restarted(machine)
    journal = Journal(machine)
    configuration = machine.root / "etc/vswapd/vswapd.toml"
    before = configuration.read_text()
    pid = main_pid(machine)
    try:
        configuration.write_text('[pool]\ntiers = ["zstd:1"]\n[server]\nmax_connections = 7\n')
        machine.run("systemctl", "reload", "vswapd.service")
        journal.await_line(r"server\.max_connections")
        assert status(machine)["pool"]["codec"] == "zstd:1"
        configuration.write_text('[pool]\ntires = ["zstd:1"]\n')
        machine.run("systemctl", "reload", "vswapd.service")
        journal.await_line(r"pool\.tiers")
        assert status(machine)["pool"]["codec"] == "zstd:1"
    finally:
        configuration.write_text(before)
    assert main_pid(machine) == pid
    assert show(machine, "ActiveState") == "active"


def test_a_wrong_configuration_loses_nothing(machine: Container) -> None:
    """A misspelt key keeps the service from starting; corrected, it goes on with all pages."""
    restarted(machine)
    journal = Journal(machine)
    configuration = machine.root / "etc/vswapd/vswapd.toml"
    before = configuration.read_text()
    script = (
        "import subprocess, vswap\n"
        "space = vswap.connect()\n"
        "slots = space.store(b'x' * vswap.PAGE_BYTES)\n"
        "good = open('/etc/vswapd/vswapd.toml').read()\n"
        "open('/etc/vswapd/vswapd.toml', 'w').write('[pool]\\ntires = [\"zstd:1\"]\\n')\n"
        "print(subprocess.run(['systemctl', 'restart', 'vswapd.service']).returncode != 0)\n"
        "open('/etc/vswapd/vswapd.toml', 'w').write(good)\n"
        "print(bytes(space.load(slots)) == b'x' * vswap.PAGE_BYTES)\n"
    )
    try:
        result = client(machine, script, "root")
    finally:
        configuration.write_text(before)
    assert result.stdout == "True\nTrue\n", result.stderr
    journal.await_line(r"pool\.tires")


def test_ready_is_reported_with_a_status(machine: Container) -> None:
    """The service tells systemd that it is ready, and in a line what it does."""
    restarted(machine)
    assert show(machine, "Type") == "notify"
    assert show(machine, "StatusText")


def test_a_stuck_daemon_is_restarted_by_the_watchdog(machine: Container) -> None:
    """An event loop that makes no progress is killed; the service comes back with all pages."""
    settings = drop_in(machine, "watchdog")
    try:
        settings.write_text("[Service]\nWatchdogSec=3s\n")
        machine.run("systemctl", "daemon-reload")
        restarted(machine)
        journal = Journal(machine)
        stuck = main_pid(machine)
        script = (
            "import os, subprocess, vswap\n"
            "space = vswap.connect()\n"
            "pages = os.urandom(500 * vswap.PAGE_BYTES)\n"
            "slots = space.store(pages)\n"
            "stop = ['systemctl', 'kill', '--signal=SIGSTOP', 'vswapd.service']\n"
            "subprocess.run(stop, check=True)\n"
            "print(bytes(space.load(slots)) == pages)\n"
        )
        result = client(machine, script, "root")
        assert result.stdout == "True\n", result.stderr
        journal.await_line(r"Watchdog timeout")
        journal.await_line(r"Scheduled restart job")
        assert main_pid(machine) != stuck
    finally:
        settings.unlink()
        machine.run("systemctl", "daemon-reload")
        restarted(machine)


def test_an_idle_daemon_feeds_the_watchdog(machine: Container) -> None:
    """The watchdog is configured, and a daemon with nothing to do keeps feeding it."""
    restarted(machine)
    assert show(machine, "WatchdogUSec") == "30s"
    assert show(machine, "WatchdogTimestampMonotonic") != "0"


def test_stop_is_clean(machine: Container) -> None:
    """Stopping exits with 0, leaves no process and no socket, and complains of nothing."""
    restarted(machine)
    journal = Journal(machine)
    assert client(machine, ROUND_TRIP, MEMBER).stdout == "loaded 3000\n"
    machine.run("systemctl", "stop", "vswapd.socket", "vswapd.service")
    assert show(machine, "Result") == "success"
    assert show(machine, "ExecMainStatus") == "0"
    assert not (machine.root / "run/vswapd.sock").exists()
    left = machine.run("find", "/proc", "-maxdepth", "1", "-user", "vswap").stdout
    assert left == ""
    alarming = [entry for entry in journal.entries() if int(entry["PRIORITY"]) <= 4]
    assert not alarming


def test_the_journal_has_levels_and_one_line_per_event(machine: Container) -> None:
    """What the daemon logs reaches the journal with its level, one entry per event."""
    journal = Journal(machine)
    restarted(machine)
    machine.run("systemctl", "stop", "vswapd.service")
    own = [entry for entry in journal.entries() if entry.get("_COMM") != "systemd"]
    said = [entry for entry in own if entry.get("_SYSTEMD_UNIT") == "vswapd.service"]
    assert said
    assert {entry["PRIORITY"] for entry in said} <= {"5", "6"}
    assert not any("Traceback" in entry["MESSAGE"] for entry in said)


KEEPS = """
import subprocess, sys, vswap
page = vswap.PAGE_BYTES
pages = b"".join(bytes([n % 251, n // 251]) * (page // 2) for n in range(3000))
with vswap.connect() as space:
    slots = space.store(pages)
    for _ in range(3):
        subprocess.run(sys.argv[1:], check=True)
        assert bytes(space.load(slots)) == pages
        space.store(pages[:page], slots=slots[:1])
    space.free(slots)
    print("kept", len(slots))
"""
"""A client whose pages are there again, byte for byte, whatever becomes of the daemon."""


def keeps(machine: Container, *command: str) -> None:
    """Run a command three times in the life of a space."""
    result = client(machine, KEEPS.replace("sys.argv[1:]", repr(list(command))), "root")
    assert result.stdout == "kept 3000\n", result.stderr
    report = machine.run("vswapctl", "verify", "--json")
    assert json.loads(report.stdout)["ok"], report.stdout


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("whom", ["all", "main"])
def test_a_killed_service_keeps_all_pages(machine: Container, shards: int, whom: str) -> None:
    """It is started again by systemd, over the memory that systemd has kept."""
    with shards_of_service(machine, shards):
        journal = Journal(machine)
        keeps(
            machine,
            *("systemctl", "kill", "--signal=SIGKILL", f"--kill-who={whom}", "vswapd.service"),
        )
        journal.await_line(r"Scheduled restart job")
        assert client(machine, ROUND_TRIP, MEMBER).stdout == "loaded 3000\n"


@pytest.mark.parametrize("shards", [1, 3])
def test_a_restart_keeps_all_pages(machine: Container, shards: int) -> None:
    """A restart is clean: nobody is refused, and nothing is lost."""
    with shards_of_service(machine, shards):
        journal = Journal(machine)
        pid = main_pid(machine)
        keeps(machine, "systemctl", "restart", "vswapd.service")
        assert main_pid(machine) != pid
        assert show(machine, "NRestarts") == "0"
        assert [entry for entry in journal.entries() if int(entry["PRIORITY"]) <= 4] == []


def test_a_stop_gives_the_memory_back(machine: Container) -> None:
    """What is kept goes with the service: the next start finds nothing, and its client is told."""
    restarted(machine)
    script = (
        "import subprocess, vswap\n"
        "space = vswap.connect()\n"
        "slots = space.store(b'x' * vswap.PAGE_BYTES)\n"
        "subprocess.run(['systemctl', 'stop', 'vswapd.service'], check=True)\n"
        "try:\n"
        "    space.load(slots)\n"
        "except vswap.SpaceLost:\n"
        "    print('lost')\n"
    )
    result = client(machine, script, "root")
    assert result.stdout == "lost\n", result.stderr


def test_upgrade(machine: Container) -> None:
    """Installing over a running service leaves it running; a restart brings what was installed."""
    restarted(machine)
    pid = main_pid(machine)
    machine.run("make", "-C", "/src", "install", "PYTHON=/usr/bin/python3")
    assert main_pid(machine) == pid
    assert client(machine, ROUND_TRIP, MEMBER).stdout == "loaded 3000\n"
    restarted(machine)
    assert client(machine, ROUND_TRIP, MEMBER).stdout == "loaded 3000\n"
