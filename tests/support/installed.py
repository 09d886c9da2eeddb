"""vswapd as it is installed in a container with a real systemd: what its users and root do there.

Invariants:
- Nothing polls: the journal is followed until it says what is awaited.

This module must not know any one test.
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
from pathlib import Path
from typing import Any

from support.container import Container, raises_limits
from support.sources import REPOSITORY, copy_sources

PYTHON = "/usr/local/lib/vswapd/bin/python"
UNIT = "vswapd.service"
MEMBER = "member"
"""A user of the group vswap."""
STRANGER = "stranger"
"""A user who is not."""
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


def install(container: Container, wheels: Path) -> None:
    """Install vswapd, make a member and a stranger, and enable the socket.

    Args:
        container: booted; nothing in it reaches a network.
        wheels: an empty directory, for what this machine fetches.
    """
    copy_sources(container.root / "src")
    _fetch_wheels(container, wheels)
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


def _allow_locking(container: Container) -> None:
    """Let the service lock memory where nobody may raise a limit, so not even its systemd.

    There the unit's LimitMEMLOCK= has no effect, and only the capability helps.
    """
    drop_in(container, "locking").write_text(
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


def drop_in(machine: Container, name: str) -> Path:
    """Where to write settings that override the unit's; `systemctl daemon-reload` reads them."""
    path = machine.root / f"etc/systemd/system/{UNIT}.d/{name}.conf"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def client(machine: Container, script: str, user: str) -> subprocess.CompletedProcess[str]:
    """Run Python that can import vswap, as a user."""
    return machine.run(PYTHON, "-I", "-", user=user, check=False, script=script)


def ctl(
    machine: Container, *arguments: str, user: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run vswapctl, as root or as a user."""
    return machine.run("vswapctl", *arguments, user=user, check=False)


def status(machine: Container) -> dict[str, Any]:
    """The status document."""
    document: dict[str, Any] = json.loads(machine.run("vswapctl", "status", "--json").stdout)
    return document


def show(machine: Container, name: str) -> str:
    """A property of the unit, as systemd has it."""
    return machine.run("systemctl", "show", "--value", f"-p{name}", UNIT).stdout.strip()


def main_pid(machine: Container) -> int:
    """The daemon's process id inside the container."""
    return int(show(machine, "MainPID"))


def of_process(machine: Container, file: str) -> str:
    """What a file of the daemon's directory in /proc says."""
    return machine.run("cat", f"/proc/{main_pid(machine)}/{file}").stdout


def restarted(machine: Container) -> None:
    """The service has just been started, whatever was before."""
    machine.run("systemctl", "reset-failed", UNIT, "vswapd.socket")
    machine.run("systemctl", "start", "vswapd.socket")
    machine.run("systemctl", "restart", UNIT)


class Journal:
    """What the journal says of a service from the moment on in which this is made."""

    def __init__(self, machine: Container, unit: str = UNIT) -> None:
        self._machine = machine
        self._unit = unit
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
        return [f"--after-cursor={self._cursor}", f"--unit={self._unit}"]
