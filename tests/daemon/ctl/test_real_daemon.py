"""vswapctl, the metrics page and the configuration against a daemon as users run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vswap
from support.daemon import RunningDaemon, daemon_environment, running_daemon
from vswapd.ctl import main
from vswapd.metrics.families import FAMILIES

PAGES = b"".join(f"{number:>4096}".encode() for number in range(1000)) + bytes(4096 * 100)


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon("pool.max=16M") as daemon:
        yield daemon


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ctl:
    """vswapctl with the socket of one daemon."""

    def __init__(self, daemon: RunningDaemon, capsys: pytest.CaptureFixture[str]) -> None:
        self._socket = str(daemon.socket_path)
        self._capsys = capsys

    def __call__(self, *words: str, expected: int = 0) -> str:
        code = main(["--socket", self._socket, *words])
        out, err = self._capsys.readouterr()
        assert code == expected, err
        return out if code in {0, 1} and not err else err

    def json(self, *words: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self(*words, "--json"))
        return found


@pytest.fixture
def ctl(daemon: RunningDaemon, capsys: pytest.CaptureFixture[str]) -> Ctl:
    return Ctl(daemon, capsys)


def test_status_shows_what_is_stored(daemon: RunningDaemon, ctl: Ctl) -> None:
    """The screen and the JSON show what a client has stored, under the client's name."""
    with vswap.connect(daemon.socket_path) as space:
        space.store(PAGES)
        status = ctl.json("status")
        screen = ctl("status")
        spaces = ctl("spaces")
    assert status["slots"]["allocated"] == 1100
    assert status["slots"]["zero"] == 100
    assert "1,100 allocated" in screen
    assert "1,100 stored" in screen
    assert "1,100" in spaces
    assert str(os.getpid()) in spaces


def test_a_client_that_has_gone_is_not_shown(daemon: RunningDaemon, ctl: Ctl) -> None:
    """What it has left under a name has no client, and no pid."""
    with vswap.connect(daemon.socket_path, name="left", label="a-program") as space:
        space.store(PAGES)
        assert f"a-program {os.getpid()}" in ctl("status")
    while any(found["pid"] for found in ctl.json("spaces")["spaces"]):
        pass  # the daemon is about to see that it has gone
    for shown in (ctl("status"), ctl("spaces"), ctl("status", "--json"), ctl("spaces", "--json")):
        assert "left" in shown
        assert "a-program" not in shown
    assert "no client (left)" in ctl("status")
    assert ctl("drop", "left").startswith("left: dropped")


def test_names_that_others_rely_on_are_there(ctl: Ctl) -> None:
    """The document has the names that are promised to those who read it."""
    status = ctl.json("status")
    promised = {
        "slots": "allocated unbacked lost zero zswap phys",
        "pool": "bytes max_bytes live_bytes original_bytes",
        "traffic": "store_pages load_pages free_pages writeback_pages writeback_bytes swapin_pages",
        "rejects": "pool_full device_full no_device group_limit writeback_disabled write_budget "
        "disabled",
    }
    for section, names in promised.items():
        assert set(names.split()) <= set(status[section])
    assert {"clients", "spaces", "state", "devices"} <= set(status)


def test_devices_come_and_go(daemon: RunningDaemon, ctl: Ctl, tmp_path: Path) -> None:
    """A device is attached, written to on demand, shown, and drained, with all pages kept."""
    swap = str(tmp_path / "swap")
    assert ctl("swapon", swap, "--size", "8M", "--priority", "7").endswith(", priority 7\n")
    with vswap.connect(daemon.socket_path) as space:
        slots = space.store(PAGES)
        assert "written" in ctl("writeback", "1M")
        device = ctl.json("status")["devices"][0]
        assert device["path"] == swap
        assert set(device) >= {"size_bytes", "used_bytes", "live_bytes", "priority", "state"}
        assert device["live_bytes"] > 0
        assert swap in ctl("status")
        assert ctl("verify").startswith("all good")
        assert "were moved" in ctl("swapoff", swap)
        assert bytes(space.load(slots)) == PAGES
    assert "swap" in ctl("swapoff", swap, expected=1)
    assert "given back" in ctl("compact")


