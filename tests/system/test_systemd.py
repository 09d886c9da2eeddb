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
    ctl,
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
        configuration.write_text('[pool]\ntires = ["zstd:3"]\n')
        failed = machine.run("systemctl", "reload", "vswapd.service", check=False)
        assert failed.returncode != 0
        journal.await_line(r"did you mean pool\.tiers")
        assert status(machine)["pool"]["codec"] == "zstd:1"
        assert "did you mean pool.tiers" in status(machine)["config_error"]
        configuration.write_text('[pool]\ntiers = ["zstd:2"]\n')
        machine.run("systemctl", "reload", "vswapd.service")
        # It has been done when systemctl returns.
        assert status(machine)["pool"]["codec"] == "zstd:2"
        assert status(machine)["config_error"] is None
    finally:
        configuration.write_text(before)
    assert main_pid(machine) == pid
    assert show(machine, "ActiveState") == "active"


WRONG = """
import json, subprocess, vswap

def run(*command):
    return subprocess.run(command, capture_output=True, text=True)

file = "/etc/vswapd/vswapd.toml"
good = open(file).read()
page = b"x" * vswap.PAGE_BYTES
with vswap.connect() as space:
    slots = space.store(page)
    open(file, "w").write("[pool]\\ntires = [\\"zstd:1\\"]\\n")
    for command in (
        ("systemctl", "restart", "vswapd.service"),
        ("systemctl", "kill", "--signal=SIGKILL", "vswapd.service"),
    ):
        assert run(*command).returncode == 0
        assert bytes(space.load(slots)) == page
        for shown in (
            run("systemctl", "status", "vswapd.service").stdout,
            run("vswapctl", "status").stdout,
            json.loads(run("vswapctl", "status", "--json").stdout)["config_error"],
        ):
            assert "did you mean pool.tiers" in shown.replace("\\n", " "), shown
    assert "vswapd" not in run("systemctl", "--failed").stdout
    open(file, "w").write(good)
    assert run("systemctl", "reload", "vswapd.service").returncode == 0
    assert bytes(space.load(slots)) == page
    print(json.loads(run("vswapctl", "status", "--json").stdout)["config_error"])
"""


@pytest.mark.parametrize("shards", [1, 3])
def test_a_wrong_configuration_loses_nothing(machine: Container, shards: int) -> None:
    """With a misspelt key the service goes on with what was good, and all that shows it says so."""
    with shards_of_service(machine, shards):
        journal = Journal(machine)
        configuration = machine.root / "etc/vswapd/vswapd.toml"
        before = configuration.read_text()
        try:
            result = client(machine, WRONG, "root")
        finally:
            configuration.write_text(before)
        assert result.stdout == "None\n", result.stderr
        own = [entry for entry in journal.entries() if entry.get("_COMM") != "systemd"]
        alarming = [entry["MESSAGE"] for entry in own if int(entry["PRIORITY"]) <= 3]
        assert len(alarming) == 2, alarming
        assert all("did you mean pool.tiers" in line for line in alarming)


def test_a_wrong_configuration_with_nothing_kept(machine: Container) -> None:
    """The service has failed, where everybody looks; whoever connects meanwhile is told."""
    configuration = machine.root / "etc/vswapd/vswapd.toml"
    before = configuration.read_text()
    try:
        machine.run("systemctl", "stop", "vswapd.service")
        configuration.write_text('[pool]\ntires = ["zstd:1"]\n')
        journal = Journal(machine)
        assert machine.run("systemctl", "start", "vswapd.service", check=False).returncode != 0
        assert show(machine, "ActiveState") == "failed"
        assert show(machine, "ExecMainStatus") == "78"
        assert "vswapd.service" in machine.run("systemctl", "--failed").stdout
        [said] = [entry for entry in journal.entries() if entry.get("_COMM") != "systemd"]
        assert said["PRIORITY"] == "3"
        assert "did you mean pool.tiers" in said["MESSAGE"]
        # The socket begins it again for a client, who is told at once.
        result = client(machine, ROUND_TRIP, MEMBER)
        assert result.returncode != 0
        assert "vswap.errors." in result.stderr
        assert machine.run("systemctl", "is-active", "vswapd.socket").stdout == "active\n"
        configuration.write_text(before)
        # A start that the client was the cause of may still have the wrong one.
        machine.run("systemctl", "restart", "vswapd.service")
        assert client(machine, ROUND_TRIP, MEMBER).stdout == "loaded 3000\n"
    finally:
        configuration.write_text(before)
        restarted(machine)


