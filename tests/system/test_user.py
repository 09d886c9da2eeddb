"""The unit for users, under the service managers that systemd gives them on several Debians.

Each test brings the service into the state it needs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.container import Container, missing
from support.installed import PYTHON, UNIT, Journal

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.timeout(900),
    # systemd 252 and 257.
    pytest.mark.releases("bookworm", "trixie"),
]

# In CI a skip is a failure (see tests/conftest.py), so there it must run.
if reason := missing():
    pytest.skip(reason, allow_module_level=True)

NAME = "alice"


@dataclass(frozen=True, slots=True)
class User:
    """An ordinary user, whose service manager runs though nobody is logged in."""

    machine: Container
    uid: int

    @property
    def home(self) -> Path:
        """As this machine sees it."""
        return self.machine.root / "home" / NAME

    def run(
        self, *command: str, check: bool = True, script: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a program of the user's that is not in a session."""
        environment = {"XDG_RUNTIME_DIR": f"/run/user/{self.uid}", "HOME": f"/home/{NAME}"}
        return self.machine.run(
            *command, user=NAME, check=check, environment=environment, script=script
        )

    def start(self) -> None:
        """Have the user's service manager run."""
        self.machine.run("systemctl", "start", f"user@{self.uid}.service")

    def systemctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Ask the user's service manager for something."""
        return self.run("systemctl", "--user", *words, check=check)

    def client(self, script: str) -> str:
        """Run Python that can import vswap; what it prints."""
        return self.run(PYTHON, "-I", "-", script=script).stdout

    def log_in(self, script: str) -> str:
        """The same within a session, which ends with it."""
        command = f"{PYTHON} -I -c '{script}'"
        return self.machine.run("su", "--login", NAME, "--command", command).stdout

    def journal(self) -> Journal:
        """What the user's service manager, and what it runs, says from now on."""
        return Journal(self.machine, f"user@{self.uid}.service")


@pytest.fixture
def user(machine: Container) -> Iterator[User]:
    """A user with the socket enabled, and nothing stored."""
    if machine.run("id", NAME, check=False).returncode:
        machine.run("useradd", "--create-home", NAME)
        # Who logs out has logged out at once.
        settings = machine.root / "etc/systemd/logind.conf.d/at-once.conf"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text("[Login]\nUserStopDelaySec=0\n")
        machine.run("systemctl", "restart", "systemd-logind.service")
        # And may come back at once, as often as a quick machine runs the tests.
        settings = machine.root / "etc/systemd/system/user@.service.d/often.conf"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text("[Unit]\nStartLimitIntervalSec=0\n")
        machine.run("systemctl", "daemon-reload")
    machine.run("loginctl", "enable-linger", NAME)
    found = User(machine, int(machine.run("id", "-u", NAME).stdout))
    found.start()
    found.systemctl("enable", "--now", "vswapd.socket")
    yield found
    found.systemctl("stop", "vswapd.service", "vswapd.socket")


KEEPS = """
import subprocess, vswap
pages = b"".join(bytes([n % 251, n // 251]) * 2048 for n in range(3000))
with vswap.connect() as space:
    slots = space.store(pages)
    for words in COMMANDS:
        subprocess.run(["systemctl", "--user", *words.split()], check=True)
        assert bytes(space.load(slots)) == pages, words
    print("kept", len(slots))
"""


def test_pages_are_kept(user: User) -> None:
    """The user's own service manager keeps the memory of a daemon that is killed or restarted."""
    commands = (
        "kill --signal=SIGKILL vswapd.service",
        "restart vswapd.service",
        "kill --signal=SIGKILL --kill-who=main vswapd.service",
        "kill --signal=SIGTERM --kill-who=main vswapd.service",
        "daemon-reexec",
        "kill --signal=SIGKILL vswapd.service",
        "restart vswapd.service",
    )
    assert user.client(KEEPS.replace("COMMANDS", repr(commands))) == "kept 3000\n"
    assert f"/run/user/{user.uid}/vswapd.sock" in user.systemctl("status", UNIT).stdout
    assert user.run("vswapctl", "reload").stdout == "nothing has changed\n"


def test_a_wrong_configuration_loses_nothing(user: User) -> None:
    """A reload of it fails, a restart goes on with what was good, and both say why."""
    file = user.home / "vswapd.toml"
    drop_in = user.home / ".config/systemd/user/vswapd.service.d/mine.conf"
    command = f"vswapd serve --config /home/{NAME}/vswapd.toml"
    user.run("mkdir", "-p", f"/home/{NAME}/.config/systemd/user/vswapd.service.d")
    try:
        drop_in.write_text(f"[Service]\nExecStart=\nExecStart=/usr/local/bin/{command}\n")
        file.write_text('[pool]\ntiers = ["zstd:1"]\n')
        user.systemctl("daemon-reload")
        user.systemctl("start", UNIT)
        script = KEEPS.replace("COMMANDS", "['restart vswapd.service']")
        file.write_text('[pool]\ntires = ["lz4"]\n')
        assert user.systemctl("reload", UNIT, check=False).returncode != 0
        assert user.client(script) == "kept 3000\n"
        assert "did you mean pool.tiers" in user.systemctl("status", UNIT).stdout
        shown = user.run("vswapctl", "status").stdout
        assert "CONFIGURATION ERROR" in shown.splitlines()[0]
        assert "zstd:1" in shown
        file.write_text('[pool]\ntiers = ["zstd:2"]\n')
        user.systemctl("reload", UNIT)
        assert "zstd:2" in user.run("vswapctl", "status").stdout
    finally:
        drop_in.unlink()
        user.systemctl("daemon-reload")


def test_what_logging_out_does(user: User) -> None:
    """It ends the user's services, and the pages are gone; with lingering they stay."""
    store = 'import vswap; s = vswap.connect(name="mine"); s.store(bytes(8192)); s.close()'
    look = 'import vswap; print(len(vswap.connect(name="mine").slots()))'
    user.log_in(store)
    assert user.log_in(look) == "2\n"
    user.machine.run("loginctl", "disable-linger", NAME)
    # The last session was over before: nothing but lingering has held the manager.
    journal = user.journal()
    user.log_in("")
    journal.await_line(r"Deactivated successfully")
    # Not by a session: who logs in while he is being logged out is not given a manager.
    user.start()
    assert user.client(look) == "0\n"


def test_the_unit_fits_a_users_manager(user: User) -> None:
    """It has no setting that this systemd does not know, and what it forbids is forbidden."""
    units = ("vswapd.service", "vswapd.socket")
    files = [f"/usr/local/lib/systemd/user/{unit}" for unit in units]
    report = user.run("systemd-analyze", "--user", "verify", *files, check=False)
    said = (report.stdout + report.stderr).splitlines()
    assert [line for line in said if "vswapd" in line and "Command 'man " not in line] == []
    user.systemctl("start", UNIT)
    pid = user.systemctl("show", "--value", "-pMainPID", UNIT).stdout.strip()
    shown = user.machine.run("cat", f"/proc/{pid}/status").stdout
    assert "NoNewPrivs:\t1\n" in shown
    assert "Seccomp:\t2\n" in shown
    swapon = user.run("vswapctl", "swapon", f"/home/{NAME}/swap", "--size", "8M")
    assert "8.00 MiB" in swapon.stdout or "7.75 MiB" in swapon.stdout
    user.run("vswapctl", "swapoff", f"/home/{NAME}/swap")
