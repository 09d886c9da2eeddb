"""A container with a real systemd: its tree is made by debootstrap and booted by systemd-nspawn.

Invariants:
- Booted means what its systemd says: READY on nspawn's notification socket. Nothing polls.
- A run gets a copy of the tree (`trees`), which is removed with it.
- One at a time, on one machine: nspawn puts them all into the same control group.
- Leaving the block powers it off and removes the copy and its control groups. Should this process
  be killed, the kernel ends the container.

This module must not know what is tested in the container.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support import trees

BOOT_DEADLINE_S = 120.0
COMMAND_DEADLINE_S = 300.0
"""No command inside takes longer than a minute, installing everything included."""
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "make", "python3", "python3-venv"),
    # Users have a service manager of their own with these.
    *("libpam-systemd", "dbus-user-session"),
)
LOCK = Path("/run/lock/vswapd-system-tests")
COMMANDS = ("systemd-nspawn", "nsenter", "setpriv")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What a machine allows its own systemd and nspawn withholds: locking memory, and raising limits.
_CAPABILITIES = "CAP_IPC_LOCK,CAP_SYS_RESOURCE"


def missing() -> str | None:
    """Why no container can be booted here, or None if one can."""
    if os.geteuid() != 0:
        return "booting a container needs root"
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    return f"not installed: {', '.join(absent)}" if absent else trees.missing()


def raises_limits() -> bool:
    """Whether root may raise limits here; in some virtual machines and containers it may not."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> 24 & 1)  # CAP_SYS_RESOURCE, see capability.h
    return False


@dataclass(slots=True, kw_only=True)
class Container:
    """A booted container. `leader` is its PID 1 as this machine numbers it."""

    root: Path
    leader: int

    def command(self, arguments: Sequence[str], *, user: str | None = None) -> list[str]:
        """The command of this machine that runs `arguments` inside, with a clean environment."""
        into = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"]
        enter = ["nsenter", f"--target={self.leader}", *into, "--", "env", "-i", f"PATH={PATH}"]
        become = [] if user is None else ["runuser", "-u", user, "--"]
        return [*enter, *become, *arguments]

    def run(
        self,
        *arguments: str,
        user: str | None = None,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
        script: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root or as `user`, with `script` as its standard input.

        Raises:
            AssertionError: `check`, and it failed; the text ends with what it wrote.
        """
        variables = [f"{name}={value}" for name, value in (environment or {}).items()]
        command = self.command(["env", *variables, *arguments], user=user)
        if check:
            return _checked(command, script=script)
        return _run(command, script=script)


def _run(command: Sequence[str], script: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        input=script or "",
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_DEADLINE_S,
    )


def _checked(command: Sequence[str], script: str | None = None) -> subprocess.CompletedProcess[str]:
    result = _run(command, script=script)
    assert result.returncode == 0, (
        f"{' '.join(command)} exited with {result.returncode}:\n{result.stdout}{result.stderr}"
    )
    return result


@contextlib.contextmanager
def booted_container(release: str | None = None) -> Iterator[Container]:
    """Boot a fresh copy of the tree of a release, by default this machine's, until the block ends.

    The next one can be booted when it has ended: in one process, too, two wait for each other.
    """
    original = trees.tree(release or trees.this_release(), PACKAGES)
    with (
        LOCK.open("w") as alone,
        tempfile.TemporaryDirectory(dir="/var/tmp", prefix="vswapd-machine-") as name,
        trees.copy(original) as root,
    ):
        fcntl.flock(alone, fcntl.LOCK_EX)
        (root / "etc" / "machine-id").unlink(missing_ok=True)
        notify_path = Path(name) / "notify"
        console_path = Path(name) / "console"
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
            console_path.open("wb") as console,
        ):
            notify.bind(str(notify_path))
            process = subprocess.Popen(
                _nspawn(root),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={"PATH": PATH, "NOTIFY_SOCKET": str(notify_path), **_hierarchy(release)},
            )
            groups: list[Path] = []
            try:
                leader = _await_boot(notify, process, console_path)
                groups = _control_groups(leader)
                yield Container(root=root, leader=leader)
            finally:
                _end(process)
                _remove_control_groups(groups)


def _hierarchy(release: str | None) -> dict[str, str]:
    """What nspawn is told of control groups: later releases boot with version 2 only."""
    other = release not in {None, trees.this_release()}
    return {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"} if other else {}


def _nspawn(root: Path) -> list[str]:
    return [
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *("systemd-nspawn", "--quiet", "--keep-unit", "--register=no", "--boot"),
        *(f"--directory={root}", "--machine=vswapd-test", "--notify-ready=yes"),
        *("--private-network", "--link-journal=no", "--resolv-conf=off", "--timezone=off"),
        *(f"--capability={_CAPABILITIES}", "--rlimit=RLIMIT_MEMLOCK=infinity"),
    ]


def _await_boot(notify: socket.socket, process: subprocess.Popen[bytes], console: Path) -> int:
    """Wait until the container's systemd has reached its default target; returns its PID 1."""
    leader = None
    ended = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(notify, select.POLLIN)
        poll.register(ended, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(BOOT_DEADLINE_S * 1000)}
            if notify.fileno() not in ready:
                what = "nspawn ended" if ended in ready else f"not within {BOOT_DEADLINE_S:.0f} s"
                raise AssertionError(f"no boot, {what}:\n{console.read_text(errors='replace')}")
            for line in notify.recv(65536).decode().splitlines():
                name, _, value = line.partition("=")
                if name == "X_NSPAWN_LEADER_PID":
                    leader = int(value)
                elif line == "READY=1" and leader is not None:
                    return leader
    finally:
        os.close(ended)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Power off, by force if need be. nspawn ends when nothing of the container is left."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _control_groups(leader: int) -> list[Path]:
    """The directories of control groups that nspawn made for the container."""
    found = []
    for line in Path(f"/proc/{leader}/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        parts = Path(group).parts
        if "payload" not in parts:
            continue
        payload = Path(*parts[1 : parts.index("payload") + 1])
        for mount in ("", "unified", controllers.removeprefix("name=")):
            directory = Path("/sys/fs/cgroup", mount, payload)
            if directory.is_dir():
                found.append(directory)
    return found


def _remove_control_groups(groups: Sequence[Path]) -> None:
    for group in groups:
        for directory, _, _ in os.walk(group, topdown=False):
            Path(directory).rmdir()