FOREIGN = """
import glob, os, subprocess, time, vswap

def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

def show(name):
    return run("systemctl", "show", "--value", "-p" + name, "vswapd.service").strip()

page = b"x" * vswap.PAGE_BYTES
with vswap.connect() as space:
    slots = space.store(page)
    [path, *_] = [
        path
        for path in glob.glob("/proc/" + show("MainPID") + "/fd/*")
        if "memfd:vswapd-table" in os.readlink(path)
    ]
    table = os.open(path, os.O_RDWR)
    at = os.fstat(table).st_size - os.sysconf("SC_PAGE_SIZE")
    label = os.pread(table, 64, at)
    kept = show("NFileDescriptorStore")
    os.pwrite(table, label[:8] + (99).to_bytes(4, "little") + label[12:], at)
    follow = ["journalctl", "--follow", "--lines=0", "--output=cat", "--unit=vswapd.service"]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as journal:
        for _ in range(3):
            # Each of them waits before it ends, and so does this.
            run("systemctl", "kill", "--signal=SIGKILL", "vswapd.service")
            while "layout version 99" not in journal.stdout.readline():
                pass
        journal.terminate()
    while "layout version 99" not in show("StatusText"):
        pass
    assert show("NFileDescriptorStore") == kept, show("NFileDescriptorStore")
    assert "vswapd" not in run("systemctl", "--failed")
    os.pwrite(table, label, at)
    run("systemctl", "restart", "vswapd.service")
    print(bytes(space.load(slots)) == page)
"""


def test_memory_that_cannot_be_gone_on_with_is_not_given_up(machine: Container) -> None:
    """Journal and status say why, until somebody has put it right: then all pages are there."""
    restarted(machine)
    result = client(machine, FOREIGN, "root")
    assert result.stdout == "True\n", result.stderr


def test_a_reload_after_a_restart_finds_nothing_changed(machine: Container) -> None:
    """What was meant is what is meant; what a restart does not change is said to need a stop."""
    restarted(machine)
    for _ in range(2):
        machine.run("systemctl", "restart", "vswapd.service")
        assert ctl(machine, "reload").stdout == "nothing has changed\n"
    configuration = machine.root / "etc/vswapd/vswapd.toml"
    before = configuration.read_text()
    shards = status(machine)["shards"]
    try:
        configuration.write_text(f"[server]\nshards = {shards + 1}\n")
        for _ in range(2):
            said = ctl(machine, "reload").stdout
            assert "needs a stop and a start, as a restart keeps the memory: server.shards" in said
            machine.run("systemctl", "restart", "vswapd.service")
            assert status(machine)["shards"] == shards
        machine.run("systemctl", "stop", "vswapd.service")
        machine.run("systemctl", "start", "vswapd.service")
        assert status(machine)["shards"] == shards + 1
        assert ctl(machine, "reload").stdout == "nothing has changed\n"
    finally:
        configuration.write_text(before)
        machine.run("systemctl", "stop", "vswapd.service")
        restarted(machine)


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
@pytest.mark.parametrize("how", ["SIGKILL all", "SIGKILL main", "SIGTERM main"])
def test_a_killed_service_keeps_all_pages(machine: Container, shards: int, how: str) -> None:
    """It is started again by systemd, over the memory that systemd has kept."""
    number, whom = how.split()
    with shards_of_service(machine, shards):
        journal = Journal(machine)
        keeps(
            machine,
            *("systemctl", "kill", f"--signal={number}", f"--kill-who={whom}", "vswapd.service"),
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