def test_writeback_without_a_device_fails(daemon: RunningDaemon, ctl: Ctl) -> None:
    """Where nothing can be written, writeback says why and fails."""
    with vswap.connect(daemon.socket_path) as space:
        space.store(PAGES)
        assert "stopped: " in ctl("writeback", "1M", expected=1)


def test_settings_change_and_wrong_ones_do_not(ctl: Ctl) -> None:
    """A setting takes effect at once; wrong and fixed ones are refused with what to do."""
    assert ctl("set", "pool.max=24M") == "pool.max: 16M -> 24M\n"
    assert ctl.json("status")["pool"]["max_bytes"] == 24 << 20
    assert "did you mean pool.max?" in ctl("set", "pool.maks=1G", expected=2)
    assert "units B, K, M, G, T" in ctl("set", "pool.max=1Q", expected=2)
    assert "server.max_batch" in ctl("set", "server.max_batch=8", expected=2)
    assert ctl.json("status")["pool"]["max_bytes"] == 24 << 20
    assert ctl("set", "pool.max=16M") == "pool.max: 24M -> 16M\n"


def test_reload_tells_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    """After an edit of the file, reload names what changed and what waits for a restart."""
    with running_daemon(config='[pool]\nmax = "16M"\n') as daemon:
        ctl = Ctl(daemon, capsys)
        file = daemon.directory / "vswapd.toml"
        file.write_text('[pool]\nmax = "32M"\n[server]\nmax_batch = 8\n')
        assert ctl("reload") == "changed: pool.max\nneeds a restart: server.max_batch\n"
        assert ctl("reload") == "nothing has changed\nneeds a restart: server.max_batch\n"
        file.write_text('[pool]\nmaks = "32M"\n')
        assert "did you mean pool.max?" in ctl("reload", expected=2)
        assert ctl.json("status")["pool"]["max_bytes"] == 32 << 20


def test_metrics_of_a_daemon(free_port: int, tmp_path: Path) -> None:
    """A daemon serves its numbers on the configured address, and writes them to the file."""
    file = tmp_path / "vswap.prom"
    settings = [f"metrics.listen=127.0.0.1:{free_port}", f"metrics.textfile={file}"]
    with running_daemon("pool.max=16M", *settings) as daemon:
        with vswap.connect(daemon.socket_path) as space:
            space.store(PAGES)
            with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics") as reply:
                text = reply.read().decode()
        assert "vswap_store_pages_total 1100.0" in text
        assert 'vswap_reject_pages_total{reason="pool_full"} 0.0' in text
        silent = {"vswap_write_budget_left_bytes", "vswap_group_pool_max_bytes"}
        silent |= {"vswap_group_device_max_bytes"}
        for family in FAMILIES:
            if "device" not in family.labels and family.name not in silent:
                assert f"\n{family.name}" in text
    assert not file.exists()


def test_taken_metrics_port_is_told_at_the_start(free_port: int, tmp_path: Path) -> None:
    """A daemon that cannot serve its metrics does not start, and says so in one line."""
    with running_daemon(f"metrics.listen=127.0.0.1:{free_port}"):
        command = [sys.executable, "-m", "vswapd", "serve"]
        command += [f"--socket={tmp_path / 's'}", f"--set=metrics.listen=127.0.0.1:{free_port}"]
        result = subprocess.run(
            command,
            env=daemon_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert result.returncode == 78
    assert "metrics.listen: cannot listen at" in result.stderr
    assert "Traceback" not in result.stderr


# What argparse imports late is imported early: the interpreter may lie where only root can read.
_AS_NOBODY = """
import locale, os, sys
import vswapd.ctl.command
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(vswapd.ctl.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can be somebody else")
def test_strangers_may_look_but_not_steer() -> None:
    """Another user reads the status; steering is exit 77, as is a socket that is closed to them."""
    with running_daemon("pool.max=16M", "server.socket_mode=666") as daemon:
        daemon.directory.chmod(0o755)
        for words, expected in (("status --json", 0), ("compact", 77)):
            assert _as_nobody(daemon, words).returncode == expected
        daemon.socket_path.chmod(0o600)
        result = _as_nobody(daemon, "status --json")
        assert result.returncode == 77
        assert result.stderr.count("\n") == 1


def _as_nobody(daemon: RunningDaemon, words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, "--socket", str(daemon.socket_path), *words.split()],
        env=daemon_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
